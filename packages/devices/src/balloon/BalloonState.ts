/** What a balloon's device and its host share, as long as the machine: the sizes, the last statistics, and who waits for them. */
import {
  type BalloonController,
  type BalloonCounters,
  BalloonError,
  type BalloonSize,
  type BalloonStatus,
  MEM_STATS_PATIENCE_MILLIS,
  type MemStat,
  type MemStats
} from "@troupe/core/BalloonController"
import * as Clock from "effect/Clock"
import * as Deferred from "effect/Deferred"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as PubSub from "effect/PubSub"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"

/** Sizes that a reader of `changes` may be behind. */
const CHANGES_KEPT = 16
const NANOS_PER_MILLI = 1_000_000n

/** What the running device does for its host. Both are done soon, in the device's own turns. */
export interface BalloonAttention {
  /** The host asks for another size. */
  readonly requested: () => void
  /** The host asks for statistics. */
  readonly asked: () => void
}

/** Whether the guest's driver gives statistics; `undefined` while there is no driver. */
export type StatsSupport = boolean | undefined

/** The host's side of one balloon. */
export class BalloonState {
  readonly #pagesMax: number
  readonly #now: () => number
  readonly #changes: PubSub.PubSub<BalloonSize>
  readonly #counters = {
    inflatedPages: 0,
    deflatedPages: 0,
    reportedPages: 0,
    discardedBytes: 0,
    discards: 0,
    badRequests: 0
  }
  #requested = 0
  #actual = 0
  #support: StatsSupport
  #sample: { readonly stats: ReadonlyArray<MemStat>; readonly time: number } | undefined
  /** Those who wait for statistics; all get the next ones. */
  #waiters: Deferred.Deferred<void> | undefined
  #attention: BalloonAttention | undefined
  #closed = false

  constructor(pagesMax: number, changes: PubSub.PubSub<BalloonSize>, now: () => number) {
    this.#pagesMax = pagesMax
    this.#changes = changes
    this.#now = now
    this.#publish()
  }

  /** What the host has asked for, in pages. */
  get requested(): number {
    return this.#requested
  }

  /** What the driver says that it has given up, in pages. */
  get actual(): number {
    return this.#actual
  }

  set actual(pages: number) {
    if (pages === this.#actual) return
    this.#actual = pages
    this.#publish()
  }

  /** Whether somebody waits for statistics. */
  get wanted(): boolean {
    return this.#waiters !== undefined
  }

  /** Counters that the device adds to. */
  get counters(): { -readonly [name in keyof BalloonCounters]: BalloonCounters[name] } {
    return this.#counters
  }

  /** Connects a running device, until {@link detach}. */
  attach(attention: BalloonAttention): void {
    this.#attention = attention
  }

  /** The device does not run any more. */
  detach(): void {
    this.#attention = undefined
    this.driver(undefined)
  }

  /** A driver is at work that gives statistics or does not, or none is. What an earlier one said is forgotten. */
  driver(support: StatsSupport): void {
    this.#support = support
    this.#sample = undefined
    if (support === false) this.#wake()
  }

  /** The driver has given statistics. */
  sampled(stats: ReadonlyArray<MemStat>): void {
    this.#sample = { stats, time: this.#now() }
    this.#wake()
  }

  /** The machine is gone. */
  close(): void {
    this.#closed = true
    this.#attention = undefined
    this.#wake()
  }

  /** The service that this is to clients of the guest. */
  get controller(): BalloonController["Service"] {
    return {
      getBalloonSize: Effect.suspend(() => this.#closed ? this.#gone("getBalloonSize") : Effect.succeed(this.#size)),
      requestNumPages: (pages) => Effect.suspend(() => this.#request(pages)),
      getMemStats: this.#memStats(MEM_STATS_PATIENCE_MILLIS, "getMemStats"),
      getMemStatsWithin: (patience) => this.#memStats(patience, "getMemStatsWithin"),
      changes: Stream.fromPubSub(this.#changes),
      counters: () => ({ ...this.#counters })
    }
  }

  get #size(): BalloonSize {
    return { currentNumPages: this.#actual, requestedNumPages: this.#requested }
  }

  #publish(): void {
    PubSub.publishUnsafe(this.#changes, this.#size)
  }

  #wake(): void {
    const waiters = this.#waiters
    this.#waiters = undefined
    if (waiters !== undefined) Deferred.doneUnsafe(waiters, Effect.void)
  }

  #fail(operation: string, status: BalloonStatus, detail: string): Effect.Effect<never, BalloonError> {
    return Effect.fail(new BalloonError({ status, operation, detail }))
  }

  #gone(operation: string): Effect.Effect<never, BalloonError> {
    return this.#fail(operation, "PEER_CLOSED", "the machine is gone")
  }

  #request(pages: number): Effect.Effect<void, BalloonError> {
    if (this.#closed) return this.#gone("requestNumPages")
    if (!Number.isInteger(pages) || pages < 0 || pages > this.#pagesMax) {
      const detail = `${pages} is not a whole number from 0 to ${this.#pagesMax}, the pages that the guest has`
      return this.#fail("requestNumPages", "OUT_OF_RANGE", detail)
    }
    if (pages !== this.#requested) {
      this.#requested = pages
      this.#publish()
    }
    this.#attention?.requested()
    return Effect.void
  }

  #memStats(patience: Duration.Input, operation: string): Effect.Effect<MemStats, BalloonError> {
    return Effect.suspend(() => {
      const asked = Duration.toMillis(patience) > 0
      if (!asked || this.#closed || this.#support === false) return this.#lastStats(operation)
      this.#waiters ??= Deferred.makeUnsafe()
      this.#attention?.asked()
      return Effect.andThen(
        Effect.timeoutOption(Deferred.await(this.#waiters), patience),
        Effect.suspend(() => this.#lastStats(operation))
      )
    })
  }

  #lastStats(operation: string): Effect.Effect<MemStats, BalloonError> {
    if (this.#closed) return this.#gone(operation)
    const sample = this.#sample
    if (sample !== undefined) return Effect.succeed({ stats: sample.stats, ageMillis: this.#now() - sample.time })
    if (this.#support === false) {
      return this.#fail(operation, "NOT_SUPPORTED", "the guest's driver gives no statistics")
    }
    return this.#fail(
      operation,
      "TIMED_OUT",
      this.#support === undefined
        ? "no driver of the guest is at work; ask again when the guest has started it"
        : "the guest has given no statistics yet"
    )
  }
}

/** The host's side of a balloon of at most `pagesMax` pages. It is over when the scope closes. */
export const makeBalloonState: (pagesMax: number) => Effect.Effect<BalloonState, never, Scope.Scope> = Effect
  .fnUntraced(
    function*(pagesMax) {
      const clock = yield* Clock.Clock
      const changes = yield* Effect.acquireRelease(
        PubSub.sliding<BalloonSize>({ capacity: CHANGES_KEPT, replay: 1 }),
        PubSub.shutdown
      )
      return yield* Effect.acquireRelease(
        Effect.sync(() =>
          new BalloonState(pagesMax, changes, () => Number(clock.monotonicTimeNanosUnsafe() / NANOS_PER_MILLI))
        ),
        (state) => Effect.sync(() => state.close())
      )
    }
  )
