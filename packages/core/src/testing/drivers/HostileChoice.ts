/** What a hostile driver chooses, out of a seed: the same seed chooses the same. */
import { Seed } from "../Seed.ts"

/** A sequence of choices. */
export class Choice {
  readonly #seed: Seed

  constructor(seed: number) {
    this.#seed = new Seed(seed)
  }

  /** A whole number in `[0, limit)`. */
  below(limit: number): number {
    return this.#seed.choose(limit)
  }

  /** One of the items. */
  of<A>(items: readonly [A, ...ReadonlyArray<A>]): A {
    return items[this.below(items.length)] ?? items[0]
  }

  /** True in this part, 0 to 1, of all cases. */
  chance(probability: number): boolean {
    return this.#seed.next() / 2 ** 32 < probability
  }

  /** 32 bits. */
  any32(): number {
    return this.#seed.next()
  }

  /** Often small, sometimes an edge, seldom anything of 32 bits. */
  number(): number {
    const kind = this.below(8)
    return kind < 4 ? this.below(16) : kind < 6 ? this.below(0x1_0000) : kind === 6 ? this.of(EDGES) : this.any32()
  }

  /** Bytes. */
  bytes(length: number): Array<number> {
    return Array.from({ length }, () => this.below(0x100))
  }
}

const EDGES = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x1_0000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff] as const

/** The bytes of fields: `[size, value]` each, little-endian. A value above 2^53 cannot be said, and need not be. */
export const fields = (...all: ReadonlyArray<readonly [size: number, value: number]>): Array<number> =>
  all.flatMap(([size, value]) => Array.from({ length: size }, (_, i) => Math.floor(value / 2 ** (8 * i)) % 0x100))
