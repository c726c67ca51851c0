/**
 * Which operations of the hypervisor go wrong, and how.
 *
 * Operations are counted from 0 in the order in which they are begun, over all machines of one fake. The releases of what
 * they made cannot fail, as `close` and `munmap` cannot in practice; they are in the trace.
 */
import type * as Duration from "effect/Duration"

/** The operations that a fault can hit. */
export type HypervisorOperation =
  | "createVm"
  | "addMemory"
  | "addPluggableMemory"
  | "plug"
  | "unplug"
  | "attachBus"
  | "interruptLine"
  | "messageInterrupt"
  | "createVcpu"
  | "setState"
  | "run"

/** An operating system's error number and name, as `HypervisorError` carries it. */
export interface Errno {
  readonly number: number
  readonly name: string
}

/** Operation not permitted. */
export const EPERM: Errno = { number: 1, name: "EPERM" }
/** Interrupted system call. */
export const EINTR: Errno = { number: 4, name: "EINTR" }
/** Bad address. */
export const EFAULT: Errno = { number: 14, name: "EFAULT" }
/** Out of memory. */
export const ENOMEM: Errno = { number: 12, name: "ENOMEM" }
/** Permission denied. */
export const EACCES: Errno = { number: 13, name: "EACCES" }
/** Device or resource busy. */
export const EBUSY: Errno = { number: 16, name: "EBUSY" }
/** File exists. */
export const EEXIST: Errno = { number: 17, name: "EEXIST" }
/** Invalid argument. */
export const EINVAL: Errno = { number: 22, name: "EINVAL" }
/** Too many open files. */
export const EMFILE: Errno = { number: 24, name: "EMFILE" }

/** What happens to one operation before it does its work. */
export interface Fault {
  /** The operation fails with this error, having done nothing. */
  readonly errno?: Errno
  /** The operation takes this long (virtual time); it can be interrupted meanwhile. */
  readonly delay?: Duration.Input
}

/**
 * Decides, for each operation, whether and how it goes wrong. `index` counts all operations, `nth` those of this name, both
 * from 0.
 */
export type FaultPlan = (index: number, operation: HypervisorOperation, nth: number) => Fault | undefined

/** Nothing goes wrong. */
export const none: FaultPlan = () => undefined

/** The operation with this number fails. */
export const failAt = (index: number, errno: Errno): FaultPlan => (at) => (at === index ? { errno } : undefined)

/** The operation with this number takes this long, so that something else can happen meanwhile. */
export const delayAt = (index: number, delay: Duration.Input): FaultPlan => (at) => at === index ? { delay } : undefined

/** Every operation of this name fails from its n-th use on (0 is the first). */
export const failFrom = (operation: HypervisorOperation, n: number, errno: Errno): FaultPlan => (_, name, nth) =>
  name === operation && nth >= n ? { errno } : undefined

/** The first plan that has something for an operation decides. */
export const firstOf = (...plans: ReadonlyArray<FaultPlan>): FaultPlan => (index, operation, nth) => {
  for (const plan of plans) {
    const fault = plan(index, operation, nth)
    if (fault !== undefined) return fault
  }
  return undefined
}
