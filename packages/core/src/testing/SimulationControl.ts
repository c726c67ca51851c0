/** What a running simulation offers to the fakes inside it: its choices, its trace, and a place to report to. */
import * as Context from "effect/Context"
import type { Trace } from "./Trace.ts"

/** Something inside a simulation that can say what it is waiting for and what it saw go wrong. */
export interface SimulationParticipant {
  /** One line for each thing that waits, when nothing can run any more. */
  readonly waiting: () => ReadonlyArray<string>
  /** The rules of the boundary that were broken. */
  readonly violations: () => ReadonlyArray<string>
}

/** The simulation as a fake sees it. */
export interface SimulationControl {
  readonly trace: Trace
  /** Whether to let others run at this point: the seed's choice. */
  readonly pause: () => boolean
  /** A choice of the seed in `[0, limit)`. */
  readonly choose: (limit: number) => number
  readonly join: (participant: SimulationParticipant) => void
  readonly leave: (participant: SimulationParticipant) => void
}

/** The simulation that this fiber runs in, or `undefined` outside of one. */
export const SimulationControl: Context.Reference<SimulationControl | undefined> = Context.Reference<
  SimulationControl | undefined
>("@troupe/core/testing/SimulationControl", { defaultValue: () => undefined })
