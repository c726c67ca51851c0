/**
 * Frames for the guest that are whole and wait for room: few, and the newest is lost when there are more.
 */
import type { NetFrame } from "@troupe/core/NetFrame"

/** The most frames that wait. */
export const OUTBOX_FRAMES_MAX = 512
/** The most bytes that wait. */
export const OUTBOX_BYTES_MAX = 0x8_0000

/** A bounded queue of frames. */
export class Outbox {
  #frames: Array<Uint8Array> = []
  #first = 0
  #bytes = 0
  #lost = 0

  /** Whether nothing waits. */
  get isEmpty(): boolean {
    return this.#first === this.#frames.length
  }

  /** Frames that were lost because too many waited. */
  get lost(): number {
    return this.#lost
  }

  /** Puts a frame behind the others. It must not change any more. Returns whether there was room. */
  push(frame: Uint8Array): boolean {
    if (this.#frames.length - this.#first >= OUTBOX_FRAMES_MAX || this.#bytes + frame.length > OUTBOX_BYTES_MAX) {
      this.#lost++
      return false
    }
    this.#frames.push(frame)
    this.#bytes += frame.length
    return true
  }

  /** Moves the first frame into buffers. Returns its length, negative when it does not fit and stays, 0 when there is none. */
  take(frame: NetFrame): number {
    const next = this.#frames[this.#first]
    if (next === undefined) return 0
    if (next.length > frame.size) return -next.length
    frame.clearOffloads()
    frame.write(0, next)
    this.drop()
    return next.length
  }

  /** Loses the first frame. */
  drop(): void {
    const next = this.#frames[this.#first]
    if (next === undefined) return
    this.#frames[this.#first] = GONE
    this.#bytes -= next.length
    this.#first++
    if (this.#first === this.#frames.length) {
      this.#frames = []
      this.#first = 0
    } else if (this.#first >= OUTBOX_FRAMES_MAX) {
      this.#frames.splice(0, this.#first)
      this.#first = 0
    }
  }

  /** Loses all. */
  clear(): void {
    this.#frames = []
    this.#first = 0
    this.#bytes = 0
  }
}

const GONE = new Uint8Array(0)
