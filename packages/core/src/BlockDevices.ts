/** The disks of a guest as its host sees them: what went wrong, and how much was done. */
import * as Context from "effect/Context"
import type * as Stream from "effect/Stream"
import type { BlockBackendError } from "./BlockBackend.ts"

/** Something that happened to a disk. */
export type BlockEvent = {
  /** A request of the guest failed because the back end did; the guest saw an input/output error. */
  readonly _tag: "RequestFailed"
  /** The disk's `id`. */
  readonly disk: string
  readonly operation: "read" | "write" | "flush" | "discard" | "writeZeroes"
  /** First byte on the disk. */
  readonly offset: number
  /** Length in bytes. */
  readonly length: number
  readonly error: BlockBackendError
}

/** What a disk has done since its machine was made. */
export interface BlockStatistics {
  /** The disk's `id`. */
  readonly disk: string
  /** Requests that the guest was answered, of any kind and outcome. */
  readonly requests: number
  /** Bytes read and written by requests that succeeded. */
  readonly bytesRead: number
  readonly bytesWritten: number
  /** Requests that the back end failed. */
  readonly failures: number
}

/** Events that wait for a reader that is slow; it loses the oldest ones beyond them. */
export const BLOCK_EVENTS_MAX = 256

/** The disks of a guest. Published by the block devices. */
export class BlockDevices extends Context.Service<BlockDevices, {
  /** What happens to the disks from now on, until the machine is gone. At most {@link BLOCK_EVENTS_MAX} events wait. */
  readonly events: Stream.Stream<BlockEvent>
  /** One entry a disk, in the order of the configuration. */
  readonly statistics: () => ReadonlyArray<BlockStatistics>
}>()("@troupe/core/BlockDevices") {}
