/** The threads' table finds what the bus finds, and serves each range as the bus declares. */
import { assert, describe, it } from "@effect/vitest"
import { Bus, type BusRange, SHADOW_INVALID } from "@troupe/core/Bus"
import { AccessTable, buildAccessTable } from "@troupe/node/kvm/thread/AccessTable"
import * as fc from "fast-check"

/** Ranges that do not overlap, in any order: gaps and sizes one after the other. */
const ranges = fc.array(
  fc.record({
    space: fc.constantFrom("pio" as const, "mmio" as const),
    gap: fc.nat({ max: 5 }),
    size: fc.integer({ min: 1, max: 9 }),
    read: fc.constantFrom("shadowed" as const, "call" as const),
    write: fc.constantFrom("posted" as const, "call" as const)
  }),
  { maxLength: 12 }
).map((parts) => {
  const next = { pio: 0x10, mmio: 2 ** 40 }
  return parts.map(({ gap, size, ...rest }): BusRange => {
    const base = next[rest.space] + gap
    next[rest.space] = base + size
    return { ...rest, base, size, doorbells: [], device: `device at ${base}` }
  })
}).chain((list) => fc.shuffledSubarray(list, { minLength: list.length, maxLength: list.length }))

describe("AccessTable", () => {
  it("finds the range that the bus finds, for every address and size", () => {
    fc.assert(fc.property(ranges, (list) => {
      const bus = Bus.make(list)
      if (!(bus instanceof Bus)) return assert.fail(bus.message)
      const table = new AccessTable(buildAccessTable(bus), list.length)
      for (const size of [1, 2, 4, 8]) {
        for (let i = 0; i < 120; i++) {
          for (
            const [space, row] of [["pio", table.findPort(i, size)], [
              "mmio",
              table.findAddress(2 ** 40 + i, size)
            ]] as const
          ) {
            const expected = bus.find(space, space === "pio" ? i : 2 ** 40 + i, size)
            assert.strictEqual(row < 0 ? -1 : table.range(row), expected)
            const range = list[expected]
            if (range === undefined) continue
            assert.strictEqual(table.base(row), range.base)
            assert.strictEqual(table.isPosted(row), range.write === "posted")
          }
        }
      }
    }))
  })

  it("answers from the shadow entries of the right range, lowest byte first, or not at all", () => {
    fc.assert(
      fc.property(
        ranges,
        fc.array(fc.integer({ min: -1, max: 255 }), { minLength: 9, maxLength: 9 }),
        (list, entries) => {
          const bus = Bus.make(list)
          if (!(bus instanceof Bus)) return assert.fail(bus.message)
          const table = new AccessTable(buildAccessTable(bus), list.length)
          list.forEach((range, index) => {
            const row = range.space === "pio" ? table.findPort(range.base, 1) : table.findAddress(range.base, 1)
            if (range.read !== "shadowed") return assert.strictEqual(table.shadow(row, 0, 1), -1)
            const shadow = table.shadowOf(index, range.size)
            assert.strictEqual(shadow.length, range.size)
            assert.isTrue(shadow.every((entry) => entry === SHADOW_INVALID))
            shadow.set(entries.slice(0, range.size))
            for (const size of [1, 2, 4]) {
              for (let offset = 0; offset + size <= range.size; offset++) {
                const bytes = entries.slice(offset, offset + size)
                const expected = bytes.includes(SHADOW_INVALID)
                  ? -1
                  : bytes.reduce((sum, byte, i) => sum + byte * 2 ** (8 * i), 0)
                assert.strictEqual(table.shadow(row, offset, size), expected)
              }
            }
            shadow.fill(SHADOW_INVALID)
          })
        }
      )
    )
  })
})
