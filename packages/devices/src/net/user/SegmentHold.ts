/**
 * Segments that came before their turn, few and in order of their sequence numbers.
 */
import { sequenceAdd, sequenceDistance } from "./TcpHeader.ts"

/** The most segments that are kept. */
export const HELD_SEGMENTS_MAX = 32

interface Held {
  readonly sequence: number
  readonly bytes: Uint8Array
  readonly fin: boolean
}

const EMPTY = new Uint8Array(0)

/** The segments that a connection keeps for later. Those that do not find room are lost, and the guest sends them again. */
export class SegmentHold {
  /** The bytes that {@link take} has found. */
  bytes: Uint8Array = EMPTY
  /** Whether the guest's stream ends behind {@link bytes}. */
  fin = false
  #held: Array<Held> = []
  #length = 0

  /** Bytes that are kept. */
  get length(): number {
    return this.#length
  }

  /** Keeps a segment that lies inside the window that begins at `next`, unless there were more than `limit` bytes then. */
  keep(sequence: number, bytes: Uint8Array, fin: boolean, next: number, limit: number): void {
    if (this.#held.length >= HELD_SEGMENTS_MAX || (bytes.length === 0 && !fin)) return
    if (this.#length + bytes.length > limit) return
    const place = sequenceDistance(sequence, next)
    let index = this.#held.length
    for (; index > 0; index--) {
      const other = this.#held[index - 1]
      if (other === undefined) break
      const distance = sequenceDistance(other.sequence, next)
      if (distance < place) break
      if (distance === place && other.bytes.length >= bytes.length && (other.fin || !fin)) return
    }
    this.#held.splice(index, 0, { sequence, bytes, fin })
    this.#length += bytes.length
  }

  /** Finds what continues at `next`, and gives it up into {@link bytes} and {@link fin}. Returns whether there is something. */
  take(next: number): boolean {
    for (;;) {
      const first = this.#held[0]
      if (first === undefined || sequenceDistance(first.sequence, next) > 0) return false
      this.#held.shift()
      this.#length -= first.bytes.length
      const old = sequenceDistance(next, first.sequence)
      const ends = sequenceDistance(sequenceAdd(first.sequence, first.bytes.length), next)
      if (ends < 0 || (ends === 0 && !first.fin)) continue
      this.bytes = first.bytes.subarray(old)
      this.fin = first.fin
      return true
    }
  }

  /** Forgets all. */
  clear(): void {
    this.#held = []
    this.#length = 0
    this.bytes = EMPTY
  }
}
