/** Feature bits of virtio devices: 64 of them, as two unsigned halves (virtio 1.3, section 2.2 and chapter 6). */

/** Descriptors may refer to tables of descriptors. */
export const VIRTIO_F_INDIRECT_DESC = 28
/** `used_event` and `avail_event` instead of the flags say when to interrupt and when to notify. */
export const VIRTIO_F_EVENT_IDX = 29
/** The device follows virtio 1.0 or later. */
export const VIRTIO_F_VERSION_1 = 32
/** Queues have the packed format (section 2.8). */
export const VIRTIO_F_RING_PACKED = 34
/** Buffers come back in the order in which they were made available. */
export const VIRTIO_F_IN_ORDER = 35

/** A set of feature bits. */
export interface Features {
  /** Bits 0 to 31. */
  readonly low: number
  /** Bits 32 to 63. */
  readonly high: number
}

/** The set of these bits, each 0 to 63. */
export const makeFeatures = (...bits: ReadonlyArray<number>): Features => {
  let low = 0
  let high = 0
  for (const bit of bits) {
    if (bit < 32) low |= 1 << bit
    else high |= 1 << (bit - 32)
  }
  return { low: low >>> 0, high: high >>> 0 }
}

/** Whether a bit, 0 to 63, is in the set. */
export const hasFeature = (features: Features, bit: number): boolean =>
  ((bit < 32 ? features.low >>> bit : features.high >>> (bit - 32)) & 1) !== 0

/** All bits that are in one of the sets. */
export const unionFeatures = (a: Features, b: Features): Features => ({
  low: (a.low | b.low) >>> 0,
  high: (a.high | b.high) >>> 0
})

/** Whether all bits of `part` are in `whole`. */
export const includesFeatures = (whole: Features, part: Features): boolean =>
  (part.low & ~whole.low) === 0 && (part.high & ~whole.high) === 0
