import { assert, describe, it } from "@effect/vitest"
import { resetAfterQuiet, resetPace, restartPolicy } from "@troupe/core/RestartSchedule"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Schedule from "effect/Schedule"
import * as fc from "fast-check"

const QUIET = 1000

/**
 * The delays in milliseconds that a schedule asks for when what it paces fails each time after so long; `undefined` where it ends,
 * which is the last one.
 */
const delays = Effect.fnUntraced(
  function*(schedule: Schedule.Schedule<unknown, unknown>, lives: ReadonlyArray<number>) {
    const step = yield* Schedule.toStep(schedule)
    const asked: Array<number | undefined> = []
    let now = 1_000_000
    for (const life of lives) {
      now += life
      const exit = yield* Effect.exit(step(now, "failed"))
      if (!Exit.isSuccess(exit)) {
        asked.push(undefined)
        break
      }
      const delay = Duration.toMillis(exit.value[1])
      asked.push(delay)
      now += delay
    }
    return asked
  }
)

const lives = fc.array(fc.oneof(fc.nat(3 * QUIET), fc.constantFrom(0, QUIET - 1, QUIET)), {
  minLength: 1,
  maxLength: 40,
  size: "max"
})

describe("resetAfterQuiet", () => {
  it.effect("counts what comes close together, and begins anew after a quiet time", () =>
    Effect.promise(() =>
      fc.assert(fc.asyncProperty(lives, fc.integer({ min: 1, max: 6 }), (lives, times) => {
        const schedule = Schedule.exponential(10).pipe(Schedule.upTo({ times }), resetAfterQuiet(QUIET))
        const expected: Array<number | undefined> = []
        let tries = 0
        for (const [index, life] of lives.entries()) {
          if (index > 0 && life >= QUIET) tries = 0
          expected.push(tries < times ? 10 * 2 ** tries++ : undefined)
          if (expected.at(-1) === undefined) break
        }
        return Effect.runPromise(
          Effect.map(delays(schedule, lives), (asked) => assert.deepStrictEqual(asked, expected))
        )
      }))
    ))

  it.effect("is its schedule's own beginning for each that uses it", () =>
    Effect.gen(function*() {
      const schedule = Schedule.exponential(10).pipe(resetAfterQuiet(QUIET))
      assert.deepStrictEqual(yield* delays(schedule, [0, 0, 0]), [10, 20, 40])
      assert.deepStrictEqual(yield* delays(schedule, [0, 0, 0]), [10, 20, 40])
    }))
})

describe("the usual schedules", () => {
  it.effect("start a device again five times in a row, and for ever when failures are rare", () =>
    Effect.gen(function*() {
      const policy = restartPolicy()
      if (policy._tag !== "restart") return assert.fail("not a restart")
      assert.deepStrictEqual(yield* delays(policy.schedule, [5, 0, 1, 59_999, 7, 0]), [10, 20, 40, 80, 160, undefined])
      const many = restartPolicy({ delay: 300, times: 6 })
      if (many._tag !== "restart") return assert.fail("not a restart")
      assert.deepStrictEqual(yield* delays(many.schedule, Array.from({ length: 7 }, () => 0)), [
        300,
        600,
        1000,
        1000,
        1000,
        1000,
        undefined
      ])
      const rare = Array.from({ length: 100 }, () => 60_000)
      assert.deepStrictEqual(yield* delays(policy.schedule, rare), rare.map(() => 10))
    }))

  it.effect("slow a machine down that does nothing but reset", () =>
    Effect.gen(function*() {
      const asked = yield* delays(resetPace, [...Array.from({ length: 1000 }, () => 5), 10_000, 5])
      assert.deepStrictEqual(asked.slice(0, 9), [10, 20, 40, 80, 160, 320, 640, 1000, 1000])
      assert.deepStrictEqual(asked.slice(998), [1000, 1000, 10, 20])
    }))
})
