/**
 * Small, valid kernel files made in memory: for tests that need something to load, and as a base to spoil for tests of loaders.
 */
import { BOOT_FLAG, BootParamsOffset, HDRS, LOADED_HIGH, PROTOCOL_2_12, XLF_KERNEL_64 } from "../boot/BootParams.ts"
import { ENTRY_64_OFFSET } from "../boot/BzImage.ts"
import {
  ELF_HEADER_SIZE,
  ELF_MAGIC,
  ELFCLASS64,
  ELFDATA2LSB,
  ElfHeaderOffset,
  EM_X86_64,
  ET_EXEC,
  EV_CURRENT,
  PROGRAM_HEADER_SIZE,
  ProgramHeaderOffset,
  PT_LOAD,
  PT_NOTE,
  XEN_ELFNOTE_PHYS32_ENTRY
} from "../boot/Elf.ts"
import { writeUint64 } from "../boot/LittleEndian.ts"

/** A part of a synthetic ELF kernel. */
export interface ElfKernelSegment {
  readonly guestAddress: number
  readonly bytes: Uint8Array
  /** `p_memsz` in bytes; default: the length of `bytes`. */
  readonly size?: number
}

/** A synthetic ELF kernel. */
export interface ElfKernelOptions {
  readonly segments: ReadonlyArray<ElfKernelSegment>
  /** `e_entry`. */
  readonly entry: number
  /** Adds a PVH note with this entry point. */
  readonly pvhEntry?: number
  /** Size of the note's descriptor: Linux has used both. Default 4. */
  readonly pvhEntrySize?: 4 | 8
}

const NOTE_NAME = [0x58, 0x65, 0x6e, 0]

/** An ELF kernel: file header, program headers, the note if there is one, then the segments. */
export const makeElfKernel = (options: ElfKernelOptions): Uint8Array => {
  const descSize = options.pvhEntrySize ?? 4
  const noteSize = options.pvhEntry === undefined ? 0 : 12 + NOTE_NAME.length + descSize
  const headers = options.segments.length + (noteSize > 0 ? 1 : 0)
  const note = ELF_HEADER_SIZE + headers * PROGRAM_HEADER_SIZE
  const size = options.segments.reduce((sum, segment) => sum + segment.bytes.length, note + noteSize)
  const file = new Uint8Array(size)
  const view = new DataView(file.buffer)
  const at = ElfHeaderOffset
  view.setUint32(0, ELF_MAGIC, true)
  view.setUint8(at.EI_CLASS, ELFCLASS64)
  view.setUint8(at.EI_DATA, ELFDATA2LSB)
  view.setUint8(at.EI_VERSION, EV_CURRENT)
  view.setUint16(at.e_type, ET_EXEC, true)
  view.setUint16(at.e_machine, EM_X86_64, true)
  view.setUint32(at.e_version, EV_CURRENT, true)
  writeUint64(view, at.e_entry, options.entry)
  writeUint64(view, at.e_phoff, ELF_HEADER_SIZE)
  view.setUint16(at.e_ehsize, ELF_HEADER_SIZE, true)
  view.setUint16(at.e_phentsize, PROGRAM_HEADER_SIZE, true)
  view.setUint16(at.e_phnum, headers, true)

  const programHeader = (
    index: number,
    type: number,
    offset: number,
    address: number,
    filesz: number,
    memsz: number
  ) => {
    const header = ELF_HEADER_SIZE + index * PROGRAM_HEADER_SIZE
    view.setUint32(header + ProgramHeaderOffset.p_type, type, true)
    writeUint64(view, header + ProgramHeaderOffset.p_offset, offset)
    writeUint64(view, header + ProgramHeaderOffset.p_vaddr, address)
    writeUint64(view, header + ProgramHeaderOffset.p_paddr, address)
    writeUint64(view, header + ProgramHeaderOffset.p_filesz, filesz)
    writeUint64(view, header + ProgramHeaderOffset.p_memsz, memsz)
    writeUint64(view, header + ProgramHeaderOffset.p_align, 4)
  }
  let offset = note + noteSize
  for (const [index, segment] of options.segments.entries()) {
    const { bytes, guestAddress } = segment
    programHeader(index, PT_LOAD, offset, guestAddress, bytes.length, segment.size ?? bytes.length)
    file.set(bytes, offset)
    offset += bytes.length
  }
  if (options.pvhEntry !== undefined) {
    programHeader(headers - 1, PT_NOTE, note, 0, noteSize, noteSize)
    view.setUint32(note, NOTE_NAME.length, true)
    view.setUint32(note + 4, descSize, true)
    view.setUint32(note + 8, XEN_ELFNOTE_PHYS32_ENTRY, true)
    file.set(NOTE_NAME, note + 12)
    view.setUint32(note + 16, options.pvhEntry, true)
  }
  return file
}

/** A synthetic bzImage. */
export interface BzImageOptions {
  /** The protected-mode kernel, a multiple of 16 bytes longer than 512; its 64-bit entry is at offset 0x200. */
  readonly kernel: Uint8Array
  /** `pref_address`; default 16 MiB. */
  readonly prefAddress?: number
  /** `kernel_alignment`; default 2 MiB. */
  readonly kernelAlignment?: number
  /** `init_size`; default twice the kernel. */
  readonly initSize?: number
  /** `cmdline_size`; default 2047. */
  readonly cmdlineSize?: number
  /** `initrd_addr_max`; default 0x7fff_ffff. */
  readonly initrdAddrMax?: number
  /** Default `true`. */
  readonly relocatable?: boolean
}

const SECTOR_SIZE = 512
const SETUP_SECTS = 4
/** End of the setup header of protocol 2.15. */
const SETUP_HEADER_END = 0x26c

/** A bzImage: boot sector and setup header, four sectors of real-mode code that are empty, the kernel. */
export const makeBzImage = (options: BzImageOptions): Uint8Array => {
  const setupSize = (SETUP_SECTS + 1) * SECTOR_SIZE
  const file = new Uint8Array(setupSize + options.kernel.length)
  const view = new DataView(file.buffer)
  const at = BootParamsOffset
  view.setUint8(at.sentinel, 0xff)
  view.setUint8(at.setup_sects, SETUP_SECTS)
  view.setUint32(at.syssize, options.kernel.length / 16, true)
  view.setUint16(at.boot_flag, BOOT_FLAG, true)
  view.setUint8(at.jump, 0xeb)
  view.setUint8(at.jump + 1, SETUP_HEADER_END - (at.jump + 2))
  view.setUint32(at.header, HDRS, true)
  view.setUint16(at.version, PROTOCOL_2_12, true)
  view.setUint8(at.loadflags, LOADED_HIGH)
  view.setUint32(at.code32_start, 0x10_0000, true)
  view.setUint32(at.initrd_addr_max, options.initrdAddrMax ?? 0x7fff_ffff, true)
  view.setUint32(at.kernel_alignment, options.kernelAlignment ?? 0x20_0000, true)
  view.setUint8(at.relocatable_kernel, (options.relocatable ?? true) ? 1 : 0)
  view.setUint16(at.xloadflags, XLF_KERNEL_64, true)
  view.setUint32(at.cmdline_size, options.cmdlineSize ?? 2047, true)
  writeUint64(view, at.pref_address, options.prefAddress ?? 0x100_0000)
  view.setUint32(at.init_size, options.initSize ?? 2 * options.kernel.length, true)
  file.set(options.kernel, setupSize)
  return file
}

/** A bzImage with nothing in it, for machines whose guest is a program of the fake: it loads into 32 MiB and more. */
export const emptyKernel = (): Uint8Array => makeBzImage({ kernel: new Uint8Array(2 * ENTRY_64_OFFSET) })
