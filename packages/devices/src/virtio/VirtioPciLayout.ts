/** Where everything of a virtio-pci function is, by the names of the specification (virtio 1.3, section 4.1). */

/** The vendor of all virtio devices, and what their device identifiers begin at (section 4.1.2). */
export const VIRTIO_PCI_VENDOR = 0x1af4
export const VIRTIO_PCI_DEVICE_BASE = 0x1040
/** A device that is not transitional has at least this revision, and a subsystem identifier of at least 0x40. */
export const VIRTIO_PCI_REVISION = 1
export const VIRTIO_PCI_SUBSYSTEM = 0x40

/** Kinds of capabilities (section 4.1.4). */
export const VirtioPciCap = {
  COMMON_CFG: 1,
  NOTIFY_CFG: 2,
  ISR_CFG: 3,
  DEVICE_CFG: 4,
  PCI_CFG: 5
} as const

/** Registers of the common configuration (section 4.1.4.3). */
export const Common = {
  /** 32 bits (RW). */
  device_feature_select: 0x00,
  /** 32 bits (R). */
  device_feature: 0x04,
  /** 32 bits (RW). */
  driver_feature_select: 0x08,
  /** 32 bits (RW). */
  driver_feature: 0x0c,
  /** 16 bits: the vector for configuration changes (RW). */
  config_msix_vector: 0x10,
  /** 16 bits (R). */
  num_queues: 0x12,
  /** 8 bits (RW). */
  device_status: 0x14,
  /** 8 bits (R). */
  config_generation: 0x15,
  /** 16 bits (RW). */
  queue_select: 0x16,
  /** 16 bits: 0 when there is no such queue (RW). */
  queue_size: 0x18,
  /** 16 bits (RW). */
  queue_msix_vector: 0x1a,
  /** 16 bits (RW). */
  queue_enable: 0x1c,
  /** 16 bits (R). */
  queue_notify_off: 0x1e,
  /** 64 bits in two halves (RW). */
  queue_desc: 0x20,
  /** 64 bits in two halves (RW). */
  queue_driver: 0x28,
  /** 64 bits in two halves (RW). */
  queue_device: 0x30,
  /** Of features that are not offered; read as 0. */
  queue_notif_config_data: 0x38,
  queue_reset: 0x3a,
  /** Behind the registers. */
  End: 0x40
} as const

/** The vector that none is (section 4.1.5.1.2). */
export const VIRTIO_MSI_NO_VECTOR = 0xffff

/** Bits of the ISR status (section 4.1.4.5). */
export const IsrStatus = {
  QUEUE: 1,
  CONFIGURATION: 2
} as const

/**
 * The memory of a function. Behind the first register are pages that the guest reads without an exit: common and device
 * configuration on one, MSI-X on one of its own. Behind the second is what a read or a write has an effect on: the ISR status,
 * which a read clears, and the doorbells.
 */
export const PciMemoryLayout = {
  /** Base address registers. */
  PAGES: 0,
  CALLS: 2,
  /** In the pages. */
  COMMON: 0x000,
  DEVICE_CONFIG: 0x100,
  MSIX: 0x1000,
  PAGES_SIZE: 0x2000,
  /** In the calls. */
  ISR: 0x000,
  NOTIFY: 0x100,
  CALLS_SIZE: 0x1000
} as const

/** Bytes from one queue's doorbell to the next. */
export const NOTIFY_OFF_MULTIPLIER = 4
/** The most queues of a device for whose doorbells there is room. */
export const PCI_QUEUES_MAX = (PciMemoryLayout.CALLS_SIZE - PciMemoryLayout.NOTIFY) / NOTIFY_OFF_MULTIPLIER
