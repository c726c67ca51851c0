/** A driver and a device on one queue in plain memory, in both formats. */
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import { PackedQueueDriver } from "@troupe/core/testing/drivers/PackedQueueDriver"
import type { DriverBuffer, QueueDriver } from "@troupe/core/testing/drivers/QueueDriver"
import { SplitQueueDriver } from "@troupe/core/testing/drivers/SplitQueueDriver"
import {
  makeFeatures,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_VERSION_1
} from "../src/virtio/Features.ts"
import { makeVirtqueue } from "../src/virtio/QueueMaker.ts"
import type { Virtqueue } from "../src/virtio/Virtqueue.ts"

const MEMORY_SIZE = 0x10_0000
const QUEUE_ADDRESS = 0x1000
/** Where the buffers of tests begin. */
export const DATA_ADDRESS = 0x8_0000

/** What was negotiated. */
export interface PairOptions {
  readonly size: number
  readonly indirect: boolean
  readonly eventIndex: boolean
  readonly inOrder: boolean
}

/** Both sides. */
export interface Pair {
  readonly memory: GuestMemory
  readonly driver: QueueDriver
  readonly queue: Virtqueue
}

/** Makes a pair, on a packed ring or on a split one. */
export const pairOf = (packed: boolean) => (options: PairOptions): Pair => {
  const { eventIndex, inOrder, indirect, size } = options
  const memory = new GuestMemory([new MemoryRegion(0, new ArrayBuffer(MEMORY_SIZE))])
  const place = { memory, address: QUEUE_ADDRESS, size, indirect, eventIndex }
  const driver = packed ? new PackedQueueDriver(place) : new SplitQueueDriver(place)
  const queue = makeVirtqueue(memory, {
    size,
    descriptorArea: driver.areas.descriptor,
    driverArea: driver.areas.driver,
    deviceArea: driver.areas.device,
    features: makeFeatures(
      VIRTIO_F_VERSION_1,
      ...(packed ? [VIRTIO_F_RING_PACKED] : []),
      ...(indirect ? [VIRTIO_F_INDIRECT_DESC] : []),
      ...(eventIndex ? [VIRTIO_F_EVENT_IDX] : []),
      ...(inOrder ? [VIRTIO_F_IN_ORDER] : [])
    )
  })
  if (queue === undefined) throw new Error("the queue is refused")
  return { memory, driver, queue }
}

/** Both formats, with sizes that they can have. */
export const FORMATS = [
  { name: "split", pair: pairOf(false), sizes: [1, 2, 4, 16] },
  { name: "packed", pair: pairOf(true), sizes: [1, 2, 3, 5, 16, 17] }
]

/** A buffer of a chain. */
export const buffer = (address: number, length: number, writable = false): DriverBuffer => ({
  address,
  length,
  writable
})
