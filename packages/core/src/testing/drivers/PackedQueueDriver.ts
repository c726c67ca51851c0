/**
 * The driver's side of a packed virtqueue (virtio 1.3, section 2.8), as a guest's kernel has it.
 *
 * It is correct, and it checks the device: a chain that comes back twice, that was never given, or with more bytes than it has
 * room for throws and so ends the test. It needs guest memory only, no vCPU.
 */
import type { GuestMemory, MemoryRegion } from "../../GuestMemory.ts"
import { clearedRegion, type DriverBuffer, type QueueDriver, type UsedChain } from "./QueueDriver.ts"

const DESC_F_NEXT = 1
const DESC_F_WRITE = 2
const DESC_F_INDIRECT = 4
const DESC_F_AVAIL = 0x80
const DESC_F_USED = 0x8000
const EVENT_ENABLE = 0
const EVENT_DISABLE = 1
const EVENT_DESC = 2
const DESCRIPTOR_SIZE = 16

/** Entries of the indirect table that each id has. */
export const PACKED_INDIRECT_ENTRIES = 16

/** Where a queue lies, and what was negotiated. */
export interface PackedQueueOptions {
  readonly memory: GuestMemory
  /** First address of the queue's memory, a multiple of 16; it takes {@link packedQueueMemory} bytes. */
  readonly address: number
  /** The number of entries. */
  readonly size: number
  readonly indirect: boolean
  readonly eventIndex: boolean
}

const layout = (address: number, size: number) => {
  const driverEvents = address + size * DESCRIPTOR_SIZE
  const deviceEvents = driverEvents + 4
  const tables = driverEvents + DESCRIPTOR_SIZE
  return { driverEvents, deviceEvents, tables, end: tables + size * PACKED_INDIRECT_ENTRIES * DESCRIPTOR_SIZE }
}

/** Bytes of guest memory that a queue with `size` entries takes. */
export const packedQueueMemory = (size: number): number => layout(0, size).end

/** One queue of a driver. */
export class PackedQueueDriver implements QueueDriver {
  readonly size: number
  readonly indirect: boolean
  readonly eventIndex: boolean
  readonly descriptorRing: number
  readonly driverEvents: number
  readonly deviceEvents: number
  readonly #tables: number
  readonly #region: MemoryRegion
  readonly #freeIds: Array<number> = []
  #freeEntries: number
  /** Of each chain that the device has, by id: how many entries it takes, and how many bytes the device may write. */
  readonly #given = new Map<number, { readonly entries: number; readonly room: number }>()
  #next = 0
  #nextWrap = 1
  #polled = 0
  #polledWrap = 1
  /** The first entry that was added and not yet shown, and how many were added since. */
  #first = { slot: 0, wrap: 1, flags: 0 }
  #unpublished = 0

  constructor(options: PackedQueueOptions) {
    const { address, memory, size } = options
    const places = layout(address, size)
    const region = clearedRegion(memory, address, places.end)
    this.size = size
    this.indirect = options.indirect
    this.eventIndex = options.eventIndex
    this.descriptorRing = address
    this.driverEvents = places.driverEvents
    this.deviceEvents = places.deviceEvents
    this.#tables = places.tables
    this.#region = region
    this.#freeEntries = size
    for (let id = size - 1; id >= 0; id--) this.#freeIds.push(id)
  }

  /** The number of chains that the device has. */
  get inFlight(): number {
    return this.#given.size
  }

  /** Where the queue's three areas are. */
  get areas() {
    return { descriptor: this.descriptorRing, driver: this.driverEvents, device: this.deviceEvents }
  }

  /**
   * Adds a chain; the device sees it after {@link publish}. Returns its id, or `undefined` when there is no room for it. A table
   * of descriptors is used when asked for, where it was negotiated and has room.
   */
  add(buffers: ReadonlyArray<DriverBuffer>, indirect = false): number | undefined {
    if (buffers.length === 0) throw new RangeError("a chain has at least one buffer")
    const inTable = indirect && this.indirect && buffers.length <= PACKED_INDIRECT_ENTRIES
    const entries = inTable ? 1 : buffers.length
    if (entries > this.#freeEntries) return undefined
    const id = this.#freeIds.pop()
    if (id === undefined) return undefined
    this.#freeEntries -= entries
    const room = buffers.reduce((sum, buffer) => sum + (buffer.writable ? buffer.length : 0), 0)
    this.#given.set(id, { entries, room })
    if (inTable) {
      const table = this.#tables + id * PACKED_INDIRECT_ENTRIES * DESCRIPTOR_SIZE
      buffers.forEach((buffer, i) => {
        this.writeDescriptor(
          table + i * DESCRIPTOR_SIZE,
          buffer.address,
          buffer.length,
          0,
          buffer.writable ? DESC_F_WRITE : 0
        )
      })
      this.#write(table, buffers.length * DESCRIPTOR_SIZE, id, DESC_F_INDIRECT)
    } else {
      buffers.forEach((buffer, i) => {
        const flags = (buffer.writable ? DESC_F_WRITE : 0) | (i + 1 < buffers.length ? DESC_F_NEXT : 0)
        this.#write(buffer.address, buffer.length, id, flags)
      })
    }
    return id
  }

  /** Shows the device the added chains. Returns whether it wants to be notified of them. */
  publish(): boolean {
    const count = this.#unpublished
    if (count === 0) return false
    const { flags, slot, wrap } = this.#first
    this.#store(this.descriptorRing + slot * DESCRIPTOR_SIZE + 14, flags)
    this.#unpublished = 0
    const wish = this.#load(this.deviceEvents + 2) & 3
    if (wish !== EVENT_DESC) return wish === EVENT_ENABLE
    const event = this.#load(this.deviceEvents)
    const place = (event & 0x7fff) + (event >>> 15 === wrap ? 0 : this.size)
    return place >= slot && place < slot + count
  }

  /** The next chain that the device has used, or `undefined`. */
  poll(): UsedChain | undefined {
    const flags = this.#load(this.descriptorRing + this.#polled * DESCRIPTOR_SIZE + 14)
    if (!this.#isUsed(flags)) return undefined
    const at = this.descriptorRing + this.#polled * DESCRIPTOR_SIZE - this.#region.guestAddress
    const id = this.#region.view.getUint16(at + 12, true)
    const written = this.#region.view.getUint32(at + 8, true)
    const chain = this.#given.get(id)
    if (chain === undefined) throw new Error(`the device used chain ${id}, which it does not have`)
    if (written > chain.room) {
      throw new Error(`the device wrote ${written} bytes to a chain that has room for ${chain.room}`)
    }
    this.#given.delete(id)
    this.#freeIds.push(id)
    this.#freeEntries += chain.entries
    this.#polled += chain.entries
    if (this.#polled >= this.size) {
      this.#polled -= this.size
      this.#polledWrap ^= 1
    }
    return { head: id, written }
  }

  /** Asks for an interrupt for the next used chain. Returns `true` when there is one already. */
  enableInterrupts(): boolean {
    if (this.eventIndex) {
      this.#store(this.driverEvents, this.#polled | this.#polledWrap << 15)
      this.#store(this.driverEvents + 2, EVENT_DESC)
    } else this.#store(this.driverEvents + 2, EVENT_ENABLE)
    return this.#isUsed(this.#load(this.descriptorRing + this.#polled * DESCRIPTOR_SIZE + 14))
  }

  /** Asks for no interrupts. It is a hint. */
  disableInterrupts(): void {
    this.#store(this.driverEvents + 2, EVENT_DISABLE)
  }

  /** Writes a descriptor as it is given, right or wrong, at a guest physical address. */
  writeDescriptor(address: number, buffer: number, length: number, id: number, flags: number): void {
    const at = address - this.#region.guestAddress
    const view = this.#region.view
    view.setUint32(at, buffer % 2 ** 32, true)
    view.setUint32(at + 4, Math.floor(buffer / 2 ** 32), true)
    view.setUint32(at + 8, length, true)
    view.setUint16(at + 12, id, true)
    view.setUint16(at + 14, flags, true)
  }

  #isUsed(flags: number): boolean {
    const both = DESC_F_AVAIL | DESC_F_USED
    return (flags & both) === (this.#polledWrap === 1 ? both : 0)
  }

  /** Writes the next entry of the ring. The flags of the first one wait until {@link publish}. */
  #write(address: number, length: number, id: number, flags: number): void {
    const lap = this.#nextWrap === 1 ? DESC_F_AVAIL : DESC_F_USED
    const at = this.descriptorRing + this.#next * DESCRIPTOR_SIZE
    const old = this.#load(at + 14)
    const first = this.#unpublished++ === 0
    if (first) this.#first = { slot: this.#next, wrap: this.#nextWrap, flags: flags | lap }
    this.writeDescriptor(at, address, length, id, first ? old : flags | lap)
    if (++this.#next === this.size) {
      this.#next = 0
      this.#nextWrap ^= 1
    }
  }

  #load(address: number): number {
    return Atomics.load(this.#region.words, (address - this.#region.guestAddress) / 2)
  }

  #store(address: number, value: number): void {
    Atomics.store(this.#region.words, (address - this.#region.guestAddress) / 2, value)
  }
}
