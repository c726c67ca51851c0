/** The protocol `MemController`: the host's side of a guest's hot-pluggable memory. */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import type { GuestError } from "./GuestError.ts"

/** The sizes of hot-pluggable memory, in bytes. */
export interface MemSize {
  readonly blockSize: number
  readonly regionSize: number
  readonly usableRegionSize: number
  readonly pluggedSize: number
  readonly requestedSize: number
}

/** The hot-pluggable memory of a guest. Published by the memory device. */
export class MemController extends Context.Service<MemController, {
  readonly getMemSize: Effect.Effect<MemSize, GuestError>
  readonly requestSize: (requestedSize: number) => Effect.Effect<void, GuestError>
}>()("@troupe/core/MemController") {}
