/**
 * The lifecycle against a plain model of its state table: any sequence of calls, guests that end in any way, and clients
 * that give up, each followed by a look at what is left open.
 */
import { assert, describe, it } from "@effect/vitest"
import type { Epitaph, Guest } from "@troupe/core/Guest"
import type { GuestConfigInput } from "@troupe/core/GuestConfig"
import type { GuestError, GuestErrorReason } from "@troupe/core/GuestError"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import type { GuestStop } from "@troupe/core/GuestStop"
import { FakeHypervisor, Simulation } from "@troupe/core/testing"
import * as Cause from "effect/Cause"
import type * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as fc from "fast-check"
import { type Action, ACTIONS, goodConfig, layerHost, layerLifecycle, makeRemote, type Remote } from "./TestGuest.ts"

/** What a client holds: its guest, and what it has heard of its end. */
interface Client {
  readonly guest: Guest
  readonly epitaph: Fiber.Fiber<Epitaph>
}

interface Model {
  state: "Empty" | "Created" | "Running"
  /** Epitaphs that each client must have heard, `undefined` while its guest lives. */
  readonly clients: Array<{ generation: number; expected: string | undefined }>
  generation: number
}

interface Real {
  readonly world: Simulation.SimulationWorld
  readonly context: Context.Context<GuestLifecycle | FakeHypervisor.FakeHypervisor>
  readonly remote: Remote
  readonly clients: Array<Client>
  run: Fiber.Fiber<GuestStop, GuestError> | undefined
}

type Services = GuestLifecycle | FakeHypervisor.FakeHypervisor

const start = <A, E>(real: Real, effect: Effect.Effect<A, E, Services>): Fiber.Fiber<A, E> =>
  real.world.fork(Effect.provide(effect, real.context))

const now = <A, E>(real: Real, effect: Effect.Effect<A, E, Services>): Exit.Exit<A, E> =>
  real.world.finish(start(real, effect))

/** The reason of a failure, or a word for anything else. */
const outcome = (exit: Exit.Exit<unknown, GuestError>): string =>
  Exit.isSuccess(exit)
    ? "ok"
    : Option.match(Exit.findErrorOption(exit), {
      onNone: () => (Cause.hasInterruptsOnly(exit.cause) ? "interrupted" : Cause.pretty(exit.cause)),
      onSome: (error) => error.reason._tag
    })

const lifecycle = <A, E>(
  use: (lifecycle: GuestLifecycle["Service"]) => Effect.Effect<A, E>
): Effect.Effect<A, E, GuestLifecycle> => Effect.flatMap(GuestLifecycle, use)

const tell = (epitaph: Epitaph): string =>
  epitaph._tag === "ZX_ERR_INTERNAL" ? `ZX_ERR_INTERNAL ${epitaph.reason?._tag ?? ""}` : epitaph._tag

const openNow = (real: Real): ReadonlyArray<string> => {
  const exit = now(real, Effect.flatMap(FakeHypervisor.FakeHypervisor, (fake) => fake.openResources))
  if (Exit.isFailure(exit)) throw new Error(Cause.pretty(exit.cause))
  return exit.value
}

/** What must hold after every command. */
const settled = (model: Model, real: Real): void => {
  real.world.settle()
  const open = openNow(real)
  const machines = open.filter((what) => what === "machine").length
  assert.strictEqual(machines, model.state === "Empty" ? 0 : 1, open.join("; "))
  if (model.state === "Empty") assert.deepStrictEqual(open, [])
  assert.strictEqual(real.run !== undefined, model.state === "Running")
  if (real.run !== undefined) assert.isUndefined(real.run.pollUnsafe(), "run returned while its guest runs")
  for (const [index, { expected }] of model.clients.entries()) {
    const heard = real.clients[index]?.epitaph.pollUnsafe()
    const text = heard === undefined ? undefined : Exit.isSuccess(heard) ? tell(heard.value) : Cause.pretty(heard.cause)
    assert.strictEqual(text, expected, `client ${index}`)
  }
  assert.deepStrictEqual(real.world.violations, [])
}

/** The guest of the model is gone, and its clients hear this. */
const end = (model: Model, epitaph: string): void => {
  for (const client of model.clients) {
    if (client.generation === model.generation) client.expected ??= epitaph
  }
  model.state = "Empty"
}

const configs: { readonly [name: string]: { readonly config: GuestConfigInput; readonly outcome: string } } = {
  good: { config: goodConfig, outcome: "ok" },
  tiny: { config: { ...goodConfig, guestMemory: 4096 }, outcome: "BAD_CONFIG" },
  noKernel: { config: { ...goodConfig, kernel: new Uint8Array(100) }, outcome: "KERNEL_LOAD_FAILURE" },
  noDevice: { config: { ...goodConfig, virtioRng: true }, outcome: "FAILED_SERVICE_CONNECT" }
}

class Create implements fc.Command<Model, Real> {
  readonly name: string
  constructor(name: string) {
    this.name = name
  }
  check = () => true
  run(model: Model, real: Real): void {
    const { config, outcome: built } = configs[this.name] ?? { config: goodConfig, outcome: "ok" }
    const result = outcome(now(real, lifecycle((it) => it.create(config))))
    if (model.state === "Running") {
      assert.strictEqual(result, "ALREADY_RUNNING")
    } else {
      if (model.state === "Created") end(model, "none")
      assert.strictEqual(result, built)
      if (built === "ok") {
        model.state = "Created"
        model.generation++
      }
    }
    settled(model, real)
  }
  toString = () => `create(${this.name})`
}

class Bind implements fc.Command<Model, Real> {
  check = () => true
  run(model: Model, real: Real): void {
    const exit = now(real, lifecycle((it) => it.bind))
    assert.strictEqual(outcome(exit), model.state === "Empty" ? "NOT_CREATED" : "ok")
    if (Exit.isSuccess(exit)) {
      real.clients.push({ guest: exit.value, epitaph: start(real, exit.value.epitaph) })
      model.clients.push({ generation: model.generation, expected: undefined })
    }
    settled(model, real)
  }
  toString = () => "bind"
}

class Run implements fc.Command<Model, Real> {
  check = () => true
  run(model: Model, real: Real): void {
    if (model.state === "Created") {
      real.run = start(real, lifecycle((it) => it.run))
      model.state = "Running"
    } else {
      const result = outcome(now(real, lifecycle((it) => it.run)))
      assert.strictEqual(result, model.state === "Empty" ? "NOT_CREATED" : "ALREADY_RUNNING")
    }
    settled(model, real)
  }
  toString = () => "run"
}

class Stop implements fc.Command<Model, Real> {
  check = () => true
  run(model: Model, real: Real): void {
    const stopped = now(
      real,
      Effect.gen(function*() {
        yield* (yield* GuestLifecycle).stop
        // Looked at at once: stop returns after every loop has stopped.
        return yield* (yield* FakeHypervisor.FakeHypervisor).openResources
      })
    )
    assert.deepStrictEqual(stopped, Exit.succeed([]))
    if (model.state === "Running") {
      assert.strictEqual(ended(real), "CONTROLLER_FORCED_HALT")
      end(model, "ZX_ERR_INTERNAL CONTROLLER_FORCED_HALT")
    } else if (model.state === "Created") {
      end(model, "ZX_ERR_INTERNAL ")
    }
    settled(model, real)
  }
  toString = () => "stop"
}

class Interrupt implements fc.Command<Model, Real> {
  check = (model: Readonly<Model>) => model.state === "Running"
  run(model: Model, real: Real): void {
    real.run?.interruptUnsafe()
    assert.strictEqual(ended(real), "interrupted")
    end(model, "ZX_ERR_INTERNAL CONTROLLER_FORCED_HALT")
    settled(model, real)
  }
  toString = () => "interrupt run"
}

/** How a run ends for each thing that a guest can do: the result, and what clients hear. */
const ends: { readonly [action in Exclude<Action, "break-device">]: readonly [result: string, epitaph: string] } = {
  "power-off": ["ok", "ZX_OK"],
  "acpi-reset": ["ok", "ZX_OK"],
  "keyboard-reset": ["ok", "ZX_OK"],
  halt: ["ok", "ZX_OK"],
  "triple-fault": ["VCPU_RUNTIME_FAILURE", "ZX_ERR_INTERNAL VCPU_RUNTIME_FAILURE"],
  "internal-error": ["VCPU_RUNTIME_FAILURE", "ZX_ERR_INTERNAL VCPU_RUNTIME_FAILURE"],
  panic: ["VCPU_RUNTIME_FAILURE", "ZX_ERR_INTERNAL VCPU_RUNTIME_FAILURE"]
}

class Say implements fc.Command<Model, Real> {
  readonly action: Action
  constructor(action: Action) {
    this.action = action
  }
  check = (model: Readonly<Model>) => model.state === "Running"
  run(model: Model, real: Real): void {
    real.remote.say(this.action)
    if (this.action === "break-device") {
      // The default policy starts the device again; the guest goes on.
      now(real, Effect.sleep("1 second"))
    } else {
      const [result, epitaph] = ends[this.action]
      assert.strictEqual(ended(real), result)
      end(model, epitaph)
    }
    settled(model, real)
  }
  toString = () => `guest does ${this.action}`
}

/** Drives the world until the run has ended, and says how. */
const ended = (real: Real): string => {
  const running = real.run
  if (running === undefined) return "nothing runs"
  const exit = real.world.finish(running)
  real.run = undefined
  return outcome(exit)
}

const commands = fc.commands<Model, Real>([
  fc.constantFrom(...Object.keys(configs)).map((name) => new Create(name)),
  fc.constant(new Create("good")),
  fc.constant(new Bind()),
  fc.constant(new Run()),
  fc.constant(new Run()),
  fc.constant(new Stop()),
  fc.constant(new Interrupt()),
  fc.constantFrom(...ACTIONS).map((action) => new Say(action))
], { maxCommands: 40 })

describe("GuestLifecycle", () => {
  it("does what its state table says, whatever is called when", () => {
    fc.assert(
      fc.property(commands, fc.integer(), (sequence, seed) => {
        const world = Simulation.make({ seed })
        const remote = makeRemote()
        const scope = Scope.makeUnsafe()
        const built = world.run(Layer.buildWithScope(layerLifecycle([remote.factory]), scope))
        if (Exit.isFailure(built)) throw new Error(Cause.pretty(built.cause))
        const real: Real = { world, context: built.value, remote, clients: [], run: undefined }
        const model: Model = { state: "Empty", clients: [], generation: 0 }
        fc.modelRun(() => ({ model, real }), sequence)
        // The owner goes, wherever it was: nothing is left, a pending run ends, clients hear no epitaph.
        world.run(Scope.close(scope, Exit.void))
        if (model.state === "Running") assert.strictEqual(ended(real), "CONTROLLER_FORCED_HALT")
        end(model, "none")
        settled(model, real)
      }),
      { numRuns: 300 }
    )
  })
})

const reasons: ReadonlySet<GuestErrorReason["_tag"]> = new Set([
  "NOT_CREATED",
  "ALREADY_RUNNING",
  "CONTROLLER_FORCED_HALT",
  "VCPU_RUNTIME_FAILURE"
])

describe("any number of clients", () => {
  it("never makes two guests, loses none, and leaves nothing, however calls overlap", () => {
    const call = fc.constantFrom("create", "bind", "run", "stop", "interrupt", "power-off", "triple-fault")
    fc.assert(
      fc.property(
        fc.array(fc.array(call, { maxLength: 6 }), { minLength: 1, maxLength: 4 }),
        fc.integer(),
        (clients, seed) => {
          const remote = makeRemote()
          Simulation.check(
            Effect.gen(function*() {
              const fake = yield* FakeHypervisor.FakeHypervisor
              const check = Effect.map(fake.openResources, (open) => {
                assert.isAtMost(open.filter((what) => what === "machine").length, 1)
              })
              yield* Effect.scoped(
                Effect.gen(function*() {
                  const it = yield* GuestLifecycle
                  const one = (what: string): Effect.Effect<unknown, GuestError> => {
                    switch (what) {
                      case "create":
                        return it.create(goodConfig)
                      case "bind":
                        return it.bind
                      case "run":
                        return Effect.timeoutOption(it.run, "1 minute")
                      case "interrupt":
                        return Effect.timeoutOption(it.run, "3 millis")
                      case "stop":
                        return it.stop
                      default:
                        return Effect.sync(() => remote.say(what === "power-off" ? "power-off" : "triple-fault"))
                    }
                  }
                  yield* Effect.forEach(
                    clients,
                    (calls) =>
                      Effect.forEach(calls, (what) =>
                        Effect.gen(function*() {
                          const exit = yield* Effect.exit(one(what))
                          if (Exit.isFailure(exit)) {
                            const error = Exit.findErrorOption(exit)
                            assert.isTrue(Option.isSome(error), Cause.pretty(exit.cause))
                            if (Option.isSome(error)) {
                              assert.isTrue(reasons.has(error.value.reason._tag), error.value.message)
                            }
                          }
                          yield* check
                          yield* Effect.yieldNow
                        })),
                    { concurrency: "unbounded" }
                  )
                }).pipe(Effect.provide(GuestLifecycle.layer))
              )
              assert.deepStrictEqual(yield* fake.openResources, [])
            }).pipe(Effect.provide(layerHost([remote.factory]))),
            { seed }
          )
        }
      ),
      { numRuns: 200 }
    )
  })
})
