/**
 * What a kernel finds when it starts, read as a kernel reads it: from the structure that RSI (Linux `boot_params`) or EBX (PVH
 * `hvm_start_info`) points to. It knows nothing of the code that wrote them.
 */
import { addressFromHalves } from "../GuestAddress.ts"
import type { GuestMemory } from "../GuestMemory.ts"
import type { GuestCpu } from "./GuestCpu.ts"

/** A range of the memory map. `type` 1 is RAM (ACPI 6.5, table 15.4). */
export interface MemoryMapEntry {
  readonly address: number
  readonly size: number
  readonly type: number
}

/** What the boot protocol told the kernel. */
export interface GuestBoot {
  readonly protocol: "linux64" | "pvh"
  readonly commandLine: string
  readonly memoryMap: ReadonlyArray<MemoryMapEntry>
  /** Physical address of the ACPI root pointer (RSDP). */
  readonly rsdp: number
  /** The initial RAM disk. */
  readonly initrd: { readonly address: number; readonly size: number } | undefined
}

const COMMAND_LINE_LIMIT = 0x1_0000
const MEMORY_MAP_LIMIT = 128

/** Documentation/arch/x86/zero-page.rst */
const BootParams = {
  ACPI_RSDP_ADDR: 0x70,
  EXT_CMD_LINE_PTR: 0xc8,
  E820_ENTRIES: 0x1e8,
  HDR_BOOT_FLAG: 0x1fe,
  HDR_HEADER: 0x202,
  HDR_RAMDISK_IMAGE: 0x218,
  HDR_RAMDISK_SIZE: 0x21c,
  HDR_CMD_LINE_PTR: 0x228,
  E820_TABLE: 0x2d0,
  SIZE: 0x1000
} as const
const E820_ENTRY_SIZE = 20
const HEADER_MAGIC = 0x5372_6448 // "HdrS"

/** xen/include/public/arch-x86/hvm/start_info.h */
const StartInfo = {
  MAGIC: 0,
  VERSION: 4,
  NR_MODULES: 12,
  MODLIST: 16,
  CMDLINE: 24,
  RSDP: 32,
  MEMMAP: 40,
  MEMMAP_ENTRIES: 48,
  SIZE: 56
} as const
const START_MAGIC = 0x336e_c578
const MODULE_SIZE = 32
const MEMMAP_ENTRY_SIZE = 24

/** Reads what the boot vCPU was given. Throws, and so ends the test, when the structures are not as their protocol says. */
export const read = (cpu: GuestCpu): GuestBoot => {
  const state = cpu.state
  if (state === undefined) throw new Error("only the boot vCPU is told how the machine was booted")
  return state.mode === "long" ? readLinux(cpu.memory, state.rsi) : readPvh(cpu.memory, state.rbx)
}

const readLinux = (memory: GuestMemory, address: number): GuestBoot => {
  const view = viewAt(memory, address, BootParams.SIZE, "boot_params")
  expect(view.getUint16(BootParams.HDR_BOOT_FLAG, true), 0xaa55, "boot_params.hdr.boot_flag")
  expect(view.getUint32(BootParams.HDR_HEADER, true), HEADER_MAGIC, "boot_params.hdr.header")
  const entries = Math.min(view.getUint8(BootParams.E820_ENTRIES), MEMORY_MAP_LIMIT)
  const size = view.getUint32(BootParams.HDR_RAMDISK_SIZE, true)
  return {
    protocol: "linux64",
    commandLine: textAt(
      memory,
      addressFromHalves(
        view.getUint32(BootParams.HDR_CMD_LINE_PTR, true),
        view.getUint32(BootParams.EXT_CMD_LINE_PTR, true)
      )
    ),
    memoryMap: Array.from(
      { length: entries },
      (_, i) => readMapEntry(view, BootParams.E820_TABLE + i * E820_ENTRY_SIZE)
    ),
    rsdp: uint64(view, BootParams.ACPI_RSDP_ADDR),
    initrd: size === 0 ? undefined : { address: view.getUint32(BootParams.HDR_RAMDISK_IMAGE, true), size }
  }
}

const readPvh = (memory: GuestMemory, address: number): GuestBoot => {
  const view = viewAt(memory, address, StartInfo.SIZE, "hvm_start_info")
  expect(view.getUint32(StartInfo.MAGIC, true), START_MAGIC, "hvm_start_info.magic")
  const entries = Math.min(view.getUint32(StartInfo.MEMMAP_ENTRIES, true), MEMORY_MAP_LIMIT)
  const map = viewAt(memory, uint64(view, StartInfo.MEMMAP), entries * MEMMAP_ENTRY_SIZE, "the memory map")
  const modules = view.getUint32(StartInfo.NR_MODULES, true)
  const module = modules === 0
    ? undefined
    : viewAt(memory, uint64(view, StartInfo.MODLIST), MODULE_SIZE, "the module list")
  return {
    protocol: "pvh",
    commandLine: textAt(memory, uint64(view, StartInfo.CMDLINE)),
    memoryMap: Array.from({ length: entries }, (_, i) => readMapEntry(map, i * MEMMAP_ENTRY_SIZE)),
    rsdp: uint64(view, StartInfo.RSDP),
    initrd: module === undefined ? undefined : { address: uint64(module, 0), size: uint64(module, 8) }
  }
}

const readMapEntry = (view: DataView, at: number): MemoryMapEntry => ({
  address: uint64(view, at),
  size: uint64(view, at + 8),
  type: view.getUint32(at + 16, true)
})

const textAt = (memory: GuestMemory, address: number): string => {
  let text = ""
  for (let i = 0; i < COMMAND_LINE_LIMIT; i++) {
    const byte = memory.slice(address + i, 1)?.[0]
    if (byte === undefined) throw new Error("the command line leaves memory")
    if (byte === 0) return text
    text += String.fromCharCode(byte)
  }
  throw new Error("the command line does not end")
}

const viewAt = (memory: GuestMemory, address: number, size: number, what: string): DataView => {
  const bytes = memory.slice(address, size)
  if (bytes === undefined) throw new Error(`${what} is not in memory: 0x${address.toString(16)}`)
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
}

const uint64 = (view: DataView, at: number): number =>
  addressFromHalves(view.getUint32(at, true), view.getUint32(at + 4, true))

const expect = (found: number, expected: number, what: string): void => {
  if (found !== expected) throw new Error(`${what} is 0x${found.toString(16)}, not 0x${expected.toString(16)}`)
}
