/** Host code that breaks or hangs: factories, files, devices, their starts and their ends; and owners that go in the middle. */
import { assert, describe, it } from "@effect/vitest"
import type { Device, DeviceBehaviour } from "@troupe/core/Device"
import type { DeviceFactory } from "@troupe/core/DeviceCatalog"
import type { Epitaph } from "@troupe/core/Guest"
import { GuestFileError, makeGuestFile } from "@troupe/core/GuestFile"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { MachinePolicy } from "@troupe/core/MachinePolicy"
import { FakeHypervisor, FaultPlan, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as Scope from "effect/Scope"
import { goodConfig, layerHost, layerLifecycle, makeRemote } from "./TestGuest.ts"

const quiet: DeviceBehaviour = { read: () => 0, write: () => undefined }

const factoryOf = (fields: Partial<Device>): DeviceFactory => ({
  provides: "power",
  devices: () =>
    Effect.succeed([{ name: "probe0", ranges: [], interrupts: [], start: () => Effect.succeed(quiet), ...fields }])
})

const noneOpen = Effect.gen(function*() {
  const fake = yield* FakeHypervisor.FakeHypervisor
  assert.deepStrictEqual(yield* fake.openResources, [])
})

const powerOff = GuestProgram.kernel(GuestProgram.make((cpu) => GuestAcpi.powerOff(cpu)))

/** Throws from the `from`-th time on. */
const brokenFrom = (from: number, what: string) => {
  let times = 0
  return (): void => {
    if (++times >= from) throw new Error(what)
  }
}

describe("a defect of the host", () => {
  const creates: { readonly [where: string]: () => readonly [ReadonlyArray<DeviceFactory>, object] } = {
    "in a device factory": () => [[{
      provides: "power",
      devices: () => {
        throw new Error("broken")
      }
    }], {}],
    "in a device factory's effect": () => [[{ provides: "power", devices: () => Effect.die(new Error("broken")) }], {}],
    "in a device's ACPI nodes": () => [[factoryOf({ acpi: () => brokenFrom(1, "broken")() ?? [] })], {}],
    "in a device's start": () => [[factoryOf({
      start: () => {
        throw new Error("broken")
      }
    })], {}],
    "in a read of the kernel": () => [[], { kernel: makeGuestFile("vmlinuz", Effect.die(new Error("broken"))) }],
    "in a device's end, after a failure": () => [[
      factoryOf({
        start: () => Effect.as(Effect.addFinalizer(() => Effect.die(new Error("broken at its end"))), quiet)
      })
    ], { kernel: makeGuestFile("vmlinuz", Effect.die(new Error("broken"))) }]
  }
  for (const [where, make] of Object.entries(creates)) {
    it(`${where} fails create, typed, and leaves nothing`, () => {
      Simulation.explore(
        Effect.suspend(() => {
          const [factories, fields] = make()
          return Effect.gen(function*() {
            const lifecycle = yield* GuestLifecycle
            const error = yield* Effect.flip(lifecycle.create({ ...goodConfig, ...fields }))
            assert.strictEqual(error.reason._tag, "INTERNAL_ERROR")
            assert.include(error.message, "broken")
            yield* noneOpen
            assert.strictEqual((yield* Effect.flip(lifecycle.run)).reason._tag, "NOT_CREATED")
            yield* lifecycle.stop
          }).pipe(Effect.provide(layerLifecycle(factories)))
        }),
        5
      )
    })
  }

  it("in a machine that is built again after a reset fails run, typed; clients hear it; the next guest works", () => {
    Simulation.explore(
      Effect.suspend(() => {
        const acpi = brokenFrom(2, "broken tables")
        return Effect.gen(function*() {
          const lifecycle = yield* GuestLifecycle
          yield* lifecycle.create({
            ...goodConfig,
            kernel: GuestProgram.kernel(GuestProgram.make((cpu) => GuestAcpi.reset(cpu)))
          })
          const guest = yield* lifecycle.bind
          const error = yield* Effect.flip(lifecycle.run)
          assert.strictEqual(error.reason._tag, "INTERNAL_ERROR")
          assert.include(error.message, "broken tables")
          assert.deepStrictEqual(yield* guest.epitaph, { _tag: "ZX_ERR_INTERNAL", reason: error.reason })
          yield* noneOpen
          yield* lifecycle.stop
        }).pipe(
          Effect.provide(layerLifecycle([factoryOf({ acpi: () => acpi() ?? [] })])),
          Effect.updateService(MachinePolicy, (policy) => ({ ...policy, reset: "run-again" as const }))
        )
      }),
      5
    )
  })

  it("in a device's end does not keep run or stop from ending, nor the next guest from being made", () => {
    Simulation.explore(
      Effect.suspend(() => {
        let broken = true
        const logged: Array<string> = []
        const layerLog = Logger.layer([Logger.make(({ message }) => logged.push(String(message)))])
        const factory = factoryOf({
          start: () =>
            Effect.as(
              Effect.addFinalizer(() => broken ? Effect.die(new Error("broken at its end")) : Effect.void),
              quiet
            )
        })
        return Effect.gen(function*() {
          const lifecycle = yield* GuestLifecycle
          const config = { ...goodConfig, kernel: powerOff }
          // Stopped before it ran.
          yield* lifecycle.create(config)
          const first = yield* lifecycle.bind
          yield* lifecycle.stop
          assert.strictEqual((yield* first.epitaph)._tag, "ZX_ERR_INTERNAL")
          yield* noneOpen
          // Replaced before it ran.
          yield* lifecycle.create(config)
          yield* lifecycle.create(config)
          // Run to its end, which the device does not change any more.
          const second = yield* lifecycle.bind
          assert.strictEqual((yield* lifecycle.run)._tag, "PowerOff")
          assert.strictEqual((yield* second.epitaph)._tag, "ZX_OK")
          yield* noneOpen
          // Interrupted.
          yield* lifecycle.create(goodConfig)
          assert.strictEqual((yield* Effect.timeoutOption(lifecycle.run, "1 second"))._tag, "None")
          yield* noneOpen
          broken = false
          yield* lifecycle.create(config)
          assert.strictEqual((yield* lifecycle.run)._tag, "PowerOff")
          assert.deepStrictEqual(logged.filter((text) => !text.includes("while its machine was taken apart")), [])
          assert.strictEqual(logged.length, 4)
        }).pipe(Effect.provide(layerLifecycle([factory])), Effect.provide(layerLog))
      }),
      5
    )
  })
})

describe("an operation of the host that never ends", () => {
  const cases: { readonly [where: string]: () => readonly [ReadonlyArray<DeviceFactory>, object] } = {
    "a device's start": () => [[factoryOf({ start: () => Effect.never })], {}],
    "a device factory": () => [[{ provides: "power", devices: () => Effect.never }], {}],
    "a read of the kernel": () => [[], { kernel: makeGuestFile("vmlinuz", Effect.never) }]
  }
  for (const [where, make] of Object.entries(cases)) {
    it(`${where}: create can be interrupted, and nothing is left`, () => {
      Simulation.explore(
        Effect.suspend(() => {
          const [factories, fields] = make()
          return Effect.gen(function*() {
            const lifecycle = yield* GuestLifecycle
            const given = yield* Effect.timeoutOption(lifecycle.create({ ...goodConfig, ...fields }), "1 minute")
            assert.strictEqual(given._tag, "None")
            yield* noneOpen
          }).pipe(Effect.provide(layerLifecycle(factories)))
        }),
        5
      )
    })

    it(`${where}: the owner can go, and the client that waits is told`, () => {
      Simulation.explore(
        Effect.suspend(() => {
          const [factories, fields] = make()
          return Effect.gen(function*() {
            const scope = yield* Scope.make()
            const context = yield* Layer.buildWithScope(Layer.fresh(GuestLifecycle.layer), scope)
            const lifecycle = yield* Effect.provide(GuestLifecycle, context)
            const creating = yield* Effect.forkChild(Effect.flip(lifecycle.create({ ...goodConfig, ...fields })))
            yield* Effect.sleep("1 second")
            yield* Scope.close(scope, Exit.void)
            yield* noneOpen
            assert.strictEqual((yield* Fiber.join(creating)).reason._tag, "INTERNAL_ERROR")
            yield* noneOpen
          }).pipe(Effect.provide(layerHost(factories)))
        }),
        5
      )
    })
  }
})

describe("a machine that is never built again after a reset", () => {
  for (const how of ["stop", "interrupt", "owner"] as const) {
    it(`can be ended by ${how}, and nothing is left`, () => {
      Simulation.explore(
        Effect.suspend(() => {
          let reads = 0
          const image = GuestProgram.kernel(GuestProgram.make((cpu) => GuestAcpi.reset(cpu)))
          const kernel = makeGuestFile(
            "vmlinuz",
            Effect.suspend(() => ++reads < 3 ? Effect.succeed(image) : Effect.never)
          )
          return Effect.gen(function*() {
            const scope = yield* Scope.make()
            const context = yield* Layer.buildWithScope(Layer.fresh(GuestLifecycle.layer), scope)
            const lifecycle = yield* Effect.provide(GuestLifecycle, context)
            yield* lifecycle.create({ ...goodConfig, kernel })
            const guest = yield* lifecycle.bind
            const running = yield* Effect.forkChild(lifecycle.run)
            yield* Effect.sleep("1 second")
            assert.strictEqual(reads, 3)
            if (how === "stop") yield* lifecycle.stop
            else if (how === "interrupt") yield* Fiber.interrupt(running)
            else yield* Scope.close(scope, Exit.void)
            yield* noneOpen
            const exit = yield* Fiber.await(running)
            if (how !== "interrupt") {
              assert.strictEqual((yield* Effect.flip(exit)).reason._tag, "CONTROLLER_FORCED_HALT")
            }
            assert.strictEqual((yield* guest.epitaph)._tag, how === "owner" ? "none" : "ZX_ERR_INTERNAL")
          }).pipe(
            Effect.provide(layerHost([])),
            Effect.updateService(MachinePolicy, (policy) => ({ ...policy, reset: "run-again" as const }))
          )
        }),
        5
      )
    })
  }
})

describe("an owner that goes", () => {
  it("while a guest is being made leaves nothing, at every step of the schedule", () => {
    for (let seed = 0; seed < 4; seed++) {
      for (let wait = 0; wait < 40; wait++) {
        Simulation.check(
          Effect.gen(function*() {
            const scope = yield* Scope.make()
            const context = yield* Layer.buildWithScope(Layer.fresh(GuestLifecycle.layer), scope)
            const lifecycle = yield* Effect.provide(GuestLifecycle, context)
            const creating = yield* Effect.forkChild(Effect.exit(lifecycle.create(goodConfig)))
            for (let i = 0; i < wait; i++) yield* Effect.yieldNow
            yield* Scope.close(scope, Exit.void)
            yield* Fiber.await(creating)
            yield* noneOpen
            // Whoever still holds the service gets an answer, and no guest.
            const late = yield* Effect.exit(lifecycle.create(goodConfig))
            assert.isTrue(Exit.isFailure(late))
            yield* lifecycle.stop
            assert.strictEqual((yield* Effect.flip(lifecycle.run)).reason._tag, "NOT_CREATED")
            yield* noneOpen
          }).pipe(Effect.provide(layerHost([makeRemote().factory]))),
          { seed }
        )
      }
    }
  })
})

describe("a file that cannot be read", () => {
  it("when the machine is built again after a reset fails run with the file's name", () => {
    Simulation.explore(
      Effect.suspend(() => {
        let reads = 0
        const image = GuestProgram.kernel(GuestProgram.make((cpu) => GuestAcpi.reset(cpu)))
        const kernel = makeGuestFile(
          "vmlinuz",
          Effect.suspend(() =>
            ++reads === 1
              ? Effect.succeed(image)
              : Effect.fail(new GuestFileError({ name: "vmlinuz", detail: "there is no such file" }))
          )
        )
        return Effect.gen(function*() {
          const lifecycle = yield* GuestLifecycle
          yield* lifecycle.create({ ...goodConfig, kernel })
          const guest = yield* lifecycle.bind
          const error = yield* Effect.flip(lifecycle.run)
          assert.strictEqual(error.reason._tag, "KERNEL_LOAD_FAILURE")
          assert.include(error.message, "vmlinuz")
          assert.deepStrictEqual(yield* guest.epitaph, { _tag: "ZX_ERR_INTERNAL", reason: error.reason })
          yield* noneOpen
        }).pipe(
          Effect.provide(layerLifecycle([])),
          Effect.updateService(MachinePolicy, (policy) => ({ ...policy, reset: "run-again" as const }))
        )
      }),
      5
    )
  })
})

describe("an epitaph", () => {
  it("is none when the first vCPU never started, and an error when a later life of the guest did not start", () => {
    const resets = GuestProgram.kernel(GuestProgram.make((cpu) => GuestAcpi.reset(cpu)))
    const epitaphAfter = (faults: FaultPlan.FaultPlan): Epitaph => {
      let heard: Epitaph | undefined
      Simulation.check(
        Effect.gen(function*() {
          const lifecycle = yield* GuestLifecycle
          yield* lifecycle.create({ ...goodConfig, cpus: 1, kernel: resets })
          const guest = yield* lifecycle.bind
          const error = yield* Effect.flip(lifecycle.run)
          assert.strictEqual(error.reason._tag, "VCPU_START_FAILURE")
          heard = yield* guest.epitaph
        }).pipe(
          Effect.provide(layerLifecycle([], { faults })),
          Effect.updateService(MachinePolicy, (policy) => ({ ...policy, reset: "run-again" as const }))
        )
      )
      if (heard === undefined) throw new Error("no epitaph")
      return heard
    }
    assert.strictEqual(epitaphAfter(FaultPlan.failFrom("createVcpu", 0, FaultPlan.ENOMEM))._tag, "none")
    assert.strictEqual(epitaphAfter(FaultPlan.failFrom("createVcpu", 1, FaultPlan.ENOMEM))._tag, "ZX_ERR_INTERNAL")
  })
})

describe("a policy", () => {
  it("is that of the client that creates the guest, also when the owner of the lifecycle has another", () => {
    Simulation.explore(
      Effect.gen(function*() {
        const seen = yield* Deferred.make<number>()
        let lives = 0
        const kernel = GuestProgram.kernel(GuestProgram.make(function*(cpu) {
          if (++lives < 3) yield* GuestAcpi.reset(cpu)
          Deferred.doneUnsafe(seen, Exit.succeed(lives))
          yield* GuestAcpi.powerOff(cpu)
        }))
        const context = yield* Layer.build(layerLifecycle([])).pipe(
          Effect.updateService(MachinePolicy, (policy) => ({ ...policy, reset: "stop" as const }))
        )
        const stop = yield* Effect.gen(function*() {
          const lifecycle = yield* GuestLifecycle
          yield* lifecycle.create({ ...goodConfig, kernel })
          return yield* lifecycle.run
        }).pipe(
          Effect.provide(context),
          Effect.updateService(MachinePolicy, (policy) => ({ ...policy, reset: "run-again" as const }))
        )
        assert.strictEqual(stop._tag, "PowerOff")
        assert.strictEqual(yield* Deferred.await(seen), 3)
      }).pipe(Effect.scoped),
      3
    )
  })
})
