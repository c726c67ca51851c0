/** The memory device in whole machines on the fake hypervisor, driven by guest programs and by its host. */
import { assert, describe, it } from "@effect/vitest"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { MachinePolicy } from "@troupe/core/MachinePolicy"
import { MemController } from "@troupe/core/MemController"
import { FakeHypervisor, FaultPlan, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import { startVirtioMmio, VirtioMmio, type VirtioMmioDriver } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as References from "effect/References"
import * as Stream from "effect/Stream"
import * as fc from "fast-check"
import { layerMem, makeMem, MemBlockState, MemConfig, memPolicy, MemRequest, MemResponse } from "../src/Mem.ts"
import { layerPower } from "../src/Power.ts"
import { layerSerial } from "../src/Serial.ts"
import type { VirtioDevice } from "../src/virtio/VirtioDevice.ts"
import { virtioOn } from "../src/virtio/VirtioTransport.ts"

const QUEUE_ADDRESS = 0x18_0000
const REQUEST_ADDRESS = 0x1a_0000
const RESPONSE_ADDRESS = 0x1a_0100
const BLOCK = 0x1_0000
const BLOCKS = 16
const REGION = BLOCK * BLOCKS
const FEATURES = { low: 2, high: 0 }

const layerHost = (faults: FaultPlan.FaultPlan = FaultPlan.none, device = layerMem) =>
  GuestLifecycle.layer.pipe(
    Layer.provide(
      device.pipe(Layer.provide(layerPower), Layer.provide(layerSerial), Layer.provide(DeviceCatalog.layerEmpty))
    ),
    Layer.provideMerge(FakeHypervisor.layer({ faults }))
  )

const configOf = (program: GuestProgram.GuestProgram) => ({
  kernelType: "LINUX" as const,
  kernel: GuestProgram.kernel(program),
  cpus: 1,
  guestMemory: "2M",
  virtioMem: true,
  virtioMemBlockSize: BLOCK,
  virtioMemRegionSize: REGION
})

/** Runs a program to its end. `host` is the host's part, before it and meanwhile. */
const runGuest = <E = never>(
  program: (cpu: GuestCpu) => GuestRoutine,
  host: (controller: MemController["Service"]) => Effect.Effect<unknown, E> = () => Effect.void
) =>
  Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    let failure: unknown
    yield* lifecycle.create(configOf(GuestProgram.make(function*(cpu) {
      try {
        yield* program(cpu)
      } catch (error) {
        failure = error
      }
      yield* GuestAcpi.powerOff(cpu)
    })))
    const controller = yield* (yield* lifecycle.bind).getMemController
    yield* host(controller)
    assert.deepStrictEqual(yield* lifecycle.run, { _tag: "PowerOff" })
    if (failure !== undefined) throw failure
    const fake = yield* FakeHypervisor.FakeHypervisor
    assert.deepStrictEqual(yield* fake.violations, [])
    assert.deepStrictEqual(yield* fake.openResources, [])
  })

const placeOf = (cpu: GuestCpu) => {
  const place = GuestAcpi.find(cpu).virtioMmio[0]
  if (place === undefined) throw new Error("the machine has no virtio device")
  return place
}

function* start(cpu: GuestCpu): GuestRoutine<VirtioMmioDriver> {
  return yield* startVirtioMmio(cpu, placeOf(cpu), { memoryAddress: QUEUE_ADDRESS, features: FEATURES })
}

/** A 64-bit field of the configuration space. */
function* config(cpu: GuestCpu, field: keyof typeof MemConfig): GuestRoutine<number> {
  const at = placeOf(cpu).base + VirtioMmio.Config + MemConfig[field]
  return (yield* cpu.load(at, 4)) + (yield* cpu.load(at + 4, 4)) * 2 ** 32
}

interface Answer {
  readonly type: number
  readonly state: number
}

const putRequest = (cpu: GuestCpu, type: number, address: number, blocks: number): void => {
  const request = new DataView(new ArrayBuffer(24))
  request.setUint16(0, type, true)
  request.setBigUint64(8, BigInt(address), true)
  request.setUint16(16, blocks, true)
  cpu.memory.write(REQUEST_ADDRESS, new Uint8Array(request.buffer))
  cpu.memory.write(RESPONSE_ADDRESS, new Uint8Array(10).fill(0xee))
}

const CHAIN = [[
  { address: REQUEST_ADDRESS, length: 24, writable: false },
  { address: RESPONSE_ADDRESS, length: 10, writable: true }
]]

function* ask(cpu: GuestCpu, driver: VirtioMmioDriver, type: number, address = 0, blocks = 0): GuestRoutine<Answer> {
  putRequest(cpu, type, address, blocks)
  yield* driver.send(cpu, 0, CHAIN)
  const { written } = yield* driver.receive(cpu, 0)
  assert.strictEqual(written, 10)
  const response = cpu.memory.slice(RESPONSE_ADDRESS, 10) ?? new Uint8Array(10)
  return { type: response[0] ?? 0, state: response[8] ?? 0 }
}

/** Checks every block from the guest's side: plugged ones keep what is written to them, the others are an open bus. */
function* checkBlocks(cpu: GuestCpu, base: number, plugged: ReadonlyMap<number, number>): GuestRoutine {
  for (let block = 0; block < BLOCKS; block++) {
    const address = base + block * BLOCK
    const value = plugged.get(block)
    assert.strictEqual(yield* cpu.load(address, 4), value ?? 0xffff_ffff, `block ${block}`)
    assert.strictEqual(yield* cpu.load(address + BLOCK - 4, 4), value === undefined ? 0xffff_ffff : 0)
    assert.strictEqual(cpu.memory.slice(address, BLOCK) === undefined, value === undefined)
    if (value === undefined) yield* cpu.store(address, 4, 1)
  }
}

const request = fc.oneof(
  { weight: 6, arbitrary: fc.record({ type: fc.constantFrom(0, 1, 3), first: fc.nat(BLOCKS), count: fc.nat(6) }) },
  {
    weight: 1,
    arbitrary: fc.record({
      type: fc.nat(6),
      first: fc.constantFrom(-1, 0.5, 2 ** 36, 2 ** 47, 0),
      count: fc.constantFrom(0, 1, BLOCKS + 1, 65535)
    })
  },
  { weight: 1, arbitrary: fc.constant({ type: 2, first: 0, count: 0 }) }
)

describe("The memory device", () => {
  it("does what a model of the specification does, and memory is there exactly while it is plugged", () => {
    fc.assert(
      fc.property(
        fc.record({
          requests: fc.array(request, { size: "max", maxLength: 30 }),
          wanted: fc.nat(BLOCKS),
          failing: fc.constantFrom(-1, 0, 1, 3)
        }),
        fc.integer(),
        Simulation.property(({ failing, requests, wanted }) => {
          const faults: FaultPlan.FaultPlan = (_, operation, nth) =>
            (operation === "plug" || operation === "unplug") && nth === failing
              ? { errno: FaultPlan.ENOMEM }
              : undefined
          const uses = { [MemRequest.PLUG]: 0, [MemRequest.UNPLUG]: 0 }
          return runGuest(function*(cpu) {
            const driver = yield* start(cpu)
            const base = yield* config(cpu, "addr")
            assert.strictEqual(base, 2 ** 32)
            assert.strictEqual(yield* config(cpu, "block_size"), BLOCK)
            assert.strictEqual(yield* config(cpu, "region_size"), REGION)
            assert.strictEqual(yield* config(cpu, "usable_region_size"), REGION)
            assert.strictEqual(yield* config(cpu, "requested_size"), wanted * BLOCK)
            /** The blocks that are plugged, and the word that the guest wrote into each. */
            const model = new Map<number, number>()
            for (const { count, first, type } of requests) {
              const all = Array.from({ length: Math.min(count, BLOCKS + 1) }, (_, i) => first + i)
              const wrong = !Number.isInteger(first) || first < 0 || count === 0 || first + count > BLOCKS
              const answer = yield* ask(cpu, driver, type, Math.max(0, base + first * BLOCK), count)
              const fails = (kind: 0 | 1) => uses[kind]++ === failing
              const expect = (expected: number) => assert.strictEqual(answer.type, expected, JSON.stringify(requests))
              if (type === MemRequest.UNPLUG_ALL) {
                if (model.size > 0 && fails(MemRequest.UNPLUG)) expect(MemResponse.BUSY)
                else {
                  expect(MemResponse.ACK)
                  model.clear()
                }
              } else if (wrong || type > 3) expect(MemResponse.ERROR)
              else if (type === MemRequest.STATE) {
                expect(MemResponse.ACK)
                const plugged = all.filter((block) => model.has(block)).length
                assert.strictEqual(
                  answer.state,
                  plugged === 0
                    ? MemBlockState.UNPLUGGED
                    : plugged === count
                    ? MemBlockState.PLUGGED
                    : MemBlockState.MIXED
                )
              } else if (type === MemRequest.PLUG) {
                if (all.some((block) => model.has(block))) expect(MemResponse.ERROR)
                else if (model.size + count > wanted) expect(MemResponse.NACK)
                else if (fails(MemRequest.PLUG)) expect(MemResponse.BUSY)
                else {
                  expect(MemResponse.ACK)
                  for (const block of all) {
                    assert.strictEqual(yield* cpu.load(base + block * BLOCK, 4), 0, "fresh memory is zero")
                    yield* cpu.store(base + block * BLOCK, 4, 0x1234_0000 + block)
                    model.set(block, 0x1234_0000 + block)
                  }
                }
              } else {
                if (!all.every((block) => model.has(block))) expect(MemResponse.ERROR)
                else if (fails(MemRequest.UNPLUG)) expect(MemResponse.BUSY)
                else {
                  expect(MemResponse.ACK)
                  for (const block of all) model.delete(block)
                }
              }
              assert.strictEqual(yield* config(cpu, "plugged_size"), model.size * BLOCK)
            }
            yield* checkBlocks(cpu, base, model)
          }, (controller) => controller.requestSize(wanted * BLOCK)).pipe(
            Effect.provide(layerHost(faults)),
            Effect.provideService(References.MinimumLogLevel, "None")
          )
        })
      ),
      { numRuns: 150 }
    )
  })

  it("interrupts for another requested size, and not for what the guest itself plugs", () => {
    Simulation.explore(
      Effect.gen(function*() {
        let controller: MemController["Service"] | undefined
        let host: Fiber.Fiber<unknown, unknown> | undefined
        yield* runGuest(function*(cpu) {
          const { gsi } = placeOf(cpu)
          const driver = yield* start(cpu)
          cpu.interrupts.acknowledge(gsi)
          // A mark that the host waits for.
          while ((yield* config(cpu, "requested_size")) === 0) {
            yield* cpu.waitForInterrupt(gsi)
            assert.strictEqual((yield* driver.handleInterrupt(cpu)) & 2, 2)
          }
          const base = yield* config(cpu, "addr")
          assert.strictEqual((yield* ask(cpu, driver, MemRequest.PLUG, base, 3)).type, MemResponse.ACK)
          assert.strictEqual((yield* cpu.load(placeOf(cpu).base + VirtioMmio.InterruptStatus, 4)) & 2, 0)
          assert.strictEqual((yield* ask(cpu, driver, MemRequest.PLUG, base + 8 * BLOCK, 1)).type, MemResponse.NACK)
        }, (it) => {
          controller = it
          const asking = Effect.andThen(Effect.sleep("1 seconds"), it.requestSize(3 * BLOCK))
          return Effect.map(Effect.forkChild(asking), (fiber) => void (host = fiber))
        })
        if (host !== undefined) yield* Fiber.join(host)
        assert.deepStrictEqual(yield* controller?.getMemSize ?? Effect.void, {
          blockSize: BLOCK,
          regionSize: REGION,
          usableRegionSize: REGION,
          pluggedSize: 3 * BLOCK,
          requestedSize: 3 * BLOCK
        })
      }).pipe(Effect.provide(layerHost())),
      20
    )
  })

  it("stops what it has begun when it is reset, and a reset changes nothing that is plugged", () => {
    Simulation.explore(
      runGuest(function*(cpu) {
        const first = yield* start(cpu)
        const base = yield* config(cpu, "addr")
        assert.strictEqual((yield* ask(cpu, first, MemRequest.PLUG, base, 2)).type, MemResponse.ACK)
        yield* cpu.store(base, 4, 77)
        putRequest(cpu, MemRequest.PLUG, base + 4 * BLOCK, 4)
        yield* first.send(cpu, 0, CHAIN)
        // The hypervisor needs a minute for it.
        yield* cpu.sleep("1 seconds")
        yield* cpu.store(placeOf(cpu).base + VirtioMmio.Status, 4, 0)
        while ((yield* cpu.load(placeOf(cpu).base + VirtioMmio.Status, 4)) !== 0) yield* cpu.sleep("1 seconds")
        assert.isBelow(cpu.now(), 10_000)
        const second = yield* start(cpu)
        assert.deepStrictEqual(Array.from(cpu.memory.slice(RESPONSE_ADDRESS, 10) ?? []), Array(10).fill(0xee))
        assert.strictEqual(yield* config(cpu, "plugged_size"), 2 * BLOCK)
        assert.strictEqual(yield* cpu.load(base, 4), 77)
        assert.strictEqual(
          (yield* ask(cpu, second, MemRequest.STATE, base + 4 * BLOCK, 4)).state,
          MemBlockState.UNPLUGGED
        )
        // It did not go on behind the reset.
        yield* cpu.sleep("2 minutes")
        assert.strictEqual(yield* config(cpu, "plugged_size"), 2 * BLOCK)
        assert.strictEqual((yield* ask(cpu, second, MemRequest.UNPLUG_ALL)).type, MemResponse.ACK)
        assert.strictEqual(yield* cpu.load(base, 4), 0xffff_ffff)
      }, (controller) => controller.requestSize(REGION)).pipe(
        Effect.provide(
          layerHost((_, operation, nth) => operation === "plug" && nth === 1 ? { delay: "1 minutes" } : undefined)
        )
      ),
      20
    )
  })

  it("stops between two blocks when it is reset, and what is plugged then is what it says", () => {
    const seen = new Set<number>()
    Simulation.explore(
      runGuest(function*(cpu) {
        const first = yield* start(cpu)
        const base = yield* config(cpu, "addr")
        putRequest(cpu, MemRequest.PLUG, base, BLOCKS)
        yield* first.send(cpu, 0, CHAIN)
        yield* cpu.store(placeOf(cpu).base + VirtioMmio.Status, 4, 0)
        const second = yield* start(cpu)
        const plugged: Array<number> = []
        for (let block = 0; block < BLOCKS; block++) {
          const { state } = yield* ask(cpu, second, MemRequest.STATE, base + block * BLOCK, 1)
          if (state === MemBlockState.PLUGGED) plugged.push(block)
        }
        seen.add(plugged.length)
        assert.strictEqual(yield* config(cpu, "plugged_size"), plugged.length * BLOCK)
        yield* checkBlocks(cpu, base, new Map(plugged.map((block) => [block, 0])))
        assert.strictEqual((yield* ask(cpu, second, MemRequest.UNPLUG_ALL)).type, MemResponse.ACK)
      }, (controller) => controller.requestSize(REGION)).pipe(Effect.provide(layerHost())),
      100
    )
    assert.isTrue(Array.from(seen).some((count) => count > 0 && count < BLOCKS), Array.from(seen).join())
  })

  it("is started again when it fails in the middle of a request, and what is plugged then is what it says", () => {
    Simulation.explore(
      Effect.suspend(() => {
        let breaks = false
        /** The device, until it breaks. */
        const layerBreaking = DeviceCatalog.layerAdd(Effect.succeed({
          provides: "virtioMem" as const,
          devices: Effect.fnUntraced(function*(config) {
            const { controller, device } = yield* makeMem(BLOCK, REGION)
            const start: VirtioDevice["start"] = (context) =>
              Effect.map(device.start(context), (behaviour) => ({
                activate: (driver) => behaviour.activate(driver),
                reset: () => behaviour.reset(),
                signal: (number) => behaviour.signal?.(number) ?? false,
                ...(behaviour.run === undefined ? {} : { run: behaviour.run }),
                notify: (queue) => {
                  const more = behaviour.notify(queue)
                  if (breaks) throw new Error("broken, as it was told")
                  return more
                }
              }))
            return [virtioOn(config, { ...device, start }, {
              name: "mem0",
              policy: memPolicy,
              services: Context.make(MemController, controller),
              pluggableMemory: { size: REGION, blockSize: BLOCK, alignment: BLOCK }
            })]
          })
        }))
        return runGuest(function*(cpu) {
          const first = yield* start(cpu)
          const base = yield* config(cpu, "addr")
          assert.strictEqual((yield* ask(cpu, first, MemRequest.PLUG, base, 2)).type, MemResponse.ACK)
          yield* cpu.store(base, 4, 77)
          breaks = true
          putRequest(cpu, MemRequest.PLUG, base + 4 * BLOCK, 4)
          yield* first.send(cpu, 0, CHAIN)
          while (((yield* first.status(cpu)) & 64) === 0) yield* cpu.sleep("10 millis")
          breaks = false
          const second = yield* start(cpu)
          const plugged = [0, 1]
          for (const block of [4, 5, 6, 7]) {
            const { state } = yield* ask(cpu, second, MemRequest.STATE, base + block * BLOCK, 1)
            if (state === MemBlockState.PLUGGED) plugged.push(block)
          }
          assert.strictEqual(yield* config(cpu, "plugged_size"), plugged.length * BLOCK)
          yield* checkBlocks(cpu, base, new Map(plugged.map((block) => [block, block === 0 ? 77 : 0])))
          assert.strictEqual((yield* ask(cpu, second, MemRequest.UNPLUG_ALL)).type, MemResponse.ACK)
          yield* checkBlocks(cpu, base, new Map())
        }, (controller) => controller.requestSize(REGION)).pipe(
          Effect.provide(layerHost(FaultPlan.none, layerBreaking)),
          Effect.provideService(References.MinimumLogLevel, "None")
        )
      }),
      40
    )
  })

  it("begins every life of the guest with nothing plugged, and asks for the same again", () => {
    let lives = 0
    Simulation.check(
      runGuest(function*(cpu) {
        const driver = yield* start(cpu)
        const base = yield* config(cpu, "addr")
        assert.strictEqual(yield* config(cpu, "plugged_size"), 0)
        assert.strictEqual(yield* config(cpu, "requested_size"), 4 * BLOCK)
        yield* checkBlocks(cpu, base, new Map())
        assert.strictEqual((yield* ask(cpu, driver, MemRequest.PLUG, base, 4)).type, MemResponse.ACK)
        assert.strictEqual(yield* cpu.load(base, 4), 0)
        yield* cpu.store(base, 4, ++lives)
        if (lives < 3) yield* GuestAcpi.reset(cpu)
      }, (controller) => controller.requestSize(4 * BLOCK)).pipe(
        Effect.provideService(MachinePolicy, { reset: "run-again", device: { _tag: "escalate" } }),
        Effect.provide(layerHost())
      )
    )
    assert.strictEqual(lives, 3)
  })

  it("refuses a driver that would read what is not plugged, and needs a reset after a request without room to answer", () => {
    Simulation.check(
      runGuest(function*(cpu) {
        let refused = false
        try {
          yield* startVirtioMmio(cpu, placeOf(cpu), { memoryAddress: QUEUE_ADDRESS })
        } catch {
          refused = true
        }
        assert.isTrue(refused)
        const driver = yield* start(cpu)
        yield* driver.send(cpu, 0, [[
          { address: REQUEST_ADDRESS, length: 24, writable: false },
          { address: RESPONSE_ADDRESS, length: 9, writable: true }
        ]])
        yield* cpu.waitForInterrupt(placeOf(cpu).gsi)
        assert.strictEqual((yield* driver.status(cpu)) & 64, 64)
        const again = yield* start(cpu)
        assert.strictEqual((yield* ask(cpu, again, MemRequest.UNPLUG_ALL)).type, MemResponse.ACK)
      }).pipe(Effect.provide(layerHost()))
    )
  })

  it("tells the host which rule a requested size breaks, and shows every change", () => {
    Simulation.check(
      runGuest(function*(cpu) {
        yield* start(cpu)
      }, (controller) =>
        Effect.gen(function*() {
          for (
            const [size, text] of [
              [BLOCK + 1, "multiple of blockSize (65536)"],
              [REGION + BLOCK, "0 to usableRegionSize (1048576)"],
              [-BLOCK, "0 to usableRegionSize"],
              [Number.NaN, "0 to usableRegionSize"],
              [0.5, "0 to usableRegionSize"]
            ] as const
          ) {
            const error = yield* Effect.flip(controller.requestSize(size))
            assert.strictEqual(error.reason._tag, "BAD_CONFIG")
            assert.include(error.message, text)
          }
          assert.strictEqual((yield* controller.getMemSize).requestedSize, 0)
          const seen = yield* Effect.forkChild(
            controller.changes.pipe(Stream.map((size) => size.requestedSize), Stream.take(3), Stream.runCollect)
          )
          yield* Effect.sleep("1 seconds")
          yield* controller.requestSize(BLOCK)
          yield* controller.requestSize(REGION)
          assert.deepStrictEqual(yield* Fiber.join(seen), [0, BLOCK, REGION])
        })).pipe(Effect.provide(layerHost()))
    )
  })

  it("is refused with the reason where the region cannot be had", () => {
    Simulation.check(
      Effect.gen(function*() {
        const lifecycle = yield* GuestLifecycle
        const config = configOf(function*() {})
        const failed = yield* Effect.flip(lifecycle.create(config))
        assert.strictEqual(failed.reason._tag, "GUEST_INITIALIZATION_FAILURE")
        assert.strictEqual(failed.reason.hypervisor?.operation, "addPluggableMemory")
        const small = yield* Effect.flip(lifecycle.create({ ...config, virtioMemRegionSize: 2 ** 40 }))
        assert.include(small.message, "virtioMemBlockSize: must be at least 67108864")
        const aligned = yield* Effect.flip(lifecycle.create({ ...config, virtioMemRegionAlignment: 2 ** 45 }))
        assert.strictEqual(aligned.reason._tag, "DEVICE_INITIALIZATION_FAILURE")
        assert.include(aligned.message, "do not fit behind the RAM")
      }).pipe(Effect.provide(layerHost(FaultPlan.failFrom("addPluggableMemory", 0, FaultPlan.ENOMEM))))
    )
  })
})
