/** The I/O ports and values of power control: what the ACPI tables say and what the power device answers to. */

/** `SLEEP_CONTROL_REG`, 8 bits (ACPI 6.5, section 4.8.3.7). */
export const SLEEP_CONTROL_PORT = 0x600
/** `SLEEP_STATUS_REG`, 8 bits (ACPI 6.5, section 4.8.3.7). */
export const SLEEP_STATUS_PORT = 0x601
/** `RESET_REG`, 8 bits (ACPI 6.5, section 4.8.3.6). */
export const RESET_PORT = 0x602
/** `RESET_VALUE`: what the guest writes to {@link RESET_PORT}. */
export const RESET_VALUE = 0x06
/** Command and status port of the keyboard controller (8042): the oldest way to reset a PC. */
export const KEYBOARD_CONTROLLER_PORT = 0x64
/** The pvpanic device (`_HID` "QEMU0001"), one byte: a guest kernel says here that it has panicked. */
export const PVPANIC_PORT = 0x505
/** `PVPANIC_PANICKED`: the guest has panicked. */
export const PVPANIC_PANICKED = 0x01
