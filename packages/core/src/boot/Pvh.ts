/**
 * What a PVH kernel finds through EBX: `hvm_start_info` version 1, its module list and its memory map (Xen
 * `public/arch-x86/hvm/start_info.h`).
 */
import type { E820Entry } from "./E820.ts"
import { writeUint64 } from "./LittleEndian.ts"
import { type AddressRange, PVH_START_INFO_ADDRESS } from "./MachineLayout.ts"

/** `magic`: "xEn3" with the 0x80 bit of the "E" set. */
export const XEN_HVM_START_MAGIC_VALUE = 0x336e_c578
/** The version of the structure: 1 is the first with a memory map. */
export const START_INFO_VERSION = 1

/** Offsets in `hvm_start_info`. */
export const StartInfoOffset = {
  magic: 0,
  version: 4,
  flags: 8,
  nr_modules: 12,
  modlist_paddr: 16,
  cmdline_paddr: 24,
  rsdp_paddr: 32,
  memmap_paddr: 40,
  memmap_entries: 48
} as const

/** Bytes of `hvm_start_info`. */
export const START_INFO_SIZE = 56
/** Bytes of `hvm_modlist_entry`. */
const MODULE_SIZE = 32
/** Bytes of `hvm_memmap_table_entry`. */
const MEMMAP_ENTRY_SIZE = 24

/** What `hvm_start_info` is made of. */
export interface StartInfoInput {
  readonly commandLineAddress: number
  /** The initial RAM disk: the only module. */
  readonly initrd?: AddressRange
  readonly memoryMap: ReadonlyArray<E820Entry>
  readonly rsdpAddress: number
}

/** The structure for {@link PVH_START_INFO_ADDRESS}, with the module list and the memory map behind it. */
export const makeStartInfo = (input: StartInfoInput): Uint8Array => {
  const modules = input.initrd === undefined ? 0 : 1
  const modlist = START_INFO_SIZE
  const memmap = modlist + modules * MODULE_SIZE
  const bytes = new Uint8Array(memmap + input.memoryMap.length * MEMMAP_ENTRY_SIZE)
  const view = new DataView(bytes.buffer)
  const at = StartInfoOffset
  view.setUint32(at.magic, XEN_HVM_START_MAGIC_VALUE, true)
  view.setUint32(at.version, START_INFO_VERSION, true)
  view.setUint32(at.nr_modules, modules, true)
  writeUint64(view, at.modlist_paddr, modules === 0 ? 0 : PVH_START_INFO_ADDRESS + modlist)
  writeUint64(view, at.cmdline_paddr, input.commandLineAddress)
  writeUint64(view, at.rsdp_paddr, input.rsdpAddress)
  writeUint64(view, at.memmap_paddr, PVH_START_INFO_ADDRESS + memmap)
  view.setUint32(at.memmap_entries, input.memoryMap.length, true)
  if (input.initrd !== undefined) {
    writeUint64(view, modlist, input.initrd.guestAddress)
    writeUint64(view, modlist + 8, input.initrd.size)
  }
  for (const [index, entry] of input.memoryMap.entries()) {
    const offset = memmap + index * MEMMAP_ENTRY_SIZE
    writeUint64(view, offset, entry.guestAddress)
    writeUint64(view, offset + 8, entry.size)
    view.setUint32(offset + 16, entry.type, true)
  }
  return bytes
}
