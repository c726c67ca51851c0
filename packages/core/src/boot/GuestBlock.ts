/** What boot code puts into guest memory: bytes, and where they go. */
import type { AddressRange } from "./MachineLayout.ts"

/**
 * Bytes for guest memory. `size` is the length of the range that they belong to; where it exceeds `bytes.length`, the rest
 * of the range must read as zero.
 */
export interface GuestBlock extends AddressRange {
  /** What it is, for reports: `kernel`, `boot_params`. */
  readonly name: string
  readonly bytes: Uint8Array
}

/** A block that is exactly as long as its bytes. */
export const guestBlock = (name: string, guestAddress: number, bytes: Uint8Array): GuestBlock => ({
  name,
  guestAddress,
  bytes,
  size: bytes.length
})
