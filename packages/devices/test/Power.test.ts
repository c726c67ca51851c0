import { assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import { power } from "../src/Power.ts"
import { DeviceHarness } from "./DeviceHarness.ts"

const started = Effect.gen(function*() {
  const harness = new DeviceHarness(power)
  yield* harness.start
  return harness
})

/** Every byte that, written to the port, ends the machine, and how. */
const endingBytes = (port: number) =>
  Effect.gen(function*() {
    const endings = new Map<number, unknown>()
    for (let value = 0; value < 256; value++) {
      const harness = yield* started
      harness.out8(port, value)
      if (harness.stops.length > 0) endings.set(value, harness.stops[0])
    }
    return endings
  })

describe("Power", () => {
  it.effect("turns off for SLP_EN with the sleep type of S5, whatever the ignored bits are", () =>
    Effect.gen(function*() {
      const endings = yield* endingBytes(0x600)
      // SLP_TYP is bits 2 to 4, SLP_EN is bit 5; bits 0, 1, 6 and 7 are ignored.
      const wanted = Array.from({ length: 256 }, (_, value) => value).filter((value) => (value & 0x3c) === 0x34)
      assert.deepStrictEqual([...endings.keys()], wanted)
      assert.deepStrictEqual(endings.get(0x34), { _tag: "PowerOff" })
    }))

  it.effect("does nothing for the sleep status register", () =>
    Effect.gen(function*() {
      assert.strictEqual((yield* endingBytes(0x601)).size, 0)
    }))

  it.effect("resets for the reset value only", () =>
    Effect.gen(function*() {
      assert.deepStrictEqual([...(yield* endingBytes(0x602))], [[0x06, { _tag: "Reset", by: "acpi" }]])
    }))

  it.effect("resets for keyboard commands that pulse the reset line", () =>
    Effect.gen(function*() {
      const endings = yield* endingBytes(0x64)
      assert.deepStrictEqual([...endings.keys()], [0xf0, 0xf2, 0xf4, 0xf6, 0xf8, 0xfa, 0xfc, 0xfe])
      assert.deepStrictEqual(endings.get(0xfe), { _tag: "Reset", by: "keyboard-controller" })
    }))

  it.effect("takes a panic", () =>
    Effect.gen(function*() {
      const endings = yield* endingBytes(0x505)
      assert.strictEqual(endings.size, 128)
      assert.deepStrictEqual(endings.get(1), { _tag: "GuestPanic" })
    }))

  it.effect("shows a keyboard controller that is always ready, no wake event, and the panic event", () =>
    Effect.gen(function*() {
      const harness = yield* started
      assert.deepStrictEqual([0x600, 0x601, 0x602, 0x64, 0x505].map((port) => harness.in8(port)), [0, 0, 0, 0, 1])
      for (const backing of harness.backings) assert.isTrue(backing.shadow?.every((value) => value >= 0))
    }))

  it.effect("takes a wide write as writes of its bytes", () =>
    Effect.gen(function*() {
      const harness = yield* started
      harness.write(0, 0, 2, 0x0634)
      assert.deepStrictEqual(harness.stops, [{ _tag: "PowerOff" }])
      const other = yield* started
      other.write(0, 1, 2, 0x0634)
      assert.deepStrictEqual(other.stops, [{ _tag: "Reset", by: "acpi" }])
    }))
})
