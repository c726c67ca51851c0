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
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Fiber from "effect/Fiber"
import * as Random from "effect/Random"
import type * as Scheduler from "effect/Scheduler"
import type * as Scope from "effect/Scope"
import { BoundaryViolation } from "./FakeWorld.ts"
import { Seed } from "./Seed.ts"
import { SimulationClock } from "./SimulationClock.ts"
import { SimulationControl, type SimulationParticipant } from "./SimulationControl.ts"
import { formatEvent, Trace } from "./Trace.ts"

/** What a simulation may choose. */
export interface SimulationOptions {
  /** Decides everything that is a matter of chance. Default: 0. */
  readonly seed?: number
  /** Number of scheduled tasks after which a simulation that has not ended is given up. Default: 1,000,000. */
  readonly maxSteps?: number
  /** Whether fibers are also preempted between their effects, where only a fiber that ran long would be. Default: true. */
  readonly preempt?: boolean
}

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

/** Nothing can run any more, and the effect has not ended. */
export class SimulationStuck extends Error {
  override readonly name = "SimulationStuck"
  /** One line for each thing that waits. */
  readonly waiting: ReadonlyArray<string>
  constructor(why: string, waiting: ReadonlyArray<string>) {
    const lines = waiting.length === 0
      ? ["no fake and no label of it waits: it may wait for something outside, such as a promise or a real timer"]
      : waiting
    super(`${why}\n${lines.map((line) => `  ${line}`).join("\n")}`)
    this.waiting = waiting
  }
}

const DEFAULT_MAX_STEPS = 1_000_000
/** Tasks that a given-up simulation may still use to close its scopes. */
const CLOSING_STEPS = 100_000
/** Longest run of a fiber in effects before it is preempted. */
const PREEMPTION_LIMIT = 64
/** The budget of a fiber that is not preempted: Effect's own default. */
const DEFAULT_BUDGET = 2048

/** Picks the next task by the seed. */
class SeededScheduler implements Scheduler.Scheduler, Scheduler.SchedulerDispatcher {
  readonly executionMode = "sync"
  steps = 0
  readonly #tasks: Array<() => void> = []
  readonly #seed: Seed
  readonly #preempt: boolean
  #budget: number

  constructor(seed: Seed, preempt: boolean) {
    this.#seed = seed
    this.#preempt = preempt
    this.#budget = preempt ? 2 + seed.choose(PREEMPTION_LIMIT) : DEFAULT_BUDGET
  }

  shouldYield(fiber: Fiber.Fiber<unknown, unknown>): boolean {
    if (fiber.currentOpCount < this.#budget) return false
    if (this.#preempt) this.#budget = 2 + this.#seed.choose(PREEMPTION_LIMIT)
    return true
  }

  makeDispatcher(): Scheduler.SchedulerDispatcher {
    return this
  }

  scheduleTask(task: () => void): void {
    this.#tasks.push(task)
  }

  flush(): void {
    while (this.step());
  }

  /** Runs one task. Returns whether there was one. */
  step(): boolean {
    const tasks = this.#tasks
    const last = tasks.pop()
    if (last === undefined) return false
    this.steps++
    const choice = this.#seed.choose(tasks.length + 1)
    const task = tasks[choice] ?? last
    if (choice < tasks.length) tasks[choice] = last
    task()
    return true
  }
}

/** Runs an effect to its end. Synchronous; never hangs. */
export const run = <A, E>(
  effect: Effect.Effect<A, E, Scope.Scope>,
  options: SimulationOptions = {}
): SimulationResult<A, E> => {
  const seedNumber = options.seed ?? 0
  const seed = new Seed(seedNumber)
  const scheduler = new SeededScheduler(seed, options.preempt ?? true)
  const clock = new SimulationClock()
  const trace = new Trace()
  const participants = new Set<SimulationParticipant>()
  const control: SimulationControl = {
    trace,
    pause: () => (seed.next() & 3) === 0,
    choose: seed.choose,
    join: (participant) => {
      participants.add(participant)
    },
    leave: (participant) => {
      participants.delete(participant)
    }
  }
  const fiber = Effect.runFork(
    Effect.scoped(effect).pipe(
      Effect.provideService(Clock.Clock, clock),
      Effect.provideService(SimulationControl, control),
      Random.withSeed(seedNumber)
    ),
    { scheduler }
  )
  let limit = options.maxSteps ?? DEFAULT_MAX_STEPS
  /** Runs until the effect has ended (then until nothing is left to do), or the limit, or a standstill. */
  const drive = (): void => {
    while (scheduler.steps < limit) {
      if (scheduler.step()) continue
      if (fiber.pollUnsafe() !== undefined || !clock.advance()) return
    }
  }
  drive()
  let failure: Error | undefined
  if (fiber.pollUnsafe() === undefined) {
    const waiting = Array.from(participants).flatMap((participant) => participant.waiting())
    failure = new SimulationStuck(
      scheduler.steps >= limit
        ? `the simulation has not ended after ${scheduler.steps} steps, at ${clock.currentTimeMillisUnsafe()} ms`
        : `nothing can run any more at ${clock.currentTimeMillisUnsafe()} ms`,
      waiting
    )
    limit = scheduler.steps + CLOSING_STEPS
    fiber.interruptUnsafe()
    drive()
    if (fiber.pollUnsafe() === undefined) {
      failure = new SimulationStuck(`${failure.message}\nand it cannot be interrupted`, [])
    }
  }
  const violations = new Set(Array.from(participants).flatMap((participant) => participant.violations()))
  if (failure === undefined && violations.size > 0) {
    failure = new BoundaryViolation(Array.from(violations).join("\n"))
  }
  return {
    exit: failure === undefined ? fiber.pollUnsafe() ?? Exit.die("the simulation has no end") : Exit.die(failure),
    seed: seedNumber,
    trace,
    steps: scheduler.steps,
    time: clock.currentTimeMillisUnsafe()
  }
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
