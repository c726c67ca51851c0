/**
 * Linux's `boot_params`, the "zero page" that a 64-bit kernel finds through RSI (Linux `Documentation/arch/x86/zero-page.rst`
 * and `boot.rst`).
 */
import type { E820Entry } from "./E820.ts"
import { writeUint64 } from "./LittleEndian.ts"
import type { AddressRange } from "./MachineLayout.ts"

/** Bytes of `boot_params`. */
export const BOOT_PARAMS_SIZE = 0x1000

/** Offsets in `boot_params`. From {@link SETUP_HEADER_START} on they are also offsets in a bzImage file. */
export const BootParamsOffset = {
  acpi_rsdp_addr: 0x070,
  ext_ramdisk_image: 0x0c0,
  ext_ramdisk_size: 0x0c4,
  ext_cmd_line_ptr: 0x0c8,
  e820_entries: 0x1e8,
  sentinel: 0x1ef,
  setup_sects: 0x1f1,
  syssize: 0x1f4,
  vid_mode: 0x1fa,
  boot_flag: 0x1fe,
  jump: 0x200,
  header: 0x202,
  version: 0x206,
  type_of_loader: 0x210,
  loadflags: 0x211,
  code32_start: 0x214,
  ramdisk_image: 0x218,
  ramdisk_size: 0x21c,
  cmd_line_ptr: 0x228,
  initrd_addr_max: 0x22c,
  kernel_alignment: 0x230,
  relocatable_kernel: 0x234,
  min_alignment: 0x235,
  xloadflags: 0x236,
  cmdline_size: 0x238,
  hardware_subarch: 0x23c,
  setup_data: 0x250,
  pref_address: 0x258,
  init_size: 0x260,
  handover_offset: 0x264,
  e820_table: 0x2d0
} as const

/** First byte of the setup header. */
export const SETUP_HEADER_START = BootParamsOffset.setup_sects
/** The setup header may not reach further into `boot_params`: the EDD buffer starts here. */
export const SETUP_HEADER_LIMIT = 0x290

/** `boot_flag` of every bootable image. */
export const BOOT_FLAG = 0xaa55
/** `header`: "HdrS" as a little-endian number. */
export const HDRS = 0x5372_6448
/** Boot protocol 2.12, the first with `xloadflags` and so the first that announces a 64-bit entry. */
export const PROTOCOL_2_12 = 0x020c
/** `loadflags`: the protected-mode code is loaded at 1 MiB or above. */
export const LOADED_HIGH = 0x01
/** `xloadflags`: the kernel has the 64-bit entry point at 0x200. */
export const XLF_KERNEL_64 = 0x01
/** `type_of_loader` of a loader without an assigned number. */
export const LOADER_TYPE_UNDEFINED = 0xff
/** `vid_mode` "normal": the kernel leaves the (absent) display alone. */
export const VIDEO_MODE_NORMAL = 0xffff
/** The most entries that the memory map in `boot_params` has room for. */
export const E820_MAX_ENTRIES = 128

/** Bytes of one `boot_e820_entry`. */
const E820_ENTRY_SIZE = 20

/** What `boot_params` is made of. */
export interface BootParamsInput {
  /** The kernel's own setup header, from {@link SETUP_HEADER_START} on; a kernel in ELF form has none. */
  readonly setupHeader?: Uint8Array
  /** Where the kernel is loaded, below 4 GiB. */
  readonly loadAddress: number
  /** Where the command line is and how long it is, its terminating zero not counted. */
  readonly commandLine: AddressRange
  /** The initial RAM disk, below 4 GiB. */
  readonly initrd?: AddressRange
  readonly e820: ReadonlyArray<E820Entry>
  /** Where the ACPI root pointer is. */
  readonly rsdpAddress: number
}

/** `boot_params` for a kernel. */
export const makeBootParams = (input: BootParamsInput): Uint8Array => {
  const bytes = new Uint8Array(BOOT_PARAMS_SIZE)
  const view = new DataView(bytes.buffer)
  const at = BootParamsOffset
  if (input.setupHeader === undefined) {
    view.setUint16(at.boot_flag, BOOT_FLAG, true)
    view.setUint32(at.header, HDRS, true)
    view.setUint16(at.version, PROTOCOL_2_12, true)
    view.setUint32(at.cmdline_size, input.commandLine.size, true)
  } else {
    bytes.set(input.setupHeader.subarray(0, SETUP_HEADER_LIMIT - SETUP_HEADER_START), SETUP_HEADER_START)
  }
  view.setUint16(at.vid_mode, VIDEO_MODE_NORMAL, true)
  view.setUint8(at.type_of_loader, LOADER_TYPE_UNDEFINED)
  view.setUint8(at.loadflags, view.getUint8(at.loadflags) | LOADED_HIGH)
  view.setUint32(at.code32_start, input.loadAddress, true)
  view.setUint32(at.ramdisk_image, input.initrd?.guestAddress ?? 0, true)
  view.setUint32(at.ramdisk_size, input.initrd?.size ?? 0, true)
  view.setUint32(at.cmd_line_ptr, input.commandLine.guestAddress, true)
  view.setUint32(at.hardware_subarch, 0, true)
  writeUint64(view, at.setup_data, 0)
  writeUint64(view, at.acpi_rsdp_addr, input.rsdpAddress)
  const entries = input.e820.slice(0, E820_MAX_ENTRIES)
  view.setUint8(at.e820_entries, entries.length)
  for (const [index, entry] of entries.entries()) {
    const offset = at.e820_table + index * E820_ENTRY_SIZE
    writeUint64(view, offset, entry.guestAddress)
    writeUint64(view, offset + 8, entry.size)
    view.setUint32(offset + 16, entry.type, true)
  }
  return bytes
}
