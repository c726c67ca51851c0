/** Where random bytes for guests come from: the host's choice. */
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Random from "effect/Random"

/** A source of random bytes. */
export class EntropySource extends Context.Service<EntropySource, {
  /** Fills `bytes`, which may be guest memory, with random bytes. Synchronous, and takes time only by their number. */
  readonly fill: (bytes: Uint8Array) => void
}>()("@troupe/devices/EntropySource") {
  /** Bytes of Effect's `Random`: repeatable with a seed, for tests. Not for secrets. */
  static readonly layerRandom: Layer.Layer<EntropySource> = Layer.effect(
    EntropySource,
    Effect.map(Random.Random, (random) => ({
      fill: (bytes: Uint8Array) => {
        for (let i = 0; i < bytes.length; i++) bytes[i] = Math.floor(random.nextDoubleUnsafe() * 256)
      }
    }))
  )
}
