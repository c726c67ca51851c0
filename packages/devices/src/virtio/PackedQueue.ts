/**
 * The device's side of a packed virtqueue (virtio 1.3, section 2.8).
 *
 * There is one ring, of descriptors, which both sides write: the driver makes a chain available in as many entries as it has
 * descriptors, and the device writes what it has used over entries that it took before. Two bits of each entry say on which
 * lap around the ring either side has been there. What was said of guest memory in `SplitQueue.ts` holds here as well.
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

/** The largest size of a packed virtqueue (section 2.8.10.1). It need not be a power of two. */
export const PACKED_QUEUE_SIZE_MAX = 32768
/** In a descriptor's flags: the driver's lap counter when it made the descriptor available. */
export const VIRTQ_DESC_F_AVAIL = 1 << 7
/** In a descriptor's flags: the device's lap counter when it used the descriptor; the opposite of the driver's before. */
export const VIRTQ_DESC_F_USED = 1 << 15
/** Event suppression: tell me of everything. */
export const RING_EVENT_FLAGS_ENABLE = 0
/** Event suppression: tell me of nothing. */
export const RING_EVENT_FLAGS_DISABLE = 1
/** Event suppression: tell me of the descriptor that the other field names. With `VIRTIO_F_EVENT_IDX` only. */
export const RING_EVENT_FLAGS_DESC = 2
/** Alignment of the descriptor ring in bytes. */
export const DESCRIPTOR_RING_ALIGNMENT = 16
/** Size and alignment of an event suppression structure in bytes. */
export const EVENT_SUPPRESSION_SIZE = 4

/** How a driver has set a queue up. Addresses are guest physical. */
export interface PackedQueueSetup {
  readonly size: number
  readonly descriptorRing: number
  /** The structure that the driver writes. */
  readonly driverEvents: number
  /** The structure that the device writes. */
  readonly deviceEvents: number
  /** `VIRTIO_F_INDIRECT_DESC` was negotiated. */
  readonly indirect: boolean
  /** `VIRTIO_F_EVENT_IDX` was negotiated. */
  readonly eventIndex: boolean
  /** `VIRTIO_F_IN_ORDER` was negotiated. Default: `false`. */
  readonly inOrder?: boolean
}

const OFFSET_MASK = 0x7fff
const WRAP_SHIFT = 15
const EVENT_FLAGS_MASK = 3
const LENGTH_MAX = 0xffff_ffff
/** Words of 16 bits in a descriptor, and which of them the flags are. */
const WORDS = DESCRIPTOR_SIZE / 2
const FLAGS_WORD = 7

/** Whether flags say that the driver has made a descriptor available on this lap. */
const isAvailable = (flags: number, wrap: number): boolean =>
  (flags >>> 7 & 1) === wrap && (flags >>> WRAP_SHIFT & 1) !== wrap

/** A packed virtqueue that a driver has set up. Valid until the driver resets the device or stops the queue. */
export class PackedQueue implements Virtqueue {
  /** The number of entries. */
  readonly size: number
  readonly #walk: ChainWalk
  readonly #order: CompletionOrder | undefined
  readonly #eventIndex: boolean

  /** The region of the ring, where the ring begins in it, and the flags of its first entry among the 16-bit words. */
  readonly #view: DataView
  readonly #offset: number
  readonly #words: Uint16Array
  readonly #flags: number
  /** The event suppression structures: first the descriptor that is named, then the flags. */
  readonly #driver: Uint16Array
  readonly #driverEvent: number
  readonly #device: Uint16Array
  readonly #deviceEvent: number

  /** The entry where the next chain is to come, and the lap. */
  #next = 0
  #nextWrap = 1
  /** The entry where the next chain that is given back goes, and the lap. */
  #used = 0
  #usedWrap = 1
  /** The first entry that was used and not yet shown, its lap and flags, and how many entries were used since. */
  #first = 0
  #firstWrap = 1
  #firstFlags = 0
  #unpublished = 0
  /** Entries of chains that were taken and not yet given back. */
  #outside = 0
  #atWork = 0
  /** A bit for each id: whether a chain of this id is outside. */
  readonly #ids = new Uint32Array(0x1_0000 / 32)
  #closed = false

  private constructor(
    memory: GuestMemory,
    setup: PackedQueueSetup,
    ring: MemoryRegion,
    driver: MemoryRegion,
    device: MemoryRegion
  ) {
    this.size = setup.size
    this.#walk = new ChainWalk(memory, setup.size, setup.indirect)
    this.#order = setup.inOrder === true ? new CompletionOrder(setup.size) : undefined
    this.#eventIndex = setup.eventIndex
    this.#view = ring.view
    this.#words = ring.words
    this.#offset = setup.descriptorRing - ring.guestAddress
    this.#flags = this.#offset / 2 + FLAGS_WORD
    this.#driver = driver.words
    this.#driverEvent = (setup.driverEvents - driver.guestAddress) / 2
    this.#device = device.words
    this.#deviceEvent = (setup.deviceEvents - device.guestAddress) / 2
  }

  /** The queue of this set-up, or `undefined` when its size, an alignment or a place in memory is wrong. */
  static make(memory: GuestMemory, setup: PackedQueueSetup): PackedQueue | undefined {
    const { descriptorRing, deviceEvents, driverEvents, size } = setup
    if (!Number.isInteger(size) || size < 1 || size > PACKED_QUEUE_SIZE_MAX) return undefined
    if (
      descriptorRing % DESCRIPTOR_RING_ALIGNMENT !== 0 || driverEvents % EVENT_SUPPRESSION_SIZE !== 0 ||
      deviceEvents % EVENT_SUPPRESSION_SIZE !== 0
    ) return undefined
    const ring = memory.regionOf(descriptorRing, size * DESCRIPTOR_SIZE)
    const driver = memory.regionOf(driverEvents, EVENT_SUPPRESSION_SIZE)
    const device = memory.regionOf(deviceEvents, EVENT_SUPPRESSION_SIZE)
    if (ring === undefined || driver === undefined || device === undefined) return undefined
    return new PackedQueue(memory, setup, ring, driver, device)
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
   *
   * The flags of a chain's first descriptor are read before anything else of it, and written last by a correct driver.
   */
  take(chain: DescriptorChain): boolean {
    chain.clear()
    if (this.#stopped) return false
    const flags = Atomics.load(this.#words, this.#flags + WORDS * this.#next)
    if (!isAvailable(flags, this.#nextWrap)) return false
    const id = this.#follow(chain, flags)
    if (id < 0) {
      chain.clear()
      return false
    }
    chain.head = id
    const { entries } = chain
    if (this.#order !== undefined) chain.place = this.#order.enter(id, entries)
    this.#ids[id >>> 5] = (this.#ids[id >>> 5] ?? 0) | 1 << (id & 31)
    this.#outside += entries
    this.#atWork++
    this.#next += entries
    if (this.#next >= this.size) {
      this.#next -= this.size
      this.#nextWrap ^= 1
    }
    return true
  }

  /**
   * Gives a chain back to the driver; `written` is the number of bytes written at the beginning of its writable buffers. The
   * driver sees it after the next {@link publish}. Chains may be completed in any order, each once; where the driver wants
   * them in order, they wait for their turn. Nothing happens when the queue was closed meanwhile.
   */
  complete(chain: DescriptorChain, written: number): void {
    if (this.#closed) return chain.clear()
    const id = chain.head
    if (id < 0 || !this.#isOutside(id)) throw new Error(`chain ${id} is not in flight`)
    if (written > chain.writableBytes) {
      throw new RangeError(`${written} bytes in a chain that takes ${chain.writableBytes}`)
    }
    this.#atWork--
    const order = this.#order
    if (order === undefined) {
      this.#use(id, chain.entries, written)
    } else {
      order.complete(chain.place, written)
      for (; order.ready; order.shift()) this.#use(order.id, order.descriptors, order.written)
    }
    chain.clear()
  }

  /**
   * Shows the driver all completed chains. Returns whether it wants an interrupt for them (section 2.8.4).
   *
   * All entries but the first are written already, and a driver does not look at them before it has seen the first. Its wish is
   * read after that, both in one total order with the driver's store of its wish and read of the entry.
   */
  publish(): boolean {
    const count = this.#unpublished
    if (count === 0 || this.#closed) return false
    Atomics.store(this.#words, this.#flags + WORDS * this.#first, this.#firstFlags)
    this.#unpublished = 0
    const flags = Atomics.load(this.#driver, this.#driverEvent + 1) & EVENT_FLAGS_MASK
    if (flags === RING_EVENT_FLAGS_DISABLE) return false
    if (flags !== RING_EVENT_FLAGS_DESC || !this.#eventIndex) return true
    const event = Atomics.load(this.#driver, this.#driverEvent)
    // The place that is named, on the lap of the first entry or on the next one.
    const place = (event & OFFSET_MASK) + (event >>> WRAP_SHIFT === this.#firstWrap ? 0 : this.size)
    return place >= this.#first && place < this.#first + count
  }

  /** Tells the driver that the device is at work and needs no notification. It is a hint: notifications may still come. */
  suppressNotifications(): void {
    if (!this.#stopped) Atomics.store(this.#device, this.#deviceEvent + 1, RING_EVENT_FLAGS_DISABLE)
  }

  /**
   * Asks the driver for a notification of the next chain. Returns `true` when there is one already: it may have become
   * available before the driver could see the wish, so the caller takes it, or is called again, instead of waiting.
   */
  resumeNotifications(): boolean {
    if (this.#stopped) return false
    if (this.#eventIndex) {
      Atomics.store(this.#device, this.#deviceEvent, this.#next | this.#nextWrap << WRAP_SHIFT)
      Atomics.store(this.#device, this.#deviceEvent + 1, RING_EVENT_FLAGS_DESC)
    } else Atomics.store(this.#device, this.#deviceEvent + 1, RING_EVENT_FLAGS_ENABLE)
    return isAvailable(Atomics.load(this.#words, this.#flags + WORDS * this.#next), this.#nextWrap)
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

  #isOutside(id: number): boolean {
    return ((this.#ids[id >>> 5] ?? 0) >>> (id & 31) & 1) !== 0
  }

  /** Writes what was used over the next entry, and leaves out as many as the chain had. */
  #use(id: number, entries: number, written: number): void {
    const slot = this.#used
    const at = this.#offset + slot * DESCRIPTOR_SIZE
    // `len` has 32 bits, and a chain can have 2^32 bytes: what cannot be said is less than what was written.
    this.#view.setUint32(at + 8, written > LENGTH_MAX ? LENGTH_MAX : written, true)
    this.#view.setUint16(at + 12, id, true)
    const flags = (this.#usedWrap === 1 ? VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED : 0) |
      (written > 0 ? VIRTQ_DESC_F_WRITE : 0)
    if (this.#unpublished === 0) {
      this.#first = slot
      this.#firstWrap = this.#usedWrap
      this.#firstFlags = flags
    } else this.#view.setUint16(at + 14, flags, true)
    this.#ids[id >>> 5] = (this.#ids[id >>> 5] ?? 0) & ~(1 << (id & 31))
    this.#unpublished += entries
    this.#outside -= entries
    this.#used = slot + entries
    if (this.#used >= this.size) {
      this.#used -= this.size
      this.#usedWrap ^= 1
    }
  }

  /**
   * Follows a chain from the next entry on, whose flags were read, and notes how many entries it takes. Returns its id, which is
   * in its last descriptor, or -1.
   */
  #follow(chain: DescriptorChain, firstFlags: number): number {
    const walk = this.#walk
    const view = this.#view
    // Not more entries than the driver can have made available: those that it was not yet shown as used are not its own.
    const entriesMax = this.size - this.#outside - this.#unpublished
    let slot = this.#next
    let wrap = this.#nextWrap
    let flags = firstFlags
    for (;;) {
      if (chain.entries === entriesMax) {
        walk.fail("available-index", `more descriptors are available than the ${this.size} of the queue`)
        return -1
      }
      chain.entries++
      const at = this.#offset + slot * DESCRIPTOR_SIZE
      const low = view.getUint32(at, true)
      const high = view.getUint32(at + 4, true)
      const length = view.getUint32(at + 8, true)
      const id = view.getUint16(at + 12, true)
      if ((flags & VIRTQ_DESC_F_INDIRECT) !== 0) {
        // A list has descriptors of one kind only (section 2.8.5), unlike a split ring's.
        if (chain.entries > 1) {
          walk.fail("indirect", "a table of descriptors after other buffers")
          return -1
        }
        const region = walk.table(low, high, length, flags)
        if (region === undefined) return -1
        const table = addressFromHalves(low, high) - region.guestAddress
        if (!this.#followTable(chain, region.view, table, length / DESCRIPTOR_SIZE)) return -1
      } else if (!walk.buffer(chain, low, high, length, (flags & VIRTQ_DESC_F_WRITE) !== 0)) return -1
      if ((flags & VIRTQ_DESC_F_NEXT) === 0) {
        if (!this.#isOutside(id)) return id
        walk.fail("head-in-flight", `chain ${id} is made available twice`)
        return -1
      }
      if (++slot === this.size) {
        slot = 0
        wrap ^= 1
      }
      flags = view.getUint16(this.#offset + slot * DESCRIPTOR_SIZE + 14, true)
      if (!isAvailable(flags, wrap)) {
        walk.fail("next-index", `a chain goes on in descriptor ${slot}, which is not available`)
        return -1
      }
    }
  }

  /** The descriptors of a table follow each other; of their flags only the direction counts (section 2.8.7). */
  #followTable(chain: DescriptorChain, view: DataView, table: number, entries: number): boolean {
    for (let i = 0; i < entries; i++) {
      const at = table + i * DESCRIPTOR_SIZE
      const low = view.getUint32(at, true)
      const high = view.getUint32(at + 4, true)
      const length = view.getUint32(at + 8, true)
      const writable = (view.getUint16(at + 14, true) & VIRTQ_DESC_F_WRITE) !== 0
      if (!this.#walk.buffer(chain, low, high, length, writable)) return false
    }
    return true
  }
}
