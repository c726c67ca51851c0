/**
 * The one error of guests: `GuestError`, whose `reason` is one of the 15 values of the protocol file `guest.fidl`.
 *
 * Every reason carries what was being done, to which device or vCPU, what was under it, and what to do about it. Handle one
 * with `Effect.catchReason("GuestError", "BAD_CONFIG", ...)`; send it anywhere through its Schema.
 */
import * as Schema from "effect/Schema"
import { HypervisorError } from "./Hypervisor.ts"
import { GuestFailure } from "./VcpuExit.ts"

const context = {
  /** The lifecycle step or operation that failed, e.g. `create`. */
  operation: Schema.String,
  /** What went wrong, in a sentence. */
  detail: Schema.String,
  /** The device that it happened to. */
  device: Schema.optionalKey(Schema.String),
  /** The vCPU that it happened to. */
  vcpu: Schema.optionalKey(Schema.Int),
  /** The hypervisor operation under it. */
  hypervisor: Schema.optionalKey(HypervisorError),
  /** The guest's own failure under it. */
  failure: Schema.optionalKey(GuestFailure),
  /** The last lines that the guest wrote to its serial port. */
  serialLog: Schema.optionalKey(Schema.Array(Schema.String)),
  /** What the host can do about it. */
  hint: Schema.optionalKey(Schema.String)
}

/** Catch-all VMM error (1). */
export class InternalError extends Schema.TaggedError<InternalError>()("INTERNAL_ERROR", context) {
  readonly code = 1
}
/** A device endpoint was requested, but the device is not enabled (2). */
export class DeviceNotPresent extends Schema.TaggedError<DeviceNotPresent>()("DEVICE_NOT_PRESENT", context) {
  readonly code = 2
}
/** One thing that is wrong with a configuration. */
export const ConfigIssue = Schema.Struct({
  /** Path of the field, e.g. `vsockListeners[1].port`. */
  field: Schema.String,
  /** The rule that it breaks. */
  rule: Schema.String,
  /** The value given, as text. */
  value: Schema.String
})
/** One thing that is wrong with a configuration. */
export type ConfigIssue = typeof ConfigIssue.Type
/** The configuration failed validation (3). */
export class BadConfig extends Schema.TaggedError<BadConfig>()("BAD_CONFIG", {
  ...context,
  issues: Schema.Array(ConfigIssue)
}) {
  readonly code = 3
}
/** The guest object could not be initialised: no hypervisor, no memory (4). */
export class GuestInitializationFailure
  extends Schema.TaggedError<GuestInitializationFailure>()("GUEST_INITIALIZATION_FAILURE", context)
{
  readonly code = 4
}
/** A device could not be given its place in the machine: addresses, interrupts, doorbells (5). */
export class DeviceInitializationFailure
  extends Schema.TaggedError<DeviceInitializationFailure>()("DEVICE_INITIALIZATION_FAILURE", context)
{
  readonly code = 5
}
/** A device was placed, but its own start failed (6). */
export class DeviceStartFailure extends Schema.TaggedError<DeviceStartFailure>()("DEVICE_START_FAILURE", context) {
  readonly code = 6
}
/** A device's address range overlaps guest memory (7). */
export class DeviceMemoryOverlap extends Schema.TaggedError<DeviceMemoryOverlap>()("DEVICE_MEMORY_OVERLAP", context) {
  readonly code = 7
}
/** A service that the configuration needs was not provided (8). */
export class FailedServiceConnect
  extends Schema.TaggedError<FailedServiceConnect>()("FAILED_SERVICE_CONNECT", context)
{
  readonly code = 8
}
/** Two devices publish the same service to the guest's clients (9). */
export class DuplicatePublicServices
  extends Schema.TaggedError<DuplicatePublicServices>()("DUPLICATE_PUBLIC_SERVICES", context)
{
  readonly code = 9
}
/** The kernel, the initial RAM disk or the command line could not be loaded (10). */
export class KernelLoadFailure extends Schema.TaggedError<KernelLoadFailure>()("KERNEL_LOAD_FAILURE", {
  ...context,
  /** The field of the image that is wrong, e.g. `e_machine`. */
  field: Schema.optionalKey(Schema.String)
}) {
  readonly code = 10
}
/** A vCPU could not be started (11). */
export class VcpuStartFailure extends Schema.TaggedError<VcpuStartFailure>()("VCPU_START_FAILURE", context) {
  readonly code = 11
}
/** A vCPU, or a device that the machine cannot live without, failed while the guest ran (12). */
export class VcpuRuntimeFailure extends Schema.TaggedError<VcpuRuntimeFailure>()("VCPU_RUNTIME_FAILURE", context) {
  readonly code = 12
}
/** The guest was asked for before it was created (13). */
export class NotCreated extends Schema.TaggedError<NotCreated>()("NOT_CREATED", context) {
  readonly code = 13
}
/** The guest is already running; stop it first (14). */
export class AlreadyRunning extends Schema.TaggedError<AlreadyRunning>()("ALREADY_RUNNING", context) {
  readonly code = 14
}
/** A running guest was stopped by the host (15). */
export class ControllerForcedHalt
  extends Schema.TaggedError<ControllerForcedHalt>()("CONTROLLER_FORCED_HALT", context)
{
  readonly code = 15
}

/** The 15 reasons, in the order of their numbers. */
export const GuestErrorReason = Schema.Union([
  InternalError,
  DeviceNotPresent,
  BadConfig,
  GuestInitializationFailure,
  DeviceInitializationFailure,
  DeviceStartFailure,
  DeviceMemoryOverlap,
  FailedServiceConnect,
  DuplicatePublicServices,
  KernelLoadFailure,
  VcpuStartFailure,
  VcpuRuntimeFailure,
  NotCreated,
  AlreadyRunning,
  ControllerForcedHalt
])
/** Why a guest operation failed. */
export type GuestErrorReason = typeof GuestErrorReason.Type

/** The numbers of the protocol file, by name. */
export const GuestErrorCode = {
  INTERNAL_ERROR: 1,
  DEVICE_NOT_PRESENT: 2,
  BAD_CONFIG: 3,
  GUEST_INITIALIZATION_FAILURE: 4,
  DEVICE_INITIALIZATION_FAILURE: 5,
  DEVICE_START_FAILURE: 6,
  DEVICE_MEMORY_OVERLAP: 7,
  FAILED_SERVICE_CONNECT: 8,
  DUPLICATE_PUBLIC_SERVICES: 9,
  KERNEL_LOAD_FAILURE: 10,
  VCPU_START_FAILURE: 11,
  VCPU_RUNTIME_FAILURE: 12,
  NOT_CREATED: 13,
  ALREADY_RUNNING: 14,
  CONTROLLER_FORCED_HALT: 15
} as const satisfies { readonly [tag in GuestErrorReason["_tag"]]: number }

/** A guest operation failed. */
export class GuestError extends Schema.TaggedError<GuestError>()("GuestError", { reason: GuestErrorReason }) {
  /** The reason's number in the protocol file. */
  get code(): number {
    return GuestErrorCode[this.reason._tag]
  }
  /** The story in full: what was done, to what, why it failed, what to do, and the guest's last words. */
  override get message(): string {
    const reason = this.reason
    const lines = [`${reason._tag} during ${reason.operation}: ${reason.detail}`]
    if (reason.device !== undefined) lines.push(`  device: ${reason.device}`)
    if (reason.vcpu !== undefined) lines.push(`  vCPU: ${reason.vcpu}`)
    if (reason._tag === "BAD_CONFIG") {
      for (const issue of reason.issues) lines.push(`  ${issue.field}: ${issue.rule}, got ${issue.value}`)
    }
    if (reason._tag === "KERNEL_LOAD_FAILURE" && reason.field !== undefined) lines.push(`  field: ${reason.field}`)
    if (reason.hypervisor !== undefined) lines.push(`  under it: ${reason.hypervisor.message}`)
    if (reason.failure !== undefined) lines.push(`  exit: ${formatFailure(reason.failure)}`)
    if (reason.hint !== undefined) lines.push(`  hint: ${reason.hint}`)
    if (reason.serialLog !== undefined && reason.serialLog.length > 0) {
      lines.push("  last lines of the serial log:")
      for (const line of reason.serialLog) lines.push(`    ${line}`)
    }
    return lines.join("\n")
  }
}

const formatFailure = (failure: GuestFailure): string => {
  switch (failure._tag) {
    case "GuestPanic":
      return "the guest's kernel panicked"
    case "HypervisorInternalError":
      return `KVM internal error ${failure.suberror}, instruction bytes [${failure.instructionBytes}], ${
        formatRegisters(failure.registers)
      }`
    case "EntryFailed":
      return `entry failed, hardware reason ${failure.hardwareReason}, ${formatRegisters(failure.registers)}`
    case "UnknownExit":
      return `exit reason ${failure.exitReason}, ${formatRegisters(failure.registers)}`
    case "Halted":
    case "TripleFault":
      return `${failure._tag}, ${formatRegisters(failure.registers)}`
  }
}

const formatRegisters = (registers: { readonly [name: string]: string }): string =>
  Object.entries(registers).map(([name, value]) => `${name}=${value}`).join(" ")
