/** Why a kernel, an initial RAM disk or a command line cannot be loaded: the field, its rule and the value found. */
import * as Data from "effect/Data"
import * as Result from "effect/Result"

/** What was being read when a rule was broken. */
export type ImagePart = "kernel" | "bzImage" | "ELF" | "initrd" | "command line" | "memory"

/** A boot input breaks a rule. A machine reports it as `KERNEL_LOAD_FAILURE`. */
export class KernelImageError extends Data.TaggedError("KernelImageError")<{
  /** What was being read. */
  readonly part: ImagePart
  /** The field by its name in the specification of its format, e.g. `boot_flag` or `e_phnum`. */
  readonly field: string
  /** The rule that the field breaks, as the end of a sentence: `must be 0xaa55`. */
  readonly rule: string
  /** The value found. */
  readonly value: number | string
}> {
  override get message(): string {
    const value = typeof this.value === "number" ? formatValue(this.value) : this.value
    return `${this.part}: ${this.field} ${this.rule}, found ${value}`
  }
}

const formatValue = (value: number): string =>
  Number.isSafeInteger(value) && value > 9 ? `0x${value.toString(16)} (${value})` : String(value)

/** A failed result with that story. */
export const refuse = (
  part: ImagePart,
  field: string,
  rule: string,
  value: number | string
): Result.Result<never, KernelImageError> => Result.fail(new KernelImageError({ part, field, rule, value }))
