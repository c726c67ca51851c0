/** Bits of the device status (virtio 1.3, section 2.1), the same on every transport. */
export const DeviceStatus = {
  /** The guest has noticed the device. */
  ACKNOWLEDGE: 1,
  /** The guest knows how to drive it. */
  DRIVER: 2,
  /** The driver is ready. */
  DRIVER_OK: 4,
  /** The features are agreed. */
  FEATURES_OK: 8,
  /** The device cannot go on without a reset. Set by the device. */
  DEVICE_NEEDS_RESET: 64,
  /** The guest has given the device up. */
  FAILED: 128
} as const
