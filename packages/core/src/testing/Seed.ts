/** The choices of a seed: a small deterministic generator of numbers (SplitMix32). It is for tests, and for nothing secret. */

/** A sequence of choices. The same seed makes the same ones. */
export class Seed {
  #state: number

  constructor(seed: number) {
    // Seeds that differ by little, 1 and 2, must not begin alike: one round of mixing, high half included.
    this.#state = (Math.imul(seed | 0, 0x9e37_79b1) ^ Math.imul(Math.floor(seed / 2 ** 32) | 0, 0x85eb_ca6b)) | 0
  }

  /** 32 bits, unsigned. */
  readonly next = (): number => {
    this.#state = (this.#state + 0x9e37_79b9) | 0
    let bits = this.#state
    bits = Math.imul(bits ^ (bits >>> 16), 0x21f0_aaad)
    bits = Math.imul(bits ^ (bits >>> 15), 0x735a_2d97)
    return (bits ^ (bits >>> 15)) >>> 0
  }

  /** A whole number in `[0, limit)`. */
  readonly choose = (limit: number): number => Math.floor((this.next() / 2 ** 32) * limit)
}
