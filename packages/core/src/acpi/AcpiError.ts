/** Why ACPI tables cannot be built: a mistake of the host program, such as a device with a name that AML cannot carry. */
import * as Data from "effect/Data"

/** A rule of the ACPI specification or of this machine's layout that the given description breaks. */
export class AcpiError extends Data.TaggedError("AcpiError")<{
  /** The rule, as a sentence. */
  readonly rule: string
  /** The value that breaks it. */
  readonly value: string
}> {
  override get message(): string {
    return `ACPI: ${this.rule}, found ${this.value}`
  }
}
