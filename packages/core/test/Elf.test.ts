/** The ELF loader: every rule of its headers and notes. */
import { assert, describe, it } from "@effect/vitest"
import {
  ELF_HEADER_SIZE,
  ElfHeaderOffset,
  type ElfImage,
  isElf,
  MAXIMUM_NOTE_BYTES,
  parseElf,
  PROGRAM_HEADER_SIZE,
  ProgramHeaderOffset,
  PT_NOTE
} from "@troupe/core/boot/Elf"
import { ramRegions } from "@troupe/core/boot/MachineLayout"
import { makeElfKernel } from "@troupe/core/testing/KernelImages"
import * as fc from "fast-check"

const MIB = 0x10_0000
const ram = ramRegions(64 * MIB)
const code = new Uint8Array(100).fill(0x90)
const data = new Uint8Array(60).fill(1)
const segments = [
  { guestAddress: 2 * MIB, bytes: code },
  { guestAddress: 4 * MIB, bytes: data, size: 1000 }
]
const base = () => makeElfKernel({ segments, entry: 2 * MIB + 16, pvhEntry: 2 * MIB + 32 })
const NOTE = ELF_HEADER_SIZE + 3 * PROGRAM_HEADER_SIZE

const header = (index: number, field: number) => ELF_HEADER_SIZE + index * PROGRAM_HEADER_SIZE + field

const accepted = (image: Uint8Array, regions = ram): ElfImage => {
  const result = parseElf(image, regions)
  if (result._tag === "Failure") throw new Error(result.failure.message)
  return result.success
}

const refusedField = (image: Uint8Array, regions = ram): string => {
  const result = parseElf(image, regions)
  if (result._tag === "Success") throw new Error("the image was accepted")
  assert.strictEqual(result.failure.part, "ELF")
  return result.failure.field
}

const spoiled = (spoil: (view: DataView) => void): Uint8Array => {
  const image = base()
  spoil(new DataView(image.buffer))
  return image
}

/** A note as it is in a file, padded to 4 bytes. */
const note = (name: string, type: number, desc: ReadonlyArray<number>) => {
  const padded = Math.ceil(name.length / 4) * 4
  const bytes = new Uint8Array(12 + padded + Math.ceil(desc.length / 4) * 4)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, name.length, true)
  view.setUint32(4, desc.length, true)
  view.setUint32(8, type, true)
  for (let i = 0; i < name.length; i++) bytes[12 + i] = name.charCodeAt(i)
  bytes.set(desc, 12 + padded)
  return bytes
}

describe("parseElf", () => {
  it("reads segments, entry and the PVH note", () => {
    const image = base()
    assert.isTrue(isElf(image))
    const elf = accepted(image)
    assert.strictEqual(elf.entry, 2 * MIB + 16)
    assert.strictEqual(elf.pvhEntry, 2 * MIB + 32)
    assert.deepStrictEqual(elf.segments.map((s) => [s.guestAddress, s.size]), [[2 * MIB, 100], [4 * MIB, 1000]])
    assert.deepStrictEqual(elf.segments.map((s) => s.bytes), [code, data])
    for (const segment of elf.segments) assert.strictEqual(segment.bytes.buffer, image.buffer)
  })

  it("reads a PVH note of 8 bytes, and finds the note behind others", () => {
    assert.strictEqual(accepted(makeElfKernel({ segments, entry: 0, pvhEntry: 77, pvhEntrySize: 8 })).pvhEntry, 77)
    const notes = [note("GNU\0", 3, [1, 2, 3, 4, 5]), note("Xen\0", 6, [1]), note("Xe", 18, [1, 0, 0, 0])]
    notes.push(note("Xen\0", 18, [0x10, 0x20, 0x30, 0]))
    const bytes = new Uint8Array(notes.reduce((sum, n) => sum + n.length, 0))
    let offset = 0
    for (const n of notes) {
      bytes.set(n, offset)
      offset += n.length
    }
    // A segment that is in the file as PT_LOAD becomes the notes.
    const image = makeElfKernel({ segments: [...segments, { guestAddress: 6 * MIB, bytes }], entry: 0 })
    new DataView(image.buffer).setUint32(header(2, ProgramHeaderOffset.p_type), PT_NOTE, true)
    assert.strictEqual(accepted(image).pvhEntry, 0x30_2010)
  })

  it("takes notes without a descriptor, up to the last byte", () => {
    const image = makeElfKernel({
      segments: [...segments, { guestAddress: 6 * MIB, bytes: note("GNU\0", 1, []) }],
      entry: 0
    })
    new DataView(image.buffer).setUint32(header(2, ProgramHeaderOffset.p_type), PT_NOTE, true)
    assert.isUndefined(accepted(image).pvhEntry)
  })

  it("has no PVH entry without a note", () => {
    assert.isUndefined(accepted(makeElfKernel({ segments, entry: 2 * MIB })).pvhEntry)
  })

  it("takes segments in any order and above 4 GiB, and ignores empty ones", () => {
    const high = { guestAddress: 2 ** 32, bytes: data }
    const empty = { guestAddress: 16, bytes: new Uint8Array(0) }
    const elf = accepted(makeElfKernel({ segments: [high, empty, ...segments], entry: 0 }), ramRegions(2 ** 32))
    assert.deepStrictEqual(elf.segments.map((s) => s.guestAddress), [2 * MIB, 4 * MIB, 2 ** 32])
  })

  const h = ElfHeaderOffset
  const p = ProgramHeaderOffset
  const rules: ReadonlyArray<[field: string, spoil: (view: DataView) => void]> = [
    ["EI_CLASS", (view) => view.setUint8(h.EI_CLASS, 1)],
    ["EI_DATA", (view) => view.setUint8(h.EI_DATA, 2)],
    ["EI_VERSION", (view) => view.setUint8(h.EI_VERSION, 0)],
    ["e_type", (view) => view.setUint16(h.e_type, 1, true)],
    ["e_machine", (view) => view.setUint16(h.e_machine, 183, true)],
    ["e_version", (view) => view.setUint32(h.e_version, 2, true)],
    ["e_entry", (view) => view.setUint32(h.e_entry + 4, 0xffff_ffff, true)],
    ["e_phentsize", (view) => view.setUint16(h.e_phentsize, 32, true)],
    ["e_phnum", (view) => view.setUint16(h.e_phnum, 0, true)],
    ["e_phnum", (view) => view.setUint16(h.e_phnum, 0xffff, true)],
    ["e_phoff", (view) => view.setUint32(h.e_phoff, 0, true)],
    ["e_phoff", (view) => view.setUint32(h.e_phoff, 0xffff_ffff, true)],
    ["e_phoff", (view) => view.setUint32(h.e_phoff + 4, 0xffff_ffff, true)],
    ["e_phoff", (view) => view.setUint16(h.e_phnum, 128, true)],
    ["phdr[0].p_offset", (view) => view.setUint32(header(0, p.p_offset), 0x1000_0000, true)],
    ["phdr[0].p_offset", (view) => view.setUint32(header(0, p.p_offset + 4), 0x8000_0000, true)],
    ["phdr[0].p_filesz", (view) => view.setUint32(header(0, p.p_filesz), 0x1000_0000, true)],
    ["phdr[0].p_filesz", (view) => view.setUint32(header(0, p.p_filesz + 4), 0xffff_ffff, true)],
    ["phdr[0].p_memsz", (view) => view.setUint32(header(0, p.p_memsz), 99, true)],
    ["phdr[0].p_memsz", (view) => view.setUint32(header(0, p.p_memsz + 4), 0xffff_ffff, true)],
    ["phdr[1].p_paddr", (view) => view.setUint32(header(1, p.p_paddr), MIB - 1, true)],
    ["phdr[1].p_paddr", (view) => view.setUint32(header(1, p.p_paddr), 0x9000, true)],
    ["phdr[1].p_paddr", (view) => view.setUint32(header(1, p.p_paddr), 64 * MIB - 999, true)],
    ["phdr[1].p_paddr", (view) => view.setUint32(header(1, p.p_paddr), 0xfee0_0000, true)],
    ["phdr[1].p_paddr", (view) => view.setUint32(header(1, p.p_paddr + 4), 0xffff_ffff, true)],
    ["phdr[1].p_paddr", (view) => view.setUint32(header(1, p.p_memsz + 4), 0x10, true)],
    ["p_paddr", (view) => view.setUint32(header(1, p.p_paddr), 2 * MIB + 99, true)],
    ["phdr[2].p_offset", (view) => view.setUint32(header(2, p.p_offset), 0x1000_0000, true)],
    ["n_namesz", (view) => view.setUint32(NOTE, 0xffff_fff0, true)],
    ["n_descsz", (view) => view.setUint32(NOTE + 4, 0xffff_fff0, true)],
    ["XEN_ELFNOTE_PHYS32_ENTRY.n_descsz", (view) => view.setUint32(NOTE + 4, 2, true)],
    ["e_phnum", (view) => {
      for (const index of [0, 1]) view.setUint32(header(index, p.p_type), 6, true)
    }]
  ]
  for (const [index, [field, spoil]] of rules.entries()) {
    it(`names ${field} when it is wrong (${index})`, () => assert.strictEqual(refusedField(spoiled(spoil)), field))
  }

  it("refuses a PVH entry that has more than 32 bits", () => {
    const image = makeElfKernel({ segments, entry: 0, pvhEntry: 77, pvhEntrySize: 8 })
    image[NOTE + 20] = 1
    assert.strictEqual(refusedField(image), "XEN_ELFNOTE_PHYS32_ENTRY")
  })

  it("looks at a bounded amount of notes only", () => {
    const withNotes = (size: number) => {
      const notes = { guestAddress: 6 * MIB, bytes: new Uint8Array(size) }
      const image = makeElfKernel({ segments: [...segments, notes], entry: 0 })
      new DataView(image.buffer).setUint32(header(2, p.p_type), PT_NOTE, true)
      return image
    }
    assert.isUndefined(accepted(withNotes(MAXIMUM_NOTE_BYTES)).pvhEntry)
    assert.strictEqual(refusedField(withNotes(MAXIMUM_NOTE_BYTES + 1)), "phdr[2].p_filesz")
  })

  it("accepts segments that touch, and refuses any two that overlap", () => {
    const extent = fc.record({ start: fc.integer({ min: 0, max: 40 }), size: fc.integer({ min: 1, max: 20 }) })
    fc.assert(fc.property(fc.array(extent, { minLength: 2, maxLength: 5 }), (extents) => {
      const overlap = extents.some((a, i) =>
        extents.some((b, j) => i < j && a.start < b.start + b.size && b.start < a.start + a.size)
      )
      const image = makeElfKernel({
        entry: 0,
        segments: extents.map(({ size, start }) => ({
          guestAddress: 2 * MIB + start,
          size,
          bytes: new Uint8Array(size >> 1)
        }))
      })
      assert.strictEqual(parseElf(image, ram)._tag, overlap ? "Failure" : "Success")
    }))
  })

  it("refuses every truncation", () => {
    const image = base()
    fc.assert(fc.property(fc.integer({ min: 0, max: image.length - 1 }), (length) => {
      refusedField(image.subarray(0, length))
    }))
  })
})
