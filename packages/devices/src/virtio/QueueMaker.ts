/** The one place where a virtqueue is made out of what a driver has set up and negotiated, whatever its format. */
import type { GuestMemory } from "@troupe/core/GuestMemory"
import {
  type Features,
  hasFeature,
  makeFeatures,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_IN_ORDER,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_VERSION_1
} from "./Features.ts"
import { PackedQueue } from "./PackedQueue.ts"
import { SplitQueue } from "./SplitQueue.ts"
import type { Virtqueue } from "./Virtqueue.ts"

/**
 * The features that queues and transports implement, offered with every device. What only some devices can keep to, such as
 * `VIRTIO_F_IN_ORDER`, is among the features of those devices.
 */
export const TRANSPORT_FEATURES: Features = makeFeatures(
  VIRTIO_F_VERSION_1,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_EVENT_IDX
)

/** How a driver has set a queue up (virtio 1.3, section 2.6). Addresses are guest physical, and -1 above 2^52. */
export interface VirtqueueSetup {
  readonly size: number
  /** Split: the descriptor table. Packed: the descriptor ring. */
  readonly descriptorArea: number
  /** Split: the available ring. Packed: the driver's event suppression structure. */
  readonly driverArea: number
  /** Split: the used ring. Packed: the device's event suppression structure. */
  readonly deviceArea: number
  /** What was negotiated. */
  readonly features: Features
}

/** The queue of this set-up, or `undefined` when its size, an alignment or a place in memory is wrong. */
export const makeVirtqueue = (memory: GuestMemory, setup: VirtqueueSetup): Virtqueue | undefined => {
  const { descriptorArea, deviceArea, driverArea, features, size } = setup
  const indirect = hasFeature(features, VIRTIO_F_INDIRECT_DESC)
  const eventIndex = hasFeature(features, VIRTIO_F_EVENT_IDX)
  const inOrder = hasFeature(features, VIRTIO_F_IN_ORDER)
  return hasFeature(features, VIRTIO_F_RING_PACKED)
    ? PackedQueue.make(memory, {
      size,
      descriptorRing: descriptorArea,
      driverEvents: driverArea,
      deviceEvents: deviceArea,
      indirect,
      eventIndex,
      inOrder
    })
    : SplitQueue.make(memory, {
      size,
      descriptorTable: descriptorArea,
      availableRing: driverArea,
      usedRing: deviceArea,
      indirect,
      eventIndex,
      inOrder
    })
}
