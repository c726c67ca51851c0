/** What all machines of one fake hypervisor share: faults, the trace, what is open, and which rules were broken. */
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import { HypervisorError } from "../Hypervisor.ts"
import type { Errno, FaultPlan, HypervisorOperation } from "./FaultPlan.ts"
import type { SimulationControl, SimulationParticipant } from "./SimulationControl.ts"
import type { Trace } from "./Trace.ts"

/** A rule of the boundary was broken: by a device, by a machine, or by a guest program that is no program. */
export class BoundaryViolation extends Error {
  override readonly name = "BoundaryViolation"
}

/** Number of violations and operation names that are kept. */
const KEPT = 1024

/** The shared state of one fake hypervisor. */
export class FakeWorld implements SimulationParticipant {
  readonly trace: Trace
  readonly control: SimulationControl | undefined
  readonly broken: Array<string> = []
  /** The operations begun so far, in order; the first {@link KEPT}. */
  readonly operations: Array<HypervisorOperation> = []
  operationCount = 0
  readonly #plan: FaultPlan
  readonly #uses = new Map<HypervisorOperation, number>()
  readonly #open = new Map<number, string>()
  #nextResource = 0
  #machines = 0

  constructor(plan: FaultPlan, trace: Trace, control: SimulationControl | undefined) {
    this.#plan = plan
    this.trace = trace
    this.control = control
  }

  /** The number of a new machine. */
  nextMachine(): number {
    return ++this.#machines
  }

  readonly waiting = (): ReadonlyArray<string> => []
  readonly violations = (): ReadonlyArray<string> => this.broken

  /** What is open now, oldest first. */
  get open(): ReadonlyArray<string> {
    return Array.from(this.#open.values())
  }

  /** Notes something as open; the result notes it as closed. */
  opened(what: string): () => void {
    const key = this.#nextResource++
    this.#open.set(key, what)
    return () => {
      this.#open.delete(key)
    }
  }

  /** Notes that a rule was broken, and returns the defect to die with. */
  violation(message: string, cause?: unknown): BoundaryViolation {
    if (this.broken.length < KEPT) this.broken.push(message)
    return new BoundaryViolation(message, { cause })
  }

  /** Whether to let others run now. Without a simulation nobody is let in between. */
  pause(): boolean {
    return this.control !== undefined && this.control.pause()
  }

  /** An operation of the boundary: counted, perhaps delayed, perhaps failed, then done. */
  operation<A, R>(
    name: HypervisorOperation,
    subject: string,
    body: Effect.Effect<A, HypervisorError, R>
  ): Effect.Effect<A, HypervisorError, R> {
    return Effect.suspend(() => {
      const index = this.operationCount++
      if (this.operations.length < KEPT) this.operations.push(name)
      const nth = this.#uses.get(name) ?? 0
      this.#uses.set(name, nth + 1)
      const fault = this.#plan(index, name, nth)
      const paused = this.pause()
      if (fault === undefined) return paused ? Effect.andThen(Effect.yieldNow, body) : body
      const start = fault.delay === undefined ? Effect.yieldNow : Effect.sleep(fault.delay)
      const { errno } = fault
      return Effect.andThen(start, errno === undefined ? body : fail(name, subject, "the fault plan says so", errno))
    })
  }

  /** Something that is open until its scope closes. */
  resource<A>(
    what: string,
    acquire: () => A | HypervisorError,
    release: (resource: A) => void
  ): Effect.Effect<A, HypervisorError, Scope.Scope> {
    return Effect.map(
      Effect.acquireRelease(
        Effect.suspend(() => {
          const resource = acquire()
          if (resource instanceof HypervisorError) return Effect.fail(resource)
          return Effect.succeed({ resource, closed: this.opened(what) })
        }),
        ({ closed, resource }) => {
          const done = Effect.sync(() => {
            release(resource)
            closed()
          })
          return this.pause() ? Effect.andThen(Effect.yieldNow, done) : done
        }
      ),
      ({ resource }) => resource
    )
  }
}

/** The error of an operation that the fake refuses. */
export const refusal = (
  operation: HypervisorOperation,
  subject: string,
  detail: string,
  errno: Errno
): HypervisorError => new HypervisorError({ operation, arguments: subject, detail, errno })

const fail = (
  operation: HypervisorOperation,
  subject: string,
  detail: string,
  errno: Errno
): Effect.Effect<never, HypervisorError> =>
  Effect.suspend(() => Effect.fail(refusal(operation, subject, detail, errno)))
