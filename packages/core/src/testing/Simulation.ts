/**
 * Runs an effect to its end in a world where one seed decides everything: which fiber runs next, where it is preempted, what
 * `Random` gives, and when a vCPU of the fake hypervisor lets others in.
 *
 * Time is virtual. It stands still while anything can run and then jumps to the next timer, so nothing ever sleeps. The same
 * effect with the same seed makes the same {@link Trace}, byte for byte. When nothing can run, no timer waits and the effect has
 * not ended, the simulation ends it with a report instead of hanging.
 *
 * ```ts
 * import { Simulation } from "@troupe/core/testing"
 * import * as Effect from "effect/Effect"
 *
 * const result = Simulation.run(Effect.sleep("365 days"), { seed: 7 })
 * export const virtualMillis = result.time // 31_536_000_000
 * ```
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Scope from "effect/Scope"
import { SimulationControl, type SimulationParticipant } from "./SimulationControl.ts"
import { type SimulationOptions, SimulationWorld } from "./SimulationWorld.ts"
import { formatEvent, type Trace } from "./Trace.ts"

export { type SimulationOptions, SimulationStuck, SimulationWorld } from "./SimulationWorld.ts"

/** How a simulation went. */
export interface SimulationResult<A, E> {
  /** How the effect ended. A simulation that is stuck, runs too long or broke a rule of the boundary ends in a defect. */
  readonly exit: Exit.Exit<A, E>
  readonly seed: number
  /** What happened at the boundary of the fakes inside. */
  readonly trace: Trace
  /** Number of scheduled tasks. */
  readonly steps: number
  /** Virtual time at the end in milliseconds; it begins at 0. */
  readonly time: number
}

/** A world to be driven by hand: for tests that do one thing after the other, such as model-based ones. */
export const make = (options: SimulationOptions = {}): SimulationWorld => new SimulationWorld(options)

/** Runs an effect to its end. Synchronous; never hangs. */
export const run = <A, E>(
  effect: Effect.Effect<A, E, Scope.Scope>,
  options: SimulationOptions = {}
): SimulationResult<A, E> => {
  const world = new SimulationWorld(options)
  const exit = world.run(effect)
  world.settle()
  return { exit, seed: world.seed, trace: world.trace, steps: world.steps, time: world.time }
}

/** Names what a fiber is doing meanwhile, for the report of a simulation that is stuck. Outside a simulation it does nothing. */
export const label = (name: string) => <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> =>
  Effect.flatMap(SimulationControl, (control) => {
    if (control === undefined) return effect
    const participant: SimulationParticipant = { waiting: () => [name], violations: () => [] }
    return Effect.acquireUseRelease(
      Effect.sync(() => control.join(participant)),
      () => effect,
      () => Effect.sync(() => control.leave(participant))
    )
  })

/** Number of events of the trace that a report shows. */
const REPORTED_EVENTS = 20

/** What a failed simulation says: why, the seed to repeat it with, and the last events of its trace. */
export const report = (result: SimulationResult<unknown, unknown>): string => {
  const cause = Exit.isFailure(result.exit) ? Cause.pretty(result.exit.cause) : "it succeeded"
  const events = result.trace.events.slice(-REPORTED_EVENTS).map((event) => `  ${formatEvent(event)}`)
  return [
    `simulation with seed ${result.seed}: ${cause}`,
    `repeat it with { seed: ${result.seed} }; ${result.steps} steps, ${result.time} ms of virtual time`,
    ...(events.length === 0 ? [] : [`the last of ${result.trace.count} events:`, ...events])
  ].join("\n")
}

/** Runs an effect and returns its value, or throws an error with the whole {@link report}. */
export const check = <A, E>(effect: Effect.Effect<A, E, Scope.Scope>, options: SimulationOptions = {}): A => {
  const result = run(effect, options)
  if (Exit.isSuccess(result.exit)) return result.exit.value
  throw new Error(report(result), { cause: Cause.squash(result.exit.cause) })
}

/**
 * A property of simulations, for a property-based test library that gives the input and the seed, and shrinks both:
 *
 * ```ts
 * import { Simulation } from "@troupe/core/testing"
 * import * as Effect from "effect/Effect"
 * import * as fc from "fast-check"
 *
 * const addition = Simulation.property((n: number) => Effect.sync(() => { if (n + 1 <= n) throw new Error("no") }))
 * fc.assert(fc.property(fc.integer(), fc.integer(), addition))
 * ```
 */
export const property = <I, A, E>(
  make: (input: I) => Effect.Effect<A, E, Scope.Scope>,
  options: Omit<SimulationOptions, "seed"> = {}
) =>
(input: I, seed: number): void => {
  check(make(input), { ...options, seed })
}

/** Runs an effect with the seeds `[first, first + count)`; throws the {@link report} of the first that fails. */
export const explore = <A, E>(
  effect: Effect.Effect<A, E, Scope.Scope>,
  count: number,
  options: Omit<SimulationOptions, "seed"> & { readonly first?: number } = {}
): ReadonlyArray<A> =>
  Array.from({ length: count }, (_, index) => check(effect, { ...options, seed: (options.first ?? 0) + index }))
