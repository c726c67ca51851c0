/** The clock of a simulation: time stands still while anything can run, and then jumps to the next timer. */
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import type * as TestClock from "effect/testing/TestClock"

interface Timer {
  readonly time: number
  /** Timers of one time fire in the order in which they were made. */
  readonly order: number
  readonly fire: () => void
  cancelled: boolean
}

const NANOS_PER_MILLI = 1_000_000

/** A clock that a simulation moves. It starts at 0 and is a `TestClock` too: to adjust it is to sleep. */
export class SimulationClock implements TestClock.TestClock {
  /** A binary heap, the earliest timer first. */
  readonly #timers: Array<Timer> = []
  #now = 0
  #order = 0
  #live = 0

  currentTimeMillisUnsafe(): number {
    return this.#now
  }

  currentTimeNanosUnsafe(): bigint {
    return BigInt(Math.round(this.#now * NANOS_PER_MILLI))
  }

  monotonicTimeNanosUnsafe(): bigint {
    return this.currentTimeNanosUnsafe()
  }

  readonly currentTimeMillis = Effect.sync(() => this.#now)
  readonly currentTimeNanos = Effect.sync(() => this.currentTimeNanosUnsafe())
  readonly monotonicTimeNanos = this.currentTimeNanos

  sleep(duration: Duration.Duration): Effect.Effect<void> {
    const millis = Duration.toMillis(duration)
    if (millis <= 0) return Effect.yieldNow
    return Effect.callback<void>((resume) => {
      const timer = this.#add(this.#now + millis, () => resume(Effect.void))
      return Effect.sync(() => this.#cancel(timer))
    })
  }

  adjust(duration: Duration.Input): Effect.Effect<void> {
    return this.sleep(Duration.fromInputUnsafe(duration))
  }

  setTime(timestamp: number): Effect.Effect<void> {
    return Effect.suspend(() => this.sleep(Duration.millis(Math.max(0, timestamp - this.#now))))
  }

  withLive<A, E, R>(_effect: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> {
    return Effect.die(new Error("a simulation has no live clock: its time is virtual, and its runs repeat"))
  }

  /** Whether a timer waits. */
  get hasTimers(): boolean {
    return this.#live > 0
  }

  /** Jumps to the earliest timers and fires all of that time. Returns whether there was one. */
  advance(): boolean {
    const first = this.#next()
    if (first === undefined) return false
    this.#now = first.time
    for (let timer = this.#next(); timer !== undefined && timer.time === this.#now; timer = this.#next()) {
      this.#take()
      timer.cancelled = true // fired: a later cancellation must not count it again
      this.#live--
      timer.fire()
    }
    return true
  }

  #add(time: number, fire: () => void): Timer {
    const timer: Timer = { time, order: this.#order++, fire, cancelled: false }
    if (time === Number.POSITIVE_INFINITY) return timer
    this.#live++
    const timers = this.#timers
    let at = timers.push(timer) - 1
    while (at > 0) {
      const parent = (at - 1) >> 1
      const above = timers[parent]
      if (above === undefined || before(above, timer)) break
      timers[at] = above
      at = parent
    }
    timers[at] = timer
    return timer
  }

  #cancel(timer: Timer): void {
    if (timer.cancelled || timer.time === Number.POSITIVE_INFINITY) return
    timer.cancelled = true
    this.#live--
  }

  /** The earliest timer that is not cancelled; those before it are dropped. */
  #next(): Timer | undefined {
    while (this.#timers[0]?.cancelled === true) this.#take()
    return this.#timers[0]
  }

  #take(): Timer | undefined {
    const timers = this.#timers
    const first = timers[0]
    const last = timers.pop()
    if (first === undefined || last === undefined || timers.length === 0) return first
    let at = 0
    for (;;) {
      const left = 2 * at + 1
      const leftTimer = timers[left]
      if (leftTimer === undefined) break
      const rightTimer = timers[left + 1]
      const useRight = rightTimer !== undefined && before(rightTimer, leftTimer)
      const child = useRight ? rightTimer : leftTimer
      if (before(last, child)) break
      timers[at] = child
      at = useRight ? left + 1 : left
    }
    timers[at] = last
    return first
  }
}

const before = (a: Timer, b: Timer): boolean => a.time < b.time || (a.time === b.time && a.order < b.order)
