/** Posted writes wake a device's fiber once for many of them, and never at the cost of order or room. */
import { assert, it } from "@effect/vitest"
import { DeviceActor, MAILBOX_CAPACITY } from "@troupe/core/DeviceActor"
import { GuestMemory } from "@troupe/core/GuestMemory"
import * as Effect from "effect/Effect"

const settle = Effect.repeat(Effect.yieldNow, { times: 20 })

const makeActor = (seen: Array<number>) =>
  new DeviceActor(
    {
      name: "device0",
      ranges: [{ space: "pio", base: 0x10, size: 4, read: "call", write: "posted" }],
      interrupts: [],
      start: () =>
        Effect.succeed({
          read: () => seen.length,
          write: (_range, _offset, _size, value) => {
            seen.push(value)
          }
        })
    },
    { _tag: "escalate" },
    (own) => ({
      name: "device0",
      memory: new GuestMemory([]),
      ranges: [],
      interrupts: [],
      messages: [],
      bases: [],
      ...own,
      stop: () => undefined
    })
  )

const started = Effect.gen(function*() {
  const seen: Array<number> = []
  const actor = makeActor(seen)
  yield* actor.start
  yield* Effect.forkScoped(actor.run)
  yield* settle
  return { actor, seen }
})

it.effect("posted writes of one burst are handled together, once the fiber is scheduled", () =>
  Effect.gen(function*() {
    const { actor, seen } = yield* started
    for (let value = 0; value < 100; value++) assert.isTrue(actor.posted(0, 0, 1, value))
    assert.deepStrictEqual(seen, [])
    yield* settle
    assert.deepStrictEqual(seen, Array.from({ length: 100 }, (_, value) => value))
  }))

it.effect("a call is answered at once, after what was posted before it", () =>
  Effect.gen(function*() {
    const { actor, seen } = yield* started
    let answer = -1
    for (let value = 0; value < 10; value++) actor.posted(0, 0, 1, value)
    actor.call(0, 0, 1, false, 0, {
      complete: (value) => {
        answer = value
      }
    })
    assert.strictEqual(answer, 10)
    yield* settle
    assert.strictEqual(seen.length, 10)
  }))

it.effect("a device that keeps up refuses no burst, however long", () =>
  Effect.gen(function*() {
    const { actor, seen } = yield* started
    for (let value = 0; value < 3 * MAILBOX_CAPACITY; value++) assert.isTrue(actor.posted(0, 0, 1, value))
    yield* settle
    assert.deepStrictEqual(seen, Array.from({ length: 3 * MAILBOX_CAPACITY }, (_, value) => value))
  }))
