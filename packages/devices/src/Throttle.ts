/**
 * A rate limit at work in a device: it admits requests while there are tokens, and wakes the device when there are again.
 *
 * ```ts
 * // once for each device, so that neither a reset nor a restart fills the buckets
 * const throttle = yield* makeThrottle(config.rateLimit)
 * // in a turn, before a chain is taken from the queue
 * if (!throttle.admit(bytes)) return false // `signal` is called when it is worth trying again
 * // in the behaviour that the device's `start` returns
 * run: throttle.run(() => context.signal(SIGNAL_TOKENS))
 * ```
 */
import type { RateLimit } from "@troupe/core/RateLimit"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import { RateLimiter } from "./TokenBucket.ts"

const NANOS_PER_MILLI = 1_000_000n

/** Admits requests at the pace of a limit. All methods are synchronous. */
export class Throttle {
  readonly #limiter: RateLimiter | undefined
  readonly #now: () => number
  /** When a refused request is to be tried again, or infinity. */
  #due = Number.POSITIVE_INFINITY
  /** Opened when {@link #due} comes sooner than it was. */
  readonly #sooner = Latch.makeUnsafe(false)

  /** `now` is a clock in whole milliseconds that does not go back. Without a limit everything is admitted. */
  constructor(limit: RateLimit | undefined, now: () => number) {
    const limited = limit !== undefined && (limit.bytes !== undefined || limit.operations !== undefined)
    this.#limiter = limited ? new RateLimiter(limit, now()) : undefined
    this.#now = now
  }

  /** Admits a request, and takes its tokens; or refuses it, and has the device woken when there are enough for it. */
  admit(bytes: number, operations = 1): boolean {
    const limiter = this.#limiter
    if (limiter === undefined) return true
    const now = this.#now()
    if (limiter.take(now, bytes, operations)) return true
    const due = now + limiter.readyIn(now, bytes, operations)
    if (due < this.#due) {
      this.#due = due
      this.#sooner.openUnsafe()
    }
    return false
  }

  /** The driver is gone, and its requests with it. What was used stays used. */
  reset(): void {
    this.#due = Number.POSITIVE_INFINITY
    this.#limiter?.forget()
  }

  /** Calls `wake` when the tokens are there that a refused request waits for. Runs beside the device. */
  run(wake: () => void): Effect.Effect<never> {
    if (this.#limiter === undefined) return Effect.never
    const sleep = Effect.suspend(() => {
      this.#sooner.closeUnsafe()
      const wait = this.#due - this.#now()
      return wait === Number.POSITIVE_INFINITY
        ? this.#sooner.await
        : Effect.timeoutOrElse(this.#sooner.await, { duration: wait, orElse: () => Effect.void })
    })
    const look = Effect.sync(() => {
      if (this.#due > this.#now()) return
      this.#due = Number.POSITIVE_INFINITY
      wake()
    })
    return Effect.forever(Effect.andThen(sleep, look))
  }
}

/** The throttle of a limit, or of none, by the clock of the host. */
export const makeThrottle = (limit: RateLimit | undefined): Effect.Effect<Throttle> =>
  Effect.map(
    Clock.Clock,
    (clock) => new Throttle(limit, () => Number(clock.monotonicTimeNanosUnsafe() / NANOS_PER_MILLI))
  )
