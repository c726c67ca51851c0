/**
 * The driver's side of a split virtqueue (virtio 1.3, section 2.7), as a guest's kernel has it.
 *
 * It is correct, and it checks the device: a chain that comes back twice, that was never given, or with more bytes than it has
 * room for throws and so ends the test. It needs guest memory only, no vCPU.
 */
import type { GuestMemory, MemoryRegion } from "../../GuestMemory.ts"
import { clearedRegion, type DriverBuffer, type QueueDriver, type UsedChain } from "./QueueDriver.ts"

const DESC_F_NEXT = 1
const DESC_F_WRITE = 2
const DESC_F_INDIRECT = 4
const AVAIL_F_NO_INTERRUPT = 1
const USED_F_NO_NOTIFY = 1
const DESCRIPTOR_SIZE = 16
const INDEX_MASK = 0xffff

/** Entries of the indirect table that each descriptor has. */
export const INDIRECT_ENTRIES = 16

export type { DriverBuffer, UsedChain } from "./QueueDriver.ts"

/** Where a queue lies, and what was negotiated. */
export interface SplitQueueOptions {
  readonly memory: GuestMemory
  /** First address of the queue's memory, a multiple of 16; it takes {@link splitQueueMemory} bytes. */
  readonly address: number
  /** The number of entries, a power of two. */
  readonly size: number
  readonly indirect: boolean
  readonly eventIndex: boolean
}

const alignUp = (value: number, alignment: number): number => Math.ceil(value / alignment) * alignment

const layout = (address: number, size: number) => {
  const availableRing = address + size * DESCRIPTOR_SIZE
  const usedRing = alignUp(availableRing + 6 + 2 * size, 4)
  const tables = alignUp(usedRing + 6 + 8 * size, DESCRIPTOR_SIZE)
  return { availableRing, usedRing, tables, end: tables + size * INDIRECT_ENTRIES * DESCRIPTOR_SIZE }
}

/** Bytes of guest memory that a queue with `size` entries takes. */
export const splitQueueMemory = (size: number): number => layout(0, size).end

/** One queue of a driver. */
export class SplitQueueDriver implements QueueDriver {
  readonly size: number
  readonly indirect: boolean
  readonly eventIndex: boolean
  readonly descriptorTable: number
  readonly availableRing: number
  readonly usedRing: number
  readonly #tables: number
  readonly #region: MemoryRegion
  readonly #free: Array<number> = []
  /** The descriptors of each chain that the device has, by head, and how many bytes it may write. */
  readonly #given = new Map<number, { readonly descriptors: ReadonlyArray<number>; readonly room: number }>()
  #added = 0
  #published = 0
  #polled = 0

  constructor(options: SplitQueueOptions) {
    const { address, memory, size } = options
    const places = layout(address, size)
    const region = clearedRegion(memory, address, places.end)
    this.size = size
    this.indirect = options.indirect
    this.eventIndex = options.eventIndex
    this.descriptorTable = address
    this.availableRing = places.availableRing
    this.usedRing = places.usedRing
    this.#tables = places.tables
    this.#region = region
    for (let index = size - 1; index >= 0; index--) this.#free.push(index)
  }

  /** The number of chains that the device has. */
  get inFlight(): number {
    return this.#given.size
  }

  /** Where the queue's three areas are. */
  get areas() {
    return { descriptor: this.descriptorTable, driver: this.availableRing, device: this.usedRing }
  }

  /**
   * Adds a chain; the device sees it after {@link publish}. Returns its head, or `undefined` when there is no room for it. A
   * table of descriptors is used when asked for, where it was negotiated and has room.
   */
  add(buffers: ReadonlyArray<DriverBuffer>, indirect = false): number | undefined {
    if (buffers.length === 0) throw new RangeError("a chain has at least one buffer")
    const inTable = indirect && this.indirect && buffers.length <= INDIRECT_ENTRIES
    const needed = inTable ? 1 : buffers.length
    if (needed > this.#free.length) return undefined
    const descriptors = this.#free.splice(-needed)
    const head = descriptors[0] ?? 0
    if (inTable) {
      const table = this.#tables + head * INDIRECT_ENTRIES * DESCRIPTOR_SIZE
      this.writeDescriptor(head, table, buffers.length * DESCRIPTOR_SIZE, DESC_F_INDIRECT, 0)
      this.#writeChain(table, buffers, buffers.map((_, index) => index))
    } else {
      this.#writeChain(this.descriptorTable, buffers, descriptors)
    }
    const room = buffers.reduce((sum, buffer) => sum + (buffer.writable ? buffer.length : 0), 0)
    this.#given.set(head, { descriptors, room })
    this.writeAvailable(this.#added, head)
    this.#added = (this.#added + 1) & INDEX_MASK
    return head
  }

  /** Shows the device the added chains. Returns whether it wants to be notified of them. */
  publish(): boolean {
    const before = this.#published
    const after = this.#added
    if (before === after) return false
    this.writeAvailableIndex(after)
    this.#published = after
    if (!this.eventIndex) return (this.#load(this.usedRing) & USED_F_NO_NOTIFY) === 0
    const event = this.#load(this.usedRing + 4 + 8 * this.size)
    return ((after - event - 1) & INDEX_MASK) < ((after - before) & INDEX_MASK)
  }

  /** The next chain that the device has used, or `undefined`. */
  poll(): UsedChain | undefined {
    if (this.#load(this.usedRing + 2) === this.#polled) return undefined
    const at = this.#offset(this.usedRing + 4 + 8 * (this.#polled % this.size))
    const head = this.#region.view.getUint32(at, true)
    const written = this.#region.view.getUint32(at + 4, true)
    const chain = this.#given.get(head)
    if (chain === undefined) throw new Error(`the device used chain ${head}, which it does not have`)
    if (written > chain.room) {
      throw new Error(`the device wrote ${written} bytes to a chain that has room for ${chain.room}`)
    }
    this.#given.delete(head)
    this.#free.push(...chain.descriptors)
    this.#polled = (this.#polled + 1) & INDEX_MASK
    return { head, written }
  }

  /** Asks for an interrupt for the next used chain. Returns `true` when there is one already. */
  enableInterrupts(): boolean {
    if (this.eventIndex) this.#store(this.availableRing + 4 + 2 * this.size, this.#polled)
    else this.#store(this.availableRing, 0)
    return this.#load(this.usedRing + 2) !== this.#polled
  }

  /** Asks for no interrupts. It is a hint: with event indices there is no such wish, only an old one. */
  disableInterrupts(): void {
    if (!this.eventIndex) this.#store(this.availableRing, AVAIL_F_NO_INTERRUPT)
  }

  /** Writes a descriptor of the queue's table as it is given, right or wrong. */
  writeDescriptor(index: number, address: number, length: number, flags: number, next: number): void {
    this.#writeDescriptor(this.descriptorTable, index, address, length, flags, next)
  }

  /** Writes an entry of the available ring as it is given, right or wrong. */
  writeAvailable(position: number, head: number): void {
    this.#store(this.availableRing + 4 + 2 * (position % this.size), head)
  }

  /** Writes the index of the available ring as it is given, right or wrong. */
  writeAvailableIndex(index: number): void {
    this.#store(this.availableRing + 2, index & INDEX_MASK)
  }

  #writeChain(table: number, buffers: ReadonlyArray<DriverBuffer>, indices: ReadonlyArray<number>): void {
    buffers.forEach((buffer, i) => {
      const next = indices[i + 1]
      const flags = (buffer.writable ? DESC_F_WRITE : 0) | (next === undefined ? 0 : DESC_F_NEXT)
      this.#writeDescriptor(table, indices[i] ?? 0, buffer.address, buffer.length, flags, next ?? 0)
    })
  }

  #writeDescriptor(table: number, index: number, address: number, length: number, flags: number, next: number): void {
    const at = this.#offset(table + index * DESCRIPTOR_SIZE)
    const view = this.#region.view
    view.setUint32(at, address % 2 ** 32, true)
    view.setUint32(at + 4, Math.floor(address / 2 ** 32), true)
    view.setUint32(at + 8, length, true)
    view.setUint16(at + 12, flags, true)
    view.setUint16(at + 14, next, true)
  }

  #offset(address: number): number {
    return address - this.#region.guestAddress
  }

  #load(address: number): number {
    return Atomics.load(this.#region.words, this.#offset(address) / 2)
  }

  #store(address: number, value: number): void {
    Atomics.store(this.#region.words, this.#offset(address) / 2, value)
  }
}
