/**
 * How often a machine has woken the event loop of its host, for measurements and reports.
 */
import * as Context from "effect/Context"

/** Counters of one machine since it was made. */
export interface WakeCounts {
  /** Calls of the event loop for a doorbell. Rings of one doorbell that came before the loop had time for it are one. */
  readonly doorbells: number
  /** Calls of the event loop for posted writes and calls of the vCPUs' threads, likewise. */
  readonly messages: number
}

/** The same, for those who count. */
export type MutableWakeCounts = { -readonly [Counter in keyof WakeCounts]: number }

/** Counters of a new machine. */
export const makeWakeCounts = (): MutableWakeCounts => ({ doorbells: 0, messages: 0 })

/** Is told of every machine that is made, with its counters, live and after its end. */
export type WakeObserver = (counts: WakeCounts) => void

/** The observer of all machines of a hypervisor. Default: nobody. Read when the hypervisor's layer is built. */
export const WakeObserver = Context.Reference<WakeObserver>("@troupe/node/WakeObserver", {
  defaultValue: () => () => {}
})
