/**
 * Guest memory: the regions of RAM that a machine has, and bounded views of them.
 *
 * A view never reaches outside its region, and a range that is not wholly inside one region is refused with `undefined`
 * instead of an exception, because such ranges come from the guest. The hypervisor that made a region detaches its buffer
 * before the memory goes away, so a view kept too long is empty, never dangling.
 */
import type { BlockMap } from "./BlockMap.ts"
import { addressEnd, formatAddress, INVALID_ADDRESS } from "./GuestAddress.ts"

/** The page size of x86-64 guests and the granularity of memory slots, in bytes. */
export const PAGE_SIZE = 4096

/** Gives whole pages of a region back to the host, by offset and length in bytes; they read as zero afterwards. */
export type GiveBack = (offset: number, length: number) => void

/** One contiguous piece of guest memory: `[guestAddress, guestAddress + size)`, with the views that device code uses. */
export class MemoryRegion {
  /** Guest physical address of the first byte; a multiple of {@link PAGE_SIZE}. */
  readonly guestAddress: number
  /** Length in bytes; a multiple of {@link PAGE_SIZE}. */
  readonly size: number
  /** The region's bytes. Empty once the region's owner is closed. */
  readonly bytes: Uint8Array<ArrayBuffer>
  /** The region for 8- to 64-bit access at any alignment. Throws `TypeError` once the region's owner is closed. */
  readonly view: DataView<ArrayBuffer>
  /** The region as 16-bit words, for `Atomics` on ring indices (a virtqueue's `idx` fields are 2-byte aligned). */
  readonly words: Uint16Array<ArrayBuffer>

  /** Which blocks of a pluggable region the guest has now; `undefined` when it always has all of it. */
  readonly blocks: BlockMap | undefined

  readonly #giveBack: GiveBack | undefined

  /** `giveBack` is how the host takes pages of it back. Default: they are filled with zeros, and nobody gains memory. */
  constructor(guestAddress: number, buffer: ArrayBuffer, giveBack?: GiveBack, blocks?: BlockMap) {
    this.guestAddress = guestAddress
    this.blocks = blocks
    this.#giveBack = giveBack
    this.size = buffer.byteLength
    this.bytes = new Uint8Array(buffer)
    this.view = new DataView(buffer)
    this.words = new Uint16Array(buffer)
  }

  /**
   * Whether `[address, address + length)` lies wholly inside this region, and is plugged where that can change. A region whose
   * owner is closed holds nothing.
   */
  contains(address: number, length: number): boolean {
    const present = this.bytes.length
    if (address < this.guestAddress || present === 0) return false
    const end = addressEnd(address, length)
    return end !== INVALID_ADDRESS && end <= this.guestAddress + present &&
      (this.blocks === undefined || this.blocks.covers(address - this.guestAddress, length))
  }

  /**
   * Gives the pages of `[offset, offset + length)` back to the host. They read as zero until they are written again. Both
   * numbers are multiples of {@link PAGE_SIZE}, and the range lies in the region: anything else is a `RangeError`.
   */
  discard(offset: number, length: number): void {
    if (
      offset < 0 || length < 0 || offset % PAGE_SIZE !== 0 || length % PAGE_SIZE !== 0 ||
      offset + length > this.bytes.length
    ) {
      throw new RangeError(`pages at offset ${offset}, ${length} bytes, of a region of ${this.bytes.length}`)
    }
    if (length === 0) return
    if (this.#giveBack === undefined) this.bytes.fill(0, offset, offset + length)
    else this.#giveBack(offset, length)
  }
}

/** The memory of one machine: its regions in ascending order. They never overlap. */
export class GuestMemory {
  readonly regions: ReadonlyArray<MemoryRegion>

  constructor(regions: Iterable<MemoryRegion>) {
    this.regions = Array.from(regions).toSorted((a, b) => a.guestAddress - b.guestAddress)
    for (let i = 1; i < this.regions.length; i++) {
      const before = this.regions[i - 1]
      const region = this.regions[i]
      if (before !== undefined && region !== undefined && before.guestAddress + before.size > region.guestAddress) {
        throw new RangeError(`memory regions overlap at ${formatAddress(region.guestAddress)}`)
      }
    }
  }

  /** The number of bytes of all regions together, with those that are not plugged. */
  get size(): number {
    let size = 0
    for (const region of this.regions) size += region.size
    return size
  }

  /** The region that holds all of `[address, address + length)`, or `undefined` when no single region does. */
  regionOf(address: number, length: number): MemoryRegion | undefined {
    for (let i = 0; i < this.regions.length; i++) {
      const region = this.regions[i]
      if (region !== undefined && region.contains(address, length)) return region
    }
    return undefined
  }

  /** A view (no copy) of `[address, address + length)`, or `undefined` when no single region holds it. */
  slice(address: number, length: number): Uint8Array<ArrayBuffer> | undefined {
    const region = this.regionOf(address, length)
    if (region === undefined) return undefined
    const offset = address - region.guestAddress
    return region.bytes.subarray(offset, offset + length)
  }

  /** Copies `bytes` to `address`. Returns `false`, having written nothing, when no single region holds the range. */
  write(address: number, bytes: Uint8Array): boolean {
    const region = this.regionOf(address, bytes.length)
    if (region === undefined) return false
    region.bytes.set(bytes, address - region.guestAddress)
    return true
  }
  /**
   * Gives the pages of `[address, address + length)` back to the host; they read as zero until they are written again. Returns
   * `false`, having done nothing, when the range is not whole pages of one region.
   */
  discard(address: number, length: number): boolean {
    if (address % PAGE_SIZE !== 0 || length % PAGE_SIZE !== 0) return false
    const region = this.regionOf(address, length)
    if (region === undefined) return false
    region.discard(address - region.guestAddress, length)
    return true
  }
}
