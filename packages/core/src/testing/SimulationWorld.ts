/**
 * A world where one seed decides everything and time is virtual: the scheduler, the clock and the random numbers that the
 * fibers in it have. Whoever holds it drives it.
 */
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
import { Trace } from "./Trace.ts"

/** What a simulation may choose. */
export interface SimulationOptions {
  /** Decides everything that is a matter of chance. Default: 0. */
  readonly seed?: number
  /** Number of scheduled tasks after which a simulation that has not ended is given up. Default: 1,000,000. */
  readonly maxSteps?: number
  /** Whether fibers are also preempted between their effects, where only a fiber that ran long would be. Default: true. */
  readonly preempt?: boolean
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
/** Tasks that a given-up effect may still use to close its scopes. */
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

/**
 * A simulated world. `run` starts an effect and drives the world until it has ended; between two runs, what was forked
 * stays where it is.
 */
export class SimulationWorld {
  /** The number that decides everything. */
  readonly seed: number
  /** What happened at the boundary of the fakes inside. */
  readonly trace = new Trace()
  readonly #maxSteps: number
  readonly #scheduler: SeededScheduler
  readonly #clock = new SimulationClock()
  readonly #participants = new Set<SimulationParticipant>()
  readonly #control: SimulationControl

  constructor(options: SimulationOptions = {}) {
    this.seed = options.seed ?? 0
    this.#maxSteps = options.maxSteps ?? DEFAULT_MAX_STEPS
    const seed = new Seed(this.seed)
    this.#scheduler = new SeededScheduler(seed, options.preempt ?? true)
    this.#control = {
      trace: this.trace,
      pause: () => (seed.next() & 3) === 0,
      choose: seed.choose,
      join: (participant) => {
        this.#participants.add(participant)
      },
      leave: (participant) => {
        this.#participants.delete(participant)
      }
    }
  }

  /** Number of tasks that were run. */
  get steps(): number {
    return this.#scheduler.steps
  }

  /** Virtual time in milliseconds. */
  get time(): number {
    return this.#clock.currentTimeMillisUnsafe()
  }

  /** One line for each thing that waits. */
  get waiting(): ReadonlyArray<string> {
    return Array.from(this.#participants).flatMap((participant) => participant.waiting())
  }

  /** The rules of the boundary that were broken. */
  get violations(): ReadonlyArray<string> {
    return Array.from(new Set(Array.from(this.#participants).flatMap((participant) => participant.violations())))
  }

  /** Starts an effect, up to its first wait. It goes on when the world is driven. */
  fork<A, E>(effect: Effect.Effect<A, E, Scope.Scope>): Fiber.Fiber<A, E> {
    return Effect.runFork(
      Effect.scoped(effect).pipe(
        Effect.provideService(Clock.Clock, this.#clock),
        Effect.provideService(SimulationControl, this.#control),
        Random.withSeed(this.seed)
      ),
      { scheduler: this.#scheduler }
    )
  }

  /**
   * Starts an effect and drives the world until it has ended. An effect that cannot end is interrupted and dies with
   * {@link SimulationStuck}; when a rule of the boundary was broken it dies with that.
   */
  run<A, E>(effect: Effect.Effect<A, E, Scope.Scope>): Exit.Exit<A, E> {
    return this.finish(this.fork(effect))
  }

  /** Drives the world until a fiber of it has ended, as {@link run} does. */
  finish<A, E>(fiber: Fiber.Fiber<A, E>): Exit.Exit<A, E> {
    this.#drive(fiber, this.#maxSteps)
    let failure: Error | undefined
    if (fiber.pollUnsafe() === undefined) {
      failure = new SimulationStuck(
        this.steps >= this.#maxSteps
          ? `the simulation has not ended after ${this.steps} steps, at ${this.time} ms`
          : `nothing can run any more at ${this.time} ms`,
        this.waiting
      )
      fiber.interruptUnsafe()
      this.#drive(fiber, this.steps + CLOSING_STEPS)
      if (fiber.pollUnsafe() === undefined) {
        failure = new SimulationStuck(`${failure.message}\nand it cannot be interrupted`, [])
      }
    }
    const violations = this.violations
    if (failure === undefined && violations.length > 0) failure = new BoundaryViolation(violations.join("\n"))
    const exit = fiber.pollUnsafe()
    return failure === undefined && exit !== undefined ? exit : Exit.die(failure)
  }

  /** Runs what can run, without letting time pass. */
  settle(): void {
    while (this.steps < this.#maxSteps && this.#scheduler.step());
  }

  /** Runs at most this many tasks; time passes when nothing else can happen. Returns whether more can happen. */
  advance(steps: number): boolean {
    const limit = this.steps + steps
    while (this.steps < limit) {
      if (!this.#scheduler.step() && !this.#clock.advance()) return false
    }
    return true
  }

  #drive(fiber: Fiber.Fiber<unknown, unknown>, limit: number): void {
    while (this.steps < limit && fiber.pollUnsafe() === undefined) {
      if (!this.#scheduler.step() && !this.#clock.advance()) return
    }
  }
}
