/** The protocol `MemController`: the host's side of a guest's hot-pluggable memory. */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import type * as Stream from "effect/Stream"
import type { GuestError } from "./GuestError.ts"

/** The sizes of hot-pluggable memory, in bytes (virtio 1.3, section 5.15.4). All are multiples of the block size. */
export interface MemSize {
  /** What can be plugged and unplugged on its own. Never changes. */
  readonly blockSize: number
  /** What can be plugged at most, by the configuration. Never changes. */
  readonly regionSize: number
  /** What can be plugged at most now: the whole region. */
  readonly usableRegionSize: number
  /** What the guest has plugged, and the host has given it. */
  readonly pluggedSize: number
  /** What the host has asked the guest to have plugged. */
  readonly requestedSize: number
}

/** The hot-pluggable memory of a guest. Published by the memory device. It outlives restarts of the device and resets of the guest. */
export class MemController extends Context.Service<MemController, {
  readonly getMemSize: Effect.Effect<MemSize, GuestError>
  /**
   * Asks the guest to have this many bytes plugged, and returns at once. Whether and when the guest follows is its own matter:
   * it may be unable to give memory up that it uses. What it plugs beyond the request is refused; a guest that is reset is
   * asked again.
   *
   * Fails with `BAD_CONFIG`, which names the rule, for what is not a multiple of the block size from 0 to
   * `usableRegionSize`. Nothing has changed then.
   */
  readonly requestSize: (requestedSize: number) => Effect.Effect<void, GuestError>
  /**
   * The sizes now, and then whenever one changes, until the machine is gone. A reader that is slow misses some in between, and
   * never the last.
   */
  readonly changes: Stream.Stream<MemSize>
}>()("@troupe/core/MemController") {}
