/**
 * The failures of the FFI module: a system call that failed, and a host on which no back end works.
 */
import * as Schema from "effect/Schema"
import { getSystemErrorMap } from "node:util"

/** The symbolic name of an error number, e.g. `EINVAL` for 22. */
export const errnoName = (errno: number): string => getSystemErrorMap().get(-errno)?.[0] ?? `errno ${errno}`

/** What the operating system says about an error number, e.g. `invalid argument` for 22. */
export const errnoText = (errno: number): string => getSystemErrorMap().get(-errno)?.[1] ?? "unknown error"

/** A system call that failed. */
export class FfiError extends Schema.TaggedError<FfiError>()("FfiError", {
  /** The call, or the `ioctl` by its name, e.g. `mmap` or `TUNSETIFF`. */
  operation: Schema.String,
  /** What the operating system says about it. */
  detail: Schema.String,
  /** The arguments as text. */
  arguments: Schema.String,
  /** The error number and its name, e.g. 13 and `EACCES`. */
  errno: Schema.Struct({ number: Schema.Int, name: Schema.String }),
  /** What the host can do about it. */
  hint: Schema.optionalKey(Schema.String)
}) {
  override get message(): string {
    const hint = this.hint === undefined ? "" : `. ${this.hint}`
    return `${this.operation}(${this.arguments}): ${this.detail} (${this.errno.name})${hint}`
  }
}

/** Makes an {@link FfiError} of a negative result. */
export const ffiError = (operation: string, args: string, result: number, hint?: string): FfiError =>
  new FfiError({
    operation,
    arguments: args,
    detail: errnoText(-result),
    errno: { number: -result, name: errnoName(-result) },
    ...(hint === undefined ? {} : { hint })
  })

/** No FFI back end works in this process. */
export class FfiUnavailable extends Schema.TaggedError<FfiUnavailable>()("FfiUnavailable", {
  /** The back ends that were tried, each with what was in the way. */
  attempts: Schema.Array(Schema.Struct({ backEnd: Schema.String, problem: Schema.String }))
}) {
  override get message(): string {
    const attempts = this.attempts.map(({ backEnd, problem }) => `${backEnd}: ${problem}`).join("; ")
    return `no foreign function interface: ${attempts}. Use Node 26.1 or later, or install the package koffi`
  }
}
