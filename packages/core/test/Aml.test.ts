/** AML: the bytes of single terms, and that an independent reader finds the tree that went in. */
import { assert, describe, it } from "@effect/vitest"
import { Aml, type AmlData, type AmlResource, type AmlTerm, encodeAml, Resource } from "@troupe/core/acpi/Aml"
import * as fc from "fast-check"
import { readAml, readResources } from "./AmlReader.ts"

const bytesOf = (...terms: ReadonlyArray<AmlTerm>): Uint8Array => {
  const result = encodeAml(terms)
  if (result._tag === "Failure") throw new Error(result.failure.message)
  return result.success
}
const hex = (...terms: ReadonlyArray<AmlTerm>): string => Buffer.from(bytesOf(...terms)).toString("hex")
const named = (value: AmlData): AmlTerm => Aml.name("A", value)
const nameHex = (value: AmlData): string => hex(named(value)).slice("08415f5f5f".length)
const nameStringHex = (path: string): string => hex(Aml.scope(path, [])).slice(4)
const template = (resource: AmlResource): string => {
  const [term] = readAml(bytesOf(Aml.name("_CRS", Aml.resourceTemplate([resource]))))
  return term?._tag === "Name" && term.value._tag === "Buffer" ? Buffer.from(term.value.bytes).toString("hex") : ""
}
const refusal = (...terms: ReadonlyArray<AmlTerm>): string => {
  const result = encodeAml(terms)
  if (result._tag === "Success") throw new Error("the terms were encoded")
  return result.failure.message
}

describe("encodeAml", () => {
  it("writes integers as short as they can be", () => {
    const cases: ReadonlyArray<[number, string]> = [
      [0, "00"],
      [1, "01"],
      [2, "0a02"],
      [0xff, "0aff"],
      [0x100, "0b0001"],
      [0xffff, "0bffff"],
      [0x1_0000, "0c00000100"],
      [0xffff_ffff, "0cffffffff"],
      [0x1_0000_0000, "0e0000000001000000"],
      [Number.MAX_SAFE_INTEGER, "0effffffffffff1f00"]
    ]
    for (const [value, expected] of cases) assert.strictEqual(nameHex(Aml.integer(value)), expected)
  })

  it("writes strings, EISA identifiers, buffers, packages and references", () => {
    assert.strictEqual(nameHex(Aml.string("LNRO0005")), "0d4c4e524f3030303500")
    assert.strictEqual(nameHex(Aml.eisaId("PNP0501")), "0c41d00501")
    assert.strictEqual(nameHex(Aml.eisaId("PNP0C0F")), "0c41d00c0f")
    assert.strictEqual(nameHex(Aml.buffer(new Uint8Array([1, 2, 3]))), "11060a03010203")
    assert.strictEqual(nameHex(Aml.package([Aml.integer(5), Aml.integer(0)])), "1205020a0500")
    assert.strictEqual(nameHex(Aml.reference("\\_SB.PCI0")), "5c2e5f53425f50434930")
  })

  it("writes names with their prefixes and segment counts", () => {
    assert.strictEqual(nameStringHex("\\"), "5c00")
    assert.strictEqual(nameStringHex("\\_SB"), "5c5f53425f")
    assert.strictEqual(nameStringHex("^^AB"), "5e5e41425f5f")
    assert.strictEqual(nameStringHex("A.B"), "2e415f5f5f425f5f5f")
    assert.strictEqual(nameStringHex("\\A.B.C"), "5c2f03415f5f5f425f5f5f435f5f5f")
  })

  it("writes names of up to 255 segments", () => {
    const path = (count: number) => Array.from({ length: count }, () => "SEG0").join(".")
    assert.deepStrictEqual(readAml(bytesOf(Aml.scope(path(255), []))), [{ _tag: "Scope", path: path(255), terms: [] }])
    assert.include(refusal(Aml.scope(path(256), [])), "255 segments")
  })

  it("writes scopes, devices and methods with their lengths", () => {
    assert.strictEqual(hex(Aml.device("DEV0", [])), "5b820544455630")
    assert.strictEqual(hex(Aml.method("_STA", [Aml.return(Aml.integer(15))])), "14095f53544100a40a0f")
    assert.strictEqual(hex(Aml.method("MTH", [], { argumentCount: 2, serialized: true })), "14064d54485f0a")
  })

  it("writes package lengths of one to four bytes at their limits", () => {
    // A buffer's package covers the length itself, the integer that gives the size, and the bytes.
    for (const size of [0, 1, 55, 58, 59, 60, 61, 62, 255, 256, 4087, 4088, 4089, 4090, 4091, 4092]) {
      const value = Aml.buffer(new Uint8Array(size).fill(size))
      assert.deepStrictEqual(readAml(bytesOf(Aml.name("BUF0", value))), [{ _tag: "Name", path: "BUF0", value }])
    }
    for (const size of [1_048_563, 1_048_566, 1_048_567, 1_048_568, 1_048_569, 1_048_570]) {
      const [term] = readAml(bytesOf(Aml.name("BUF0", Aml.buffer(new Uint8Array(size)))))
      assert.isTrue(term?._tag === "Name" && term.value._tag === "Buffer" && term.value.bytes.length === size)
    }
    assert.strictEqual(hex(Aml.name("A", Aml.buffer(new Uint8Array(60)))).slice(10, 18), "113f0a3c")
    assert.strictEqual(hex(Aml.name("A", Aml.buffer(new Uint8Array(61)))).slice(10, 20), "1141040a3d")
  })

  it("writes resource descriptors as the specification shows them", () => {
    assert.strictEqual(template(Resource.io(0x3f8, 8)), "4701f803f80301087900")
    assert.strictEqual(template(Resource.memory32Fixed(0xd000_0000, 0x1000)), "86090001000000d0001000007900")
    assert.strictEqual(template(Resource.interrupt(5)), "8906000301050000007900")
  })

  it("says which term cannot be encoded", () => {
    for (const path of ["", "a", "TOOLONG", "1A", "A..B", "A.", "^", "A B", "\\^A", "Ä"]) {
      assert.include(refusal(Aml.scope(path, [])), JSON.stringify(path))
    }
    assert.include(refusal(named(Aml.string("ü"))), "ASCII")
    assert.include(refusal(named(Aml.string("a\0"))), "ASCII")
    assert.include(refusal(named(Aml.eisaId("PNP501"))), "EISA")
    for (const value of [-1, 0.5, Number.NaN, Infinity, 2 ** 53]) {
      assert.include(refusal(named(Aml.integer(value))), `found ${value}`)
    }
    assert.include(refusal(named(Aml.package(Array.from({ length: 256 }, () => Aml.integer(0))))), "255")
    assert.include(refusal(Aml.method("A", [], { argumentCount: 8 })), "7 arguments")
    const crs = (resource: AmlResource) =>
      refusal(Aml.device("D", [Aml.name("_CRS", Aml.resourceTemplate([resource]))]))
    assert.include(crs(Resource.memory32Fixed(2 ** 32, 1)), "32-bit memory base")
    assert.include(crs(Resource.memory32Fixed(2 ** 32 - 1, 2)), "4 GiB")
    assert.include(crs(Resource.memoryWindow(2 ** 32 - 1, 2)), "4 GiB")
    assert.include(crs(Resource.memoryWindow(0, 0)), "not empty")
    assert.include(crs(Resource.busNumbers(255, 2)), "255")
    assert.include(crs(Resource.io(0xffff, 2)), "0xffff")
    assert.include(crs(Resource.io(0, 256)), "255")
    assert.include(crs(Resource.interrupt(-1)), "interrupt")
    assert.include(
      crs({ _tag: "Interrupt", gsis: [], trigger: "edge", polarity: "high", sharing: "exclusive" }),
      "1 to 255"
    )
  })

  it("refuses two objects of one name in one scope, however the name is written", () => {
    const device = Aml.device("DEV", [])
    assert.include(refusal(Aml.scope("\\_SB", [device, Aml.device("DEV_", [])])), "different names")
    assert.include(refusal(device, Aml.name("DEV", Aml.integer(0))), "different names")
    bytesOf(Aml.scope("\\_SB", [device]), Aml.scope("\\_SB", []), device)
  })
})

const segment = fc.stringMatching(/^[A-Z_][A-Z0-9_]{0,3}$/)
const path = fc.tuple(fc.constantFrom("", "\\", "^", "^^"), fc.array(segment, { minLength: 1, maxLength: 4 }))
  .map(([prefix, segments]) => prefix + segments.join("."))
const ascii = fc.array(fc.integer({ min: 0x01, max: 0x7f }), { maxLength: 20 }).map((codes) =>
  String.fromCharCode(...codes)
)
const gsi = fc.integer({ min: 0, max: 0xffff_ffff })
const resource: fc.Arbitrary<AmlResource> = fc.oneof(
  fc.record({
    _tag: fc.constant("Memory32Fixed" as const),
    base: fc.integer({ min: 0, max: 0x8000_0000 }),
    size: fc.integer({ min: 0, max: 0x7fff_ffff }),
    writable: fc.boolean()
  }),
  fc.record({
    _tag: fc.constant("MemoryWindow" as const),
    base: fc.integer({ min: 0, max: 0x8000_0000 }),
    size: fc.integer({ min: 1, max: 0x7fff_ffff })
  }),
  fc.record({
    _tag: fc.constant("BusNumbers" as const),
    first: fc.nat(0x7f),
    count: fc.integer({ min: 1, max: 0x80 })
  }),
  fc.record({
    _tag: fc.constant("Io" as const),
    base: fc.integer({ min: 0, max: 0xff00 }),
    size: fc.nat(255),
    alignment: fc.nat(255)
  }),
  fc.record({
    _tag: fc.constant("Interrupt" as const),
    gsis: fc.array(gsi, { minLength: 1, maxLength: 4 }),
    trigger: fc.constantFrom("edge" as const, "level" as const),
    polarity: fc.constantFrom("high" as const, "low" as const),
    sharing: fc.constantFrom("exclusive" as const, "shared" as const)
  })
)
const { data, terms } = fc.letrec<{ data: AmlData; term: AmlTerm; terms: ReadonlyArray<AmlTerm> }>((tie) => ({
  data: fc.oneof(
    { depthSize: "small", withCrossShrink: true },
    fc.record({ _tag: fc.constant("Integer" as const), value: fc.oneof(fc.maxSafeNat(), fc.nat(300)) }),
    fc.record({ _tag: fc.constant("String" as const), value: ascii }),
    fc.record({ _tag: fc.constant("Buffer" as const), bytes: fc.uint8Array({ maxLength: 100 }) }),
    fc.record({ _tag: fc.constant("Reference" as const), path }),
    fc.record({ _tag: fc.constant("Package" as const), elements: fc.array(tie("data"), { maxLength: 4 }) })
  ),
  term: fc.oneof(
    { depthSize: "small", withCrossShrink: true },
    fc.record({ _tag: fc.constant("Return" as const), value: tie("data") }),
    fc.record({ _tag: fc.constant("Name" as const), path, value: tie("data") }),
    fc.record({ _tag: fc.constant("Scope" as const), path, terms: tie("terms") }),
    fc.record({ _tag: fc.constant("Device" as const), path, terms: tie("terms") }),
    fc.record({
      _tag: fc.constant("Method" as const),
      path,
      argumentCount: fc.nat(7),
      serialized: fc.boolean(),
      terms: tie("terms")
    })
  ),
  terms: fc.uniqueArray(tie("term"), {
    maxLength: 5,
    selector: (term) => "path" in term ? padded(term.path) : term
  })
}))

const padded = (name: string): string => name.replaceAll(/[A-Z_][A-Z0-9_]*/g, (part) => part.padEnd(4, "_"))

/** The tree with names as they are encoded. */
const normalData = (value: AmlData): AmlData => {
  if (value._tag === "Reference") return { ...value, path: padded(value.path) }
  return value._tag === "Package" ? { ...value, elements: value.elements.map(normalData) } : value
}
const normal = (term: AmlTerm): AmlTerm => {
  if (term._tag === "Return") return { ...term, value: normalData(term.value) }
  if (term._tag === "Name") return { ...term, path: padded(term.path), value: normalData(term.value) }
  return { ...term, path: padded(term.path), terms: term.terms.map(normal) }
}

describe("the reader finds", () => {
  it("any tree that was encoded", () => {
    fc.assert(
      fc.property(terms, (tree) => {
        assert.deepStrictEqual(readAml(bytesOf(...tree)), tree.map(normal))
      }),
      { numRuns: 500 }
    )
  })

  it("any value that was encoded", () => {
    fc.assert(fc.property(data, (value) => {
      assert.deepStrictEqual(readAml(bytesOf(Aml.name("X", value))), [normal(Aml.name("X", value))])
    }))
  })

  it("any resource template that was encoded", () => {
    fc.assert(fc.property(fc.array(resource, { maxLength: 5 }), (resources) => {
      const [term] = readAml(bytesOf(Aml.name("_CRS", Aml.resourceTemplate(resources))))
      if (term?._tag !== "Name" || term.value._tag !== "Buffer") throw new Error("no template")
      assert.deepStrictEqual(readResources(term.value.bytes), resources)
    }))
  })
})
