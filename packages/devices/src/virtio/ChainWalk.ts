/**
 * What both formats of virtqueues check of a descriptor, and where they note the first rule that a driver broke.
 *
 * The caller has copied the descriptor's fields out of guest memory. They are used as they come in here, and nothing of
 * them is read again.
 */
import { addressFromHalves, formatAddress } from "@troupe/core/GuestAddress"
import type { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import type { DescriptorChain } from "./DescriptorChain.ts"
import { CHAIN_BYTES_MAX, type QueueFault, type QueueFaultKind } from "./Virtqueue.ts"

/** The chain goes on: at `next` in a split ring, at the following descriptor in a packed one. */
export const VIRTQ_DESC_F_NEXT = 1
/** The buffer is written by the device. */
export const VIRTQ_DESC_F_WRITE = 2
/** The buffer is a table of descriptors. */
export const VIRTQ_DESC_F_INDIRECT = 4
/** Size of a descriptor in bytes: `struct virtq_desc` and `struct pvirtq_desc`. */
export const DESCRIPTOR_SIZE = 16

/** The checks of one queue's chains. */
export class ChainWalk {
  /** What the driver did wrong, once it has. */
  fault: QueueFault | undefined
  readonly #memory: GuestMemory
  /** The most descriptors of a chain. */
  readonly #limit: number
  readonly #indirect: boolean
  /** Where the last buffer was: the next one is there as well, most of the time. */
  #near: MemoryRegion | undefined

  /** `limit` is the size of the queue; `indirect` says whether `VIRTIO_F_INDIRECT_DESC` was negotiated. */
  constructor(memory: GuestMemory, limit: number, indirect: boolean) {
    this.#memory = memory
    this.#limit = limit
    this.#indirect = indirect
  }

  /** Notes what is wrong, unless something was before. */
  fail(kind: QueueFaultKind, detail: string): false {
    this.fault ??= { kind, detail }
    return false
  }

  /**
   * Adds the buffer of a descriptor to its chain. Returns whether all is well with it.
   *
   * An empty buffer counts as a descriptor and is otherwise nothing: neither its address nor its direction says anything.
   */
  buffer(chain: DescriptorChain, low: number, high: number, length: number, writable: boolean): boolean {
    if (++chain.descriptors > this.#limit || chain.count === chain.capacity) {
      return this.fail(
        "chain-length",
        `a chain has more than ${Math.min(this.#limit, chain.capacity)} descriptors`
      )
    }
    if (length === 0) return true
    if (!writable && chain.writableBytes > 0) {
      return this.fail("direction", "a chain has a readable buffer after a writable one")
    }
    const address = addressFromHalves(low, high)
    const region = this.#find(address, length)
    if (region === undefined) return this.#outside(address, length)
    chain.add(region, address - region.guestAddress, length, writable)
    if (chain.readableBytes + chain.writableBytes > CHAIN_BYTES_MAX) {
      return this.fail("chain-bytes", `a chain has more than ${CHAIN_BYTES_MAX} bytes`)
    }
    return true
  }

  /** The region of a table of descriptors, or `undefined` when something is wrong with it. */
  table(low: number, high: number, length: number, flags: number): MemoryRegion | undefined {
    if (!this.#indirect) {
      this.fail("indirect", "a table of descriptors without VIRTIO_F_INDIRECT_DESC")
      return undefined
    }
    if ((flags & VIRTQ_DESC_F_NEXT) !== 0) {
      this.fail("indirect", "a table of descriptors that is not the last")
      return undefined
    }
    if (length === 0 || length % DESCRIPTOR_SIZE !== 0) {
      this.fail("indirect", `a table of ${length} bytes`)
      return undefined
    }
    const address = addressFromHalves(low, high)
    const region = this.#find(address, length)
    if (region === undefined) this.#outside(address, length)
    return region
  }

  #find(address: number, length: number): MemoryRegion | undefined {
    const near = this.#near
    if (near !== undefined) {
      const offset = address - near.guestAddress
      if (offset >= 0 && offset + length <= near.bytes.length && near.blocks === undefined) return near
    }
    const region = this.#memory.regionOf(address, length)
    if (region !== undefined) this.#near = region
    return region
  }

  #outside(address: number, length: number): false {
    const place = address < 0 ? "an address above 2^52" : formatAddress(address)
    return this.fail("address", `${length} bytes at ${place} are not in guest memory`)
  }
}
