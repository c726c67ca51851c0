/** The rules of virtio 1.3, sections 2 and 3, that hold for a device on any transport. */
import { assert, describe, it } from "@effect/vitest"
import { SplitQueueDriver } from "@troupe/core/testing/drivers/SplitQueueDriver"
import { type VirtioDriver, VirtioStatus } from "@troupe/core/testing/drivers/VirtioDriver"
import { VirtioMmioDriver } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import { findVirtioPci, VirtioPciDriver } from "@troupe/core/testing/drivers/VirtioPciDriver"
import * as Effect from "effect/Effect"
import * as fc from "fast-check"
import { virtioMmio } from "../src/virtio/VirtioMmio.ts"
import { virtioPci } from "../src/virtio/VirtioPci.ts"
import { DeviceHarness, HARNESS_BASE } from "./DeviceHarness.ts"
import { HARNESS_PLACE, harnessCpu, runGuest } from "./HarnessCpu.ts"
import { TestDevice } from "./TestDevice.ts"

const QUEUES_ADDRESS = 0x1_0000
const DATA_ADDRESS = 0x8_0000
/** What the test's device and the transports offer. */
const OFFERED = [0x3000_0020, 0x0000_0101] as const
const VERSION_1 = 1

const transports = ["mmio", "pci"] as const

const started = (transport: typeof transports[number]) =>
  Effect.gen(function*() {
    const device = new TestDevice()
    const harness = new DeviceHarness((transport === "mmio" ? virtioMmio : virtioPci)(device, { name: "test0" }))
    yield* harness.start
    const cpu = harnessCpu(harness)
    const makeDriver = (): VirtioDriver => {
      if (transport === "mmio") return new VirtioMmioDriver(HARNESS_PLACE)
      const [place] = runGuest(findVirtioPci(cpu, HARNESS_BASE))
      if (place === undefined) throw new Error("there is no virtio function")
      const driver = new VirtioPciDriver(place, 0x40)
      for (const entry of [0, 1, 2]) runGuest(driver.routeVector(cpu, entry))
      runGuest(driver.maskFunction(cpu, false))
      return driver
    }
    const driver = makeDriver()
    /** How often the device has interrupted. */
    const interrupts = () =>
      harness.interrupts.reduce((sum, count) => sum + count, 0) +
      harness.messages.reduce((sum, message) => sum + (message?.sent ?? 0), 0)
    const status = () => runGuest(driver.status(cpu))
    const writeStatus = (value: number) => runGuest(driver.writeStatus(cpu, value))
    /** Everything before DRIVER_OK. Returns whether the device agrees to the features. */
    const negotiate = (low: number, high: number): boolean => {
      runGuest(driver.reset(cpu))
      writeStatus(1)
      writeStatus(3)
      runGuest(driver.acceptFeatures(cpu, 0, low))
      runGuest(driver.acceptFeatures(cpu, 1, high))
      writeStatus(11)
      return (status() & VirtioStatus.FEATURES_OK) !== 0
    }
    const setUp = () => {
      const queue = new SplitQueueDriver({
        memory: harness.memory,
        address: QUEUES_ADDRESS,
        size: 8,
        indirect: false,
        eventIndex: false
      })
      runGuest(driver.enableQueue(cpu, 0, queue))
      return queue
    }
    return { device, harness, cpu, driver, interrupts, status, writeStatus, negotiate, setUp }
  })

describe.each(transports)("The rules of every transport, on %s", (transport) => {
  it.effect("a device has the status 0 before its driver, and after a reset", () =>
    Effect.gen(function*() {
      const { cpu, driver, negotiate, setUp, status, writeStatus } = yield* started(transport)
      assert.strictEqual(status(), 0)
      assert.isTrue(negotiate(0, VERSION_1))
      setUp()
      for (const bits of [11, 15, 0x8b]) {
        writeStatus(bits)
        assert.strictEqual(status(), bits)
        runGuest(driver.reset(cpu))
        assert.strictEqual(status(), 0)
        negotiate(0, VERSION_1)
      }
    }))

  it.effect("a device takes no buffer and interrupts nobody before its driver is ready, and then looks", () =>
    Effect.gen(function*() {
      const { cpu, device, driver, harness, interrupts, negotiate, setUp, writeStatus } = yield* started(transport)
      negotiate(0, VERSION_1)
      const queue = setUp()
      queue.add([{ address: DATA_ADDRESS, length: 4, writable: true }])
      queue.publish()
      runGuest(driver.notify(cpu, 0))
      harness.settle()
      harness.behaviour.signal?.(0)
      device.context?.updateConfig((config) => config.setUint8(0, 7))
      assert.deepStrictEqual([device.notified, device.held.length, interrupts()], [[], 0, 0])
      assert.isUndefined(queue.poll())
      writeStatus(15)
      harness.settle()
      assert.strictEqual(device.held.length, 1)
      harness.behaviour.signal?.(0)
      assert.deepStrictEqual([queue.poll(), interrupts()], [{ head: 0, written: 4 }, 1])
    }))

  it.effect("a device sends nothing and leaves the queues alone after a reset, until it is started again", () =>
    Effect.gen(function*() {
      const { cpu, device, driver, harness, interrupts, negotiate, setUp, writeStatus } = yield* started(transport)
      negotiate(0, VERSION_1)
      const queue = setUp()
      writeStatus(15)
      queue.add([{ address: DATA_ADDRESS, length: 4, writable: true }])
      queue.publish()
      runGuest(driver.notify(cpu, 0))
      harness.settle()
      const [held] = device.held
      const old = device.driver?.queues[0]
      assert.isDefined(held)
      runGuest(driver.reset(cpu))
      const before = interrupts()
      const bytes = harness.memory.slice(QUEUES_ADDRESS, 0x1000)?.slice()
      // Work of the device that ends late.
      if (held !== undefined) old?.complete(held.chain, 4)
      old?.publish()
      queue.add([{ address: DATA_ADDRESS, length: 4, writable: true }])
      runGuest(driver.notify(cpu, 0))
      harness.behaviour.signal?.(0)
      harness.settle()
      device.context?.updateConfig((config) => config.setUint8(0, 7))
      assert.strictEqual(interrupts(), before)
      assert.isUndefined(queue.poll())
      const used = queue.usedRing - QUEUES_ADDRESS
      assert.deepStrictEqual(harness.memory.slice(queue.usedRing, 70), bytes?.subarray(used, used + 70))
    }))

  it("a device agrees to every subset of what it offers with VERSION_1, again and again, and to nothing else", () => {
    const bits = fc.record({ low: fc.integer(), high: fc.integer(), extra: fc.integer({ min: -200, max: 63 }) })
    fc.assert(
      fc.property(
        fc.array(bits, { minLength: 1, maxLength: 4 }),
        (sets) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { cpu, driver, negotiate } = yield* started(transport)
            for (const { extra, high, low } of sets) {
              let lowBits = (low & OFFERED[0]) >>> 0
              let highBits = ((high & OFFERED[1]) | VERSION_1) >>> 0
              assert.strictEqual(runGuest(driver.offeredFeatures(cpu, 0)), OFFERED[0])
              assert.strictEqual(runGuest(driver.offeredFeatures(cpu, 1)), OFFERED[1])
              for (let i = 0; i < 2; i++) assert.isTrue(negotiate(lowBits, highBits), `${lowBits} ${highBits}`)
              if (extra >= 32) highBits = (highBits ^ (1 << (extra - 32))) >>> 0
              else if (extra >= 0) lowBits = (lowBits ^ (1 << extra)) >>> 0
              const isSubset = (lowBits & ~OFFERED[0]) === 0 && (highBits & ~OFFERED[1]) === 0 &&
                (highBits & VERSION_1) !== 0
              assert.strictEqual(negotiate(lowBits, highBits), isSubset, `${lowBits} ${highBits}`)
            }
          })))
      ),
      { numRuns: 200 }
    )
  })

  it.effect("a driver reads the configuration before the features are agreed, and sees another generation after a change", () =>
    Effect.gen(function*() {
      const { cpu, device, driver } = yield* started(transport)
      const read = () => runGuest(driver.configuration(cpu, [{ offset: 0, size: 4 }, { offset: 6, size: 2 }]))
      const generation = () => runGuest(driver.configurationGeneration(cpu))
      assert.deepStrictEqual(read(), [0x0403_0201, 0x0807])
      for (const quietly of [false, true]) {
        const before = generation()
        assert.strictEqual(generation(), before)
        let during: number | undefined
        device.context?.updateConfig((config) => {
          config.setUint8(0, 9)
          during = generation()
        }, { quietly })
        assert.notStrictEqual(generation(), before)
        assert.notStrictEqual(during, before)
        assert.notStrictEqual(generation(), during)
      }
      assert.deepStrictEqual(read(), [0x0403_0209, 0x0807])
    }))

  it.effect("a device that cannot go on says so, with an interrupt for the configuration when its driver was ready", () =>
    Effect.gen(function*() {
      const { cpu, driver, harness, interrupts, negotiate, setUp, status, writeStatus } = yield* started(transport)
      negotiate(0, VERSION_1)
      // A device that is started again says so to whoever has begun with it; nobody waits for an interrupt before DRIVER_OK.
      yield* harness.start
      assert.deepStrictEqual([status(), interrupts()], [0x4b, 0])
      negotiate(0, VERSION_1)
      const queue = setUp()
      writeStatus(15)
      queue.writeAvailableIndex(9)
      runGuest(driver.notify(cpu, 0))
      harness.settle()
      assert.strictEqual(status(), 0x4f)
      runGuest(driver.awaitConfigurationChange(cpu))
      assert.deepStrictEqual([driver.configurationInterrupts, interrupts()], [1, 1])
    }))
})
