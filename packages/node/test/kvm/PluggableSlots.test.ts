/** Regions whose blocks come and go, after their machine: nothing of them reaches memory that is not theirs any more. */
import { assert, describe, it } from "@effect/vitest"
import { PAGE_SIZE } from "@troupe/core/GuestMemory"
import type { PluggableMemory } from "@troupe/core/Hypervisor"
import * as Ffi from "@troupe/node/Ffi"
import { pluggableSlots, type SlotRange } from "@troupe/node/kvm/PluggableSlots"
import { Effect, Layer } from "effect"
import * as fc from "fast-check"

const BLOCKS = 8
const REGION = 0x4000_0000

/** The FFI, which counts what is given back, and slots, which count what they are told. */
const makeWorld = () => {
  const world = { givenBack: 0, slotsSet: 0 }
  const ffi = Layer.effect(
    Ffi.Ffi,
    Effect.map(Ffi.Ffi, ({ functions }) =>
      Ffi.make({
        ...functions,
        madvise: () => {
          world.givenBack++
          return 0
        }
      }))
  ).pipe(Layer.provide(Ffi.layerWith({ quiet: true })))
  const told = Effect.sync(() => {
    world.slotsSet++
  })
  const slots: SlotRange = { set: () => told, drop: () => told }
  return { world, ffi, slots }
}

describe("pluggable slots", () => {
  it.effect("touch nothing once their memory is gone", () =>
    Effect.gen(function*() {
      const range = fc.nat({ max: BLOCKS - 1 }).chain((first) =>
        fc.record({ first: fc.constant(first), length: fc.nat({ max: BLOCKS - first }), plugged: fc.boolean() })
      )
      const change =
        (memory: PluggableMemory) =>
        ({ first, length, plugged }: { readonly first: number; readonly length: number; readonly plugged: boolean }) =>
          Effect.exit(plugged ? memory.plug(first, length) : memory.unplug(first, length))
      const commands = fc.array(range, { maxLength: 6 })
      for (const [before, after] of fc.sample(fc.tuple(commands, commands), 50)) {
        const { ffi, slots, world } = makeWorld()
        yield* Effect.gen(function*() {
          const memory = yield* Effect.scoped(Effect.tap(
            pluggableSlots(() => slots)(REGION, BLOCKS * PAGE_SIZE, PAGE_SIZE),
            (memory) => Effect.forEach(before, change(memory))
          ))
          Object.assign(world, { givenBack: 0, slotsSet: 0 })
          yield* Effect.forEach(after, change(memory))
        }).pipe(Effect.provide(ffi))
        assert.deepStrictEqual(world, { givenBack: 0, slotsSet: 0 })
      }
    }))
})
