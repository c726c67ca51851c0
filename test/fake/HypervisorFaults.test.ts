/** Every operation of the hypervisor fails, or is interrupted, at every point of a create, run, stop cycle. */
import { assert, describe, it } from "@effect/vitest"
import { GuestError, type GuestErrorReason } from "@troupe/core/GuestError"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { FakeHypervisor, FaultPlan, Simulation } from "@troupe/core/testing"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as fc from "fast-check"
import { goodConfig, layerLifecycle, makeRemote, type Remote } from "./TestGuest.ts"

const ERRNOS = [FaultPlan.ENOMEM, FaultPlan.EMFILE, FaultPlan.EPERM, FaultPlan.EBUSY]

/** Create, run until the guest turns itself off, stop. */
const cycle = Effect.gen(function*() {
  const lifecycle = yield* GuestLifecycle
  yield* lifecycle.create(goodConfig)
  const guest = yield* lifecycle.bind
  const stop = yield* lifecycle.run
  yield* lifecycle.stop
  return { stop, epitaph: yield* guest.epitaph }
})

/** A host on which each guest is told to turn itself off as soon as it runs, if a remote control does not say otherwise. */
const hosted = <A, E>(
  effect: Effect.Effect<A, E, GuestLifecycle | FakeHypervisor.FakeHypervisor>,
  faults: FaultPlan.FaultPlan = FaultPlan.none,
  given?: Remote
): Effect.Effect<A, E> =>
  Effect.suspend(() => {
    const remote = given ?? makeRemote({ standingOrder: "power-off" })
    return Effect.provide(effect, layerLifecycle([remote.factory], { faults }))
  })

const fake = FakeHypervisor.FakeHypervisor

/** The reason that each operation's failure must have. Those for pluggable memory are not in a cycle without such a device. */
const reasonOf: { readonly [operation in FaultPlan.HypervisorOperation]?: GuestErrorReason["_tag"] } = {
  createVm: "GUEST_INITIALIZATION_FAILURE",
  addMemory: "GUEST_INITIALIZATION_FAILURE",
  attachBus: "DEVICE_INITIALIZATION_FAILURE",
  interruptLine: "DEVICE_INITIALIZATION_FAILURE",
  messageInterrupt: "DEVICE_INITIALIZATION_FAILURE",
  createVcpu: "VCPU_START_FAILURE",
  setState: "VCPU_START_FAILURE",
  run: "VCPU_RUNTIME_FAILURE"
}

const operations = Simulation.check(
  hosted(Effect.andThen(cycle, Effect.flatMap(fake, (it) => it.operations)))
)

describe("a hypervisor operation that fails", () => {
  it("is one of each kind in a cycle", () => {
    assert.deepStrictEqual(new Set(operations), new Set(Object.keys(reasonOf)))
  })

  for (const [index, operation] of operations.entries()) {
    it(`ends in a typed error with nothing left open: number ${index}, ${operation}`, () => {
      fc.assert(
        fc.property(fc.integer(), fc.constantFrom(...ERRNOS), (seed, errno) => {
          // The guest that meets the fault does nothing by itself that could end it first.
          const remote = makeRemote()
          Simulation.check(
            hosted(
              Effect.gen(function*() {
                const error = yield* Effect.flip(cycle)
                assert.instanceOf(error, GuestError)
                assert.strictEqual(error.reason._tag, reasonOf[operation])
                assert.strictEqual(error.reason.hypervisor?.operation, operation)
                assert.strictEqual(error.reason.hypervisor?.errno?.name, errno.name)
                assert.include(error.message, errno.name)
                const lifecycle = yield* GuestLifecycle
                assert.strictEqual((yield* Effect.flip(lifecycle.run)).reason._tag, "NOT_CREATED")
                assert.deepStrictEqual(yield* (yield* fake).openResources, [])
                // The fault is over, and so is its effect.
                remote.say("power-off")
                assert.strictEqual((yield* cycle).stop._tag, "PowerOff")
                assert.deepStrictEqual(yield* (yield* fake).openResources, [])
              }),
              FaultPlan.failAt(index, errno),
              remote
            ),
            { seed }
          )
        }),
        { numRuns: 20 }
      )
    })
  }
})

describe("a hypervisor operation that takes long", () => {
  for (const [index, operation] of operations.entries()) {
    it(`can be interrupted, and stopped, with nothing left open: number ${index}, ${operation}`, () => {
      fc.assert(
        fc.property(fc.integer(), fc.boolean(), (seed, interrupt) => {
          Simulation.check(
            hosted(
              Effect.gen(function*() {
                const lifecycle = yield* GuestLifecycle
                const fiber = yield* Effect.forkChild(cycle)
                yield* Effect.sleep("30 seconds")
                if (interrupt) yield* Fiber.interrupt(fiber)
                else yield* lifecycle.stop
                const exit = yield* Fiber.await(fiber)
                if (Exit.isFailure(exit) && !Cause.hasInterruptsOnly(exit.cause)) {
                  const error = Exit.findErrorOption(exit)
                  assert.isTrue(error._tag === "Some", Cause.pretty(exit.cause))
                }
                yield* lifecycle.stop
                assert.deepStrictEqual(yield* (yield* fake).openResources, [])
                assert.strictEqual((yield* cycle).stop._tag, "PowerOff")
              }),
              FaultPlan.delayAt(index, "1 minute")
            ),
            { seed }
          )
        }),
        { numRuns: 10 }
      )
    })
  }
})

describe("a cycle that is interrupted", () => {
  it("leaves nothing open, at every step of its schedule", () => {
    let steps = 0
    for (let seed = 0; seed < 8; seed++) {
      for (let step = 0;; step++) {
        const world = Simulation.make({ seed })
        let open: Effect.Effect<ReadonlyArray<string>> = Effect.succeed([])
        const fiber = world.fork(hosted(Effect.gen(function*() {
          open = (yield* fake).openResources
          return yield* cycle
        })))
        world.advance(step)
        const over = fiber.pollUnsafe() !== undefined
        if (!over) fiber.interruptUnsafe()
        const exit = world.finish(fiber)
        world.settle()
        assert.deepStrictEqual(world.run(open), Exit.succeed([]), `seed ${seed}, step ${step}`)
        if (over) {
          assert.isTrue(Exit.isSuccess(exit))
          break
        }
        assert.isTrue(Exit.isSuccess(exit) || Cause.hasInterruptsOnly(exit.cause), `seed ${seed}, step ${step}`)
        assert.deepStrictEqual(world.waiting, [], `seed ${seed}, step ${step}`)
        steps++
      }
    }
    assert.isAbove(steps, 100)
  })
})

describe("a lifecycle whose owner goes", () => {
  const createOnly = Effect.flatMap(GuestLifecycle, (lifecycle) => lifecycle.create(goodConfig))

  it("leaves nothing open and nobody waiting, at every step of a cycle that nobody interrupts", () => {
    let steps = 0
    for (let seed = 0; seed < 16; seed++) {
      for (let step = 0;; step++) {
        const at = `seed ${seed}, step ${step}`
        const world = Simulation.make({ seed })
        const scope = Scope.makeUnsafe()
        const remote = makeRemote({ standingOrder: "power-off" })
        const built = world.run(Layer.buildWithScope(layerLifecycle([remote.factory]), scope))
        if (Exit.isFailure(built)) throw new Error(Cause.pretty(built.cause))
        const fiber = world.fork(Effect.provide(seed % 2 === 0 ? cycle : createOnly, built.value))
        world.advance(step)
        const over = fiber.pollUnsafe() !== undefined
        assert.deepStrictEqual(world.run(Scope.close(scope, Exit.void)), Exit.void, at)
        const exit = world.finish(fiber)
        if (Exit.isFailure(exit)) {
          assert.isTrue(Option.isSome(Exit.findErrorOption(exit)), `${at}: ${Cause.pretty(exit.cause)}`)
        }
        const open = Effect.flatMap(fake, (it) => it.openResources)
        assert.deepStrictEqual(world.run(Effect.provide(open, built.value)), Exit.succeed([]), at)
        assert.deepStrictEqual(world.waiting, [], at)
        if (over) break
        steps++
      }
    }
    assert.isAbove(steps, 100)
  })
})
