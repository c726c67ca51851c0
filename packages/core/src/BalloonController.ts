/** The protocol `BalloonController`: the host's side of a guest's memory balloon. */
import * as Context from "effect/Context"
import type * as Duration from "effect/Duration"
import type * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import type * as Stream from "effect/Stream"

/** The unit of all numbers of pages here, in bytes, whatever the guest's page size (virtio 1.3, section 5.5.6). */
export const BALLOON_PAGE_SIZE = 4096

/** The sizes of a balloon, in pages of {@link BALLOON_PAGE_SIZE} bytes. */
export interface BalloonSize {
  /** What the guest's driver says that it has given up. */
  readonly currentNumPages: number
  /** What the host has asked for. */
  readonly requestedNumPages: number
}

/** Tags of memory statistics (virtio 1.3, section 5.5.6.4). A guest may give others. */
export const MemStatTag = {
  /** Bytes swapped in. */
  SWAP_IN: 0,
  /** Bytes swapped out. */
  SWAP_OUT: 1,
  /** Page faults that needed the disk. */
  MAJFLT: 2,
  /** Page faults that did not. */
  MINFLT: 3,
  /** Bytes that are used for nothing. */
  MEMFREE: 4,
  /** Bytes in all. */
  MEMTOT: 5,
  /** Bytes that new programs can have without swapping, by the guest's estimate. */
  AVAIL: 6,
  /** Bytes that are quickly had back, mostly caches of files. */
  CACHES: 7,
  /** Huge pages allocated. */
  HTLB_PGALLOC: 8,
  /** Huge pages that could not be allocated. */
  HTLB_PGFAIL: 9
} as const

/** A memory statistic of the guest. */
export interface MemStat {
  /** {@link MemStatTag}, or what a newer guest adds. */
  readonly tag: number
  /** Bytes or a count. What is above 2^53 - 1, which no honest guest says, is 2^53 - 1. */
  readonly val: number
}

/** What a guest said about its memory at one time. */
export interface MemStats {
  /** As the guest gave them, in its order. */
  readonly stats: ReadonlyArray<MemStat>
  /** How long ago the guest gave them, in milliseconds. */
  readonly ageMillis: number
}

/** What the balloon has done since the machine was made. */
export interface BalloonCounters {
  /** Pages that the guest gave to the balloon, and took back from it. */
  readonly inflatedPages: number
  readonly deflatedPages: number
  /** Pages that the guest reported as free. */
  readonly reportedPages: number
  /** Bytes that went back to the host, and in how many pieces. A page that was given back twice counts twice. */
  readonly discardedBytes: number
  readonly discards: number
  /** Requests that named memory which the guest does not have. What follows it in such a request is not looked at. */
  readonly badRequests: number
}

/**
 * Why an operation on a balloon failed, by the name of its status.
 *
 * - `NOT_SUPPORTED`: the guest's driver gives no statistics
 * - `TIMED_OUT`: it has never given any, and gave none in the time that there was
 * - `OUT_OF_RANGE`: not a number of pages that the guest could give up
 * - `PEER_CLOSED`: the machine is gone
 */
export const BalloonStatus = Schema.Literals(["NOT_SUPPORTED", "TIMED_OUT", "OUT_OF_RANGE", "PEER_CLOSED"])
/** Why an operation on a balloon failed. */
export type BalloonStatus = typeof BalloonStatus.Type

/** An operation on a balloon failed. */
export class BalloonError extends Schema.TaggedError<BalloonError>()("BalloonError", {
  status: BalloonStatus,
  /** The operation, e.g. `getMemStats`. */
  operation: Schema.String,
  /** What went wrong, and what to do about it. */
  detail: Schema.String
}) {
  override get message(): string {
    return `${this.operation}: ${this.detail} (${this.status})`
  }
}

/** How long `getMemStats` waits for fresh statistics: one second. */
export const MEM_STATS_PATIENCE_MILLIS = 1000

/**
 * The memory balloon of a guest. Published by the balloon device. It outlives restarts of the device and resets of the guest: what
 * the host has asked for is asked of every driver.
 */
export class BalloonController extends Context.Service<BalloonController, {
  /** The sizes now. */
  readonly getBalloonSize: Effect.Effect<BalloonSize, BalloonError>
  /**
   * Asks the guest to have this many pages in its balloon, and returns at once. Whether and when it follows is its own matter.
   * Fails with `OUT_OF_RANGE` for what is not a whole number from 0 to the pages that the guest has; nothing has changed then.
   */
  readonly requestNumPages: (requestedNumPages: number) => Effect.Effect<void, BalloonError>
  /** {@link getMemStatsWithin} one second. */
  readonly getMemStats: Effect.Effect<MemStats, BalloonError>
  /**
   * Asks the guest for statistics and waits for them. When it does not answer in time, the last ones that it gave are the
   * answer, and their age says so; fails with `TIMED_OUT` when there are none. With a patience of 0 nobody is asked.
   */
  readonly getMemStatsWithin: (patience: Duration.Input) => Effect.Effect<MemStats, BalloonError>
  /** The sizes now, and then whenever one changes, until the machine is gone. A slow reader misses some, and never the last. */
  readonly changes: Stream.Stream<BalloonSize>
  /** What was done so far. */
  readonly counters: () => BalloonCounters
}>()("@troupe/core/BalloonController") {}
