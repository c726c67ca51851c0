/** Schedules for what is begun again: they count what comes close together, not what a whole life brings. */
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Schedule from "effect/Schedule"
import type { DevicePolicy } from "./Device.ts"

/**
 * A schedule that begins anew after a quiet time: when its next step comes at least `quiet` after the delay of the last one
 * was over. So it is a bound on what happens in a short time, and what has worked for long has all its tries again.
 */
export const resetAfterQuiet = (quiet: Duration.Input) =>
<Output, Input, Error, Env>(
  schedule: Schedule.Schedule<Output, Input, Error, Env>
): Schedule.Schedule<Output, Input, Error, Env> => {
  const quietMillis = Duration.toMillis(quiet)
  const begin = Schedule.toStep(schedule)
  return Schedule.fromStep(Effect.map(begin, (first) => {
    let step = first
    let resumed = Number.POSITIVE_INFINITY
    return (now: number, input: Input) =>
      Effect.suspend(() => {
        const again = now - resumed >= quietMillis
        return Effect.flatMap(again ? begin : Effect.succeed(step), (current) => {
          step = current
          return Effect.map(current(now, input), (result) => {
            resumed = now + Duration.toMillis(result[1])
            return result
          })
        })
      })
  }))
}

/** How a device is started again. */
export interface RestartOptions {
  /** The first delay; each that follows is twice as long, up to one second. Default: 10 ms. */
  readonly delay?: Duration.Input
  /** How often it is started again before its failure ends the machine. Default: 5. */
  readonly times?: number
  /** After how long a time without failure all of this begins anew. Default: 1 minute. */
  readonly quiet?: Duration.Input
}

const DELAY_MAX = Duration.seconds(1)

/** Delays that double, up to one second. */
const growing = (first: Duration.Input): Schedule.Schedule<unknown> =>
  Schedule.exponential(first).pipe(
    Schedule.modifyDelay(({ duration }) => Effect.succeed(Duration.min(duration, DELAY_MAX)))
  )

/** The policy of a device that is started again a few times in a row, at growing intervals, and then ends the machine. */
export const restartPolicy = (
  { delay = "10 millis", quiet = "1 minute", times = 5 }: RestartOptions = {}
): DevicePolicy => ({
  _tag: "restart",
  schedule: growing(delay).pipe(Schedule.upTo({ times }), resetAfterQuiet(quiet))
})

const RESET_DELAY = "10 millis"
const RESET_QUIET = "10 seconds"

/** The pace of a machine that resets again and again: 10, 20, 40 ms, up to 1 s; from the start when it has run for 10 s. It never ends. */
export const resetPace: Schedule.Schedule<unknown> = growing(RESET_DELAY).pipe(resetAfterQuiet(RESET_QUIET))
