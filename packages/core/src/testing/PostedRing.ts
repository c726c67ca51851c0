/** The ring of one vCPU's posted writes: bounded, first in first out, without allocation. */

/** Number of writes that a ring holds. */
export const POSTED_RING_SIZE = 256

const FIELDS = 4

/** Places of a new ring. It grows to {@link POSTED_RING_SIZE}. */
const FIRST_SIZE = 16

/** Posted writes that their device has not taken yet. */
export class PostedRing {
  #slots = new Float64Array(FIRST_SIZE * FIELDS)
  #size = FIRST_SIZE
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
    if (this.length === this.#size) this.#grow()
    const at = (this.#tail % this.#size) * FIELDS
    this.#slots[at] = range
    this.#slots[at + 1] = offset
    this.#slots[at + 2] = size
    this.#slots[at + 3] = value
    this.#tail++
  }

  /** Gives writes to `take`, oldest first, until it refuses one or none is left. Returns whether none is left. */
  drain(take: (range: number, offset: number, size: number, value: number) => boolean): boolean {
    while (this.#head !== this.#tail) {
      const at = (this.#head % this.#size) * FIELDS
      const slots = this.#slots
      if (!take(slots[at] ?? 0, slots[at + 1] ?? 0, slots[at + 2] ?? 0, slots[at + 3] ?? 0)) return false
      this.#head++
    }
    return true
  }

  #grow(): void {
    const slots = new Float64Array(this.#slots.length * 2)
    const split = (this.#head % this.#size) * FIELDS
    slots.set(this.#slots.subarray(split))
    slots.set(this.#slots.subarray(0, split), this.#slots.length - split)
    this.#tail -= this.#head
    this.#head = 0
    this.#slots = slots
    this.#size *= 2
  }
}
