/** The ways in which a vCPU stops for good, as the hypervisor reports them. */
import * as Schema from "effect/Schema"

/** Register values as hexadecimal text (`rip: "0xffffffff81000000"`), for reports that people read. */
export const VcpuRegisters = Schema.Record(Schema.String, Schema.String)
/** Register values as hexadecimal text, by register name. */
export type VcpuRegisters = typeof VcpuRegisters.Type

/**
 * `HLT` with interrupts off and nothing that could wake the vCPU: the guest's own way of saying that it has ended. Reported
 * only when every vCPU of the machine is in this state or was never started.
 */
export const Halted = Schema.TaggedStruct("Halted", { registers: VcpuRegisters })
/** A fault while delivering a double fault (`KVM_EXIT_SHUTDOWN`; Intel SDM volume 3, section 6.15). */
export const TripleFault = Schema.TaggedStruct("TripleFault", { registers: VcpuRegisters })
/** The hypervisor gave up (`KVM_EXIT_INTERNAL_ERROR`), most often at an instruction that it cannot emulate. */
export const HypervisorInternalError = Schema.TaggedStruct("HypervisorInternalError", {
  /** `KVM_INTERNAL_ERROR_*`, e.g. 1 for a failed emulation. */
  suberror: Schema.Int,
  /** The bytes at RIP as hexadecimal text, empty when the hypervisor did not give them. */
  instructionBytes: Schema.String,
  registers: VcpuRegisters
})
/** The processor refused to enter the guest (`KVM_EXIT_FAIL_ENTRY`). */
export const EntryFailed = Schema.TaggedStruct("EntryFailed", {
  /** `hardware_entry_failure_reason`, hexadecimal. */
  hardwareReason: Schema.String,
  registers: VcpuRegisters
})
/** An exit that the hypervisor layer has no handling for. */
export const UnknownExit = Schema.TaggedStruct("UnknownExit", {
  /** `exit_reason` of `struct kvm_run`. */
  exitReason: Schema.Int,
  registers: VcpuRegisters
})
/** The guest's kernel said through the pvpanic device that it has panicked. */
export const GuestPanic = Schema.TaggedStruct("GuestPanic", {})

/** How a vCPU stopped for good. */
export const VcpuExit = Schema.Union([Halted, TripleFault, HypervisorInternalError, EntryFailed, UnknownExit])
/** How a vCPU stopped for good. */
export type VcpuExit = typeof VcpuExit.Type

/** A guest failure as a report: a vCPU's exit, or a panic that the guest announced. */
export const GuestFailure = Schema.Union([
  Halted,
  TripleFault,
  HypervisorInternalError,
  EntryFailed,
  UnknownExit,
  GuestPanic
])
/** A guest failure as a report. */
export type GuestFailure = typeof GuestFailure.Type

/** What happened, in a clause. */
export const describeFailure = (failure: GuestFailure): string => {
  switch (failure._tag) {
    case "GuestPanic":
      return "the guest's kernel panicked"
    case "TripleFault":
      return "the guest caused a triple fault"
    case "HypervisorInternalError":
      return failure.suberror === 1
        ? "the hypervisor could not emulate an instruction of the guest"
        : "the hypervisor gave up with an internal error"
    case "EntryFailed":
      return "the processor refused to enter the guest"
    case "UnknownExit":
      return "the vCPU left the guest for a reason that is not handled"
    case "Halted":
      return "the guest halted with interrupts off"
  }
}
