/** Each of the 15 reasons of `GuestError`, reached through the public API only, with the story that it must tell. */
import { assert, describe, it } from "@effect/vitest"
import { type Device, DeviceFailure } from "@troupe/core/Device"
import type { DeviceFactory } from "@troupe/core/DeviceCatalog"
import { type GuestError, GuestErrorCode, GuestErrorReason } from "@troupe/core/GuestError"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { SerialPort } from "@troupe/core/SerialPort"
import { FakeHypervisor, FaultPlan, Simulation } from "@troupe/core/testing"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Schema from "effect/Schema"
import * as Sink from "effect/Sink"
import * as Stream from "effect/Stream"
import { goodConfig, layerLifecycle, makeRemote } from "./TestGuest.ts"

type Tag = GuestErrorReason["_tag"]

interface Case {
  readonly factories?: ReadonlyArray<DeviceFactory>
  readonly faults?: FaultPlan.FaultPlan
  readonly fail: (lifecycle: GuestLifecycle["Service"]) => Effect.Effect<unknown, GuestError>
  /** What the message must name. */
  readonly names: ReadonlyArray<string>
}

const device = (fields: Partial<Device>): DeviceFactory => ({
  provides: "power",
  devices: () =>
    Effect.succeed([{
      name: "probe0",
      ranges: [],
      interrupts: [],
      start: () => Effect.succeed({ read: () => 0, write: () => undefined }),
      ...fields
    }])
})

const mmio = (base: number): Partial<Device> => ({
  ranges: [{ space: "mmio", base, size: 0x1000, read: "call", write: "call" }]
})

const create = (lifecycle: GuestLifecycle["Service"]) => lifecycle.create(goodConfig)
const createAndRun = (lifecycle: GuestLifecycle["Service"]) => Effect.andThen(create(lifecycle), lifecycle.run)
const told = makeRemote({ standingOrder: "triple-fault" })

const cases: { readonly [tag in Tag]: Case } = {
  INTERNAL_ERROR: {
    factories: [
      device({ ...mmio(0xd800_0000), name: "left" }),
      device({ ...mmio(0xd800_0800 - 0x800), name: "right" })
    ],
    fail: create,
    names: ["left", "right", "0xd8000000", "overlap"]
  },
  DEVICE_NOT_PRESENT: {
    fail: (lifecycle) =>
      create(lifecycle).pipe(Effect.andThen(lifecycle.bind), Effect.flatMap((guest) => guest.getConsole)),
    names: ["console", "virtioConsole"]
  },
  BAD_CONFIG: {
    fail: (lifecycle) => lifecycle.create({ ...goodConfig, cpus: 0 }),
    names: ["cpus", "0"]
  },
  GUEST_INITIALIZATION_FAILURE: {
    faults: FaultPlan.failFrom("addMemory", 0, FaultPlan.ENOMEM),
    fail: create,
    names: ["addMemory", "ENOMEM"]
  },
  DEVICE_INITIALIZATION_FAILURE: {
    factories: [device({ interrupts: [4] })],
    fail: create,
    names: ["probe0", "interrupt 4"]
  },
  DEVICE_START_FAILURE: {
    factories: [
      device({ start: () => Effect.fail(new DeviceFailure({ device: "probe0", detail: "the file is gone" })) })
    ],
    fail: create,
    names: ["probe0", "the file is gone"]
  },
  DEVICE_MEMORY_OVERLAP: {
    factories: [device(mmio(0x10_0000))],
    fail: create,
    names: ["probe0", "0x100000"]
  },
  FAILED_SERVICE_CONNECT: {
    fail: (lifecycle) => lifecycle.create({ ...goodConfig, virtioRng: true }),
    names: ["virtioRng"]
  },
  DUPLICATE_PUBLIC_SERVICES: {
    factories: [device({
      services: Context.make(SerialPort, {
        output: Stream.empty,
        write: () => Effect.void,
        input: Sink.drain,
        log: () => [],
        dropped: () => 0
      })
    })],
    fail: create,
    names: ["probe0", "serial0", "SerialPort"]
  },
  KERNEL_LOAD_FAILURE: {
    fail: (lifecycle) => lifecycle.create({ ...goodConfig, kernel: Uint8Array.from([0x7f, 0x45, 0x4c, 0x46, 9]) }),
    names: ["ELF"]
  },
  VCPU_START_FAILURE: {
    faults: FaultPlan.failFrom("createVcpu", 1, FaultPlan.EMFILE),
    fail: createAndRun,
    names: ["vCPU 1", "createVcpu", "EMFILE"]
  },
  VCPU_RUNTIME_FAILURE: {
    factories: [told.factory],
    fail: createAndRun,
    names: ["triple fault", "ready"]
  },
  NOT_CREATED: {
    fail: (lifecycle) => lifecycle.run,
    names: ["create"]
  },
  ALREADY_RUNNING: {
    fail: (lifecycle) =>
      Effect.gen(function*() {
        yield* create(lifecycle)
        const run = yield* Effect.forkChild(lifecycle.run)
        yield* Effect.sleep("1 second")
        return yield* lifecycle.run.pipe(Effect.ensuring(Fiber.interrupt(run)))
      }),
    names: ["stop"]
  },
  CONTROLLER_FORCED_HALT: {
    fail: (lifecycle) =>
      Effect.gen(function*() {
        yield* create(lifecycle)
        const run = yield* Effect.forkChild(lifecycle.run)
        yield* Effect.sleep("1 second")
        yield* lifecycle.stop
        return yield* Fiber.join(run)
      }),
    names: ["controller"]
  }
}

describe("GuestError", () => {
  for (const [tag, { factories, fail, faults, names }] of Object.entries(cases)) {
    it(`${tag} is reached, says what happened, and leaves nothing open`, () => {
      Simulation.explore(
        Effect.gen(function*() {
          const lifecycle = yield* GuestLifecycle
          const error = yield* Effect.flip(fail(lifecycle))
          assert.strictEqual(error.reason._tag, tag, error.message)
          assert.strictEqual(error.code, error.reason.code)
          for (const name of names) assert.include(error.message, name)
          const encoded = Schema.encodeSync(Schema.toCodecJson(GuestErrorReason))(error.reason)
          assert.deepStrictEqual(Schema.decodeSync(Schema.toCodecJson(GuestErrorReason))(encoded), error.reason)
          yield* lifecycle.stop
          assert.deepStrictEqual(yield* (yield* FakeHypervisor.FakeHypervisor).openResources, [])
        }).pipe(Effect.provide(layerLifecycle(factories ?? [], faults === undefined ? {} : { faults }))),
        5
      )
    })
  }

  it("has 15 reasons, and all of them are here", () => {
    assert.sameMembers(Object.keys(cases), Object.keys(GuestErrorCode))
    assert.deepStrictEqual(
      Object.values(GuestErrorCode).toSorted((a, b) => a - b),
      Array.from({ length: 15 }, (_, i) => i + 1)
    )
  })
})
