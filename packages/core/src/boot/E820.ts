/** The memory map that a guest is given: which physical addresses are RAM and which are taken (ACPI 6.5, chapter 15). */
import { type AddressRange, HIGH_MEMORY_ADDRESS, LOW_RESERVED_ADDRESS } from "./MachineLayout.ts"

/** Address range types (ACPI 6.5, table 15.6). PVH's memory map uses the same numbers. */
export const E820Type = { RAM: 1, RESERVED: 2, ACPI: 3, NVS: 4 } as const
/** The number of an address range type. */
export type E820Type = typeof E820Type[keyof typeof E820Type]

/** One entry of the memory map. */
export interface E820Entry extends AddressRange {
  readonly type: E820Type
}

/**
 * The memory map of a machine with these regions of RAM: all of it is usable except the firmware area that ends at 1 MiB.
 * The first region starts at 0 and is larger than 1 MiB.
 */
export const makeE820 = (ram: ReadonlyArray<AddressRange>): ReadonlyArray<E820Entry> => {
  const entries: Array<E820Entry> = []
  for (const region of ram) {
    if (region.guestAddress === 0) {
      entries.push(
        { guestAddress: 0, size: LOW_RESERVED_ADDRESS, type: E820Type.RAM },
        {
          guestAddress: LOW_RESERVED_ADDRESS,
          size: HIGH_MEMORY_ADDRESS - LOW_RESERVED_ADDRESS,
          type: E820Type.RESERVED
        },
        { guestAddress: HIGH_MEMORY_ADDRESS, size: region.size - HIGH_MEMORY_ADDRESS, type: E820Type.RAM }
      )
    } else {
      entries.push({ guestAddress: region.guestAddress, size: region.size, type: E820Type.RAM })
    }
  }
  return entries
}
