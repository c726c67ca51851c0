/** The registers of virtio-mmio and the values in them, by the names of the specification (virtio 1.3, section 4.2.2). */

/** Offsets of the registers in the page, in bytes. R: readable, W: writable by the driver. All have 32 bits but `Config`. */
export const Register = {
  /** {@link MAGIC_VALUE} (R). */
  MagicValue: 0x000,
  /** {@link MMIO_VERSION} (R). */
  Version: 0x004,
  /** Type of the device (R). */
  DeviceID: 0x008,
  /** {@link VENDOR_ID} (R). */
  VendorID: 0x00c,
  /** 32 of the features that the device offers (R). */
  DeviceFeatures: 0x010,
  /** Which 32 (W). */
  DeviceFeaturesSel: 0x014,
  /** 32 of the features that the driver accepts (W). */
  DriverFeatures: 0x020,
  /** Which 32 (W). */
  DriverFeaturesSel: 0x024,
  /** The queue that the queue registers mean (W). */
  QueueSel: 0x030,
  /** The largest size of the queue, 0 when there is no such queue (R). */
  QueueSizeMax: 0x034,
  /** The size of the queue that the driver has chosen (W). */
  QueueSize: 0x038,
  /** 1 when the device may use the queue (RW). */
  QueueReady: 0x044,
  /** The number of a queue with new chains (W). */
  QueueNotify: 0x050,
  /** Why the interrupt came: {@link InterruptCause} (R). */
  InterruptStatus: 0x060,
  /** The causes that the driver has seen (W). */
  InterruptACK: 0x064,
  /** The device status (RW). */
  Status: 0x070,
  /** Guest physical address of the descriptor table, low half (W). */
  QueueDescLow: 0x080,
  /** Its high half (W). */
  QueueDescHigh: 0x084,
  /** Guest physical address of the available ring, low half (W). */
  QueueDriverLow: 0x090,
  /** Its high half (W). */
  QueueDriverHigh: 0x094,
  /** Guest physical address of the used ring, low half (W). */
  QueueDeviceLow: 0x0a0,
  /** Its high half (W). */
  QueueDeviceHigh: 0x0a4,
  /** Length of the selected shared memory region, low half: all ones, there is none (R). */
  SHMLenLow: 0x0b0,
  /** Its high half (R). */
  SHMLenHigh: 0x0b4,
  /** Address of the selected shared memory region, low half (R). */
  SHMBaseLow: 0x0b8,
  /** Its high half (R). */
  SHMBaseHigh: 0x0bc,
  /** Changes with the configuration space (R). */
  ConfigGeneration: 0x0fc,
  /** The device's configuration space, up to the end of the page, accessed in 8, 16 or 32 bits (RW). */
  Config: 0x100
} as const

/** "virt", little-endian. */
export const MAGIC_VALUE = 0x7472_6976
/** The register layout of virtio 1.0 and later. */
export const MMIO_VERSION = 2
/** "TRPE", little-endian. */
export const VENDOR_ID = 0x4550_5254

/** Bits of InterruptStatus and InterruptACK. */
export const InterruptCause = {
  /** The device has used buffers. */
  USED_BUFFERS: 1,
  /** The configuration, or the device status, has changed. */
  CONFIGURATION: 2
} as const
