/** The configuration space of a PCI function, by the names of the PCI Local Bus Specification 3.0, chapter 6. */

/** Offsets of the header's registers, type 0 (section 6.1). */
export const PciHeader = {
  /** 16 bits. */
  VendorID: 0x00,
  /** 16 bits. */
  DeviceID: 0x02,
  /** 16 bits: {@link PciCommand}. */
  Command: 0x04,
  /** 16 bits: {@link PciStatus}. */
  Status: 0x06,
  RevisionID: 0x08,
  /** 24 bits: programming interface, subclass, class. */
  ClassCode: 0x09,
  CacheLineSize: 0x0c,
  HeaderType: 0x0e,
  /** Six of 32 bits each. */
  BaseAddress: 0x10,
  /** 16 bits. */
  SubsystemVendorID: 0x2c,
  /** 16 bits. */
  SubsystemID: 0x2e,
  CapabilitiesPointer: 0x34,
  InterruptLine: 0x3c,
  InterruptPin: 0x3d,
  /** Behind the header. */
  End: 0x40
} as const

/** Bits of the command register that can be set (section 6.2.2). None of them has an effect here. */
export const PciCommand = {
  MEMORY_SPACE: 0x002,
  BUS_MASTER: 0x004,
  PARITY_ERROR_RESPONSE: 0x040,
  SERR_ENABLE: 0x100,
  INTERRUPT_DISABLE: 0x400
} as const

/** Bits of the status register (section 6.2.3). */
export const PciStatus = {
  /** The function asserts its interrupt pin, or would if it had one. */
  INTERRUPT: 0x08,
  CAPABILITIES_LIST: 0x10
} as const

/** In the header type: the device has more functions than this one. */
export const MULTI_FUNCTION = 0x80

/** Identifiers of capabilities (appendix H). */
export const PciCapabilityId = {
  VENDOR: 0x09,
  MSI_X: 0x11
} as const

/** Size of the configuration space of a function in bytes. Beyond the first 256 bytes there are no capabilities here. */
export const PCI_CONFIG_SIZE = 256
/** What a register of a function that does not exist reads as, and a vendor that no function has. */
export const NO_VENDOR = 0xffff
