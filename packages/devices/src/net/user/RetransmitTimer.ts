/**
 * How long to wait for an acknowledgment (RFC 6298): an estimate out of round trips, doubled with each repetition.
 */
import { sequenceDistance } from "./TcpHeader.ts"

/** Before anything was measured, in milliseconds. */
export const TIMEOUT_FIRST = 1000
/** The least, in milliseconds. */
export const TIMEOUT_MIN = 200
/** The most, in milliseconds. */
export const TIMEOUT_MAX = 10_000
/** Doublings after which the time is at its most whatever was measured. */
const BACK_OFF_MAX = 16

/** The timer of one connection. */
export class RetransmitTimer {
  /** Repetitions since anything was heard of the other side. */
  unanswered = 0
  /** Repetitions since something was acknowledged. */
  #repeated = 0
  #smoothed = -1
  #variation = 0
  /** The sequence number whose acknowledgment is measured. */
  #sample = 0
  #sampleSent = -1

  /** How long to wait now, in milliseconds. */
  get timeout(): number {
    const base = this.#smoothed < 0 ? TIMEOUT_FIRST : Math.max(TIMEOUT_MIN, this.#smoothed + 4 * this.#variation)
    return Math.min(TIMEOUT_MAX, base * 2 ** this.#repeated)
  }

  /** What comes before `next` was sent for the first time. */
  sent(next: number, now: number): void {
    if (this.#sampleSent >= 0) return
    this.#sample = next
    this.#sampleSent = now
  }

  /** Something is sent again: its acknowledgment says nothing about the round trip (Karn's algorithm). */
  forgetSample(): void {
    this.#sampleSent = -1
  }

  /** Everything before `acknowledgment` has arrived. */
  acknowledged(acknowledgment: number, now: number): void {
    this.#repeated = 0
    if (this.#sampleSent < 0 || sequenceDistance(acknowledgment, this.#sample) < 0) return
    const round = Math.max(0, now - this.#sampleSent)
    this.#sampleSent = -1
    if (this.#smoothed < 0) {
      this.#smoothed = round
      this.#variation = round / 2
      return
    }
    this.#variation = 0.75 * this.#variation + 0.25 * Math.abs(this.#smoothed - round)
    this.#smoothed = 0.875 * this.#smoothed + 0.125 * round
  }

  /** The other side is there. */
  heard(): void {
    this.unanswered = 0
  }

  /** Nothing came in time. */
  backOff(): void {
    this.unanswered++
    this.#repeated = Math.min(this.#repeated + 1, BACK_OFF_MAX)
    this.forgetSample()
  }
}
