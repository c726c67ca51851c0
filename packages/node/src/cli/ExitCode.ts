/** The exit codes of `troupe run`: how the guest ended, for scripts. */
import type { GuestError } from "@troupe/core/GuestError"
import type { GuestStop } from "@troupe/core/GuestStop"

/** Exit codes by what happened. Those of guests begin at 32, so that they never collide with those of shells and runtimes. */
export const ExitCode = {
  /** The guest turned itself off. */
  POWER_OFF: 0,
  /** The machine could not be built or run. */
  FAILURE: 1,
  /** The configuration or a file that it names is wrong. */
  BAD_INPUT: 2,
  /** The guest asked for a reset. */
  RESET: 32,
  /** The guest halted with interrupts off. */
  HALT: 33,
  /** The guest's kernel panicked. */
  PANIC: 34,
  /** The guest caused a triple fault. */
  TRIPLE_FAULT: 35,
  /** A vCPU or a device failed. */
  RUNTIME_FAILURE: 36,
  /** The guest was stopped by its controller: Ctrl-C or a signal. */
  STOPPED: 130
} as const

/** The table for `--help`. */
export const exitCodeHelp =
  "Exit codes: 0 power-off, 1 host failure, 2 bad configuration or file, 32 reset, 33 halt, 34 kernel panic, 35 triple fault, 36 other vCPU or device failure, 130 stopped by Ctrl-C."

/** The exit code of a guest that ended by its own will. */
export const exitCodeOfStop = (stop: GuestStop): number => {
  switch (stop._tag) {
    case "PowerOff":
      return ExitCode.POWER_OFF
    case "Reset":
      return ExitCode.RESET
    case "Halt":
      return ExitCode.HALT
  }
}

/** The exit code of a failure. */
export const exitCodeOfError = (error: GuestError): number => {
  const reason = error.reason
  switch (reason._tag) {
    case "BAD_CONFIG":
    case "KERNEL_LOAD_FAILURE":
      return ExitCode.BAD_INPUT
    case "CONTROLLER_FORCED_HALT":
      return ExitCode.STOPPED
    case "VCPU_RUNTIME_FAILURE":
      return reason.failure?._tag === "GuestPanic"
        ? ExitCode.PANIC
        : reason.failure?._tag === "TripleFault"
        ? ExitCode.TRIPLE_FAULT
        : ExitCode.RUNTIME_FAILURE
    default:
      return ExitCode.FAILURE
  }
}

/** How the guest ended, in a line. */
export const describeStop = (stop: GuestStop): string => {
  switch (stop._tag) {
    case "PowerOff":
      return "the guest powered off"
    case "Reset":
      return stop.by === "acpi"
        ? "the guest asked for a reset through ACPI"
        : "the guest asked for a reset through the keyboard controller"
    case "Halt":
      return "the guest halted with interrupts off"
  }
}
