import { assert, describe, it } from "@effect/vitest"
import { Simulation } from "@troupe/core/testing"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as TestClock from "effect/testing/TestClock"
import * as fc from "fast-check"
import { makeThrottle } from "../src/Throttle.ts"

describe("Throttle", () => {
  it("lets a queue of requests through at the pace of its limit, waking once for each wait", () => {
    fc.assert(
      fc.property(
        fc.record({
          size: fc.integer({ min: 1, max: 100 }),
          refillTimeMillis: fc.integer({ min: 1, max: 100 }),
          requests: fc.array(fc.integer({ min: 0, max: 300 }), { size: "max", maxLength: 50 })
        }),
        fc.integer(),
        Simulation.property(({ refillTimeMillis, requests, size }) =>
          Effect.gen(function*() {
            const throttle = yield* makeThrottle({ bytes: { size, refillTimeMillis, oneTimeBurst: 0 } })
            const queue = [...requests]
            let wakes = 0
            const work = () => {
              wakes++
              while (queue[0] !== undefined && throttle.admit(queue[0])) queue.shift()
            }
            work()
            const fiber = yield* Effect.forkChild(throttle.run(work))
            const started = yield* Clock.currentTimeMillis
            while (queue.length > 0) yield* Effect.sleep(1)
            const elapsed = (yield* Clock.currentTimeMillis) - started
            const total = requests.reduce((sum, request) => sum + request, 0)
            const pace = refillTimeMillis / size
            // The last request may have waited for itself alone; what is saved up beyond a large one is lost to each wait.
            assert.isAtLeast(elapsed, Math.floor((total - size) * pace))
            assert.isAtMost(elapsed, total * pace + 2 * requests.length + 1)
            assert.isAtMost(wakes, requests.length + 1)
            yield* Fiber.interrupt(fiber)
          })
        )
      ),
      { numRuns: 100 }
    )
  })

  it.effect("wakes for the request that can go first, and for none after a reset", () =>
    Effect.gen(function*() {
      const throttle = yield* makeThrottle({ bytes: { size: 1, refillTimeMillis: 1000, oneTimeBurst: 0 } })
      let wakes = 0
      yield* Effect.forkChild(throttle.run(() => wakes++))
      assert.isTrue(throttle.admit(1))
      assert.isFalse(throttle.admit(3600))
      yield* TestClock.adjust("1 second")
      assert.strictEqual(wakes, 0)
      throttle.reset()
      yield* TestClock.adjust("2 hours")
      assert.strictEqual(wakes, 0)
      assert.isTrue(throttle.admit(1))
      assert.isFalse(throttle.admit(3600))
      yield* TestClock.adjust("500 millis")
      assert.isFalse(throttle.admit(1))
      yield* TestClock.adjust("499 millis")
      assert.strictEqual(wakes, 0)
      yield* TestClock.adjust("1 millis")
      assert.strictEqual(wakes, 1)
      assert.isTrue(throttle.admit(1))
    }))

  it.effect("admits everything without a limit", () =>
    Effect.gen(function*() {
      for (const limit of [undefined, {}]) {
        const throttle = yield* makeThrottle(limit)
        assert.isTrue(throttle.admit(Number.MAX_SAFE_INTEGER, 1e9))
      }
    }))
})
