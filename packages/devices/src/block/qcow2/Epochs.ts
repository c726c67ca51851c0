/** Tells when all that had begun at some moment has ended, whatever begins later. */
import * as Effect from "effect/Effect"

/** Counts what is under way. One at a time may wait for {@link pass}. */
export class Epochs {
  readonly #counts: [number, number] = [0, 0]
  #current: 0 | 1 = 0
  #onEnd: (() => void) | undefined

  /** Something begins. Returns what to give to {@link leave} when it has ended. */
  enter(): 0 | 1 {
    this.#counts[this.#current]++
    return this.#current
  }

  /** Something has ended. */
  leave(epoch: 0 | 1): void {
    this.#counts[epoch]--
    if (epoch !== this.#current && this.#counts[epoch] === 0) this.#onEnd?.()
  }

  /** Returns when all that is under way now has ended. */
  readonly pass: Effect.Effect<void> = Effect.uninterruptible(Effect.callback<void>((resume) => {
    const epoch = this.#current
    this.#current = epoch === 0 ? 1 : 0
    if (this.#counts[epoch] === 0) return resume(Effect.void)
    this.#onEnd = () => {
      this.#onEnd = undefined
      resume(Effect.void)
    }
  }))
}
