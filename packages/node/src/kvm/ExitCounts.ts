/**
 * What a vCPU's thread counts, for measurements and reports: how often the guest left for which reason.
 */
import * as Context from "effect/Context"
import {
  CONTROL_CALLS,
  CONTROL_EXITS,
  CONTROL_POSTED,
  CONTROL_RING_WAITS,
  CONTROL_SHADOWED,
  CONTROL_SLEEPS,
  CONTROL_UNCLAIMED
} from "./thread/VcpuControl.ts"

/** Counters of one vCPU since it was made. They wrap at 2^32. */
export interface ExitCounts {
  /** Returns from `KVM_RUN` with something to do for this process. Exits that the kernel handles are not among them. */
  readonly exits: number
  /** Writes that were posted. */
  readonly posted: number
  /** Reads that were answered from the shadow table. */
  readonly shadowed: number
  /** Accesses that the main thread answered. */
  readonly calls: number
  /** Accesses that no device has claimed. */
  readonly unclaimed: number
  /** Calls for which the thread went to sleep. */
  readonly sleeps: number
  /** Posted writes that waited for room in the ring. */
  readonly ringWaits: number
}

/** Reads the counters in a vCPU's control block, at any time. */
export const readExitCounts = (control: Int32Array<SharedArrayBuffer>): ExitCounts => {
  const read = (word: number): number => Atomics.load(control, word) >>> 0
  return {
    exits: read(CONTROL_EXITS),
    posted: read(CONTROL_POSTED),
    shadowed: read(CONTROL_SHADOWED),
    calls: read(CONTROL_CALLS),
    unclaimed: read(CONTROL_UNCLAIMED),
    sleeps: read(CONTROL_SLEEPS),
    ringWaits: read(CONTROL_RING_WAITS)
  }
}

/** Is told of every vCPU that is made, with its number and a way to read its counters, live and after its end. */
export type ExitObserver = (vcpu: number, counts: () => ExitCounts) => void

/** The observer of all vCPUs of a hypervisor. Default: nobody. Read when the hypervisor's layer is built. */
export const ExitObserver = Context.Reference<ExitObserver>("@troupe/node/ExitObserver", {
  defaultValue: () => () => {}
})
