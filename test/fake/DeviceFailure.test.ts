/**
 * Devices that fail in the middle of their work: the driver hears that a reset is needed, starts anew, and the work goes on. A
 * request that was in flight is completed or failed by the reset: never lost, never done twice, never done later on.
 */
import { assert, describe, it } from "@effect/vitest"
import { type BlockBytes, makeBlockBackend, SECTOR_SIZE } from "@troupe/core/BlockBackend"
import { makeBlockClient } from "@troupe/core/BlockClient"
import type { Device, DevicePolicy } from "@troupe/core/Device"
import type { GuestConfigInput } from "@troupe/core/GuestConfig"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { restartPolicy } from "@troupe/core/RestartSchedule"
import { DeviceDefects, FakeHypervisor, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import type { DriverBuffer, UsedChain } from "@troupe/core/testing/drivers/QueueDriver"
import {
  probeVirtioMmio,
  startVirtioMmio,
  type VirtioMmioDriver,
  type VirtioMmioOptions,
  type VirtioMmioPlace,
  VirtioStatus
} from "@troupe/core/testing/drivers/VirtioMmioDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as Random from "effect/Random"
import * as fc from "fast-check"

const QUEUE = 0x18_0000
const DATA = 0x1a_0000
/** Bytes of a slot's memory, slots of a life of the driver, and lives that have memory of their own. */
const DATA_SIZE = 0x400
const SLOTS = 5
const LIVES = 32
const STARTS_MAX = 100

// --- a driver that lives on after its device has failed ----------------------------------------------------------------

/** Starts the driver, again if the device fails meanwhile. Then nothing of an earlier life touches memory any more. */
function* begin(cpu: GuestCpu, place: VirtioMmioPlace, options: VirtioMmioOptions): GuestRoutine<VirtioMmioDriver> {
  for (let tries = 0; tries < STARTS_MAX; tries++) {
    try {
      const driver = yield* startVirtioMmio(cpu, place, options)
      if (((yield* driver.status(cpu)) & VirtioStatus.DRIVER_OK) !== 0) return driver
    } catch {
      // It failed while it was set up: what was written is refused, or is not there any more.
    }
    yield* cpu.sleep("1 second")
  }
  throw new Error("the device does not start")
}

/** Waits, by nothing but interrupts, for a chain, or for the news that the device needs a reset. */
function* receive(cpu: GuestCpu, driver: VirtioMmioDriver): GuestRoutine<UsedChain | undefined> {
  const queue = driver.queue(0)
  for (;;) {
    const used = queue.poll()
    if (used !== undefined) return used
    if (queue.enableInterrupts()) continue
    if (((yield* driver.status(cpu)) & VirtioStatus.DEVICE_NEEDS_RESET) !== 0) return undefined
    yield* cpu.waitForInterrupt(driver.place.gsi)
    yield* driver.handleInterrupt(cpu)
  }
}

/** A request of one kind of device. Its memory is that of its slot, for nobody else while it is in flight. */
interface Request {
  readonly chain: ReadonlyArray<DriverBuffer>
  /** It was completed. Looks at what it brought. Throws if that is wrong. */
  readonly completed: (written: number) => void
  /** A reset came first. */
  readonly failed: () => void
}

interface Workload {
  readonly deviceId: number
  readonly config: (defects: DeviceDefects.DeviceDefects) => Partial<GuestConfigInput>
  /** The next request, in memory that begins there. */
  readonly next: (cpu: GuestCpu, slot: number, address: number) => Request
}

interface Tally {
  completed: number
  failed: number
  starts: number
}

const placeOf = function*(cpu: GuestCpu, deviceId: number): GuestRoutine<VirtioMmioPlace> {
  for (const place of GuestAcpi.find(cpu).virtioMmio) {
    if ((yield* probeVirtioMmio(cpu, place)) === deviceId) return place
  }
  throw new Error(`the machine has no virtio device ${deviceId}`)
}

/** Does a number of requests, some at a time, each again until it is completed. */
const working = (workload: Workload, requests: number, depth: number, tally: Tally) =>
  GuestProgram.make(function*(cpu) {
    const place = yield* placeOf(cpu, workload.deviceId)
    const snapshots: Array<{ readonly memory: Uint8Array; readonly copy: Uint8Array }> = []
    let completed = 0
    while (completed < requests) {
      const driver = yield* begin(cpu, place, { memoryAddress: QUEUE, features: { low: 0xff_ffff, high: 0 } })
      // The memory of the driver's life before this one is the device's no more.
      const before = snapshots.at(-1)
      if (before !== undefined) before.copy.set(before.memory)
      const base = DATA + (tally.starts++ % LIVES) * SLOTS * DATA_SIZE
      const memory = bytesAt(cpu, base, SLOTS * DATA_SIZE)
      snapshots.push({ memory, copy: new Uint8Array(memory.length) })
      const inFlight = new Map<number, { readonly request: Request; readonly slot: number }>()
      const add = function*(slot: number): GuestRoutine {
        const request = workload.next(cpu, slot, base + slot * DATA_SIZE)
        const head = driver.queue(0).add(request.chain, slot % 2 === 0)
        if (head === undefined) throw new Error("the queue is full")
        inFlight.set(head, { request, slot })
        if (driver.queue(0).publish()) yield* driver.notify(cpu, 0)
      }
      for (let slot = 0; slot < Math.min(depth, requests - completed); slot++) yield* add(slot)
      while (inFlight.size > 0) {
        const used = yield* receive(cpu, driver)
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

// --- the devices -------------------------------------------------------------------------------------------------------

const bytesAt = (cpu: GuestCpu, address: number, length: number): Uint8Array => {
  const bytes = cpu.memory.slice(address, length)
  if (bytes === undefined) throw new Error("not in guest memory")
  return bytes
}

const POISON = 0xa5

/** Random bytes are never 0xa5 here, so a byte that was not written is known. */
const layerSource = (defects: DeviceDefects.DeviceDefects) =>
  Layer.succeed(EntropySource, {
    fill: (bytes) => {
      defects.reach("host")
      bytes.fill(0x11)
    }
  })

const entropyWork = (): Workload => ({
  deviceId: 4,
  config: () => ({ virtioRng: true }),
  next: (cpu, slot, address) => {
    const length = 16 + slot
    const bytes = bytesAt(cpu, address, DATA_SIZE).fill(POISON)
    return {
      chain: [{ address, length, writable: true }],
      completed: (written) => {
        assert.isAbove(written, 0)
        assert.isTrue(bytes.every((byte, index) => byte === (index < written ? 0x11 : POISON)))
      },
      failed: () => undefined
    }
  }
})

/** A disk whose operations take a while, each another one, and whose back end breaks as planned, which none should. */
const slowDisk = (bytes: Uint8Array<ArrayBuffer>, defects: DeviceDefects.DeviceDefects) =>
  makeBlockClient("slow", () =>
    Effect.map(
      makeBlockBackend({
        name: "slow",
        capacity: bytes.length,
        read: (offset, target: BlockBytes) =>
          Effect.map(nap, () => target.set(bytes.subarray(offset, offset + target.length))),
        write: (offset, source) => Effect.map(nap, () => bytes.set(source, offset))
      }),
      (backend) => ({
        ...backend,
        read: (...request) => {
          defects.reach("host")
          backend.read(...request)
        },
        write: (...request) => {
          defects.reach("host")
          backend.write(...request)
        }
      })
    ))

const nap = Effect.flatMap(Random.nextIntBetween(0, 30), (millis) => millis < 10 ? Effect.void : Effect.sleep(millis))

const READ = 0
const WRITE = 1
const HEADER_SIZE = 16

/**
 * Each slot writes to its own sector and reads it again, in turns. What a sector may hold is what the last completed write
 * wrote, or what one wrote that has failed since then. A read settles it: whatever came to the disk later would be seen.
 */
const blockWork = (): Workload => {
  const possible: Array<Set<number>> = []
  let version = 0
  return {
    deviceId: 2,
    config: (defects) => ({
      blockDevices: [{
        id: "disk",
        mode: "READ_WRITE",
        format: "FILE",
        client: slowDisk(new Uint8Array(64 * SECTOR_SIZE), defects)
      }]
    }),
    next: (cpu, slot, address) => {
      const versions = possible[slot] ??= new Set([0])
      const type = version++ % 3 === 0 ? READ : WRITE
      const mine = version
      const memory = bytesAt(cpu, address, DATA_SIZE).fill(POISON)
      const view = new DataView(memory.buffer, memory.byteOffset)
      view.setUint32(0, type, true)
      view.setUint32(4, 0, true)
      view.setUint32(8, slot, true)
      view.setUint32(12, 0, true)
      const data = HEADER_SIZE
      const status = data + SECTOR_SIZE
      if (type === WRITE) { for (let at = 0; at < SECTOR_SIZE; at += 4) view.setUint32(data + at, mine, true) }
      return {
        chain: [
          { address, length: HEADER_SIZE, writable: false },
          { address: address + data, length: SECTOR_SIZE, writable: type === READ },
          { address: address + status, length: 1, writable: true }
        ],
        completed: (written) => {
          assert.strictEqual(view.getUint8(status), 0)
          assert.strictEqual(written, type === READ ? SECTOR_SIZE + 1 : 1)
          const seen = type === WRITE ? mine : view.getUint32(data, true)
          if (type === READ) {
            assert.isTrue(versions.has(seen), `sector ${slot} holds ${seen}, not one of ${Array.from(versions).join()}`)
            for (let at = 0; at < SECTOR_SIZE; at += 4) assert.strictEqual(view.getUint32(data + at, true), seen)
          }
          versions.clear()
          versions.add(seen)
        },
        failed: () => {
          if (type === WRITE) versions.add(mine)
        }
      }
    }
  }
}

const workloads: Readonly<Record<string, () => Workload>> = { entropy: entropyWork, block: blockWork }

// --- runs --------------------------------------------------------------------------------------------------------------

/** Never gives up within a test. */
const persistent = restartPolicy({ delay: "10 millis", times: 1000, quiet: "1 hour" })

const isVirtio = ({ name }: Device): boolean => /^(rng|block)\d+$/.test(name)

interface RunOptions {
  readonly requests?: number
  readonly depth?: number
  readonly policy?: DevicePolicy
}

/** Runs a workload whose device breaks as planned. */
const run = (
  workload: Workload,
  defects: DeviceDefects.DeviceDefects,
  { depth = 3, policy = persistent, requests = 6 }: RunOptions = {}
) =>
  Effect.gen(function*() {
    const tally: Tally = { completed: 0, failed: 0, starts: 0 }
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({
      kernelType: "LINUX",
      kernel: GuestProgram.kernel(working(workload, requests, depth, tally)),
      cpus: 1,
      guestMemory: "2M",
      ...workload.config(defects)
    })
    const result = yield* Effect.result(lifecycle.run)
    const fake = yield* FakeHypervisor.FakeHypervisor
    assert.deepStrictEqual(yield* fake.violations, [])
    assert.deepStrictEqual(yield* fake.openResources, [])
    return { result, tally }
  }).pipe(Effect.provide(
    GuestLifecycle.layer.pipe(
      Layer.provide(DeviceDefects.layer((device) =>
        isVirtio(device) ? { ...DeviceDefects.breaking(device, defects), policy } : device
      )),
      Layer.provide(Layer.provide(layerDevices, layerSource(defects))),
      Layer.provideMerge(FakeHypervisor.layer()),
      Layer.merge(Logger.layer([]))
    )
  ))

describe.each(Object.entries(workloads))("a device that fails: %s", (_, workload) => {
  it("goes on after a failure at any point of its work", () => {
    const counted = new DeviceDefects.DeviceDefects()
    const { tally } = Simulation.check(run(workload(), counted))
    assert.deepStrictEqual(tally, { completed: 6, failed: 0, starts: 1 })
    const points = counted.points()
    assert.isAbove(points, 50)
    let failed = 0
    for (let point = 1; point < points; point++) {
      const defects = new DeviceDefects.DeviceDefects((at) => at === point)
      const { result, tally } = Simulation.check(run(workload(), defects), { seed: point })
      assert.strictEqual(result._tag === "Success" ? result.success._tag : result.failure.message, "PowerOff")
      assert.strictEqual(tally.completed, 6)
      failed += tally.failed
    }
    // It did happen in the middle of requests too.
    assert.isAbove(failed, points / 10)
  })

  it("goes on after many failures, whatever the order of events", () => {
    fc.assert(
      fc.property(
        fc.uniqueArray(fc.integer({ min: 1, max: 400 }), { minLength: 1, maxLength: 12, size: "max" }),
        fc.integer({ min: 1, max: SLOTS }),
        fc.integer(),
        (points, depth, seed) => {
          const defects = new DeviceDefects.DeviceDefects((at) => points.includes(at))
          const { result, tally } = Simulation.check(run(workload(), defects, { depth, requests: 12 }), { seed })
          assert.strictEqual(result._tag === "Success" ? result.success._tag : result.failure.message, "PowerOff")
          assert.strictEqual(tally.completed, 12)
          assert.isAtMost(tally.starts, 1 + defects.defects)
        }
      ),
      { numRuns: 100 }
    )
  })

  it("ends the machine with a typed error where it is not to be started again, or fails again and again", () => {
    for (const [policy, starts] of [[{ _tag: "escalate" }, 1], [restartPolicy({ times: 3 }), 4]] as const) {
      const defects = new DeviceDefects.DeviceDefects((_, place) => place === "doorbell")
      const { result } = Simulation.check(run(workload(), defects, { policy }))
      if (result._tag === "Success") return assert.fail("the machine should have ended")
      const { reason } = result.failure
      assert.strictEqual(reason._tag, "VCPU_RUNTIME_FAILURE")
      assert.match(reason.device ?? "", /^(rng|block)0$/)
      assert.include(result.failure.message, `started ${starts} times`)
      assert.include(result.failure.message, "broken on purpose")
      assert.strictEqual(defects.defects, starts)
    }
  })
})
