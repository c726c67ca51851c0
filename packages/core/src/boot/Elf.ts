/**
 * Kernels in ELF form: 64-bit, x86-64, loaded by physical address, entered at `e_entry` (Linux 64-bit protocol) or where a Xen
 * note says (PVH). System V ABI, chapters 4 and 5; Xen `public/elfnote.h`.
 */
import * as Result from "effect/Result"
import { addressEnd, formatAddress, INVALID_ADDRESS } from "../GuestAddress.ts"
import { type KernelImageError, refuse } from "./KernelImageError.ts"
import { hexUint64, readUint64, viewOf } from "./LittleEndian.ts"
import { type AddressRange, FOUR_GIB, HIGH_MEMORY_ADDRESS } from "./MachineLayout.ts"

/** Offsets in the file header (`Elf64_Ehdr`). */
export const ElfHeaderOffset = {
  EI_CLASS: 4,
  EI_DATA: 5,
  EI_VERSION: 6,
  e_type: 16,
  e_machine: 18,
  e_version: 20,
  e_entry: 24,
  e_phoff: 32,
  e_ehsize: 52,
  e_phentsize: 54,
  e_phnum: 56
} as const
/** Bytes of the file header. */
export const ELF_HEADER_SIZE = 64

/** Offsets in a program header (`Elf64_Phdr`). */
export const ProgramHeaderOffset = {
  p_type: 0,
  p_flags: 4,
  p_offset: 8,
  p_vaddr: 16,
  p_paddr: 24,
  p_filesz: 32,
  p_memsz: 40,
  p_align: 48
} as const
/** Bytes of a program header. */
export const PROGRAM_HEADER_SIZE = 56

/** The first four bytes of every ELF file, as a little-endian number. */
export const ELF_MAGIC = 0x464c_457f
/** `EI_CLASS`: 64-bit objects. */
export const ELFCLASS64 = 2
/** `EI_DATA`: little-endian. */
export const ELFDATA2LSB = 1
/** `EI_VERSION` and `e_version`. */
export const EV_CURRENT = 1
/** `e_type`: executable. */
export const ET_EXEC = 2
/** `e_type`: position-independent executable. It is loaded at its own physical addresses and relocates itself. */
export const ET_DYN = 3
/** `e_machine`: AMD x86-64. */
export const EM_X86_64 = 62
/** `p_type`: a part of the program. */
export const PT_LOAD = 1
/** `p_type`: notes. */
export const PT_NOTE = 4
/** The note type that carries the PVH entry point; its name is "Xen". */
export const XEN_ELFNOTE_PHYS32_ENTRY = 18

/** The most program headers that are looked at; Linux has 5. */
export const MAXIMUM_PROGRAM_HEADERS = 128
/** The most bytes of notes that are looked at. */
export const MAXIMUM_NOTE_BYTES = 0x1_0000

/** `namesz`, `descsz` and `type` of a note. */
const NOTE_HEADER_SIZE = 12
/** "Xen" and its terminating zero, as a little-endian number. */
const XEN_NAME = 0x006e_6558
const XEN_NAME_SIZE = 4

/** A part of the program: `bytes` (a view of the file) at `guestAddress`, zeroes up to `size`. */
export interface ElfSegment extends AddressRange {
  readonly bytes: Uint8Array
}

/** An ELF kernel whose headers have been checked. */
export interface ElfImage {
  /** In ascending order of address; they do not overlap. */
  readonly segments: ReadonlyArray<ElfSegment>
  /** `e_entry`. */
  readonly entry: number
  /** The PVH entry point, when the kernel has a note with one. */
  readonly pvhEntry: number | undefined
}

/** Whether the file starts like an ELF file. */
export const isElf = (image: Uint8Array): boolean => image.length >= 4 && viewOf(image).getUint32(0, true) === ELF_MAGIC

/** Reads and checks the headers of an ELF kernel for a machine with these regions of RAM. */
export const parseElf = (
  image: Uint8Array,
  ram: ReadonlyArray<AddressRange>
): Result.Result<ElfImage, KernelImageError> =>
  Result.gen(function*() {
    const table = yield* parseHeader(image)
    const segments: Array<ElfSegment> = []
    let pvhEntry: number | undefined
    let noteBytes = 0
    for (let index = 0; index < table.count; index++) {
      const header = table.offset + index * PROGRAM_HEADER_SIZE
      const type = table.view.getUint32(header + ProgramHeaderOffset.p_type, true)
      if (type === PT_LOAD) {
        const segment = yield* parseLoad(image, table.view, header, `phdr[${index}]`, ram)
        if (segment.size > 0) segments.push(segment)
      } else if (type === PT_NOTE) {
        const notes = yield* fileRange(image, table.view, header, `phdr[${index}]`)
        noteBytes += notes.length
        if (noteBytes > MAXIMUM_NOTE_BYTES) {
          return yield* refuse(
            "ELF",
            `phdr[${index}].p_filesz`,
            `of all notes together must not exceed ${MAXIMUM_NOTE_BYTES} bytes`,
            noteBytes
          )
        }
        pvhEntry ??= yield* findPvhEntry(notes, readUint64(table.view, header + ProgramHeaderOffset.p_align))
      }
    }
    if (segments.length === 0) return yield* refuse("ELF", "e_phnum", "must include a PT_LOAD segment", table.count)
    segments.sort((a, b) => a.guestAddress - b.guestAddress)
    let end = 0
    for (const segment of segments) {
      if (segment.guestAddress < end) {
        return yield* refuse(
          "ELF",
          "p_paddr",
          `must not overlap the segment that ends at ${formatAddress(end)}`,
          segment.guestAddress
        )
      }
      end = segment.guestAddress + segment.size
    }
    return { segments, entry: table.entry, pvhEntry }
  })

/**
 * Checks that a guest can start at `entry`: inside a segment and, because the boot processor's own view of memory ends there,
 * below 4 GiB.
 */
export const checkEntry = (
  image: ElfImage,
  field: string,
  entry: number
): Result.Result<number, KernelImageError> => {
  const inside = image.segments.some((s) => entry >= s.guestAddress && entry < s.guestAddress + s.size)
  return inside && entry < FOUR_GIB
    ? Result.succeed(entry)
    : refuse("ELF", field, "must be a physical address below 4 GiB inside a PT_LOAD segment", entry)
}

interface ProgramHeaderTable {
  readonly view: DataView
  readonly offset: number
  readonly count: number
  readonly entry: number
}

const parseHeader = (image: Uint8Array): Result.Result<ProgramHeaderTable, KernelImageError> => {
  if (image.length < ELF_HEADER_SIZE) {
    return refuse("ELF", "file size", `must hold the file header (${ELF_HEADER_SIZE} bytes)`, image.length)
  }
  const at = ElfHeaderOffset
  const view = viewOf(image)
  const magic = view.getUint32(0, true)
  if (magic !== ELF_MAGIC) return refuse("ELF", "EI_MAG", "must be 0x464c457f", magic)
  const elfClass = view.getUint8(at.EI_CLASS)
  if (elfClass !== ELFCLASS64) return refuse("ELF", "EI_CLASS", "must be 2 (64-bit)", elfClass)
  const data = view.getUint8(at.EI_DATA)
  if (data !== ELFDATA2LSB) return refuse("ELF", "EI_DATA", "must be 1 (little-endian)", data)
  const identVersion = view.getUint8(at.EI_VERSION)
  if (identVersion !== EV_CURRENT) return refuse("ELF", "EI_VERSION", "must be 1", identVersion)
  const type = view.getUint16(at.e_type, true)
  if (type !== ET_EXEC && type !== ET_DYN) return refuse("ELF", "e_type", "must be 2 (ET_EXEC) or 3 (ET_DYN)", type)
  const machine = view.getUint16(at.e_machine, true)
  if (machine !== EM_X86_64) return refuse("ELF", "e_machine", "must be 62 (x86-64)", machine)
  const version = view.getUint32(at.e_version, true)
  if (version !== EV_CURRENT) return refuse("ELF", "e_version", "must be 1", version)
  const entry = readUint64(view, at.e_entry)
  if (entry === INVALID_ADDRESS) {
    return refuse("ELF", "e_entry", "must be a physical address", hexUint64(view, at.e_entry))
  }
  const entrySize = view.getUint16(at.e_phentsize, true)
  if (entrySize !== PROGRAM_HEADER_SIZE) {
    return refuse("ELF", "e_phentsize", `must be ${PROGRAM_HEADER_SIZE}`, entrySize)
  }
  const count = view.getUint16(at.e_phnum, true)
  if (count === 0 || count > MAXIMUM_PROGRAM_HEADERS) {
    return refuse("ELF", "e_phnum", `must be between 1 and ${MAXIMUM_PROGRAM_HEADERS}`, count)
  }
  const offset = readUint64(view, at.e_phoff)
  const end = addressEnd(offset, count * PROGRAM_HEADER_SIZE)
  if (end === INVALID_ADDRESS || offset < ELF_HEADER_SIZE || end > image.length) {
    return refuse(
      "ELF",
      "e_phoff",
      `must place ${count} program headers inside the file (${image.length} bytes)`,
      hexUint64(view, at.e_phoff)
    )
  }
  return Result.succeed({ view, offset, count, entry })
}

/** The part of the file that a program header names, as a view. */
const fileRange = (
  image: Uint8Array,
  view: DataView,
  header: number,
  name: string
): Result.Result<Uint8Array, KernelImageError> => {
  const at = ProgramHeaderOffset
  const offset = readUint64(view, header + at.p_offset)
  const size = readUint64(view, header + at.p_filesz)
  if (offset === INVALID_ADDRESS || offset > image.length) {
    return refuse(
      "ELF",
      `${name}.p_offset`,
      `must be inside the file (${image.length} bytes)`,
      hexUint64(view, header + at.p_offset)
    )
  }
  const end = addressEnd(offset, size)
  if (end === INVALID_ADDRESS || end > image.length) {
    return refuse(
      "ELF",
      `${name}.p_filesz`,
      `must end inside the file: ${image.length - offset} bytes are there (truncated?)`,
      hexUint64(view, header + at.p_filesz)
    )
  }
  return Result.succeed(image.subarray(offset, end))
}

const parseLoad = (
  image: Uint8Array,
  view: DataView,
  header: number,
  name: string,
  ram: ReadonlyArray<AddressRange>
): Result.Result<ElfSegment, KernelImageError> =>
  Result.gen(function*() {
    const at = ProgramHeaderOffset
    const bytes = yield* fileRange(image, view, header, name)
    const size = readUint64(view, header + at.p_memsz)
    if (size === INVALID_ADDRESS || size < bytes.length) {
      return yield* refuse(
        "ELF",
        `${name}.p_memsz`,
        `must be a size not less than p_filesz (${bytes.length})`,
        hexUint64(view, header + at.p_memsz)
      )
    }
    const guestAddress = readUint64(view, header + at.p_paddr)
    if (size === 0) return { guestAddress, size, bytes }
    const rule = guestAddress === INVALID_ADDRESS
      ? "must be a physical address"
      : guestAddress < HIGH_MEMORY_ADDRESS
      ? "must be 1 MiB or above: what is below belongs to the boot tables"
      : undefined
    if (rule !== undefined) {
      return yield* refuse("ELF", `${name}.p_paddr`, rule, hexUint64(view, header + at.p_paddr))
    }
    const end = addressEnd(guestAddress, size)
    const inside = end !== INVALID_ADDRESS
      && ram.some((r) => guestAddress >= r.guestAddress && end <= r.guestAddress + r.size)
    if (!inside) {
      const regions = ram.map((r) => `${formatAddress(r.guestAddress)} to ${formatAddress(r.guestAddress + r.size)}`)
      return yield* refuse(
        "ELF",
        `${name}.p_paddr`,
        `with p_memsz ${formatAddress(size)} must lie in the machine's memory (${regions.join(", ")})`,
        guestAddress
      )
    }
    return { guestAddress, size, bytes }
  })

/** The PVH entry point in a segment of notes. Each turn advances by at least a note's header, so the size bounds the loop. */
const findPvhEntry = (
  notes: Uint8Array,
  alignment: number
): Result.Result<number | undefined, KernelImageError> => {
  const view = viewOf(notes)
  const unit = alignment === 8 ? 8 : 4
  let offset = 0
  while (offset + NOTE_HEADER_SIZE <= notes.length) {
    const nameSize = view.getUint32(offset, true)
    const descSize = view.getUint32(offset + 4, true)
    const type = view.getUint32(offset + 8, true)
    const name = offset + NOTE_HEADER_SIZE
    // Both sizes are below 2^32, so the sums stay exact however large they are.
    const desc = alignUp(name + nameSize, unit)
    if (desc > notes.length) {
      return refuse("ELF", "n_namesz", "must end inside the notes", nameSize)
    }
    if (desc + descSize > notes.length) {
      return refuse("ELF", "n_descsz", "must end inside the notes", descSize)
    }
    if (
      type === XEN_ELFNOTE_PHYS32_ENTRY && nameSize === XEN_NAME_SIZE && view.getUint32(name, true) === XEN_NAME
    ) {
      if (descSize !== 4 && descSize !== 8) {
        return refuse("ELF", "XEN_ELFNOTE_PHYS32_ENTRY.n_descsz", "must be 4 or 8", descSize)
      }
      if (descSize === 8 && view.getUint32(desc + 4, true) !== 0) {
        return refuse("ELF", "XEN_ELFNOTE_PHYS32_ENTRY", "must be a 32-bit address", hexUint64(view, desc))
      }
      return Result.succeed(view.getUint32(desc, true))
    }
    offset = alignUp(desc + descSize, unit)
  }
  return Result.succeed(undefined)
}

const alignUp = (value: number, unit: number): number => Math.ceil(value / unit) * unit
