/** The ring of one vCPU's posted writes: bounded, first in first out, without allocation. */

/** Number of writes that a ring holds. */
export const POSTED_RING_SIZE = 256

const FIELDS = 4

/** Posted writes that their device has not taken yet. */
export class PostedRing {
  readonly #slots = new Float64Array(POSTED_RING_SIZE * FIELDS)
  #head = 0
  #tail = 0

  /** Whether nothing waits. */
  get empty(): boolean {
    return this.#head === this.#tail
  }

  /** Whether another write has to wait for room. */
  get full(): boolean {
    return this.#tail - this.#head === POSTED_RING_SIZE
  }

  /** Number of writes that wait. */
  get length(): number {
    return this.#tail - this.#head
  }

  /** Appends a write. There must be room. */
  push(range: number, offset: number, size: number, value: number): void {
    const at = (this.#tail % POSTED_RING_SIZE) * FIELDS
    this.#slots[at] = range
    this.#slots[at + 1] = offset
    this.#slots[at + 2] = size
    this.#slots[at + 3] = value
    this.#tail++
  }

  /** Gives writes to `take`, oldest first, until it refuses one or none is left. Returns whether none is left. */
  drain(take: (range: number, offset: number, size: number, value: number) => boolean): boolean {
    while (this.#head !== this.#tail) {
      const at = (this.#head % POSTED_RING_SIZE) * FIELDS
      const slots = this.#slots
      if (!take(slots[at] ?? 0, slots[at + 1] ?? 0, slots[at + 2] ?? 0, slots[at + 3] ?? 0)) return false
      this.#head++
    }
    return true
  }
}
