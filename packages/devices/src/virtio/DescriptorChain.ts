/**
 * One descriptor chain after its checks: private copies of where its buffers are, and access to the bytes in them.
 *
 * A device makes as many as it works on at a time and has them filled again and again by `Virtqueue.take`. The buffers are
 * guest memory itself, which the guest can change at any moment: what is checked must be copied out first.
 */
import type { MemoryRegion } from "@troupe/core/GuestMemory"

/** Up to this many bytes are copied without a view of them. */
const SMALL_COPY = 64

/** The buffers of a chain: first those that the device reads, then those that it writes. */
export class DescriptorChain {
  /** The most buffers that it holds. A queue of this size, or a smaller one, can fill it. */
  readonly capacity: number
  /** What the driver knows the chain by: in a split ring its first descriptor, in a packed one its id; -1 while it holds none. */
  head = -1
  /** How many descriptors it has, empty ones and those of a table included. */
  descriptors = 0
  /** The queue's own notes: how many entries of the ring it takes, and its place among those that are given back in order. */
  entries = 0
  place = 0
  /** The number of buffers. Those before {@link readableCount} are readable, the others writable. */
  count = 0
  readableCount = 0
  readableBytes = 0
  writableBytes = 0
  readonly #regions: Array<MemoryRegion | undefined>
  readonly #offsets: Float64Array
  readonly #lengths: Float64Array

  constructor(capacity: number) {
    this.capacity = capacity
    this.#regions = Array.from({ length: capacity })
    this.#offsets = new Float64Array(capacity)
    this.#lengths = new Float64Array(capacity)
  }

  /** Forgets everything. */
  clear(): void {
    this.head = -1
    this.descriptors = 0
    this.entries = 0
    this.place = 0
    this.count = 0
    this.readableCount = 0
    this.readableBytes = 0
    this.writableBytes = 0
  }

  /** Adds a buffer of at least one byte, which the caller has checked to lie in the region. Readable ones come first. */
  add(region: MemoryRegion, offset: number, length: number, writable: boolean): void {
    const index = this.count++
    this.#regions[index] = region
    this.#offsets[index] = offset
    this.#lengths[index] = length
    if (writable) {
      this.writableBytes += length
    } else {
      this.readableCount = this.count
      this.readableBytes += length
    }
  }

  /** Length of a buffer in bytes. */
  length(index: number): number {
    return index < this.count ? this.#lengths[index] ?? 0 : 0
  }

  /** The array that holds a buffer, from {@link offset} on, for those who must not allocate a view for each buffer. */
  array(index: number): Uint8Array<ArrayBuffer> {
    const region = index < this.count ? this.#regions[index] : undefined
    if (region === undefined) throw new RangeError(`buffer ${index} of a chain with ${this.count}`)
    return region.bytes
  }

  /** The region of guest memory that holds a buffer, from {@link offset} on. */
  region(index: number): MemoryRegion {
    const region = index < this.count ? this.#regions[index] : undefined
    if (region === undefined) throw new RangeError(`buffer ${index} of a chain with ${this.count}`)
    return region
  }

  /** Where in its {@link array} a buffer begins. */
  offset(index: number): number {
    return index < this.count ? this.#offsets[index] ?? 0 : 0
  }

  /** The first bytes of a buffer, at most `limit`, in place. The view must not be kept after the chain is completed. */
  view(index: number, limit = Number.POSITIVE_INFINITY): Uint8Array<ArrayBuffer> {
    const region = index < this.count ? this.#regions[index] : undefined
    if (region === undefined) throw new RangeError(`buffer ${index} of a chain with ${this.count}`)
    const offset = this.#offsets[index] ?? 0
    return region.bytes.subarray(offset, offset + Math.min(limit, this.#lengths[index] ?? 0))
  }

  /**
   * Copies bytes out of the readable buffers, from `position` in all of them together. Returns how many there were, at most
   * `target.length`.
   */
  read(position: number, target: Uint8Array): number {
    return this.#copy(0, this.readableCount, position, target, false)
  }

  /** Copies `source` into the writable buffers, to `position` in all of them together. Returns how many bytes fitted. */
  write(position: number, source: Uint8Array): number {
    return this.#copy(this.readableCount, this.count, position, source, true)
  }

  #copy(first: number, end: number, position: number, bytes: Uint8Array, toGuest: boolean): number {
    let skip = position
    let done = 0
    for (let i = first; i < end && done < bytes.length; i++) {
      const length = this.#lengths[i] ?? 0
      if (skip >= length) {
        skip -= length
        continue
      }
      const region = this.#regions[i]
      if (region === undefined) break
      const start = (this.#offsets[i] ?? 0) + skip
      const amount = Math.min(length - skip, bytes.length - done)
      // Headers and the like go byte by byte: a view of them would cost more, and would be garbage afterwards.
      if (amount <= SMALL_COPY) {
        const memory = region.bytes
        if (toGuest) { for (let k = 0; k < amount; k++) memory[start + k] = bytes[done + k] ?? 0 }
        else for (let k = 0; k < amount; k++) bytes[done + k] = memory[start + k] ?? 0
      } else if (toGuest) region.bytes.set(bytes.subarray(done, done + amount), start)
      else bytes.set(region.bytes.subarray(start, start + amount), done)
      done += amount
      skip = 0
    }
    return done
  }
}
