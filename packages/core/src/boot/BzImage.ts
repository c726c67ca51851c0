/**
 * The bzImage format: a setup header behind a boot sector, real-mode code that is not used here, and the compressed kernel with
 * its 64-bit entry at offset 0x200 (Linux `Documentation/arch/x86/boot.rst`).
 */
import * as Result from "effect/Result"
import { addressEnd, formatAddress, INVALID_ADDRESS } from "../GuestAddress.ts"
import {
  BOOT_FLAG,
  BootParamsOffset,
  HDRS,
  LOADED_HIGH,
  PROTOCOL_2_12,
  SETUP_HEADER_LIMIT,
  SETUP_HEADER_START,
  XLF_KERNEL_64
} from "./BootParams.ts"
import { type KernelImageError, refuse } from "./KernelImageError.ts"
import { hexUint64, readUint64, viewOf } from "./LittleEndian.ts"
import { type AddressRange, HIGH_MEMORY_ADDRESS } from "./MachineLayout.ts"

const SECTOR_SIZE = 512
/** What `setup_sects` 0 means. */
const SETUP_SECTS_DEFAULT = 4
/** `syssize` counts paragraphs of 16 bytes. */
const PARAGRAPH_SIZE = 16
/** The setup header ends at this offset plus the byte at `jump` + 1: the target of the jump instruction there. */
const JUMP_BASE = BootParamsOffset.jump + 2
/** The opcode of a short jump, the first byte of `jump`. */
const JUMP_SHORT = 0xeb
/** End of the last field that protocol 2.12 has, `handover_offset`. */
const PROTOCOL_2_12_END = BootParamsOffset.handover_offset + 4
/** The 64-bit entry point's distance from the load address. */
export const ENTRY_64_OFFSET = 0x200

/** A bzImage whose header has been checked. The byte arrays are views of the file. */
export interface BzImage {
  /** The setup header, to be copied into `boot_params`. */
  readonly setupHeader: Uint8Array
  /** The protected-mode kernel. */
  readonly kernel: Uint8Array
  readonly relocatable: boolean
  readonly kernelAlignment: number
  readonly prefAddress: number
  /** Memory in bytes that the kernel needs from its start address on before it can look at the memory map. */
  readonly initSize: number
  /** The longest command line, its terminating zero not counted. */
  readonly cmdlineSize: number
  /** The highest address that a byte of the initial RAM disk may have. */
  readonly initrdAddrMax: number
}

/** Whether the file carries the setup header's magic number. */
export const isBzImage = (image: Uint8Array): boolean =>
  image.length >= BootParamsOffset.header + 4 && viewOf(image).getUint32(BootParamsOffset.header, true) === HDRS

/** Reads and checks the header of a bzImage. */
export const parseBzImage = (image: Uint8Array): Result.Result<BzImage, KernelImageError> => {
  const at = BootParamsOffset
  if (image.length < PROTOCOL_2_12_END) {
    return refuse("bzImage", "file size", `must hold the setup header (${PROTOCOL_2_12_END} bytes)`, image.length)
  }
  const view = viewOf(image)
  const bootFlag = view.getUint16(at.boot_flag, true)
  if (bootFlag !== BOOT_FLAG) return refuse("bzImage", "boot_flag", "must be 0xaa55", bootFlag)
  const header = view.getUint32(at.header, true)
  if (header !== HDRS) return refuse("bzImage", "header", "must be 0x53726448 (\"HdrS\")", header)
  const version = view.getUint16(at.version, true)
  if (version < PROTOCOL_2_12) {
    return refuse("bzImage", "version", "must be 2.12 (0x20c) or newer: older kernels have no 64-bit entry", version)
  }
  const loadflags = view.getUint8(at.loadflags)
  if ((loadflags & LOADED_HIGH) === 0) return refuse("bzImage", "loadflags", "must have LOADED_HIGH (bit 0)", loadflags)
  const xloadflags = view.getUint16(at.xloadflags, true)
  if ((xloadflags & XLF_KERNEL_64) === 0) {
    return refuse(
      "bzImage",
      "xloadflags",
      "must have XLF_KERNEL_64 (bit 0): the kernel has to be a 64-bit one",
      xloadflags
    )
  }

  const setupSects = view.getUint8(at.setup_sects)
  const setupSize = ((setupSects === 0 ? SETUP_SECTS_DEFAULT : setupSects) + 1) * SECTOR_SIZE
  if (setupSize > image.length) {
    return refuse(
      "bzImage",
      "setup_sects",
      `must leave the setup code inside the file (${image.length} bytes)`,
      setupSects
    )
  }
  const jump = view.getUint8(at.jump)
  const headerEnd = JUMP_BASE + view.getUint8(at.jump + 1)
  if (jump !== JUMP_SHORT || headerEnd < PROTOCOL_2_12_END) {
    return refuse(
      "bzImage",
      "jump",
      `must be a short jump over the setup header (to ${formatAddress(PROTOCOL_2_12_END)} or behind)`,
      view.getUint16(at.jump, true)
    )
  }
  const syssize = view.getUint32(at.syssize, true)
  const kernelSize = syssize * PARAGRAPH_SIZE
  if (kernelSize <= ENTRY_64_OFFSET) {
    return refuse("bzImage", "syssize", "must reach behind the 64-bit entry at 0x200", syssize)
  }
  if (kernelSize > image.length - setupSize) {
    return refuse(
      "bzImage",
      "syssize",
      `must not exceed the file: ${kernelSize} bytes are announced, ${image.length - setupSize} are there (truncated?)`,
      syssize
    )
  }

  const relocatable = view.getUint8(at.relocatable_kernel) !== 0
  const kernelAlignment = view.getUint32(at.kernel_alignment, true)
  if (relocatable && (kernelAlignment === 0 || (kernelAlignment & (kernelAlignment - 1)) !== 0)) {
    return refuse("bzImage", "kernel_alignment", "must be a power of two", kernelAlignment)
  }
  const prefAddress = readUint64(view, at.pref_address)
  if (prefAddress === INVALID_ADDRESS) {
    return refuse("bzImage", "pref_address", "must be a physical address", hexUint64(view, at.pref_address))
  }
  const initSize = view.getUint32(at.init_size, true)
  if (initSize < kernelSize) {
    return refuse("bzImage", "init_size", `must not be less than the kernel's own ${kernelSize} bytes`, initSize)
  }
  return Result.succeed({
    setupHeader: image.subarray(SETUP_HEADER_START, Math.min(headerEnd, SETUP_HEADER_LIMIT)),
    kernel: image.subarray(setupSize, setupSize + kernelSize),
    relocatable,
    kernelAlignment,
    prefAddress,
    initSize,
    cmdlineSize: view.getUint32(at.cmdline_size, true),
    initrdAddrMax: view.getUint32(at.initrd_addr_max, true)
  })
}

/**
 * The memory that the kernel runs in, `init_size` bytes from its load address on. `lowTop` is the end of the RAM below 4 GiB.
 *
 * A kernel is always loaded at `pref_address`, aligned: one that is loaded lower moves itself there (a relocatable kernel up to
 * the address that it was built for, any other one exactly), and everything else must keep clear of that place.
 */
export const placeBzImage = (image: BzImage, lowTop: number): Result.Result<AddressRange, KernelImageError> => {
  const preferred = image.relocatable ? Math.max(image.prefAddress, HIGH_MEMORY_ADDRESS) : image.prefAddress
  if (preferred < HIGH_MEMORY_ADDRESS) {
    return refuse("bzImage", "pref_address", "of a kernel that is not relocatable must be 1 MiB or above", preferred)
  }
  const unit = image.relocatable ? image.kernelAlignment : 1
  const guestAddress = Math.ceil(preferred / unit) * unit
  const end = addressEnd(guestAddress, image.initSize)
  if (end === INVALID_ADDRESS || end > lowTop) {
    return refuse(
      "bzImage",
      "init_size",
      `must fit from the load address ${
        formatAddress(guestAddress)
      } on into the machine's ${lowTop} bytes of memory below 4 GiB`,
      image.initSize
    )
  }
  return Result.succeed({ guestAddress, size: image.initSize })
}
