/**
 * Devices that fail in the middle of their work: the driver hears that a reset is needed, starts anew, and the work goes on. A
 * request that was in flight is completed or failed by the reset: never lost, never done twice, never done later on.
 */
import { assert, describe, it } from "@effect/vitest"
import type { Device, DevicePolicy } from "@troupe/core/Device"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { restartPolicy } from "@troupe/core/RestartSchedule"
import { DeviceDefects, FakeHypervisor, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import type { UsedChain } from "@troupe/core/testing/drivers/QueueDriver"
import { type VirtioDriver, type VirtioDriverOptions, VirtioStatus } from "@troupe/core/testing/drivers/VirtioDriver"
import { probeVirtioMmio, startVirtioMmio, VirtioMmioDriver } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import { findVirtioPci, startVirtioPci } from "@troupe/core/testing/drivers/VirtioPciDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import { layerVsock } from "@troupe/vsock/Catalog"
import { VsockManager } from "@troupe/vsock/VsockManager"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as fc from "fast-check"
import {
  bytesAt,
  type MakeWorkload,
  RANDOM_BYTE,
  type Request,
  SLOT_SIZE,
  type Workload,
  workloads
} from "./FailureWorkloads.ts"

const QUEUES = 0x18_0000
const DATA = 0x20_0000
/** Slots of a life of the driver, and lives that have memory of their own. */
const SLOTS = 5
const LIVES = 32
const STARTS_MAX = 100

// --- a driver that lives on after its device has failed ----------------------------------------------------------------

/** Starts a driver. */
type Start = (cpu: GuestCpu, options: VirtioDriverOptions) => GuestRoutine<VirtioDriver>

/** How the driver of a device type starts, on the transport that the machine has. */
function* starterOf(cpu: GuestCpu, deviceId: number): GuestRoutine<Start> {
  const { pci, virtioMmio } = GuestAcpi.find(cpu)
  for (const place of virtioMmio) {
    if ((yield* probeVirtioMmio(cpu, place)) === deviceId) return (cpu, options) => startVirtioMmio(cpu, place, options)
  }
  if (pci === undefined) throw new Error(`the machine has no virtio device ${deviceId}`)
  for (let tries = 0; tries < STARTS_MAX; tries++) {
    try {
      const place = (yield* findVirtioPci(cpu, pci.address)).find(({ type }) => type === deviceId)
      if (place !== undefined) return (cpu, options) => startVirtioPci(cpu, place, options)
    } catch {
      // It failed while it was looked at.
    }
    yield* cpu.sleep("1 second")
  }
  throw new Error(`the machine has no virtio device ${deviceId}`)
}

/** Starts the driver, again if the device fails meanwhile. Then nothing of an earlier life touches memory any more. */
function* begin(cpu: GuestCpu, start: Start, options: VirtioDriverOptions): GuestRoutine<VirtioDriver> {
  for (let tries = 0; tries < STARTS_MAX; tries++) {
    try {
      const driver = yield* start(cpu, options)
      if (((yield* driver.status(cpu)) & VirtioStatus.DRIVER_OK) !== 0) return driver
    } catch {
      // It failed while it was set up: what was written is refused, or is not there any more.
    }
    yield* cpu.sleep("1 second")
  }
  throw new Error("the device does not start")
}

/** Waits, by nothing but interrupts, for a chain, or for the news that the device needs a reset. */
function* receive(cpu: GuestCpu, driver: VirtioDriver, index: number): GuestRoutine<UsedChain | undefined> {
  const queue = driver.queue(index)
  for (;;) {
    const used = queue.poll()
    if (used !== undefined) return used
    if (queue.enableInterrupts()) continue
    if (((yield* driver.status(cpu)) & VirtioStatus.DEVICE_NEEDS_RESET) !== 0) return undefined
    yield* cpu.waitForInterrupt()
    if (driver instanceof VirtioMmioDriver) yield* driver.handleInterrupt(cpu)
  }
}

interface Tally {
  completed: number
  failed: number
  starts: number
}

/** Does a number of requests, some at a time, each again until it is completed. */
const working = (workload: Workload, requests: number, depth: number, tally: Tally) =>
  GuestProgram.make(function*(cpu) {
    const start = yield* starterOf(cpu, workload.deviceId)
    const options: VirtioDriverOptions = {
      memoryAddress: QUEUES,
      queueSizes: Array.from({ length: workload.queues }, () => 16),
      features: { low: workload.features, high: 0 }
    }
    const snapshots: Array<{ readonly memory: Uint8Array; readonly copy: Uint8Array }> = []
    let completed = 0
    while (completed < requests) {
      const driver = yield* begin(cpu, start, options)
      // The memory of the driver's life before this one is the device's no more.
      const before = snapshots.at(-1)
      if (before !== undefined) before.copy.set(before.memory)
      const base = DATA + (tally.starts++ % LIVES) * SLOTS * SLOT_SIZE
      const memory = bytesAt(cpu, base, SLOTS * SLOT_SIZE)
      snapshots.push({ memory, copy: new Uint8Array(memory.length) })
      yield* workload.prepare?.(cpu, driver) ?? []
      const queue = driver.queue(workload.queue)
      const inFlight = new Map<number, { readonly request: Request; readonly slot: number }>()
      const add = function*(slot: number): GuestRoutine {
        const request = workload.next(cpu, slot, base + slot * SLOT_SIZE)
        const head = queue.add(request.chain, slot % 2 === 0)
        if (head === undefined) throw new Error("the queue is full")
        inFlight.set(head, { request, slot })
        if (queue.publish()) yield* driver.notify(cpu, workload.queue)
      }
      for (let slot = 0; slot < Math.min(depth, requests - completed); slot++) yield* add(slot)
      while (inFlight.size > 0) {
        const used = yield* receive(cpu, driver, workload.queue)
        if (used === undefined) break
        const done = inFlight.get(used.head)
        if (done === undefined) throw new Error("a chain that was not in flight")
        inFlight.delete(used.head)
        done.request.completed(used.written)
        completed++
        tally.completed++
        if (completed + inFlight.size < requests) yield* add(done.slot)
      }
      // Failed by the reset that the driver does next.
      for (const { request } of inFlight.values()) {
        request.failed()
        tally.failed++
      }
    }
    yield* cpu.sleep("1 minute")
    for (const { copy, memory } of snapshots.slice(Math.max(0, snapshots.length - LIVES), -1)) {
      assert.isTrue(equal(memory, copy), "memory was written to after a reset")
    }
    yield* GuestAcpi.powerOff(cpu)
  })

const equal = (a: Uint8Array, b: Uint8Array): boolean => a.every((byte, index) => byte === b[index])

// --- runs --------------------------------------------------------------------------------------------------------------

/** Never gives up within a test. */
const persistent = restartPolicy({ delay: "10 millis", times: 1000, quiet: "1 hour" })

const DEVICES = /^(rng|block|mem|balloon|net|console|vsock)\d*$/

const isVirtio = ({ name }: Device): boolean => DEVICES.test(name)

const layerSource = (defects: DeviceDefects.DeviceDefects) =>
  Layer.succeed(EntropySource, {
    fill: (bytes) => {
      defects.reach("host")
      bytes.fill(RANDOM_BYTE)
    }
  })

const TRANSPORTS = ["mmio", "pci"] as const

interface RunOptions {
  readonly requests?: number
  readonly depth?: number
  readonly policy?: DevicePolicy
  readonly transport?: (typeof TRANSPORTS)[number]
}

/** Runs a workload whose device breaks as planned. */
const run = (
  make: MakeWorkload,
  defects: DeviceDefects.DeviceDefects,
  { depth = 3, policy = persistent, requests = 6, transport = "mmio" }: RunOptions = {}
) => {
  const workload = make(defects)
  return Effect.gen(function*() {
    const tally: Tally = { completed: 0, failed: 0, starts: 0 }
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({
      kernelType: "LINUX",
      kernel: GuestProgram.kernel(working(workload, requests, depth, tally)),
      cpus: 1,
      guestMemory: "4M",
      virtioTransport: transport,
      ...workload.config
    })
    const guest = yield* lifecycle.bind
    yield* workload.host?.(guest) ?? Effect.void
    const result = yield* Effect.result(lifecycle.run)
    workload.ended?.()
    const fake = yield* FakeHypervisor.FakeHypervisor
    assert.deepStrictEqual(yield* fake.violations, [])
    assert.deepStrictEqual(yield* fake.openResources, [])
    return { result, tally }
  }).pipe(
    Effect.scoped,
    Effect.provide(
      GuestLifecycle.layer.pipe(
        Layer.provide(
          DeviceDefects.layer((device) =>
            isVirtio(device) ? { ...DeviceDefects.breaking(device, defects), policy } : device
          )
        ),
        Layer.provide(layerVsock.pipe(Layer.provide(VsockManager.layer), Layer.provide(layerDevices))),
        Layer.provide(Layer.merge(layerSource(defects), workload.network ?? Layer.empty)),
        Layer.provideMerge(FakeHypervisor.layer()),
        Layer.merge(Logger.layer([]))
      )
    )
  )
}

describe.each(Object.entries(workloads))("a device that fails: %s", (_, make) => {
  it.each(TRANSPORTS)("goes on after a failure at any point of its work, behind virtio-%s", (transport) => {
    const counted = new DeviceDefects.DeviceDefects()
    const { tally } = Simulation.check(run(make, counted, { transport }))
    assert.deepStrictEqual(tally, { completed: 6, failed: 0, starts: 1 })
    const points = counted.points()
    assert.isAbove(points, 50)
    let failed = 0
    let broken = 0
    // The transports have the code of devices in common.
    for (let point = 1; point < points; point += transport === "pci" ? 3 : 1) {
      const defects = new DeviceDefects.DeviceDefects((at) => at === point)
      const { result, tally } = Simulation.check(run(make, defects, { transport }), { seed: point })
      assert.strictEqual(result._tag === "Success" ? result.success._tag : result.failure.message, "PowerOff")
      assert.strictEqual(tally.completed, 6)
      failed += tally.failed
      broken += defects.defects
    }
    assert.isAbove(broken, points / 10)
    // It did happen in the middle of requests too.
    assert.isAbove(failed, points / 50)
  }, 60_000)

  it("goes on after many failures, whatever the order of events", () => {
    fc.assert(
      fc.property(
        fc.uniqueArray(fc.integer({ min: 1, max: 400 }), { minLength: 1, maxLength: 12, size: "max" }),
        fc.integer({ min: 1, max: SLOTS }),
        fc.constantFrom(...TRANSPORTS),
        fc.integer(),
        (points, depth, transport, seed) => {
          const defects = new DeviceDefects.DeviceDefects((at) => points.includes(at))
          const { result, tally } = Simulation.check(run(make, defects, { depth, requests: 12, transport }), { seed })
          assert.strictEqual(result._tag === "Success" ? result.success._tag : result.failure.message, "PowerOff")
          assert.strictEqual(tally.completed, 12)
          assert.isAtMost(tally.starts, 1 + defects.defects)
        }
      ),
      { numRuns: 60 }
    )
  }, 60_000)

  it("ends the machine with a typed error where it is not to be started again, or fails again and again", () => {
    for (const [policy, starts] of [[{ _tag: "escalate" }, 1], [restartPolicy({ times: 3 }), 4]] as const) {
      const defects = new DeviceDefects.DeviceDefects((_, place) => place === "doorbell")
      const { result } = Simulation.check(run(make, defects, { policy }))
      if (result._tag === "Success") return assert.fail("the machine should have ended")
      const { reason } = result.failure
      assert.strictEqual(reason._tag, "VCPU_RUNTIME_FAILURE")
      assert.match(reason.device ?? "", DEVICES)
      assert.include(result.failure.message, `started ${starts} times`)
      assert.include(result.failure.message, "broken on purpose")
      assert.strictEqual(defects.defects, starts)
    }
  })
})
