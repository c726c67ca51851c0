/** The protocol `BalloonController`: the host's side of a guest's memory balloon. */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import type { GuestError } from "./GuestError.ts"

/** The sizes of a balloon, in pages of 4096 bytes whatever the guest's page size. */
export interface BalloonSize {
  /** What the guest's driver has given up. */
  readonly currentNumPages: number
  /** What the host has asked for. */
  readonly requestedNumPages: number
}

/** A memory statistic of the guest: a tag of the virtio specification (section 5.5.6.4) and its value. */
export interface MemStat {
  readonly tag: number
  readonly val: bigint
}

/** The memory balloon of a guest. Published by the balloon device. */
export class BalloonController extends Context.Service<BalloonController, {
  readonly getBalloonSize: Effect.Effect<BalloonSize, GuestError>
  readonly requestNumPages: (requestedNumPages: number) => Effect.Effect<void, GuestError>
  readonly getMemStats: Effect.Effect<ReadonlyArray<MemStat>, GuestError>
}>()("@troupe/core/BalloonController") {}
