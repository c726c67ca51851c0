import { assert, describe, it } from "@effect/vitest"
import type { Device, DevicePolicy } from "@troupe/core/Device"
import { CALL_RESERVE, DeviceActor, MAILBOX_CAPACITY } from "@troupe/core/DeviceActor"
import { GuestMemory } from "@troupe/core/GuestMemory"
import { restartPolicy } from "@troupe/core/RestartSchedule"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as Schedule from "effect/Schedule"
import * as TestClock from "effect/testing/TestClock"
import * as fc from "fast-check"

const CRASH = 0xff

const actorOf = (device: Device, policy: DevicePolicy) =>
  new DeviceActor(device, policy, (own) => ({
    ...own,
    name: device.name,
    memory: new GuestMemory([]),
    ranges: [],
    bases: [],
    interrupts: [],
    messages: [],
    stop: () => undefined
  }))

/** A device that breaks when it is told so, and counts its lives. */
const makeActor = (policy: DevicePolicy, end: () => Effect.Effect<void> = () => Effect.void) => {
  const seen = { starts: 0, writes: 0 }
  const device: Device = {
    name: "device0",
    ranges: [{ space: "pio", base: 0x10, size: 1, read: "call", write: "posted" }],
    interrupts: [],
    start: () =>
      Effect.acquireRelease(Effect.sync(() => seen.starts++), () => seen.starts === 1 ? end() : Effect.void).pipe(
        Effect.map(() => ({
          read: () => 0,
          write: (_range: number, _offset: number, _size: number, value: number) => {
            if (value === CRASH) throw new Error("crash")
            seen.writes++
          }
        }))
      )
  }
  return { actor: actorOf(device, policy), seen }
}

const settle = Effect.repeat(Effect.yieldNow, { times: 20 })

const recorded = () => {
  const lines: Array<string> = []
  const logger = Logger.make<unknown, void>(({ message }) => {
    lines.push(String(message))
  })
  return { lines, layer: Logger.layer([logger]) }
}

describe("a device that is started again", () => {
  it.effect("says once how many writes were lost meanwhile, and only then", () =>
    Effect.promise(() =>
      fc.assert(
        fc.asyncProperty(fc.array(fc.nat(20), { minLength: 1, maxLength: 5 }), (losses) => {
          const { layer, lines } = recorded()
          return Effect.runPromise(
            Effect.scoped(Effect.gen(function*() {
              const { actor } = makeActor({ _tag: "restart", schedule: Schedule.spaced("1 hour") })
              yield* actor.start
              yield* Effect.forkScoped(actor.run)
              for (const lost of losses) {
                actor.posted(0, 0, 1, CRASH)
                yield* settle
                const room = MAILBOX_CAPACITY - CALL_RESERVE
                for (let i = 0; i < room + lost; i++) assert.isTrue(actor.posted(0, 0, 1, 0))
                yield* TestClock.adjust("1 hour")
                yield* settle
              }
              const expected = losses.filter((lost) => lost > 0).map((lost) => `device0: ${lost} writes were lost`)
              assert.deepStrictEqual(
                lines.filter((line) => line.includes("lost")).map((line) => line.split(" before")[0]),
                expected
              )
              assert.strictEqual(lines.filter((line) => line === "device0 has failed: crash").length, losses.length)
            })).pipe(Effect.provide(Layer.merge(layer, TestClock.layer())))
          )
        }),
        { numRuns: 20 }
      )
    ))

  it.effect("takes the write that broke it anew, first of all, where that is its registers' way, and answers it then", () =>
    Effect.promise(() =>
      fc.assert(
        fc.asyncProperty(
          fc.array(fc.record({ offset: fc.integer({ min: 0, max: 1 }), breaks: fc.nat(3), call: fc.boolean() }), {
            minLength: 1,
            maxLength: 40,
            size: "max"
          }),
          (writes) =>
            Effect.runPromise(
              Effect.scoped(Effect.gen(function*() {
                const handled: Array<number> = []
                const answered: Array<number> = []
                const left = writes.map(({ breaks }) => breaks)
                const actor = actorOf({
                  name: "device0",
                  ranges: [{
                    space: "pio",
                    base: 0x10,
                    size: 2,
                    read: "call",
                    write: "posted",
                    repeats: (offset) => offset === 1
                  }],
                  interrupts: [],
                  start: () =>
                    Effect.succeed({
                      read: () => 0,
                      write: (_range: number, _offset: number, _size: number, index: number) => {
                        if ((left[index] ?? 0) > 0) {
                          left[index] = (left[index] ?? 0) - 1
                          throw new Error("crash")
                        }
                        handled.push(index)
                      }
                    })
                }, { _tag: "restart", schedule: Schedule.spaced("1 second") })
                yield* actor.start
                yield* Effect.forkScoped(actor.run)
                writes.forEach(({ call, offset }, index) => {
                  if (call) actor.call(0, offset, 1, true, index, { complete: () => answered.push(index) })
                  else actor.posted(0, offset, 1, index)
                })
                for (let i = 0; i < 3 * writes.length; i++) {
                  yield* settle
                  yield* TestClock.adjust("1 second")
                }
                yield* settle
                const all = writes.map((_, index) => index)
                assert.deepStrictEqual(
                  handled,
                  all.filter((index) => writes[index]?.offset === 1 || writes[index]?.breaks === 0)
                )
                assert.deepStrictEqual(answered, all.filter((index) => writes[index]?.call === true))
              })).pipe(Effect.provide(Layer.merge(Logger.layer([]), TestClock.layer())))
            )
        ),
        { numRuns: 30 }
      )
    ))

  it.effect("says so when its end does not end, and only then", () => {
    const { layer, lines } = recorded()
    return Effect.gen(function*() {
      const { actor, seen } = makeActor(restartPolicy(), () => Effect.sleep("1 minute"))
      yield* actor.start
      yield* Effect.forkScoped(actor.run)
      for (const [seconds, told] of [[9, 0], [2, 1], [50, 1]] as const) {
        if (seen.writes === 0) actor.posted(0, 0, 1, CRASH)
        yield* settle
        yield* TestClock.adjust(`${seconds} seconds`)
        yield* settle
        assert.strictEqual(lines.filter((line) => line.startsWith("device0 does not end")).length, told)
        seen.writes++
      }
      assert.strictEqual(seen.starts, 2)
    }).pipe(Effect.scoped, Effect.provide(layer))
  })

  it.effect("escalates in a storm of failures, and never when they are far apart", () =>
    Effect.gen(function*() {
      const storm = makeActor(restartPolicy({ delay: "10 millis", times: 3, quiet: "1 minute" }))
      yield* storm.actor.start
      const stormy = yield* Effect.forkScoped(Effect.flip(storm.actor.run))
      const rare = makeActor(restartPolicy({ delay: "10 millis", times: 3, quiet: "1 minute" }))
      yield* rare.actor.start
      const running = yield* Effect.forkScoped(rare.actor.run)
      for (let i = 0; i < 20; i++) {
        storm.actor.posted(0, 0, 1, CRASH)
        rare.actor.posted(0, 0, 1, CRASH)
        yield* settle
        yield* TestClock.adjust("1 second")
        yield* settle
        for (let second = 0; second < 60; second++) {
          if (stormy.pollUnsafe() === undefined) storm.actor.posted(0, 0, 1, CRASH)
          yield* settle
          yield* TestClock.adjust("1 second")
        }
      }
      assert.strictEqual((yield* Fiber.join(stormy)).starts, 4)
      assert.strictEqual(storm.seen.starts, 4)
      assert.strictEqual(rare.seen.starts, 21)
      assert.isUndefined(running.pollUnsafe())
    }).pipe(Effect.provide(Logger.layer([]))))
})
