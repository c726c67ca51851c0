/** A guest's reset of a device that is busy, in whole machines on the fake: who waits, for how long, and who does not. */
import { assert, describe, it } from "@effect/vitest"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { FakeHypervisor, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import type { VirtioDriver } from "@troupe/core/testing/drivers/VirtioDriver"
import { probeVirtioMmio, startVirtioMmio } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import { findVirtioPci, startVirtioPci } from "@troupe/core/testing/drivers/VirtioPciDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as Queue from "effect/Queue"
import * as Schedule from "effect/Schedule"
import { layer } from "../src/Catalog.ts"
import { EntropySource } from "../src/EntropySource.ts"
import { makeFeatures } from "../src/virtio/Features.ts"
import type { VirtioBehaviour, VirtioDevice } from "../src/virtio/VirtioDevice.ts"
import { virtioOn } from "../src/virtio/VirtioTransport.ts"

const BUSY_TYPE = 42
const RNG_TYPE = 4
/** How long the device is busy after it was told to forget its driver. */
const BUSY_MS = 50
const QUEUE_ADDRESS = 0x18_0000
const DATA_ADDRESS = 0x1a_0000
const DONE = 0x1b_0000

/** What becomes of the work that a reset has to wait for. */
type Ending = "finishes" | "crashes" | "never"

const busy = (ending: Ending): VirtioDevice => ({
  deviceId: BUSY_TYPE,
  features: makeFeatures(),
  queueSizes: [8],
  config: new Uint8Array(0),
  start: (context) =>
    Effect.gen(function*() {
      const asked = yield* Queue.unbounded<void>()
      let idle = true
      const wait = Effect.gen(function*() {
        yield* Queue.take(asked)
        yield* Effect.sleep(ending === "never" ? "1 day" : BUSY_MS)
        if (ending === "crashes") return yield* Effect.die(new Error("it broke while it was waited for"))
        idle = true
        context.signal(0)
      })
      const behaviour: VirtioBehaviour = {
        activate: () => {
          idle = false
        },
        notify: () => false,
        signal: () => false,
        reset: () => {
          if (!idle) Queue.offerUnsafe(asked, undefined)
          return idle
        },
        run: Effect.forever(wait)
      }
      return behaviour
    })
})

const layerHost = (ending: Ending) => {
  const catalog = DeviceCatalog.layerAdd(Effect.succeed({
    provides: "virtioRng" as const,
    devices: (config) =>
      Effect.succeed([
        virtioOn(config, busy(ending), { name: "busy0", policy: { _tag: "restart", schedule: Schedule.spaced(1) } })
      ])
  })).pipe(Layer.provide(layer), Layer.provide(EntropySource.layerRandom))
  return GuestLifecycle.layer.pipe(Layer.provideMerge(Layer.merge(FakeHypervisor.layer(), catalog)))
}

/** Starts the device of a type, on the transport that the machine has. */
function* startDevice(cpu: GuestCpu, type: number, memoryAddress: number): GuestRoutine<VirtioDriver> {
  const { pci, virtioMmio } = GuestAcpi.find(cpu)
  for (const place of virtioMmio) {
    if ((yield* probeVirtioMmio(cpu, place)) === type) return yield* startVirtioMmio(cpu, place, { memoryAddress })
  }
  for (const place of pci === undefined ? [] : yield* findVirtioPci(cpu, pci.address)) {
    if (place.type === type) {
      return yield* startVirtioPci(cpu, place, { memoryAddress, firstVector: 0x40 + 8 * type })
    }
  }
  throw new Error(`the machine has no device of type ${type}`)
}

const create = (program: GuestProgram.GuestProgram, virtioTransport: "mmio" | "pci") =>
  Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({
      kernelType: "LINUX",
      kernel: GuestProgram.kernel(program),
      cpus: 2,
      guestMemory: "4M",
      virtioRng: true,
      virtioTransport
    })
    return lifecycle
  })

const leavesNothing = Effect.gen(function*() {
  const fake = yield* FakeHypervisor.FakeHypervisor
  assert.deepStrictEqual(yield* fake.violations, [])
  assert.deepStrictEqual(yield* fake.openResources, [])
})

describe.each(["mmio", "pci"] as const)("A reset of a busy device on %s", (transport) => {
  it.each(["finishes", "crashes"] as const)(
    "is over when the write is, while another vCPU goes on: the work %s",
    (ending) => {
      let waited = 0
      const work = { requests: 0 }
      const program = GuestProgram.make(function*(cpu) {
        const driver = yield* startDevice(cpu, BUSY_TYPE, QUEUE_ADDRESS)
        const rng = yield* startDevice(cpu, RNG_TYPE, QUEUE_ADDRESS + 0x1_0000)
        yield* cpu.startVcpu(1, function*(second) {
          while ((yield* second.load(DONE, 4)) === 0) {
            yield* rng.send(second, 0, [[{ address: DATA_ADDRESS, length: 8, writable: true }]])
            while (rng.queue(0).poll() === undefined) yield* second.sleep(1)
            work.requests++
          }
          yield* second.store(DONE, 4, 2)
        })
        while (work.requests === 0) yield* cpu.sleep(1)
        const before = work.requests
        const begun = cpu.now()
        yield* driver.writeStatus(cpu, 0)
        // It does not look again, and need not.
        assert.strictEqual(yield* driver.status(cpu), 0)
        waited = cpu.now() - begun
        assert.isAbove(work.requests, before)
        yield* startDevice(cpu, BUSY_TYPE, QUEUE_ADDRESS)
        yield* cpu.store(DONE, 4, 1)
        while ((yield* cpu.load(DONE, 4)) !== 2) yield* cpu.sleep(1)
        yield* GuestAcpi.powerOff(cpu)
      })
      const test = Effect.gen(function*() {
        waited = 0
        work.requests = 0
        const lifecycle = yield* create(program, transport)
        assert.deepStrictEqual(yield* lifecycle.run, { _tag: "PowerOff" })
        assert.isAtLeast(waited, BUSY_MS)
        yield* leavesNothing
      })
      Simulation.explore(Effect.provide(Effect.provide(test, layerHost(ending)), Logger.layer([])), 25)
    }
  )

  it("leaves nothing behind when the machine is stopped meanwhile", () => {
    const guest = { waits: false }
    const program = GuestProgram.make(function*(cpu) {
      const driver = yield* startDevice(cpu, BUSY_TYPE, QUEUE_ADDRESS)
      guest.waits = true
      yield* driver.writeStatus(cpu, 0)
      throw new Error("the device never becomes idle")
    })
    const test = Effect.gen(function*() {
      guest.waits = false
      const lifecycle = yield* create(program, transport)
      const run = yield* Effect.forkChild(Effect.exit(lifecycle.run))
      while (!guest.waits) yield* Effect.sleep(1)
      yield* Effect.sleep(BUSY_MS)
      yield* lifecycle.stop
      yield* Fiber.join(run)
      yield* leavesNothing
    })
    Simulation.explore(Effect.provide(test, layerHost("never")), 25)
  })
})
