/** The guest's console as its host sees it: the socket that `Guest.GetConsole` returns. */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import type * as Stream from "effect/Stream"

/** The console of a guest. Published by the console device. */
export class Console extends Context.Service<Console, {
  /** What the guest writes. */
  readonly output: Stream.Stream<Uint8Array>
  /** Types `bytes`; returns when the guest's driver has room for all of them. */
  readonly write: (bytes: Uint8Array) => Effect.Effect<void>
}>()("@troupe/core/Console") {}
