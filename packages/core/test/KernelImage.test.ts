/** Plans for kernels: what a guest finds in memory, and that no input whatever gets past the loaders' rules. */
import { assert, describe, it } from "@effect/vitest"
import { BootParamsOffset } from "@troupe/core/boot/BootParams"
import { E820Type } from "@troupe/core/boot/E820"
import { ELF_HEADER_SIZE, ElfHeaderOffset, PROGRAM_HEADER_SIZE, ProgramHeaderOffset } from "@troupe/core/boot/Elf"
import { type KernelInput, type KernelPlan, loadKernel } from "@troupe/core/boot/KernelImage"
import { KernelImageError } from "@troupe/core/boot/KernelImageError"
import {
  ACPI_TABLES_ADDRESS,
  type AddressRange,
  DEVICE_WINDOW_ADDRESS,
  FOUR_GIB,
  HIGH_MEMORY_ADDRESS,
  LOW_RESERVED_ADDRESS,
  ramRegions
} from "@troupe/core/boot/MachineLayout"
import { emptyKernel, makeBzImage, makeElfKernel } from "@troupe/core/testing/KernelImages"
import * as fc from "fast-check"

const MIB = 0x10_0000
const code = new Uint8Array(4096).fill(0x90)
const bzImage = () => makeBzImage({ kernel: code })
const elf = (pvhEntry?: number) =>
  makeElfKernel({
    segments: [
      { guestAddress: 16 * MIB, bytes: code, size: 8192 },
      { guestAddress: 20 * MIB, bytes: code.subarray(0, 100) }
    ],
    entry: 16 * MIB + 0x10,
    ...(pvhEntry === undefined ? {} : { pvhEntry })
  })

const input = (image: Uint8Array, more: Partial<KernelInput> = {}): KernelInput => ({
  image,
  commandLine: "console=ttyS0",
  memorySize: 64 * MIB,
  ...more
})

const planned = (kernel: KernelInput): KernelPlan => {
  const result = loadKernel(kernel)
  if (result._tag === "Failure") throw new Error(result.failure.message)
  return result.success
}

const refused = (kernel: KernelInput): KernelImageError => {
  const result = loadKernel(kernel)
  if (result._tag === "Success") throw new Error("the kernel was accepted")
  assert.instanceOf(result.failure, KernelImageError)
  return result.failure
}

/** More than all generated tables of a plan can ever take. */
const TABLES_LIMIT = 0x2_0000

const overlaps = (a: AddressRange, b: AddressRange): boolean =>
  a.size > 0 && b.size > 0 && a.guestAddress < b.guestAddress + b.size && b.guestAddress < a.guestAddress + a.size

const view = (bytes: Uint8Array) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
const word64 = (data: DataView, offset: number) => Number(data.getBigUint64(offset, true))

/** The bytes at an address, found as a guest would: in one of the plan's blocks. */
const at = (plan: KernelPlan, address: number): DataView => {
  const block = [...plan.blocks, ...plan.segments].find((b) =>
    address >= b.guestAddress && address < b.guestAddress + b.bytes.length
  )
  if (block === undefined) throw new Error(`nothing is at ${address.toString(16)}`)
  return view(block.bytes.subarray(address - block.guestAddress))
}

const textAt = (plan: KernelPlan, address: number): string => {
  const data = at(plan, address)
  let text = ""
  for (let i = 0; data.getUint8(i) !== 0; i++) text += String.fromCharCode(data.getUint8(i))
  return text
}

/** What must hold of every plan for this input. */
const checkPlan = (kernel: KernelInput, plan: KernelPlan): void => {
  const ram = ramRegions(kernel.memorySize)
  const inside = (range: AddressRange) =>
    ram.some((r) => range.guestAddress >= r.guestAddress && range.guestAddress + range.size <= r.guestAddress + r.size)
  const everything = [...plan.segments, ...plan.blocks]
  for (const block of everything) {
    assert.isTrue(Number.isSafeInteger(block.guestAddress) && Number.isSafeInteger(block.size), block.name)
    assert.isTrue(inside(block), `${block.name} lies in RAM`)
    assert.isAtMost(block.bytes.length, block.size, block.name)
  }
  for (const [i, a] of everything.entries()) {
    for (const b of everything.slice(i + 1)) assert.isFalse(overlaps(a, b), `${a.name} and ${b.name}`)
  }
  for (const block of plan.blocks) assert.isAtMost(block.guestAddress + block.size, LOW_RESERVED_ADDRESS, block.name)
  for (const segment of plan.segments) {
    assert.isAtLeast(segment.guestAddress, HIGH_MEMORY_ADDRESS, segment.name)
    const source = segment.name === "initrd" ? kernel.initrd : kernel.image
    assert.strictEqual(segment.bytes.buffer, source?.buffer, "segments are views of the given files")
  }
  assert.isBelow(plan.blocks.reduce((sum, block) => sum + block.bytes.length, 0), TABLES_LIMIT)
  assert.isTrue(inside(plan.kernel), "the kernel's memory is RAM")
  const { rip } = plan.entry
  assert.isTrue(rip < FOUR_GIB && rip >= plan.kernel.guestAddress && rip < plan.kernel.guestAddress + plan.kernel.size)
  assert.strictEqual(plan.initrd === undefined, kernel.initrd === undefined)
  if (plan.initrd !== undefined) {
    const [segment, ...others] = plan.segments.filter((candidate) => candidate.name === "initrd")
    assert.strictEqual(others.length, 0)
    assert.strictEqual(segment?.guestAddress, plan.initrd.guestAddress)
    assert.strictEqual(segment?.bytes, kernel.initrd)
    assert.isFalse(overlaps(plan.initrd, plan.kernel), "the initial RAM disk keeps clear of the kernel")
    assert.strictEqual(plan.initrd.size, kernel.initrd?.length)
    assert.strictEqual(plan.initrd.guestAddress % 4096, 0)
    assert.isAtMost(plan.initrd.guestAddress + plan.initrd.size, DEVICE_WINDOW_ADDRESS)
  }
  const usable = plan.memoryMap.filter((entry) => entry.type === E820Type.RAM)
  const hole = HIGH_MEMORY_ADDRESS - LOW_RESERVED_ADDRESS
  assert.strictEqual(usable.reduce((sum, entry) => sum + entry.size, 0), kernel.memorySize - hole)
  for (const entry of plan.memoryMap) assert.isTrue(inside(entry))
}

describe("loadKernel", () => {
  it("gives a bzImage its boot_params, page tables and the 64-bit entry state", () => {
    const initrd = new Uint8Array(5000)
    const kernel = input(bzImage(), { initrd, rsdpAddress: 0xe_1230 })
    const plan = planned(kernel)
    checkPlan(kernel, plan)
    const { entry } = plan
    assert.strictEqual(plan.format, "bzImage")
    assert.strictEqual(entry.rip, 16 * MIB + 0x200)
    assert.strictEqual(entry.mode, "long")
    assert.strictEqual(entry.cr0, 0x8000_0011)
    assert.strictEqual(entry.cr4, 0x20)
    assert.strictEqual(entry.efer, 0x500)
    assert.strictEqual(entry.rflags, 2)
    assert.deepInclude(entry.cs, { selector: 0x10, l: 1, db: 0, type: 0xb, base: 0, limit: 0xffff_ffff, present: 1 })
    for (const segment of [entry.ds, entry.es, entry.fs, entry.gs, entry.ss]) {
      assert.deepInclude(segment, { selector: 0x18, type: 3, base: 0, limit: 0xffff_ffff, present: 1 })
    }
    const params = at(plan, entry.rsi)
    assert.strictEqual(params.getUint16(0x1fe, true), 0xaa55)
    assert.strictEqual(params.getUint32(0x202, true), 0x5372_6448)
    assert.strictEqual(params.getUint8(0x1ef), 0, "the sentinel is not copied")
    const header = view(kernel.image)
    for (const field of ["setup_sects", "syssize", "version", "init_size", "pref_address", "xloadflags"] as const) {
      const offset = BootParamsOffset[field]
      assert.notStrictEqual(header.getUint32(offset, true), 0)
      assert.strictEqual(params.getUint32(offset, true), header.getUint32(offset, true), field)
    }
    assert.strictEqual(params.getUint8(0x210), 0xff)
    assert.strictEqual(params.getUint8(0x211) & 1, 1)
    assert.strictEqual(params.getUint32(0x214, true), 16 * MIB)
    assert.strictEqual(textAt(plan, params.getUint32(0x228, true)), "console=ttyS0")
    assert.deepStrictEqual(
      { guestAddress: params.getUint32(0x218, true), size: params.getUint32(0x21c, true) },
      plan.initrd
    )
    assert.strictEqual(word64(params, 0x70), 0xe_1230)
    const map = Array.from({ length: params.getUint8(0x1e8) }, (_, i) => ({
      guestAddress: word64(params, 0x2d0 + 20 * i),
      size: word64(params, 0x2d0 + 20 * i + 8),
      type: params.getUint32(0x2d0 + 20 * i + 16, true)
    }))
    assert.deepStrictEqual(map, [
      { guestAddress: 0, size: 0x9_fc00, type: 1 },
      { guestAddress: 0x9_fc00, size: 0x6_0400, type: 2 },
      { guestAddress: MIB, size: 63 * MIB, type: 1 }
    ])
  })

  it("gives a PVH kernel its start info and the 32-bit entry state", () => {
    const initrd = new Uint8Array(5000)
    const kernel = input(elf(16 * MIB + 0x40), { initrd, memorySize: 5 * 1024 * MIB })
    const plan = planned(kernel)
    checkPlan(kernel, plan)
    const { entry } = plan
    assert.strictEqual(plan.bootProtocol, "pvh")
    assert.strictEqual(entry.rip, 16 * MIB + 0x40)
    assert.strictEqual(entry.mode, "protected")
    assert.strictEqual(entry.cr0, 0x11)
    assert.strictEqual(entry.cr4, 0)
    assert.strictEqual(entry.efer, 0)
    assert.deepInclude(entry.cs, { l: 0, db: 1, type: 0xb, base: 0, limit: 0xffff_ffff })
    assert.deepInclude(entry.tr, { type: 0xb, base: 0, limit: 0x67, s: 0, present: 1 })
    const info = at(plan, entry.rbx)
    assert.strictEqual(info.getUint32(0, true), 0x336e_c578)
    assert.strictEqual(info.getUint32(4, true), 1)
    assert.strictEqual(info.getUint32(12, true), 1)
    assert.strictEqual(textAt(plan, word64(info, 24)), "console=ttyS0")
    assert.strictEqual(word64(info, 32), ACPI_TABLES_ADDRESS)
    const module = at(plan, word64(info, 16))
    assert.deepStrictEqual({ guestAddress: word64(module, 0), size: word64(module, 8) }, plan.initrd)
    const map = at(plan, word64(info, 40))
    const entries = Array.from({ length: info.getUint32(48, true) }, (_, i) => ({
      guestAddress: word64(map, 24 * i),
      size: word64(map, 24 * i + 8),
      type: map.getUint32(24 * i + 16, true)
    }))
    assert.deepStrictEqual(entries, [
      { guestAddress: 0, size: 0x9_fc00, type: 1 },
      { guestAddress: 0x9_fc00, size: 0x6_0400, type: 2 },
      { guestAddress: MIB, size: 0xc000_0000 - MIB, type: 1 },
      { guestAddress: FOUR_GIB, size: 2 * 1024 * MIB, type: 1 }
    ])
  })

  it("enters an ELF kernel without a note at e_entry, and one with a note as it is told", () => {
    const plain = planned(input(elf()))
    assert.deepStrictEqual([plain.bootProtocol, plain.entry.rip], ["linux64", 16 * MIB + 0x10])
    const params = at(plain, plain.entry.rsi)
    assert.strictEqual(params.getUint32(0x202, true), 0x5372_6448)
    assert.strictEqual(params.getUint16(0x1fe, true), 0xaa55)
    const both = elf(16 * MIB + 0x40)
    assert.strictEqual(planned(input(both, { bootProtocol: "linux64" })).entry.rip, 16 * MIB + 0x10)
    assert.strictEqual(planned(input(both, { bootProtocol: "pvh" })).entry.rip, 16 * MIB + 0x40)
    assert.strictEqual(refused(input(elf(), { bootProtocol: "pvh" })).field, "XEN_ELFNOTE_PHYS32_ENTRY")
    assert.strictEqual(refused(input(bzImage(), { bootProtocol: "pvh" })).field, "bootProtocol")
  })

  it("wants the entry inside the kernel", () => {
    const segments = [{ guestAddress: 16 * MIB, bytes: code }]
    for (const entry of [16 * MIB, 16 * MIB + code.length - 1]) {
      assert.strictEqual(planned(input(makeElfKernel({ segments, entry }))).entry.rip, entry)
      assert.strictEqual(planned(input(makeElfKernel({ segments, entry: 0, pvhEntry: entry }))).entry.rip, entry)
    }
    for (const entry of [0, 16 * MIB - 1, 16 * MIB + code.length, 2 ** 40]) {
      assert.strictEqual(refused(input(makeElfKernel({ segments, entry }))).field, "e_entry")
    }
    const pvhEntry = 16 * MIB + code.length
    const image = makeElfKernel({ segments, entry: 16 * MIB, pvhEntry })
    assert.strictEqual(refused(input(image)).field, "XEN_ELFNOTE_PHYS32_ENTRY")
    const high = makeElfKernel({ segments: [{ guestAddress: FOUR_GIB, bytes: code }], entry: FOUR_GIB })
    assert.strictEqual(refused(input(high, { memorySize: FOUR_GIB })).field, "e_entry")
  })

  it("names the first bytes of a file that is no kernel", () => {
    const gzip = refused(input(new Uint8Array([0x1f, 0x8b, 8, 0, 0])))
    assert.strictEqual(
      gzip.message,
      "kernel: magic must be that of a bzImage (\"HdrS\" at 0x202) or of an ELF file, found 1f 8b 08 00"
    )
    assert.strictEqual(refused(input(new Uint8Array(0))).value, "an empty file")
  })

  it("puts the initial RAM disk as high as it may go", () => {
    const initrd = new Uint8Array(5000)
    const top = planned(input(bzImage(), { initrd }))
    assert.strictEqual(top.initrd?.guestAddress, 64 * MIB - 8192)
    const limited = planned(input(makeBzImage({ kernel: code, initrdAddrMax: 0x1ff_ffff }), { initrd }))
    assert.strictEqual(limited.initrd?.guestAddress, 32 * MIB - 8192)
    const below = planned(input(makeBzImage({ kernel: code, initrdAddrMax: 0xff_ffff }), { initrd }))
    assert.strictEqual(below.initrd?.guestAddress, 16 * MIB - 8192)
    const full = makeBzImage({ kernel: code, initSize: 48 * MIB })
    assert.strictEqual(planned(input(full, { initrd })).initrd?.guestAddress, 16 * MIB - 8192, "below the kernel")
  })

  it("takes an initial RAM disk of exactly the room that it says there is", () => {
    const pages = fc.integer({ min: 17 * 256, max: 40 * 256 })
    const length = fc.record({
      initSize: fc.integer({ min: 4096, max: 20 * MIB }),
      memory: pages,
      top: fc.nat(40 * MIB)
    })
    const room = new Uint8Array(40 * MIB)
    fc.assert(fc.property(length, ({ initSize, memory, top }) => {
      const memorySize = memory * 4096
      fc.pre(16 * MIB + initSize <= memorySize)
      const image = makeBzImage({ kernel: code, initSize, initrdAddrMax: top })
      const error = refused(input(image, { memorySize, initrd: room }))
      assert.strictEqual(error.part, "initrd")
      assert.include(error.message, `(${room.length})`)
      const free = Number(/: (\d+) bytes are free/.exec(error.rule)?.[1])
      if (free > 0) {
        const kernel = input(image, { memorySize, initrd: room.subarray(0, free) })
        checkPlan(kernel, planned(kernel))
      }
      assert.strictEqual(refused(input(image, { memorySize, initrd: room.subarray(0, free + 1) })).part, "initrd")
    }))
    assert.strictEqual(refused(input(bzImage(), { initrd: new Uint8Array(0) })).part, "initrd")
  })

  it("checks the command line", () => {
    const long = `${"x".repeat(2046)}\x7f`
    assert.strictEqual(textAt(planned(input(bzImage(), { commandLine: long })), 0x2_0000), long)
    for (const image of [bzImage(), elf()]) {
      assert.strictEqual(refused(input(image, { commandLine: `${long}x` })).field, "length")
      assert.strictEqual(refused(input(image, { commandLine: "a\0b" })).field, "character 1")
      assert.strictEqual(refused(input(image, { commandLine: "ü" })).field, "character 0")
    }
    const huge = makeBzImage({ kernel: code, cmdlineSize: 0xffff_ffff })
    assert.strictEqual(refused(input(huge, { commandLine: "x".repeat(0x1_0000) })).field, "length")
  })

  it("checks the memory size", () => {
    for (const memorySize of [0, -4096, 4096, 64 * MIB + 1, 64.5 * MIB + 0.5, Number.NaN, Infinity, 2 ** 53]) {
      assert.strictEqual(refused(input(bzImage(), { memorySize })).part, "memory")
    }
    assert.strictEqual(refused(input(bzImage(), { memorySize: 16 * MIB })).field, "init_size")
  })

  it("fits the smallest machine and the largest", () => {
    const segments = [{ guestAddress: MIB, bytes: code, size: MIB }]
    const small = input(makeElfKernel({ segments, entry: MIB }), { memorySize: 2 * MIB })
    checkPlan(small, planned(small))
    assert.strictEqual(refused({ ...small, memorySize: 2 * MIB - 4096 }).part, "memory")
    const high = { guestAddress: FOUR_GIB, bytes: code, size: 2 ** 44 - DEVICE_WINDOW_ADDRESS }
    const large = input(makeElfKernel({ segments: [...segments, high], entry: MIB }), { memorySize: 2 ** 44 })
    checkPlan(large, planned(large))
    assert.deepStrictEqual(planned(large).kernel, { guestAddress: MIB, size: MIB }, "what is above 4 GiB is apart")
    assert.strictEqual(refused({ ...large, memorySize: 2 ** 44 + 4096 }).part, "memory")
  })

  it("loads the empty kernel of the test kit into a small machine", () => {
    const kernel = input(emptyKernel(), { memorySize: 32 * MIB })
    checkPlan(kernel, planned(kernel))
  })
})

/** Values that sit on the edges of what fields can hold. */
const edge = fc.constantFrom(
  0,
  1,
  2,
  3,
  4,
  0x10,
  0x7f,
  0x80,
  0xff,
  0x100,
  0x200,
  0xfff,
  0x1000,
  0x7fff,
  0xffff,
  0x9_fc00,
  0xf_ffff,
  0x10_0000,
  0x20_0000,
  0x100_0000,
  0x3ff_f000,
  0x400_0000,
  0x7fff_ffff,
  0x8000_0000,
  0xbfff_ffff,
  0xc000_0000,
  0xffff_fff0,
  0xffff_ffff
)
const value32 = fc.oneof(edge, fc.integer({ min: 0, max: 0xffff_ffff }))

type Mutation = (image: Uint8Array) => Uint8Array

const truncation: fc.Arbitrary<Mutation> = fc.double({ min: 0, max: 1, noNaN: true }).map((part) => (image) =>
  image.subarray(0, Math.floor(image.length * part))
)
const anyByte: fc.Arbitrary<Mutation> = fc.tuple(fc.nat(), fc.nat(255)).map(([offset, byte]) => (image) => {
  if (image.length > 0) image[offset % image.length] = byte
  return image
})
const word = (offsets: ReadonlyArray<number>): fc.Arbitrary<Mutation> =>
  fc.tuple(fc.constantFrom(...offsets), value32, fc.constantFrom(1, 2, 4)).map(([offset, value, width]) => (image) => {
    if (offset + 4 > image.length) return image
    const data = view(image)
    if (width === 1) data.setUint8(offset, value & 0xff)
    else if (width === 2) data.setUint16(offset, value & 0xffff, true)
    else data.setUint32(offset, value, true)
    return image
  })

const elfFields = [
  ...Object.values(ElfHeaderOffset),
  ElfHeaderOffset.e_entry + 4,
  ElfHeaderOffset.e_phoff + 4,
  ...[0, 1, 2].flatMap((index) =>
    Object.values(ProgramHeaderOffset).flatMap((field) => {
      const offset = ELF_HEADER_SIZE + index * PROGRAM_HEADER_SIZE + field
      return [offset, offset + 4]
    })
  ),
  ...[0, 4, 8, 12, 16].map((offset) => ELF_HEADER_SIZE + 3 * PROGRAM_HEADER_SIZE + offset)
]
const bzFields = [...Object.values(BootParamsOffset), BootParamsOffset.pref_address + 4, BootParamsOffset.jump + 1]

const mutated = (make: () => Uint8Array, fields: ReadonlyArray<number>): fc.Arbitrary<Uint8Array> =>
  fc.array(fc.oneof({ weight: 6, arbitrary: word(fields) }, anyByte, { weight: 1, arbitrary: truncation }), {
    minLength: 1,
    maxLength: 4
  }).map((mutations) => mutations.reduce((image, mutate) => mutate(image), make()))

const anyInput = (image: fc.Arbitrary<Uint8Array>): fc.Arbitrary<KernelInput> =>
  fc.record({
    image,
    initrd: fc.oneof(
      fc.constant(undefined),
      fc.constantFrom(1, 4096, 5000, MIB).map((size) => new Uint8Array(size))
    ),
    commandLine: fc.oneof(
      { weight: 6, arbitrary: fc.constant("console=ttyS0") },
      fc.string(),
      fc.string({ unit: "binary" })
    ),
    memorySize: fc.oneof(
      {
        weight: 6,
        arbitrary: fc.constantFrom(2, 16, 17, 32, 64, 1024, 3071, 3072, 3073, 8192).map((mib) => mib * MIB)
      },
      fc.integer({ min: 0, max: 2 ** 26 }).map((pages) => pages * 4096),
      fc.double()
    ),
    rsdpAddress: fc.constantFrom(undefined, ACPI_TABLES_ADDRESS),
    bootProtocol: fc.constantFrom("auto", "linux64", "pvh", undefined)
  })

const neverThrows = (images: fc.Arbitrary<Uint8Array>, runs: number) => () => {
  let plans = 0
  let refusals = 0
  fc.assert(
    fc.property(anyInput(images), (kernel) => {
      const before = process.memoryUsage().arrayBuffers
      const result = loadKernel(kernel)
      const allocated = process.memoryUsage().arrayBuffers - before
      assert.isBelow(allocated, TABLES_LIMIT, "whatever sizes the image announces")
      if (result._tag === "Success") {
        plans++
        checkPlan(kernel, result.success)
      } else {
        refusals++
        assert.instanceOf(result.failure, KernelImageError)
        for (const part of [result.failure.part, result.failure.field, result.failure.rule, result.failure.message]) {
          assert.isAbove(part.length, 0)
        }
      }
    }),
    { numRuns: runs }
  )
  return { plans, refusals }
}

/** Far more than the properties need, in milliseconds: a busy machine must not fail them. */
const FUZZ_TIMEOUT = 60_000

describe("loadKernel with any input", () => {
  it("gives arbitrary bytes a plan or a typed refusal", () => {
    neverThrows(
      fc.oneof(
        fc.uint8Array({ maxLength: 2048 }),
        fc.uint8Array({ maxLength: 2048 }).map((bytes) => new Uint8Array([0x7f, 0x45, 0x4c, 0x46, ...bytes]))
      ),
      1000
    )()
  }, FUZZ_TIMEOUT)

  it("gives a spoiled bzImage a plan or a typed refusal", () => {
    const { plans, refusals } = neverThrows(mutated(bzImage, bzFields), 1500)()
    assert.isAbove(plans, 50, "the property looks at plans as well")
    assert.isAbove(refusals, 50)
  }, FUZZ_TIMEOUT)

  it("gives a spoiled ELF kernel a plan or a typed refusal", () => {
    const { plans, refusals } = neverThrows(mutated(() => elf(16 * MIB + 0x40), elfFields), 1500)()
    assert.isAbove(plans, 50, "the property looks at plans as well")
    assert.isAbove(refusals, 50)
  }, FUZZ_TIMEOUT)
})
