/** The driver's side of a virtqueue, whatever the format of its rings: what `SplitQueueDriver` and `PackedQueueDriver` have alike. */
import type { GuestMemory, MemoryRegion } from "../../GuestMemory.ts"

/** Alignment of a queue's memory in bytes, which is also the size of a descriptor. */
const QUEUE_ALIGNMENT = 16

/** The region that holds a queue's memory, `[address, end)`, which is zero then. Throws where there is no such memory. */
export const clearedRegion = (memory: GuestMemory, address: number, end: number): MemoryRegion => {
  const region = memory.regionOf(address, end - address)
  if (region === undefined || address % QUEUE_ALIGNMENT !== 0) {
    throw new RangeError(`no room for a queue at ${address}`)
  }
  region.bytes.fill(0, address - region.guestAddress, end - region.guestAddress)
  return region
}

/** A buffer of a chain. */
export interface DriverBuffer {
  /** Guest physical address. */
  readonly address: number
  /** Length in bytes. */
  readonly length: number
  /** Whether the device writes it. Buffers that it reads come first. */
  readonly writable: boolean
}

/** A chain that the device has used. */
export interface UsedChain {
  /** What {@link QueueDriver.add} returned. */
  readonly head: number
  /** How many bytes the device says that it has written. */
  readonly written: number
}

/** Where a queue is (virtio 1.3, section 2.6). */
export interface QueuePlace {
  /** The number of entries. */
  readonly size: number
  /** First addresses of its three areas. */
  readonly areas: { readonly descriptor: number; readonly driver: number; readonly device: number }
}

/** One queue of a driver. */
export interface QueueDriver extends QueuePlace {
  /** The number of chains that the device has. */
  readonly inFlight: number
  /**
   * Adds a chain; the device sees it after {@link publish}. Returns what its end will name it by, or `undefined` when there is
   * no room for it. A table of descriptors is used when asked for, where it was negotiated and has room.
   */
  readonly add: (buffers: ReadonlyArray<DriverBuffer>, indirect?: boolean) => number | undefined
  /** Shows the device the added chains. Returns whether it wants to be notified of them. */
  readonly publish: () => boolean
  /** The next chain that the device has used, or `undefined`. */
  readonly poll: () => UsedChain | undefined
  /** Asks for an interrupt for the next used chain. Returns `true` when there is one already. */
  readonly enableInterrupts: () => boolean
  /** Asks for no interrupts. It is a hint. */
  readonly disableInterrupts: () => void
}
