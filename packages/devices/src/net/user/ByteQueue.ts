/**
 * Bytes that wait, as the pieces that they came in: what is put in is kept, not copied, until it is dropped from the front.
 */
import { copyBytes, type NetFrame } from "@troupe/core/NetFrame"
import { addToSum } from "./Checksum.ts"

/** Dropped entries at the front of the list of pieces that are tolerated before it is made anew. */
const SLACK = 64

/** A queue of bytes. */
export class ByteQueue {
  #pieces: Array<Uint8Array> = []
  /** Index of the first piece that is not dropped. */
  #first = 0
  /** Bytes of the first piece that are dropped. */
  #skip = 0
  #length = 0

  /** Bytes in the queue. */
  get length(): number {
    return this.#length
  }

  /** Puts bytes behind the others. They must not change any more. */
  push(bytes: Uint8Array): void {
    if (bytes.length === 0) return
    this.#pieces.push(bytes)
    this.#length += bytes.length
  }

  /** Drops bytes from the front, at most all. */
  drop(count: number): void {
    let left = Math.min(count, this.#length)
    this.#length -= left
    while (left > 0) {
      const rest = (this.#pieces[this.#first]?.length ?? 0) - this.#skip
      if (left < rest) {
        this.#skip += left
        break
      }
      left -= rest
      this.#pieces[this.#first] = EMPTY
      this.#first++
      this.#skip = 0
    }
    if (this.#first === this.#pieces.length) {
      this.#pieces = []
      this.#first = 0
    } else if (this.#first > SLACK && this.#first * 2 > this.#pieces.length) {
      this.#pieces.splice(0, this.#first)
      this.#first = 0
    }
  }

  /** Drops everything. */
  clear(): void {
    this.drop(this.#length)
  }

  /** Copies `length` bytes from `offset` of the queue into a frame at `position`. Returns how many were copied. */
  copyTo(frame: NetFrame, position: number, offset: number, length: number): number {
    let done = 0
    let skip = offset + this.#skip
    for (let i = this.#first; i < this.#pieces.length && done < length; i++) {
      const piece = this.#pieces[i] ?? EMPTY
      if (skip >= piece.length) {
        skip -= piece.length
        continue
      }
      const amount = Math.min(piece.length - skip, length - done)
      if (frame.write(position + done, piece, skip, amount) !== amount) break
      done += amount
      skip = 0
    }
    return done
  }

  /** Copies `length` bytes from `offset` of the queue to `target` at `at`. Returns how many were copied. */
  copy(target: Uint8Array, at: number, offset: number, length: number): number {
    let done = 0
    let skip = offset + this.#skip
    for (let i = this.#first; i < this.#pieces.length && done < length; i++) {
      const piece = this.#pieces[i] ?? EMPTY
      if (skip >= piece.length) {
        skip -= piece.length
        continue
      }
      const amount = Math.min(piece.length - skip, length - done)
      copyBytes(piece, skip, target, at + done, amount)
      done += amount
      skip = 0
    }
    return done
  }

  /** Adds `length` bytes from `offset` of the queue to the sum of an internet checksum. */
  addToSum(sum: number, offset: number, length: number): number {
    let total = sum
    let done = 0
    let skip = offset + this.#skip
    for (let i = this.#first; i < this.#pieces.length && done < length; i++) {
      const piece = this.#pieces[i] ?? EMPTY
      if (skip >= piece.length) {
        skip -= piece.length
        continue
      }
      const amount = Math.min(piece.length - skip, length - done)
      const sumOfPiece = addToSum(0, piece, skip, skip + amount)
      // A piece that begins at an odd place of the whole has its bytes the other way round.
      total += (done & 1) === 0 ? sumOfPiece : ((sumOfPiece & 0xff) << 8) | (sumOfPiece >>> 8)
      done += amount
      skip = 0
    }
    return total
  }
}

const EMPTY = new Uint8Array(0)
