/** Devices on PCI on a real KVM: pages, doorbells, messages and held writes, driven by the driver kit over a remote vCPU. */
import { assert, describe, it } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core"
import { ACPI_TABLES_ADDRESS } from "@troupe/core/boot/MachineLayout"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestAcpi } from "@troupe/core/testing"
import { findVirtioPci, startVirtioPci } from "@troupe/core/testing/drivers/VirtioPciDriver"
import type { GuestRoutine } from "@troupe/core/testing/GuestCpu"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import { makeFeatures } from "@troupe/devices/virtio/Features"
import type { VirtioDevice } from "@troupe/devices/virtio/VirtioDevice"
import { virtioPci } from "@troupe/devices/virtio/VirtioPci"
import { KvmGuestLifecycle } from "@troupe/node"
import { Effect, Fiber, Layer, type Scope } from "effect"
import { remoteKernel, RemoteMachine } from "./programs/RemoteCpu.ts"
import { kvmObstacle, onKvm } from "./support.ts"

const QUEUE_ADDRESS = 0x10_0000
const DATA_ADDRESS = 0x18_0000

/** A device that is idle only when the test says so. */
class BusyDevice implements VirtioDevice {
  readonly deviceId = 42
  readonly features = makeFeatures()
  readonly queueSizes = [8]
  readonly config = Uint8Array.of(1)
  idle = true
  signal: () => void = () => undefined
  readonly start: VirtioDevice["start"] = (context) =>
    Effect.sync(() => {
      this.signal = () => context.signal(0)
      return { activate: () => undefined, notify: () => false, reset: () => this.idle, signal: () => false }
    })
}

const layerHost = (remote: RemoteMachine, busy: BusyDevice) => {
  const source = Layer.succeed(EntropySource, { fill: (bytes) => void bytes.fill(0x5a) })
  const catalog = DeviceCatalog.layerAdd(Effect.succeed({
    provides: "virtioRng" as const,
    devices: () => Effect.succeed([remote.device, virtioPci(busy, { name: "busy0" })])
  })).pipe(Layer.provide(layerDevices), Layer.provide(source))
  return GuestLifecycle.layer.pipe(Layer.provide(catalog), Layer.provide(KvmGuestLifecycle.layerHypervisor()))
}

/** A machine on PCI with an entropy device and one that can be busy; the routine is its guest. */
const withMachine = <A, E>(
  use: (
    remote: RemoteMachine,
    busy: BusyDevice,
    run: Fiber.Fiber<unknown, unknown>
  ) => Effect.Effect<A, E, GuestLifecycle | Scope.Scope>
) =>
  Effect.suspend(() => {
    const remote = new RemoteMachine()
    const busy = new BusyDevice()
    return Effect.scoped(Effect.gen(function*() {
      const lifecycle = yield* GuestLifecycle
      yield* lifecycle.create({
        kernelType: "LINUX",
        kernel: remoteKernel(),
        cpus: 1,
        guestMemory: "4M",
        virtioRng: true,
        virtioTransport: "pci",
        bootProtocol: "linux64"
      })
      const run = yield* Effect.forkScoped(lifecycle.run)
      yield* remote.run(remote.enableApic())
      return yield* use(remote, busy, run)
    })).pipe(Effect.provide(layerHost(remote, busy)))
  })

function* find(remote: RemoteMachine) {
  const { pci } = GuestAcpi.read(remote.memory, ACPI_TABLES_ADDRESS)
  if (pci === undefined) throw new Error("the machine has no PCI")
  return yield* findVirtioPci(remote.cpu, pci.address)
}

describe.skipIf(kvmObstacle !== undefined)(onKvm("PCI on KVM"), () => {
  it.live(
    "the driver kit finds the functions, measures their memory and gets interrupts as messages",
    () =>
      withMachine((remote, _, run) =>
        Effect.gen(function*() {
          const drive = function*(): GuestRoutine<string> {
            const { cpu } = remote
            const places = yield* find(remote)
            const [place] = places
            if (place === undefined) throw new Error("there is no function")
            const driver = yield* startVirtioPci(cpu, place, { memoryAddress: QUEUE_ADDRESS })
            const queue = driver.queue(0)
            const request = [[{ address: DATA_ADDRESS, length: 16, writable: true }]]
            for (let i = 0; i < 5; i++) {
              queue.enableInterrupts()
              yield* driver.send(cpu, 0, request)
              yield* driver.awaitInterrupt(cpu, 0)
              assert.deepStrictEqual([queue.poll()?.written, cpu.memory.slice(DATA_ADDRESS, 1)?.[0]], [16, 0x5a])
            }
            // A masked vector keeps its interrupt until it is unmasked; a message goes where it was last pointed.
            yield* driver.maskVector(cpu, 1, true)
            driver.queue(0).enableInterrupts()
            yield* driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 16, writable: true }]])
            while (driver.queue(0).poll() === undefined) yield* cpu.yield()
            while (!(yield* driver.isPending(cpu, 1))) yield* cpu.yield()
            const wasInterrupted = cpu.interrupts.acknowledge(driver.interruptOf(1))
            yield* cpu.store(place.msixTable + 16 + 8, 4, driver.firstVector + 9)
            yield* driver.maskVector(cpu, 1, false)
            yield* cpu.waitForInterrupt(driver.interruptOf(9))
            return `${places.map(({ type }) => type).join()} ${driver.interrupts} ${wasInterrupted} ${yield* driver
              .isPending(cpu, 1)}`
          }
          assert.strictEqual(yield* remote.run(drive()), "4,42 5 false false")
          yield* Effect.forkScoped(remote.run(remote.powerOff()))
          assert.deepStrictEqual(yield* Fiber.join(run), { _tag: "PowerOff" })
        })
      ),
    60_000
  )

  it.live(
    "a vCPU that resets a device goes on when the device is idle; one that still waits keeps nobody",
    () =>
      withMachine((remote, busy, run) =>
        Effect.gen(function*() {
          const places = yield* remote.run(find(remote))
          const place = places[1]
          if (place === undefined) throw new Error("there is no second function")
          const driver = yield* remote.run(startVirtioPci(remote.cpu, place, { memoryAddress: QUEUE_ADDRESS }))
          busy.idle = false
          const reset = yield* Effect.forkScoped(remote.run(driver.writeStatus(remote.cpu, 0)))
          yield* Effect.repeat(Effect.yieldNow, { until: () => remote.isBusy })
          for (let i = 0; i < 100; i++) yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
          assert.isTrue(remote.isBusy)
          busy.idle = true
          busy.signal()
          yield* Fiber.join(reset)
          assert.strictEqual(yield* remote.run(driver.status(remote.cpu)), 0)

          yield* remote.run(driver.start(remote.cpu, { memoryAddress: QUEUE_ADDRESS }))
          busy.idle = false
          yield* Effect.forkScoped(remote.run(driver.writeStatus(remote.cpu, 0)))
          yield* Effect.repeat(Effect.yieldNow, { until: () => remote.isBusy })
          yield* Fiber.interrupt(run)
          assert.strictEqual((yield* Fiber.await(run))._tag, "Failure")
        })
      ),
    60_000
  )
})
