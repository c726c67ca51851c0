/**
 * The code at the legacy reset vector: all that this machine has of a BIOS.
 *
 * Linux resets a machine whose ACPI is hardware-reduced through EFI, and where there is no EFI it goes back to real mode and
 * jumps to `F000:FFF0`, where a PC's firmware would start over. What stands here passes the wish on to the ACPI reset register.
 */
import { RESET_PORT, RESET_VALUE } from "../acpi/PowerPorts.ts"
import { type GuestBlock, guestBlock } from "./GuestBlock.ts"
import { RESET_VECTOR_ADDRESS } from "./MachineLayout.ts"

/** The code, for 16-bit real mode. */
export const resetVector: GuestBlock = guestBlock(
  "reset vector",
  RESET_VECTOR_ADDRESS,
  new Uint8Array([
    // mov al, RESET_VALUE
    0xb0,
    RESET_VALUE,
    // mov dx, RESET_PORT
    0xba,
    RESET_PORT & 0xff,
    RESET_PORT >>> 8,
    // out dx, al
    0xee,
    // The machine ends with the write. hlt, and back to it.
    0xf4,
    0xeb,
    0xfd
  ])
)
