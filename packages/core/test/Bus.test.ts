import { Bus, type BusConflict, type BusRange, openBusValue } from "@troupe/core/Bus"
import * as fc from "fast-check"
import { assert, describe, it } from "vitest"

const range = (fields: Partial<BusRange>): BusRange => ({
  space: "pio",
  base: 0,
  size: 1,
  read: "call",
  write: "call",
  doorbells: [],
  device: "device",
  ...fields
})

const anyRange = fc.record({
  space: fc.constantFrom("pio" as const, "mmio" as const),
  base: fc.integer({ min: 0, max: 60 }),
  size: fc.integer({ min: 1, max: 12 })
}).map((fields) => range(fields))

const overlap = (a: BusRange, b: BusRange) =>
  a.space === b.space && a.base < b.base + b.size && b.base < a.base + a.size

const makeBus = (ranges: ReadonlyArray<BusRange>): Bus => {
  const bus = Bus.make(ranges)
  if (!(bus instanceof Bus)) assert.fail(bus.message)
  return bus
}

const conflictOf = (ranges: ReadonlyArray<BusRange>): BusConflict => {
  const conflict = Bus.make(ranges)
  if (conflict instanceof Bus) assert.fail("these ranges should not make a bus")
  return conflict
}

describe("Bus", () => {
  it("is made exactly when no two ranges of a space overlap", () => {
    fc.assert(fc.property(fc.array(anyRange, { maxLength: 8 }), (ranges) => {
      const conflict = ranges.some((a, i) => ranges.some((b, j) => i < j && overlap(a, b)))
      assert.strictEqual(Bus.make(ranges) instanceof Bus, !conflict)
    }))
  })

  it("finds the range that holds all of an access, and no other", () => {
    fc.assert(fc.property(
      fc.array(anyRange, { maxLength: 8 }),
      fc.constantFrom("pio" as const, "mmio" as const),
      fc.integer({ min: 0, max: 80 }),
      fc.constantFrom(1, 2, 4),
      (ranges, space, address, size) => {
        const bus = Bus.make(ranges)
        fc.pre(bus instanceof Bus)
        const expected = ranges.findIndex((r) =>
          r.space === space && address >= r.base && address + size <= r.base + r.size
        )
        assert.strictEqual(bus.find(space, address, size), expected)
      }
    ))
  })

  it("names both devices of a conflict", () => {
    const conflict = conflictOf([
      range({ base: 0x3f8, size: 8, device: "serial0" }),
      range({ base: 0x3ff, size: 8, device: "power" })
    ])
    assert.deepStrictEqual(conflict.devices, ["serial0", "power"])
    assert.include(conflict.message, "serial0 [0x3f8, 0x400) (pio)")
  })

  it("refuses what cannot be: empty ranges, ports beyond the last, pages that are not pages, doorbells outside", () => {
    const wrong = [
      range({ size: 0 }),
      range({ base: 0xffff, size: 2 }),
      range({ base: -1 }),
      range({ space: "mmio", base: 2 ** 52, size: 1 }),
      range({ space: "mmio", base: 0x800, size: 0x1000, read: "register-page" }),
      range({ space: "mmio", base: 0x1000, size: 0x800, read: "register-page" }),
      range({ read: "register-page", size: 0x1000 }),
      range({ size: 4, doorbells: [{ offset: 2, size: 4 }] })
    ]
    for (const one of wrong) assert.strictEqual(conflictOf([one]).kind, "malformed")
  })

  it("tells which memory-mapped range overlaps memory", () => {
    const bus = makeBus([range({ space: "mmio", base: 0x1000, size: 0x1000, device: "rng0" }), range({ base: 0x1800 })])
    assert.strictEqual(bus.overlapping(0x1fff, 1)?.device, "rng0")
    assert.isUndefined(bus.overlapping(0x2000, 0x1000))
  })

  it("reads an open bus as ones of the access's width", () => {
    assert.deepStrictEqual([1, 2, 4].map(openBusValue), [0xff, 0xffff, 0xffff_ffff])
  })

  it("has no two doorbells that one write would ring", () => {
    const bell = fc.record({
      offset: fc.nat(2),
      size: fc.constantFrom<1 | 2>(1, 2),
      value: fc.option(fc.nat(2), { nil: undefined })
    })
    fc.assert(fc.property(fc.array(bell, { maxLength: 4 }), (bells) => {
      const doorbells = bells.map(({ offset, size, value }) => ({
        offset,
        size,
        ...(value === undefined ? {} : { value })
      }))
      const rings = (offset: number, size: number, value: number) =>
        bells.filter((it) => it.offset === offset && it.size === size && (it.value ?? value) === value).length
      const ambiguous = [0, 1, 2].some((offset) =>
        [1, 2].some((size) => [0, 1, 2, 3].some((value) => rings(offset, size, value) > 1))
      )
      assert.strictEqual(Bus.make([range({ size: 8, doorbells })]) instanceof Bus, !ambiguous)
    }))
  })
})
