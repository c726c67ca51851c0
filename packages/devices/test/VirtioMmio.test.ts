import { assert, describe, it } from "@effect/vitest"
import { splitQueueMemory } from "@troupe/core/testing/drivers/SplitQueueDriver"
import { resetVirtioMmio, startVirtioMmio, VirtioMmio } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Logger from "effect/Logger"
import * as Scope from "effect/Scope"
import * as fc from "fast-check"
import { virtioMmio } from "../src/virtio/VirtioMmio.ts"
import { Register } from "../src/virtio/VirtioMmioLayout.ts"
import { DeviceHarness } from "./DeviceHarness.ts"
import { HARNESS_PLACE, harnessCpu, runGuest } from "./HarnessCpu.ts"
import { TestDevice } from "./TestDevice.ts"

const QUEUES_ADDRESS = 0x1_0000
const DATA_ADDRESS = 0x8_0000
const VERSION_1 = 1
const OFFERED_LOW = 0x3000_0020
const OFFERED_HIGH = 0x0000_0101

const started = Effect.gen(function*() {
  const device = new TestDevice()
  const harness = new DeviceHarness(virtioMmio(device, { name: "test0" }))
  yield* harness.start
  const cpu = harnessCpu(harness)
  const read = (register: number, size = 4) => harness.read(0, register, size)
  const write = (register: number, value: number, size = 4) => harness.write(0, register, size, value)
  const start = (options: { readonly eventIndex?: boolean } = {}) =>
    runGuest(startVirtioMmio(cpu, HARNESS_PLACE, {
      memoryAddress: QUEUES_ADDRESS,
      queueSizes: [8, 4],
      features: { low: 0xffff_ffff, high: 0xffff_ffff },
      ...options
    }))
  return { device, harness, cpu, read, write, start }
})

/** Steps 1 to 5 of section 3.1.1 by hand. */
const negotiate = (write: (register: number, value: number) => void, low: number, high: number) => {
  write(Register.Status, 1)
  write(Register.Status, 3)
  write(Register.DriverFeaturesSel, 0)
  write(Register.DriverFeatures, low)
  write(Register.DriverFeaturesSel, 1)
  write(Register.DriverFeatures, high)
  write(Register.Status, 11)
}

/** A request, its answer, seen by interrupt: the driver and the device work. */
const works = ({ cpu, harness, start }: Effect.Success<typeof started>) => {
  const driver = start()
  for (const queue of [0, 1]) {
    runGuest(driver.send(cpu, queue, [[{ address: DATA_ADDRESS, length: 64, writable: true }]]))
    harness.settle()
    harness.signals.add(0)
    assert.strictEqual(runGuest(driver.receive(cpu, queue)).written, 64)
  }
  return driver
}

describe("VirtioMmio", () => {
  it.effect("shows on its page what the specification says, before any driver", () =>
    Effect.gen(function*() {
      const { harness, read, write } = yield* started
      assert.deepStrictEqual(
        [Register.MagicValue, Register.Version, Register.DeviceID].map((register) => read(register)),
        [0x74726976, 2, 42]
      )
      assert.deepStrictEqual([Register.Status, Register.InterruptStatus].map((register) => read(register)), [0, 0])
      assert.deepStrictEqual([0xb0, 0xb4, 0xb8, 0xbc].map((register) => read(register)), Array(4).fill(0xffff_ffff))
      const offered = [0, 1, 2, 0xffff_ffff].map((select) => {
        write(Register.DeviceFeaturesSel, select)
        return read(Register.DeviceFeatures)
      })
      assert.deepStrictEqual(offered, [OFFERED_LOW, OFFERED_HIGH, 0, 0])
      const sizes = [0, 1, 2, 0xffff_ffff].map((select) => {
        write(Register.QueueSel, select)
        return [read(Register.QueueSizeMax), read(Register.QueueReady)]
      })
      assert.deepStrictEqual(sizes, [[8, 0], [4, 0], [0, 0], [0, 0]])
      assert.deepStrictEqual([read(Register.Config), read(Register.Config + 4, 1), read(Register.Config + 8)], [
        0x04030201,
        5,
        0
      ])
      assert.deepStrictEqual(harness.device.ranges[0]?.doorbells?.map(({ offset, value }) => [offset, value]), [
        [0x50, 0],
        [0x50, 1],
        [0x64, 1]
      ])
    }))

  it.effect("works with a correct driver, again and again", () =>
    Effect.gen(function*() {
      const made = yield* started
      for (let i = 0; i < 3; i++) works(made)
    }))

  it.effect("agrees to offered features with VERSION_1 only, and freezes them", () =>
    Effect.gen(function*() {
      const { cpu, device, read, start, write } = yield* started
      for (
        const [low, high] of [[0, 0], [OFFERED_LOW, 0], [1, VERSION_1], [0, VERSION_1 | 2], [0, OFFERED_HIGH | 2 ** 31]]
      ) {
        runGuest(resetVirtioMmio(cpu, HARNESS_PLACE))
        negotiate(write, low ?? 0, high ?? 0)
        assert.strictEqual(read(Register.Status), 3, `features ${low} ${high}`)
        write(Register.Status, 15)
        assert.strictEqual(read(Register.Status), 3)
      }
      runGuest(resetVirtioMmio(cpu, HARNESS_PLACE))
      write(Register.DriverFeaturesSel, 2)
      write(Register.DriverFeatures, 1)
      negotiate(write, 0, VERSION_1)
      assert.strictEqual(read(Register.Status), 3, "a feature beyond bit 63")

      runGuest(resetVirtioMmio(cpu, HARNESS_PLACE))
      negotiate(write, 0x20, VERSION_1)
      assert.strictEqual(read(Register.Status), 11)
      write(Register.DriverFeatures, 0x101)
      write(Register.Status, 15)
      assert.deepStrictEqual(device.driver?.features, { low: 0x20, high: VERSION_1 })
      assert.deepStrictEqual(start().features, { low: OFFERED_LOW, high: OFFERED_HIGH })
    }))

  it.effect("goes through the status in order, and back only by a reset", () =>
    Effect.gen(function*() {
      const { device, read, write } = yield* started
      const after = (value: number) => {
        write(Register.Status, value)
        return read(Register.Status)
      }
      assert.strictEqual(after(2), 0)
      assert.strictEqual(after(8), 0)
      assert.strictEqual(after(4), 0)
      assert.strictEqual(after(1), 1)
      assert.strictEqual(after(2), 1)
      assert.strictEqual(after(0x33), 3)
      write(Register.DriverFeaturesSel, 1)
      write(Register.DriverFeatures, VERSION_1)
      assert.strictEqual(after(15), 15)
      assert.isDefined(device.driver)
      assert.strictEqual(after(7), 15)
      assert.strictEqual(after(0x40), 15)
      assert.strictEqual(after(0x8f), 0x8f)
      assert.isUndefined(device.driver)
      assert.strictEqual(after(0), 0)
    }))

  it.effect("takes the set-up of a queue only between FEATURES_OK and DRIVER_OK", () =>
    Effect.gen(function*() {
      const { cpu, device, read, start, write } = yield* started
      const setUp = () => {
        write(Register.QueueSize, 4)
        write(Register.QueueDescLow, 0x1000)
        write(Register.QueueDriverLow, 0x2000)
        write(Register.QueueDeviceLow, 0x3000)
        write(Register.QueueReady, 1)
        return read(Register.QueueReady)
      }
      assert.strictEqual(setUp(), 0)
      negotiate(write, 0, VERSION_1)
      assert.strictEqual(setUp(), 1)
      // A ready queue is frozen.
      write(Register.QueueSize, 3)
      write(Register.QueueSel, 1)
      write(Register.QueueSize, 8)
      assert.strictEqual(read(Register.QueueReady), 0, "larger than the maximum")
      write(Register.Status, 15)
      assert.deepStrictEqual(device.driver?.queues.map((queue) => queue?.size), [4, undefined])
      assert.strictEqual(setUp(), 0, "after DRIVER_OK")

      // Every part is checked.
      const refused: ReadonlyArray<readonly [number, number]> = [
        [Register.QueueSize, 0],
        [Register.QueueSize, 3],
        [Register.QueueSize, 16],
        [Register.QueueDescLow, 0x1008],
        [Register.QueueDriverLow, 0x2001],
        [Register.QueueDeviceLow, 0x3002],
        [Register.QueueDescHigh, 1],
        [Register.QueueDriverHigh, 0xffff_ffff],
        [Register.QueueDeviceHigh, 0x10_0000],
        [Register.QueueDescLow, 0x10_0000]
      ]
      for (const [register, value] of refused) {
        runGuest(resetVirtioMmio(cpu, HARNESS_PLACE))
        negotiate(write, 0, VERSION_1)
        assert.strictEqual(setUp(), 1)
        write(Register.QueueReady, 0)
        assert.strictEqual(read(Register.QueueReady), 0)
        write(register, value)
        write(Register.QueueReady, 1)
        assert.strictEqual(read(Register.QueueReady), 0, `${register.toString(16)} = ${value}`)
      }

      // A queue can be stopped at any time, and then the device does not touch it.
      const driver = start()
      write(Register.QueueSel, 0)
      write(Register.QueueReady, 0)
      assert.strictEqual(read(Register.QueueReady), 0)
      runGuest(driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 1, writable: true }]]))
      write(Register.QueueReady, 1)
      assert.strictEqual(read(Register.QueueReady), 0)
    }))

  it.effect("ignores registers in other widths and places, and unknown queues", () =>
    Effect.gen(function*() {
      const { device, harness, read, write } = yield* started
      write(Register.Status, 1, 1)
      write(Register.Status, 1, 2)
      write(Register.Status + 1, 1, 1)
      write(Register.MagicValue, 1)
      write(Register.QueueNotify, 7)
      write(Register.QueueNotify, 0, 2)
      harness.settle()
      assert.deepStrictEqual([read(Register.Status), read(Register.MagicValue)], [0, 0x74726976])
      write(Register.QueueNotify, 0)
      harness.settle()
      assert.deepStrictEqual(device.notified, [])
    }))

  it.effect("looks at every queue when the driver becomes ready", () =>
    Effect.gen(function*() {
      const { device, harness, start } = yield* started
      start()
      harness.settle()
      assert.deepStrictEqual(device.notified, [0, 1])
    }))

  it.effect("needs a reset when a driver breaks a queue, says so, and works after the reset", () =>
    Effect.gen(function*() {
      const made = yield* started
      const { cpu, device, harness, read, start, write } = made
      const driver = works(made)
      const queue = driver.queue(1)
      queue.writeDescriptor(0, 2 ** 40, 1, 0, 0)
      queue.writeAvailable(1, 0)
      queue.writeAvailableIndex(2)
      runGuest(driver.notify(cpu, 1))
      const before = harness.interrupts[0] ?? 0
      harness.settle()
      assert.strictEqual(read(Register.Status), 0x4f)
      assert.strictEqual(read(Register.InterruptStatus), 3)
      assert.strictEqual(harness.interrupts[0], before + 1)
      assert.isUndefined(device.driver)
      // The acknowledgement of used buffers alone is a doorbell without effect; the other names the configuration.
      write(Register.InterruptACK, 1)
      harness.settle()
      assert.strictEqual(read(Register.InterruptStatus), 3)
      write(Register.InterruptACK, 3)
      assert.strictEqual(read(Register.InterruptStatus), 1)
      // Nothing but a reset helps.
      const notified = device.notified.length
      write(Register.Status, 0x0f)
      runGuest(driver.notify(cpu, 0))
      harness.settle()
      assert.strictEqual(read(Register.Status), 0x4f)
      assert.strictEqual(device.notified.length, notified)
      assert.strictEqual(read(Register.QueueReady), 0)
      works(made)
      start()
      assert.strictEqual(read(Register.InterruptStatus), 0)
    }))

  it.effect("logs what a driver broke, a bounded number of times", () =>
    Effect.gen(function*() {
      const messages: Array<string> = []
      const logger = Logger.make(({ message }) => void messages.push(String(message)))
      const { cpu, harness, start } = yield* started
      const run = harness.behaviour.run ?? Effect.never
      const fiber = yield* Effect.forkChild(Effect.provide(run, Logger.layer([logger])), { startImmediately: true })
      for (let i = 0; i < 100; i++) {
        const driver = start()
        driver.queue(0).writeAvailableIndex(9)
        runGuest(driver.notify(cpu, 0))
        harness.settle()
        yield* Effect.yieldNow
      }
      assert.strictEqual(messages[0], "test0: needs a reset: queue 0: available-index: index 9 after 0 in a queue of 8")
      assert.isAtMost(messages.length, 16)
      assert.isUndefined(fiber.pollUnsafe())
      yield* Fiber.interrupt(fiber)
    }))

  it.effect("tells the driver of an earlier generation that a reset is needed", () =>
    Effect.gen(function*() {
      const made = yield* started
      const { harness, read } = made
      yield* harness.start
      assert.deepStrictEqual([read(Register.Status), harness.interrupts[0]], [0, 0])
      works(made)
      const before = harness.interrupts[0] ?? 0
      const generation = read(Register.ConfigGeneration)
      yield* harness.start
      assert.strictEqual(read(Register.Status), 0x4f)
      assert.strictEqual(read(Register.InterruptStatus), 3)
      assert.notStrictEqual(read(Register.ConfigGeneration), generation)
      assert.strictEqual(harness.interrupts[0], before + 1)
      works(made)
    }))

  it.effect("lets the driver write its configuration, and tells it of changes", () =>
    Effect.gen(function*() {
      const { cpu, device, harness, read, start, write } = yield* started
      write(Register.Config, 9, 1)
      assert.deepStrictEqual(device.configWrites, [])
      const driver = start()
      const generation = read(Register.ConfigGeneration)
      write(Register.Config + 6, 0xaabb, 2)
      assert.strictEqual(read(Register.Config + 4), 0xaabb_0605)
      assert.notStrictEqual(read(Register.ConfigGeneration), generation)
      harness.settle()
      assert.isTrue(cpu.interrupts.acknowledge(0))
      assert.strictEqual(runGuest(driver.handleInterrupt(cpu)), 2)
      assert.strictEqual(read(Register.InterruptStatus), 0)
      for (const [offset, size] of [[5, 4], [8, 1], [0xefc, 4]] as const) write(Register.Config + offset, 1, size)
      assert.strictEqual(device.configWrites.length, 1)
      assert.deepStrictEqual(
        runGuest(driver.configuration(cpu, [{ offset: 0, size: 4 }, { offset: 6, size: 2 }])),
        [0x04030201, 0xaabb]
      )
      assert.strictEqual(harness.interrupts[0], 1)
    }))

  it.effect("is reset only when the device is idle", () =>
    Effect.gen(function*() {
      const made = yield* started
      const { cpu, device, harness, read, start, write } = made
      const driver = start()
      runGuest(driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 4, writable: true }]]))
      harness.settle()
      assert.strictEqual(device.held.length, 1)
      device.idle = false
      write(Register.Status, 0)
      assert.strictEqual(read(Register.Status), 15)
      assert.strictEqual(harness.held, 1, "who wrote it waits")
      write(Register.Status, 15)
      write(Register.QueueReady, 1)
      runGuest(driver.notify(cpu, 0))
      harness.signals.add(0)
      harness.settle()
      assert.strictEqual(read(Register.Status), 15)
      write(Register.Status, 0)
      assert.strictEqual(harness.held, 2)
      device.idle = true
      harness.signals.add(0)
      harness.settle()
      assert.strictEqual(read(Register.Status), 0)
      assert.strictEqual(harness.held, 0)
      assert.isUndefined(driver.queue(0).poll())
      works(made)
    }))

  it.effect("stops a queue that has nothing in hand, and works on with the others", () =>
    Effect.gen(function*() {
      const { cpu, device, harness, read, start, write } = yield* started
      const driver = start()
      runGuest(driver.send(cpu, 1, [[{ address: DATA_ADDRESS, length: 64, writable: true }]]))
      harness.settle()
      write(Register.QueueSel, 0)
      write(Register.QueueReady, 0)
      assert.deepStrictEqual([read(Register.Status), read(Register.QueueReady), device.resets], [15, 0, 1])
      runGuest(driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 64, writable: true }]]))
      harness.settle()
      harness.signals.add(0)
      harness.settle()
      assert.isUndefined(driver.queue(0).poll())
      assert.strictEqual(driver.queue(1).poll()?.written, 64)
    }))

  it.effect("has a driver that stops a queue with buffers in hand wait until nothing writes to them, and needs a reset", () =>
    Effect.gen(function*() {
      for (const idle of [true, false]) {
        const made = yield* started
        const { cpu, device, harness, read, start, write } = made
        const driver = start()
        for (const queue of [0, 1]) {
          runGuest(driver.send(cpu, queue, [[{ address: DATA_ADDRESS, length: 64, writable: true }]]))
        }
        harness.settle()
        assert.strictEqual(device.held.length, 2)
        device.idle = idle
        write(Register.QueueSel, 0)
        write(Register.QueueReady, 0)
        assert.deepStrictEqual([read(Register.Status), read(Register.QueueReady), device.resets], [0x4f, 0, 2])
        assert.strictEqual(harness.held, idle ? 0 : 1)
        // The other one is stopped as well by now, which holds for its buffers when they are left alone.
        write(Register.QueueSel, 1)
        write(Register.QueueReady, 0)
        assert.strictEqual(harness.held, idle ? 0 : 2)
        harness.signals.add(0)
        harness.settle()
        assert.strictEqual(harness.held, idle ? 0 : 2)
        device.idle = true
        harness.signals.add(0)
        harness.settle()
        assert.deepStrictEqual([read(Register.Status), harness.held], [0x4f, 0])
        assert.deepStrictEqual([driver.queue(0).poll(), driver.queue(1).poll()], [undefined, undefined])
        works(made)
      }
    }))

  it.effect("has done the reset that a driver waits for when the device ends instead", () =>
    Effect.gen(function*() {
      const device = new TestDevice()
      const harness = new DeviceHarness(virtioMmio(device, { name: "test0" }))
      const first = yield* Scope.make()
      yield* Scope.provide(harness.start, first)
      const cpu = harnessCpu(harness)
      const start = () =>
        runGuest(startVirtioMmio(cpu, HARNESS_PLACE, { memoryAddress: QUEUES_ADDRESS, queueSizes: [8, 4] }))
      start()
      device.idle = false
      harness.write(0, Register.Status, 4, 0)
      assert.deepStrictEqual([harness.read(0, Register.Status, 4), harness.held], [15, 1])
      yield* Scope.close(first, Exit.void)
      assert.deepStrictEqual([harness.read(0, Register.Status, 4), harness.held], [0, 0])
      device.idle = true
      yield* harness.start
      assert.deepStrictEqual([harness.read(0, Register.Status, 4), harness.interrupts[0]], [0, 0])
      start()
      assert.strictEqual(harness.read(0, Register.Status, 4), 15)
    }))

  it.effect("asks a device that was stopped for a fault whether it is idle, until it is", () =>
    Effect.gen(function*() {
      const made = yield* started
      const { cpu, device, harness, start } = made
      const driver = start()
      device.idle = false
      driver.queue(0).writeAvailableIndex(9)
      runGuest(driver.notify(cpu, 0))
      harness.settle()
      const resets = device.resets
      harness.signals.add(0)
      harness.settle()
      assert.strictEqual(device.resets, resets + 1)
      device.idle = true
      harness.signals.add(0)
      harness.settle()
      assert.strictEqual(device.resets, resets + 2)
      harness.signals.add(0)
      harness.settle()
      assert.strictEqual(device.resets, resets + 2)
      works(made)
    }))

  const register = fc.constantFrom(...Object.values(VirtioMmio), 0x01, 0x2c, 0x104, 0x107, 0xffc)
  const value = fc.oneof(fc.constantFrom(0, 1, 2, 3, 4, 8, 11, 15, 0x40, 0x80, 0x8f, 0xcf), fc.nat(0xffff_ffff))
  const access = fc.record({
    register: fc.oneof({ weight: 3, arbitrary: fc.constant(VirtioMmio.Status) }, { weight: 9, arbitrary: register }),
    size: fc.constantFrom(1, 2, 4, 4, 4, 4),
    value
  })

  it("shows what a plain model of the state machine shows, whatever is written", () => {
    fc.assert(
      fc.property(
        fc.array(access, { maxLength: 60, size: "max" }),
        (accesses) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { read, write } = yield* started
            let status = 0
            let featuresSel = 0
            let driverSel = 0
            let queueSel = 0
            let accepted = new Map<number, number>()
            for (const { register, size, value } of accesses) {
              write(register, value, size)
              if (size === 4) {
                if (register === VirtioMmio.DeviceFeaturesSel) featuresSel = value
                if (register === VirtioMmio.DriverFeaturesSel) driverSel = value
                if (register === VirtioMmio.QueueSel) queueSel = value
                if (register === VirtioMmio.DriverFeatures && (status & 8) === 0) {
                  // Beyond the second word nothing can be taken back: it was never offered.
                  accepted.set(driverSel, driverSel > 1 ? (accepted.get(driverSel) ?? 0) | value : value)
                }
                if (register === VirtioMmio.Status && value === 0) {
                  status =
                    featuresSel =
                    driverSel =
                    queueSel =
                      0
                  accepted = new Map()
                } else if (register === VirtioMmio.Status && (status & ~value & 0x8f) === 0) {
                  const legal = [...accepted].every(([word, bits]) =>
                    word === 0 ? (bits & ~OFFERED_LOW) === 0 : word === 1 ? (bits & ~OFFERED_HIGH) === 0 : bits === 0
                  ) && ((accepted.get(1) ?? 0) & VERSION_1) !== 0
                  status |= value & 0x81
                  if ((status & 1) !== 0) {
                    status |= value & 2
                  }
                  if ((status & 0x82) === 2 && legal) {
                    status |= value & 8
                  }
                  if ((status & 0x88) === 8) {
                    status |= value & 4
                  }
                }
              }
              const offered = featuresSel === 0 ? OFFERED_LOW : featuresSel === 1 ? OFFERED_HIGH : 0
              const sizeMax = queueSel === 0 ? 8 : queueSel === 1 ? 4 : 0
              assert.deepStrictEqual(
                [read(VirtioMmio.Status), read(VirtioMmio.DeviceFeatures), read(VirtioMmio.QueueSizeMax)],
                [status, offered, sizeMax]
              )
              assert.strictEqual(read(VirtioMmio.MagicValue), 0x7472_6976)
            }
          })))
      ),
      { numRuns: 500 }
    )
  })

  it("survives any registers and any rings, and works after a reset", () => {
    const step = fc.oneof(
      { weight: 5, arbitrary: fc.record({ kind: fc.constant("register" as const), access }) },
      {
        weight: 5,
        arbitrary: fc.record({
          kind: fc.constant("memory" as const),
          // The first queue's available index as often as all the rest of the memory.
          at: fc.oneof(fc.constant((8 * 16 + 2) / 2), fc.nat(splitQueueMemory(8) / 2)),
          value: fc.oneof(fc.nat(16), fc.nat(0xffff))
        })
      },
      { weight: 1, arbitrary: fc.record({ kind: fc.constant("start" as const) }) },
      { weight: 2, arbitrary: fc.record({ kind: fc.constant("notify" as const), queue: fc.nat(3) }) },
      { weight: 2, arbitrary: fc.record({ kind: fc.constant("settle" as const) }) },
      { weight: 1, arbitrary: fc.record({ kind: fc.constant("complete" as const) }) }
    )
    const seen = new Set<number>()
    fc.assert(
      fc.property(
        fc.array(step, { maxLength: 60, size: "max" }),
        (steps) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const made = yield* started
            const { harness, read, start, write } = made
            for (const step of steps) {
              if (step.kind === "register") write(step.access.register, step.access.value, step.access.size)
              else if (step.kind === "memory") {
                const region = harness.memory.regions[0]
                if (region !== undefined) region.words[QUEUES_ADDRESS / 2 + step.at] = step.value
              } else if (step.kind === "start") start()
              else if (step.kind === "notify") write(VirtioMmio.QueueNotify, step.queue)
              else if (step.kind === "settle") harness.settle()
              else harness.signals.add(0)
              const status = read(VirtioMmio.Status)
              seen.add(status)
              if ((status & 4) !== 0) assert.strictEqual(status & 0x0b, 0x0b)
              if ((status & 8) !== 0) assert.strictEqual(status & 0x03, 0x03)
            }
            harness.settle()
            works(made)
          })))
      ),
      { numRuns: 500 }
    )
    for (const status of [0, 0x0f, 0x4f, 0x8f]) assert.isTrue(seen.has(status), `status ${status} was never reached`)
  })

  /**
   * The interrupt handler of Linux, step by step, between completions and configuration changes of the device: cause read,
   * acknowledged, then queues and configuration looked at. Doorbells are delivered late.
   */
  it("loses no interrupt, however its acknowledgements are delayed", () => {
    const step = fc.constantFrom("send", "complete", "configure", "handle", "handle", "handle", "handle", "deliver")
    fc.assert(
      fc.property(
        fc.array(step, { maxLength: 60, size: "max" }),
        fc.boolean(),
        (steps, eventIndex) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { cpu, device, harness, read, start, write } = yield* started
            const driver = start({ eventIndex })
            const queue = driver.queue(0)
            queue.enableInterrupts()
            harness.settle()
            let sent = 0
            let received = 0
            let configured = 1
            let seenConfiguration = 1
            let stage = 0
            let causes = 0
            const handle = () => {
              if (stage === 0 && !cpu.interrupts.acknowledge(0)) {
                return false
              }
              if (stage === 0) {
                causes = read(VirtioMmio.InterruptStatus)
              } else if (stage === 1) write(VirtioMmio.InterruptACK, causes)
              else {
                if ((causes & 2) !== 0) seenConfiguration = read(VirtioMmio.Config, 1)
                if ((causes & 1) !== 0) {
                  do {
                    while (queue.poll() !== undefined) received++
                  } while (queue.enableInterrupts())
                }
              }
              stage = (stage + 1) % 3
              return true
            }
            for (const name of steps) {
              if (name === "send") {
                sent += runGuest(driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 4, writable: true }]]))
              } else if (name === "complete") {
                device.idle = true
                if (device.held.length > 0) harness.behaviour.signal?.(0)
              } else if (name === "configure") {
                configured = (configured + 1) & 0xff
                device.context?.updateConfig((config) => config.setUint8(0, configured))
              } else if (name === "handle") handle()
              else if (name === "deliver") harness.settle()
            }
            for (let i = 0; i < 8; i++) {
              harness.settle()
              harness.behaviour.signal?.(0)
              while (handle()) harness.settle()
            }
            assert.strictEqual(received, sent)
            assert.strictEqual(seenConfiguration, configured)
          })))
      ),
      { numRuns: 1000 }
    )
  })
})
