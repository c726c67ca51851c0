/**
 * The protocol `GuestLifecycle`: create, bind, run and stop a guest.
 *
 * `LifecycleTable.ts` says what each method does in each state.
 *
 * `stop` returns after every loop of the guest has stopped, as the protocol file promises. Interrupting `run` is a forced
 * halt too. Any number of clients may use one lifecycle; when its scope closes, whatever it holds is gone.
 */
import * as Cause from "effect/Cause"
import * as Context from "effect/Context"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Result from "effect/Result"
import * as Scope from "effect/Scope"
import * as Semaphore from "effect/Semaphore"
import { DeviceCatalog } from "./DeviceCatalog.ts"
import { type Epitaph, type Guest, makeGuest } from "./Guest.ts"
import { decodeGuestConfig, type GuestConfig, type GuestConfigInput } from "./GuestConfig.ts"
import {
  AlreadyRunning,
  ControllerForcedHalt,
  GuestError,
  type GuestErrorReason,
  InternalError,
  NotCreated
} from "./GuestError.ts"
import type { GuestStop } from "./GuestStop.ts"
import { Hypervisor } from "./Hypervisor.ts"
import { type LifecycleState, LifecycleTable } from "./LifecycleTable.ts"
import { type Machine, makeMachine } from "./Machine.ts"

/** A guest from its creation to its end. */
interface Instance {
  readonly machine: Machine
  readonly scope: Scope.Closeable
  readonly guest: Guest
  readonly epitaph: Deferred.Deferred<Epitaph>
  /** Completed by `stop` while the guest runs. */
  readonly stopRequested: Deferred.Deferred<void>
  /** Completed when nothing of the guest is left. */
  readonly gone: Deferred.Deferred<void>
  running: boolean
}

const NONE: Epitaph = { _tag: "none" }

/** What `Effect.uninterruptibleMask` gives. */
type Restore = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>

/** Creates, runs and stops one guest at a time. */
export class GuestLifecycle extends Context.Service<GuestLifecycle, {
  /**
   * Builds a guest: memory, devices, kernel. Nothing runs yet. A guest that was created and never run is replaced.
   *
   * Fails with `ALREADY_RUNNING`, `BAD_CONFIG`, `GUEST_INITIALIZATION_FAILURE`, `DEVICE_INITIALIZATION_FAILURE`,
   * `DEVICE_START_FAILURE`, `DEVICE_MEMORY_OVERLAP`, `FAILED_SERVICE_CONNECT`, `DUPLICATE_PUBLIC_SERVICES`,
   * `KERNEL_LOAD_FAILURE` or `INTERNAL_ERROR`; nothing is left of the attempt then.
   */
  readonly create: (config: GuestConfigInput) => Effect.Effect<void, GuestError>
  /** A client handle on the guest. Fails with `NOT_CREATED` unless it is called between `create` and the guest's end. */
  readonly bind: Effect.Effect<Guest, GuestError>
  /**
   * Runs the guest and returns how it ended. Fails with `NOT_CREATED`, `ALREADY_RUNNING`, `VCPU_START_FAILURE`,
   * `VCPU_RUNTIME_FAILURE`, `INTERNAL_ERROR`, with `CONTROLLER_FORCED_HALT` when `stop` ended it, or, where a reset runs the
   * guest again, as `create` does. The guest is gone when this returns.
   */
  readonly run: Effect.Effect<GuestStop, GuestError>
  /** Ends the guest. Returns when every loop of it has stopped; `create` can be called again then. */
  readonly stop: Effect.Effect<void>
}>()("@troupe/core/GuestLifecycle") {
  /** A lifecycle on the hypervisor and with the devices that are provided. */
  static readonly layer: Layer.Layer<GuestLifecycle, never, Hypervisor | DeviceCatalog> = Layer.effect(
    GuestLifecycle,
    Effect.suspend(() => make)
  )
}

const fail = (reason: GuestErrorReason): Effect.Effect<never, GuestError> => Effect.fail(new GuestError({ reason }))

const forcedHalt = new GuestError({
  reason: new ControllerForcedHalt({ operation: "run", detail: "the guest was stopped by its controller" })
})

/**
 * Why an operation failed, as a typed error: its own if it has one, otherwise what died under it. The interruption of a client
 * stays what it is.
 */
const typed = (operation: string) => (cause: Cause.Cause<GuestError>): Effect.Effect<never, GuestError> => {
  const error = Cause.findErrorOption(cause)
  if (Option.isSome(error)) return Effect.fail(error.value)
  if (Cause.hasInterrupts(cause)) return Effect.failCause(cause)
  const defect = Cause.squash(cause)
  return fail(
    new InternalError({
      operation,
      detail: `an unexpected defect: ${defect instanceof Error ? defect.message : String(defect)}`
    })
  )
}

const ownerGone = new GuestError({
  reason: new InternalError({ operation: "create", detail: "the lifecycle's owner is gone: its scope has closed" })
})

const alreadyRunning = (operation: string): Effect.Effect<never, GuestError> =>
  fail(new AlreadyRunning({ operation, detail: "a guest is running", hint: "Call stop first, and wait for it" }))

const notCreated = (operation: string): Effect.Effect<never, GuestError> =>
  fail(new NotCreated({ operation, detail: "there is no guest", hint: "Call create first" }))

const make = Effect.gen(function*() {
  const hypervisor = yield* Hypervisor
  const catalog = yield* DeviceCatalog
  const closing = Deferred.makeUnsafe<never, GuestError>()
  let closed = false
  // Create and the stop of a guest that does not run take turns, so that they see the whole of each other.
  const turn = yield* Semaphore.make(1)
  let instance: Instance | undefined
  const state = (): LifecycleState => instance === undefined ? "Empty" : instance.running ? "Running" : "Created"

  /** Takes a guest apart: first its clients learn the epitaph, then it goes, then whoever waits for that goes on. */
  const end = (ended: Instance, epitaph: Epitaph, exit: Exit.Exit<unknown, unknown>): Effect.Effect<void> =>
    Effect.uninterruptible(
      Deferred.succeed(ended.epitaph, epitaph).pipe(
        Effect.andThen(Scope.close(ended.scope, exit)),
        // A device that breaks at its end has had its turn: the others have ended too, and the guest is gone.
        Effect.catchCause((cause) => Effect.logError("a device died while its machine was taken apart", cause)),
        Effect.andThen(Effect.sync(() => {
          if (instance === ended) instance = undefined
        })),
        Effect.andThen(Deferred.succeed(ended.gone, undefined)),
        Effect.asVoid
      )
    )

  /** Builds a guest, uninterruptibly but for what `restore` makes interruptible. */
  const build = Effect.fnUntraced(function*(config: GuestConfig, restore: Restore) {
    const scope = yield* Scope.make()
    const making = makeMachine(config).pipe(
      Scope.provide(scope),
      Effect.provideService(Hypervisor, hypervisor),
      Effect.provideService(DeviceCatalog, catalog)
    )
    const machine = yield* restore(Effect.raceFirst(making, Deferred.await(closing))).pipe(
      Effect.tap(() => closed ? Effect.fail(ownerGone) : Effect.void),
      Effect.onExit((exit) => Exit.isFailure(exit) ? Scope.close(scope, exit) : Effect.void),
      Effect.catchCause(typed("create"))
    )
    const epitaph = Deferred.makeUnsafe<Epitaph>()
    instance = {
      machine,
      scope,
      guest: makeGuest(machine.services, Deferred.await(epitaph)),
      epitaph,
      stopRequested: Deferred.makeUnsafe<void>(),
      gone: Deferred.makeUnsafe<void>(),
      running: false
    }
  })

  /** Takes a guest that does not run apart. From the call on nobody can bind or run it; the effect must not be interrupted. */
  const discard = (epitaph: Epitaph): Effect.Effect<void> => {
    const discarded = instance
    instance = undefined
    return discarded === undefined ? Effect.void : end(discarded, epitaph, Exit.void)
  }

  const create = (input: GuestConfigInput): Effect.Effect<void, GuestError> =>
    turn.withPermit(Effect.uninterruptibleMask((restore) =>
      Effect.suspend(() => {
        if (closed) return Effect.fail(ownerGone)
        const transition = LifecycleTable[state()].create
        if (transition === "ALREADY_RUNNING") return alreadyRunning("create")
        const config = decodeGuestConfig(input)
        const built = Result.isFailure(config) ? fail(config.failure) : build(config.success, restore)
        return transition === "replace" ? Effect.andThen(discard(NONE), built) : built
      })
    ))

  const bind = Effect.suspend(() =>
    instance === undefined || LifecycleTable[state()].bind === "NOT_CREATED"
      ? notCreated("bind")
      : Effect.succeed(instance.guest)
  )

  const runToEnd = (running: Instance): Effect.Effect<GuestStop, GuestError> =>
    Effect.raceFirst(
      Effect.catchCause(running.machine.run, typed("run")),
      Effect.andThen(Deferred.await(running.stopRequested), Effect.fail(forcedHalt))
    )

  const run = Effect.uninterruptibleMask((restore) =>
    Effect.suspend(() => {
      const running = instance
      const transition = LifecycleTable[state()].run
      if (transition === "ALREADY_RUNNING") return alreadyRunning("run")
      if (running === undefined || transition === "NOT_CREATED") return notCreated("run")
      running.running = true
      return Effect.onExit(restore(runToEnd(running)), (exit) => end(running, epitaphOf(exit, running.machine), exit))
    })
  )

  const stop: Effect.Effect<void> = Effect.suspend(() => {
    const stopping = instance
    if (stopping !== undefined && LifecycleTable[state()].stop === "halt") {
      return Effect.andThen(Deferred.succeed(stopping.stopRequested, undefined), Deferred.await(stopping.gone))
    }
    return turn.withPermit(Effect.uninterruptibleMask((restore) =>
      Effect.suspend(() => {
        switch (LifecycleTable[state()].stop) {
          case "nothing":
            return Effect.void
          case "discard":
            return discard({ _tag: "ZX_ERR_INTERNAL", reason: undefined })
          case "halt":
            return restore(stop)
        }
      })
    ))
  })

  // The owner goes: clients get no epitaph, a pending run ends as a forced halt, a pending create fails.
  yield* Effect.addFinalizer(() =>
    Effect.suspend(() => {
      closed = true
      Deferred.doneUnsafe(closing, Exit.fail(ownerGone))
      if (instance !== undefined) Deferred.doneUnsafe(instance.epitaph, Exit.succeed(NONE))
      return stop
    })
  )

  return { create, bind, run, stop }
})

/** What clients learn from how `run` ended. A guest whose vCPUs have never started leaves no epitaph. */
const epitaphOf = (exit: Exit.Exit<GuestStop, GuestError>, machine: Machine): Epitaph => {
  if (Exit.isSuccess(exit)) return { _tag: "ZX_OK" }
  const reason = Option.match(Exit.findErrorOption(exit), {
    onNone: () => forcedHalt.reason,
    onSome: (error) => error.reason
  })
  return reason._tag === "VCPU_START_FAILURE" && !machine.hasLived() ? NONE : { _tag: "ZX_ERR_INTERNAL", reason }
}
