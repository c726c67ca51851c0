/** The ways in which a guest ends by its own will: the success values of `run`. */
import * as Schema from "effect/Schema"

/** The guest turned the machine off through ACPI (sleep state S5; ACPI 6.5, section 7.4.2). */
export const PowerOff = Schema.TaggedStruct("PowerOff", {})
/** The guest asked for a reset through the ACPI reset register or the keyboard controller. */
export const Reset = Schema.TaggedStruct("Reset", {
  by: Schema.Literals(["acpi", "keyboard-controller"])
})
/** Every vCPU halted with interrupts off: the guest has said that it will do nothing more. */
export const Halt = Schema.TaggedStruct("Halt", {})

/** How a guest ended by its own will. */
export const GuestStop = Schema.Union([PowerOff, Reset, Halt])
/** How a guest ended by its own will. */
export type GuestStop = typeof GuestStop.Type
