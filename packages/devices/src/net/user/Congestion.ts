/**
 * How much may be on its way to the guest at once (RFC 5681, with NewReno's recovery of RFC 6582).
 *
 * The wire is memory and hardly ever loses anything, so a connection begins with all that its buffer holds.
 */
import { sequenceDistance } from "./TcpHeader.ts"

/** Duplicate acknowledgments that say that a segment was lost: of this side's as of the guest's. */
export const DUPLICATES_MAX = 3

/** The congestion window of one connection. */
export class Congestion {
  /** Bytes that may be on their way. */
  window: number
  #threshold: number
  #duplicates = 0
  /** What had been sent when a loss was noticed. */
  #recover = 0
  #recovering = false

  /** Begins with a window of `limit` bytes. */
  constructor(limit: number) {
    this.window = limit
    this.#threshold = limit
  }

  /** The same acknowledgment again, with `flight` bytes on their way up to `highest`. Returns whether to send the first segment again. */
  duplicate(flight: number, highest: number, mss: number): boolean {
    if (++this.#duplicates !== DUPLICATES_MAX || this.#recovering) return false
    this.#threshold = Math.max(flight >>> 1, 2 * mss)
    this.window = this.#threshold
    this.#recover = highest
    this.#recovering = true
    return true
  }

  /**
   * Everything before `acknowledgment` has arrived, `bytes` more than before. Returns whether to send the first segment again: in a
   * recovery that is not over, it was lost too.
   */
  advance(acknowledgment: number, bytes: number, mss: number, limit: number): boolean {
    this.#duplicates = 0
    if (this.#recovering) {
      if (sequenceDistance(acknowledgment, this.#recover) < 0) return true
      this.#recovering = false
      this.window = this.#threshold
    } else if (this.window < limit) {
      const gain = this.window < this.#threshold ? Math.min(bytes, 2 * mss) : Math.ceil((mss * mss) / this.window)
      this.window = Math.min(limit, this.window + gain)
    }
    return false
  }

  /** Nothing was acknowledged in time: all is sent again, slowly at first. */
  timeout(flight: number, mss: number): void {
    this.#threshold = Math.max(flight >>> 1, 2 * mss)
    this.window = mss
    this.#recovering = false
    this.#duplicates = 0
  }

  /** A timeout that says nothing about the wire, because the guest's window is closed. */
  forget(): void {
    this.#recovering = false
    this.#duplicates = 0
  }
}
