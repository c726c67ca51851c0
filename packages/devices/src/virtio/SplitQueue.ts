/**
 * The device's side of a split virtqueue (virtio 1.3, section 2.7).
 *
 * The rings belong to the guest. Each of its bytes is read once, into private storage, checked there, and only then used.
 * A chain that breaks a rule makes the queue faulty: it gives no further chains, and the transport tells the driver that the
 * device needs a reset. Nothing is allocated for a chain, and a walk takes at most as many steps as the queue has entries.
 */
import { addressFromHalves } from "@troupe/core/GuestAddress"
import type { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import {
  ChainWalk,
  DESCRIPTOR_SIZE,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE
} from "./ChainWalk.ts"
import { CompletionOrder } from "./CompletionOrder.ts"
import type { DescriptorChain } from "./DescriptorChain.ts"
import type { QueueFault, Virtqueue } from "./Virtqueue.ts"

/** The largest size of a split virtqueue (virtio 1.3, section 2.7). Sizes are powers of two. */
export const QUEUE_SIZE_MAX = 32768
/** In the available ring's flags: the driver does not want interrupts. */
export const VIRTQ_AVAIL_F_NO_INTERRUPT = 1
/** In the used ring's flags: the device does not want notifications. */
export const VIRTQ_USED_F_NO_NOTIFY = 1

/** Alignment of the descriptor table in bytes. */
export const DESCRIPTOR_TABLE_ALIGNMENT = 16
/** Alignment of the available ring in bytes. */
export const AVAILABLE_RING_ALIGNMENT = 2
/** Alignment of the used ring in bytes. */
export const USED_RING_ALIGNMENT = 4

/** Size of the available ring of a queue with `size` entries, in bytes. */
export const availableRingSize = (size: number): number => 6 + 2 * size
/** Size of the used ring of a queue with `size` entries, in bytes. */
export const usedRingSize = (size: number): number => 6 + 8 * size

/** How a driver has set a queue up. Addresses are guest physical. */
export interface QueueSetup {
  readonly size: number
  readonly descriptorTable: number
  readonly availableRing: number
  readonly usedRing: number
  /** `VIRTIO_F_INDIRECT_DESC` was negotiated. */
  readonly indirect: boolean
  /** `VIRTIO_F_EVENT_IDX` was negotiated. */
  readonly eventIndex: boolean
  /** `VIRTIO_F_IN_ORDER` was negotiated. Default: `false`. */
  readonly inOrder?: boolean
}

const isPowerOfTwo = (value: number): boolean => Number.isInteger(value) && value > 0 && (value & (value - 1)) === 0

const INDEX_MASK = 0xffff
/** The most that `len` of a used element can say. */
const LENGTH_MAX = 0xffff_ffff

/** Whose the head of a chain is: the driver's, the device's, or that of a chain that waits for its turn to be given back. */
const FREE = 0
const TAKEN = 1
const WAITING = 2

/** A virtqueue that a driver has set up. Valid until the driver resets the device or stops the queue. */
export class SplitQueue implements Virtqueue {
  /** The number of entries. */
  readonly size: number
  readonly #walk: ChainWalk
  readonly #order: CompletionOrder | undefined
  readonly #eventIndex: boolean
  readonly #mask: number

  readonly #table: MemoryRegion
  readonly #tableOffset: number
  /** The regions of the rings, and the indices of their fields in the regions' 16-bit words. */
  readonly #available: Uint16Array
  readonly #availableFlags: number
  readonly #availableIndex: number
  readonly #availableEntries: number
  readonly #usedEvent: number
  readonly #used: Uint16Array
  readonly #usedFlags: number
  readonly #usedIndex: number
  readonly #availableEvent: number
  readonly #usedView: DataView
  readonly #usedEntries: number

  /** Position of the next chain to take, and the last `idx` that was read. Both wrap at 16 bits. */
  #taken = 0
  #seen = 0
  /** Position of the next used element, and what the driver was shown. Both wrap at 16 bits. */
  #completed = 0
  #published = 0
  /** The chains that the device has: taken and not completed, and with their heads those that wait for their turn as well. */
  #atWork = 0
  readonly #heads: Uint8Array
  #closed = false

  private constructor(
    memory: GuestMemory,
    setup: QueueSetup,
    table: MemoryRegion,
    available: MemoryRegion,
    used: MemoryRegion
  ) {
    this.#walk = new ChainWalk(memory, setup.size, setup.indirect)
    this.#order = setup.inOrder === true ? new CompletionOrder(setup.size) : undefined
    this.size = setup.size
    this.#mask = setup.size - 1
    this.#eventIndex = setup.eventIndex
    this.#heads = new Uint8Array(setup.size)
    this.#table = table
    this.#tableOffset = setup.descriptorTable - table.guestAddress

    const availableWord = (setup.availableRing - available.guestAddress) / 2
    this.#available = available.words
    this.#availableFlags = availableWord
    this.#availableIndex = availableWord + 1
    this.#availableEntries = availableWord + 2
    this.#usedEvent = availableWord + 2 + setup.size

    const usedOffset = setup.usedRing - used.guestAddress
    this.#used = used.words
    this.#usedFlags = usedOffset / 2
    this.#usedIndex = usedOffset / 2 + 1
    this.#usedView = used.view
    this.#usedEntries = usedOffset + 4
    this.#availableEvent = usedOffset / 2 + 2 + 4 * setup.size
  }

  /** The queue of this set-up, or `undefined` when its size, an alignment or a place in memory is wrong. */
  static make(memory: GuestMemory, setup: QueueSetup): SplitQueue | undefined {
    const { availableRing, descriptorTable, size, usedRing } = setup
    if (!isPowerOfTwo(size) || size > QUEUE_SIZE_MAX) return undefined
    if (
      descriptorTable % DESCRIPTOR_TABLE_ALIGNMENT !== 0 || availableRing % AVAILABLE_RING_ALIGNMENT !== 0 ||
      usedRing % USED_RING_ALIGNMENT !== 0
    ) return undefined
    const table = memory.regionOf(descriptorTable, size * DESCRIPTOR_SIZE)
    const available = memory.regionOf(availableRing, availableRingSize(size))
    const used = memory.regionOf(usedRing, usedRingSize(size))
    if (table === undefined || available === undefined || used === undefined) return undefined
    return new SplitQueue(memory, setup, table, available, used)
  }

  /** What the driver did wrong, once it has. */
  get fault(): QueueFault | undefined {
    return this.#walk.fault
  }

  /** The number of chains that were taken and not yet completed. */
  get inFlight(): number {
    return this.#atWork
  }

  /**
   * Takes the next chain that the driver has made available. Returns `false`, and an empty chain, when there is none or the
   * queue is faulty. The chain's buffers may be used until it is completed.
   */
  take(chain: DescriptorChain): boolean {
    chain.clear()
    if (this.#stopped) return false
    if (this.#taken === this.#seen && !this.#look()) return false
    const head = this.#available[this.#availableEntries + (this.#taken & this.#mask)] ?? 0
    if (head >= this.size) return this.#walk.fail("head-index", `chain ${head} of a queue of ${this.size}`)
    if (this.#heads[head] !== FREE) return this.#walk.fail("head-in-flight", `chain ${head} is made available twice`)
    if (!this.#follow(chain, head)) {
      chain.clear()
      return false
    }
    chain.head = head
    if (this.#order !== undefined) chain.place = this.#order.enter(head, 1)
    this.#heads[head] = TAKEN
    this.#taken = (this.#taken + 1) & INDEX_MASK
    this.#atWork++
    return true
  }

  /**
   * Gives a chain back to the driver; `written` is the number of bytes written at the beginning of its writable buffers. The
   * driver sees it after the next {@link publish}. Chains may be completed in any order, each once; where the driver wants
   * them in order, they wait for their turn. Nothing happens when the queue was closed meanwhile.
   */
  complete(chain: DescriptorChain, written: number): void {
    if (this.#closed) return chain.clear()
    const head = chain.head
    if (this.#heads[head] !== TAKEN) throw new Error(`chain ${head} is not in flight`)
    if (written > chain.writableBytes) {
      throw new RangeError(`${written} bytes in a chain that takes ${chain.writableBytes}`)
    }
    this.#atWork--
    const order = this.#order
    if (order === undefined) {
      this.#use(head, written)
    } else {
      this.#heads[head] = WAITING
      order.complete(chain.place, written)
      for (; order.ready; order.shift()) this.#use(order.id, order.written)
    }
    chain.clear()
  }

  /**
   * Shows the driver all completed chains. Returns whether it wants an interrupt for them (virtio 1.3, section 2.7.7).
   *
   * The index is stored before the driver's wish is read, both in one total order with the driver's store of its wish and
   * read of the index. So either the driver sees the chains, or this sees that it wants to be interrupted.
   */
  publish(): boolean {
    const before = this.#published
    const after = this.#completed
    if (before === after || this.#closed) return false
    Atomics.store(this.#used, this.#usedIndex, after)
    this.#published = after
    if (!this.#eventIndex) {
      return (Atomics.load(this.#available, this.#availableFlags) & VIRTQ_AVAIL_F_NO_INTERRUPT) === 0
    }
    const event = Atomics.load(this.#available, this.#usedEvent)
    return ((after - event - 1) & INDEX_MASK) < ((after - before) & INDEX_MASK)
  }

  /** Tells the driver that the device is at work and needs no notification. It is a hint: notifications may still come. */
  suppressNotifications(): void {
    if (!this.#stopped && !this.#eventIndex) Atomics.store(this.#used, this.#usedFlags, VIRTQ_USED_F_NO_NOTIFY)
  }

  /**
   * Asks the driver for a notification of the next chain. Returns `true` when there is one already: it may have become
   * available before the driver could see the wish, so the caller takes it, or is called again, instead of waiting.
   */
  resumeNotifications(): boolean {
    if (this.#stopped) return false
    if (this.#eventIndex) {
      // With event indices the flags are 0 (section 2.7.10.1), also where a driver has left something else.
      if (this.#used[this.#usedFlags] !== 0) Atomics.store(this.#used, this.#usedFlags, 0)
      Atomics.store(this.#used, this.#availableEvent, this.#taken)
    } else Atomics.store(this.#used, this.#usedFlags, 0)
    return Atomics.load(this.#available, this.#availableIndex) !== this.#taken
  }

  /** Makes the queue faulty: what a chain holds makes no sense to the device. */
  reject(detail: string): void {
    this.#walk.fail("contents", detail)
  }

  /** The driver has stopped the queue: from now on nothing of it is read or written. */
  close(): void {
    this.#closed = true
  }

  get #stopped(): boolean {
    return this.#closed || this.#walk.fault !== undefined
  }

  /** Puts an element into the used ring. */
  #use(head: number, written: number): void {
    const entry = this.#usedEntries + 8 * (this.#completed & this.#mask)
    this.#usedView.setUint32(entry, head, true)
    // `len` has 32 bits, and a chain can have 2^32 bytes: what cannot be said is less than what was written.
    this.#usedView.setUint32(entry + 4, written > LENGTH_MAX ? LENGTH_MAX : written, true)
    this.#completed = (this.#completed + 1) & INDEX_MASK
    this.#heads[head] = FREE
  }

  /**
   * Reads the driver's index. Returns whether there is a chain to take.
   *
   * A driver has at most as many chains outside as the queue has entries: those that it made available and was not yet shown
   * as used. So the index is at most that far before what was published, and not behind what was taken.
   */
  #look(): boolean {
    const index = Atomics.load(this.#available, this.#availableIndex)
    const waiting = (index - this.#taken) & INDEX_MASK
    if (waiting > this.size || ((index - this.#published) & INDEX_MASK) > this.size) {
      return this.#walk.fail(
        "available-index",
        `index ${index} after ${this.#taken} in a queue of ${this.size}`
      )
    }
    this.#seen = index
    return waiting > 0
  }

  #follow(chain: DescriptorChain, head: number): boolean {
    const walk = this.#walk
    let view: DataView = this.#table.view
    let tableOffset = this.#tableOffset
    let entries = this.size
    let inTable = false
    let index = head
    for (;;) {
      const at = tableOffset + index * DESCRIPTOR_SIZE
      const low = view.getUint32(at, true)
      const high = view.getUint32(at + 4, true)
      const length = view.getUint32(at + 8, true)
      const flags = view.getUint16(at + 12, true)
      const next = view.getUint16(at + 14, true)
      if ((flags & VIRTQ_DESC_F_INDIRECT) !== 0) {
        if (inTable) return walk.fail("indirect", "a table of descriptors in a table")
        const region = walk.table(low, high, length, flags)
        if (region === undefined) return false
        view = region.view
        tableOffset = addressFromHalves(low, high) - region.guestAddress
        entries = length / DESCRIPTOR_SIZE
        inTable = true
        index = 0
        continue
      }
      if (!walk.buffer(chain, low, high, length, (flags & VIRTQ_DESC_F_WRITE) !== 0)) return false
      if ((flags & VIRTQ_DESC_F_NEXT) === 0) return true
      if (next >= entries) return walk.fail("next-index", `descriptor ${next} in a table of ${entries}`)
      index = next
    }
  }
}
