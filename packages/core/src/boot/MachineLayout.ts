/**
 * Where everything lies in the guest physical address space of an x86-64 machine.
 *
 * | range | what |
 * | --- | --- |
 * | `0` to `0x9_fc00` | RAM; tables for the boot processor below {@link COMMAND_LINE_ADDRESS} and its area |
 * | `0x9_fc00` to `0x10_0000` | reserved; ACPI tables from {@link ACPI_TABLES_ADDRESS}, {@link RESET_VECTOR_ADDRESS} |
 * | `0x10_0000` to {@link DEVICE_WINDOW_ADDRESS} | RAM: kernel, initial RAM disk |
 * | {@link DEVICE_WINDOW_ADDRESS} to 4 GiB | devices, interrupt controllers, pages that KVM needs for itself |
 * | 4 GiB and up | the RAM that does not fit below the device window, then hot-pluggable memory |
 */

/** 4 GiB: the first address that does not fit into 32 bits. */
export const FOUR_GIB = 0x1_0000_0000

/** First address of the window for devices, and the end of the RAM below 4 GiB. */
export const DEVICE_WINDOW_ADDRESS = 0xc000_0000
/** Size of the device window in bytes: it ends at 4 GiB. */
export const DEVICE_WINDOW_SIZE = FOUR_GIB - DEVICE_WINDOW_ADDRESS
/** First page of the virtio-mmio devices. */
export const VIRTIO_MMIO_ADDRESS = 0xd000_0000
/** Size of the register window of one virtio-mmio device, in bytes. */
export const VIRTIO_MMIO_SIZE = 0x1000
/** The configuration pages of the PCI functions (PCI Express 5.0, section 7.2.2): those of bus 0, a page each. */
export const PCI_ECAM_ADDRESS = 0xe000_0000
/** Size of the configuration pages of one bus in bytes. */
export const PCI_ECAM_BUS_SIZE = 0x10_0000
/** First address of the memory that PCI functions have behind their base address registers. */
export const PCI_MEMORY_ADDRESS = 0xe100_0000
/** Its size in bytes. */
export const PCI_MEMORY_SIZE = 0x0200_0000
/** The I/O APIC's registers, at the address that every PC has them (Intel 82093AA, section 3.0). */
export const IO_APIC_ADDRESS = 0xfec0_0000
/** The local APIC's registers after reset (Intel SDM volume 3, section 11.4.1). */
export const LOCAL_APIC_ADDRESS = 0xfee0_0000
/** The page that `KVM_SET_IDENTITY_MAP_ADDR` takes. */
export const KVM_IDENTITY_MAP_ADDRESS = 0xfffb_c000
/** The three pages that `KVM_SET_TSS_ADDR` takes. */
export const KVM_TSS_ADDRESS = 0xfffb_d000

/** The boot processor's global descriptor table. */
export const GDT_ADDRESS = 0x500
/** PVH: `hvm_start_info`, and its module list and memory map behind it on the same page. */
export const PVH_START_INFO_ADDRESS = 0x6000
/** Linux: `boot_params`, the "zero page". */
export const BOOT_PARAMS_ADDRESS = 0x7000
/** Where the boot processor's stack pointer starts; the stack has the rest of its page below. */
export const BOOT_STACK_TOP = 0x8ff0
/** Page tables that map the first 4 GiB to themselves: PML4, PDPT and four page directories. */
export const PAGE_TABLES_ADDRESS = 0x9000
/** The kernel's command line with its terminating zero. */
export const COMMAND_LINE_ADDRESS = 0x2_0000
/** Room for the command line with its terminating zero, in bytes. */
export const COMMAND_LINE_AREA_SIZE = 0x1_0000

/** End of conventional memory: what lies behind, up to 1 MiB, is where firmware and video memory are on a PC. */
export const LOW_RESERVED_ADDRESS = 0x9_fc00
/** ACPI tables: inside the area that operating systems search for the RSDP (ACPI 6.5, section 5.2.5.1). */
export const ACPI_TABLES_ADDRESS = 0xe_0000
/** Where a PC's processors find their first instruction below 1 MiB (`F000:FFF0`): 16 bytes. */
export const RESET_VECTOR_ADDRESS = 0xf_fff0
/** Room for ACPI tables in bytes. */
export const ACPI_TABLES_SIZE = RESET_VECTOR_ADDRESS - ACPI_TABLES_ADDRESS
/** 1 MiB: the lowest address that a kernel may be loaded at. */
export const HIGH_MEMORY_ADDRESS = 0x10_0000

/** The smallest machine that this layout describes, in bytes. */
export const MINIMUM_MEMORY_SIZE = 0x20_0000
/** The largest RAM of a machine in bytes (16 TiB): less than the physical addresses of any 64-bit processor. */
export const MAXIMUM_MEMORY_SIZE = 2 ** 44

/** A range of guest physical addresses: `[guestAddress, guestAddress + size)`. */
export interface AddressRange {
  readonly guestAddress: number
  /** Length in bytes. */
  readonly size: number
}

/** The RAM of a machine with `sizeBytes` of memory, in ascending order: below the device window, then from 4 GiB on. */
export const ramRegions = (sizeBytes: number): ReadonlyArray<AddressRange> =>
  sizeBytes <= DEVICE_WINDOW_ADDRESS
    ? [{ guestAddress: 0, size: sizeBytes }]
    : [
      { guestAddress: 0, size: DEVICE_WINDOW_ADDRESS },
      { guestAddress: FOUR_GIB, size: sizeBytes - DEVICE_WINDOW_ADDRESS }
    ]

/** The first address behind 4 GiB and all RAM: hot-pluggable memory begins here, or at the next address that suits it. */
export const pluggableMemoryAddress = (memorySizeBytes: number): number =>
  ramRegions(memorySizeBytes).reduce((end, region) => Math.max(end, region.guestAddress + region.size), FOUR_GIB)
