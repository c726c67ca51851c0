import { assert, describe, it } from "@effect/vitest"
import { splitQueueMemory } from "@troupe/core/testing/drivers/SplitQueueDriver"
import {
  findVirtioPci,
  startVirtioPci,
  VirtioPciCommon as Common,
  type VirtioPciDriver,
  type VirtioPciPlace
} from "@troupe/core/testing/drivers/VirtioPciDriver"
import type { AccessSize, GuestCpu } from "@troupe/core/testing/GuestCpu"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Scope from "effect/Scope"
import * as fc from "fast-check"
import { virtioPci } from "../src/virtio/VirtioPci.ts"
import { DeviceHarness, HARNESS_BASE } from "./DeviceHarness.ts"
import { harnessCpu, runGuest } from "./HarnessCpu.ts"
import { TestDevice } from "./TestDevice.ts"

const QUEUES_ADDRESS = 0x1_0000
const DATA_ADDRESS = 0x8_0000
const VERSION_1 = 1
const OFFERED_LOW = 0x3000_0020
const OFFERED_HIGH = 0x0000_0101
const NO_VECTOR = 0xffff
const CONFIG_RANGE = 0
const PAGES_RANGE = 1
const CALLS_RANGE = 2

const find = (cpu: GuestCpu): VirtioPciPlace => {
  const [place] = runGuest(findVirtioPci(cpu, HARNESS_BASE))
  if (place === undefined) throw new Error("there is no virtio function")
  return place
}

const makeStarted = (device: TestDevice) =>
  Effect.gen(function*() {
    const harness = new DeviceHarness(virtioPci(device, { name: "test0" }))
    const scope = yield* Scope.make()
    yield* Scope.provide(harness.start, scope)
    const cpu = harnessCpu(harness)
    const place = find(cpu)
    const load = (address: number, size: AccessSize) =>
      runGuest((function*() {
        return yield* cpu.load(address, size)
      })())
    const store = (address: number, size: AccessSize, value: number) =>
      runGuest((function*() {
        yield* cpu.store(address, size, value)
      })())
    const read = (register: number, size: AccessSize) => load(place.common + register, size)
    const write = (register: number, size: AccessSize, value: number) => store(place.common + register, size, value)
    const start = (options: { readonly eventIndex?: boolean } = {}) =>
      runGuest(startVirtioPci(cpu, place, {
        memoryAddress: QUEUES_ADDRESS,
        queueSizes: [8, 4],
        features: { low: 0xffff_ffff, high: 0xffff_ffff },
        ...options
      }))
    return { device, harness, scope, cpu, place, load, store, read, write, start }
  })

const started = Effect.suspend(() => makeStarted(new TestDevice()))

/** A request, its answer, seen by interrupt: the driver and the device work. */
const works = ({ cpu, device, harness, start }: Effect.Success<typeof started>): VirtioPciDriver => {
  device.idle = true
  const driver = start()
  for (const queue of [0, 1]) {
    runGuest(driver.send(cpu, queue, [[{ address: DATA_ADDRESS, length: 64, writable: true }]]))
    harness.settle()
    harness.signals.add(0)
    assert.strictEqual(runGuest(driver.receive(cpu, queue)).written, 64)
  }
  return driver
}

/** How often each vector was sent. */
const sent = (harness: DeviceHarness) => harness.messages.map((message) => message?.sent ?? 0)

/** Steps 1 to 5 of section 3.1.1 by hand. */
const negotiate = (
  write: (register: number, size: AccessSize, value: number) => void,
  low: number,
  high: number
) => {
  write(Common.device_status, 1, 1)
  write(Common.device_status, 1, 3)
  write(Common.driver_feature_select, 4, 0)
  write(Common.driver_feature, 4, low)
  write(Common.driver_feature_select, 4, 1)
  write(Common.driver_feature, 4, high)
  write(Common.device_status, 1, 11)
}

describe("VirtioPci", () => {
  it.effect("is a function as the specification describes it", () =>
    Effect.gen(function*() {
      const { harness, load, place, store } = yield* started
      const config = place.config
      // Vendor, device, revision, a subsystem of at least 0x40, no interrupt pin; a header of type 0.
      assert.deepStrictEqual([load(config, 2), load(config + 2, 2), load(config + 8, 1)], [0x1af4, 0x1040 + 42, 1])
      assert.isAtLeast(load(config + 0x2e, 2), 0x40)
      assert.deepStrictEqual([load(config + 0x0e, 1) & 0x7f, load(config + 0x3d, 1)], [0, 0])
      assert.deepStrictEqual([place.type, place.vectors, place.notifyMultiplier], [42, 3, 4])
      assert.deepStrictEqual([place.deviceLength, place.device === undefined], [8, false])
      // Each capability is inside the memory that the driver has measured (it checks), at an even place.
      for (const address of [place.common, place.notify, place.msixTable, place.msixPending]) {
        assert.strictEqual(address % 4, 0)
      }
      assert.strictEqual(place.device ?? 0, place.common + 0x100)
      // What cannot be written keeps its value; a base address register always has its own.
      const before = Array.from({ length: 64 }, (_, i) => load(config + 4 * i, 4))
      for (let i = 0; i < 64; i++) store(config + 4 * i, 4, 0xdead_beef)
      const after = Array.from({ length: 64 }, (_, i) => load(config + 4 * i, 4))
      const changed = after.flatMap((value, i) => value === before[i] ? [] : [4 * i])
      // Command; cache line size; interrupt line; MSI-X control; place, length and data of the window.
      assert.deepStrictEqual(changed, [0x04, 0x0c, 0x3c, 0x40, 0x50, 0x54, 0x58, 0x5c])
      assert.strictEqual(load(config + 4, 2), 0xbeef & 0x546)
      // Beyond the first 256 bytes there is nothing.
      store(config + 0x100, 4, 1)
      assert.deepStrictEqual([load(config + 0x100, 4), load(config + 0xffc, 4)], [0, 0])
      assert.deepStrictEqual(harness.device.interrupts, [])
    }))

  it.effect("says how large its memory is, and moves it nowhere", () =>
    Effect.gen(function*() {
      const { harness, load, place, store } = yield* started
      const bar = (register: number) => place.config + 0x10 + 4 * register
      const bases = [0, 1, 2, 3, 4, 5].map((register) => load(bar(register), 4))
      assert.deepStrictEqual(bases.map((base) => base !== 0), [true, false, true, false, false, false])
      for (const [register, mask] of [[0, 0xffff_e000], [1, 0], [2, 0xffff_f000]] as const) {
        store(bar(register), 4, 0xffff_ffff)
        assert.strictEqual(load(bar(register), 4), mask)
        // Also when the device has failed between question and answer.
        yield* harness.start
        assert.strictEqual(load(bar(register), 4), mask)
        store(bar(register), 4, 0x1234_0000)
        assert.strictEqual(load(bar(register), 4), bases[register])
        store(bar(register), 2, 0xffff)
        assert.strictEqual(load(bar(register), 4), bases[register])
      }
    }))

  it.effect("shows in the common configuration what the specification says, before any driver", () =>
    Effect.gen(function*() {
      const { load, place, read, write } = yield* started
      assert.deepStrictEqual(
        [read(Common.num_queues, 2), read(Common.device_status, 1), read(Common.config_msix_vector, 2)],
        [2, 0, NO_VECTOR]
      )
      const offered = [0, 1, 2, 0xffff_ffff].map((select) => {
        write(Common.device_feature_select, 4, select)
        assert.strictEqual(read(Common.device_feature_select, 4), select)
        return read(Common.device_feature, 4)
      })
      assert.deepStrictEqual(offered, [OFFERED_LOW, OFFERED_HIGH, 0, 0])
      const queues = [0, 1, 2, 0xffff].map((select) => {
        write(Common.queue_select, 2, select)
        return [
          read(Common.queue_size, 2),
          read(Common.queue_enable, 2),
          read(Common.queue_msix_vector, 2),
          read(Common.queue_notify_off, 2)
        ]
      })
      assert.deepStrictEqual(queues, [
        [8, 0, NO_VECTOR, 0],
        [4, 0, NO_VECTOR, 1],
        [0, 0, NO_VECTOR, 0],
        [0, 0, NO_VECTOR, 0]
      ])
      assert.deepStrictEqual([load(place.device ?? 0, 4), load((place.device ?? 0) + 4, 1)], [0x0403_0201, 5])
    }))

  it.effect("works with a correct driver, again and again", () =>
    Effect.gen(function*() {
      const made = yield* started
      for (let i = 0; i < 3; i++) works(made)
    }))

  it.effect("agrees to offered features with VERSION_1 only, shows what was accepted, and freezes it", () =>
    Effect.gen(function*() {
      const { device, read, write } = yield* started
      const reset = () => write(Common.device_status, 1, 0)
      for (
        const [low, high] of [[0, 0], [OFFERED_LOW, 0], [1, VERSION_1], [0, VERSION_1 | 2]] as const
      ) {
        reset()
        negotiate(write, low, high)
        assert.strictEqual(read(Common.device_status, 1), 3, `features ${low} ${high}`)
        assert.strictEqual(read(Common.driver_feature, 4), high)
      }
      reset()
      negotiate(write, 0x20, VERSION_1)
      assert.strictEqual(read(Common.device_status, 1), 11)
      write(Common.driver_feature, 4, 0x101)
      assert.strictEqual(read(Common.driver_feature, 4), VERSION_1)
      write(Common.device_status, 1, 15)
      assert.deepStrictEqual(device.driver?.features, { low: 0x20, high: VERSION_1 })
    }))

  it.effect("takes the set-up of a queue only between FEATURES_OK and DRIVER_OK, and shows it", () =>
    Effect.gen(function*() {
      const { device, read, write } = yield* started
      const setUp = () => {
        write(Common.queue_size, 2, 4)
        write(Common.queue_desc, 4, 0x1000)
        write(Common.queue_driver, 4, 0x2000)
        write(Common.queue_device, 4, 0x3000)
        write(Common.queue_enable, 2, 1)
        return read(Common.queue_enable, 2)
      }
      assert.strictEqual(setUp(), 0)
      assert.strictEqual(read(Common.queue_size, 2), 8)
      negotiate(write, 0, VERSION_1)
      assert.strictEqual(setUp(), 1)
      assert.deepStrictEqual(
        [Common.queue_desc, Common.queue_driver, Common.queue_device].map((register) => read(register, 4)),
        [0x1000, 0x2000, 0x3000]
      )
      // What it shows is a size that a queue can have.
      write(Common.queue_select, 2, 1)
      for (const size of [0, 3, 0xffff]) {
        write(Common.queue_size, 2, size)
        assert.strictEqual(read(Common.queue_size, 2), 4)
      }
      write(Common.queue_select, 2, 0)
      // A ready queue is frozen, and 0 does not stop it.
      write(Common.queue_size, 2, 2)
      write(Common.queue_enable, 2, 0)
      assert.deepStrictEqual([read(Common.queue_size, 2), read(Common.queue_enable, 2)], [4, 1])
      write(Common.queue_select, 2, 1)
      write(Common.queue_size, 2, 8)
      write(Common.queue_enable, 2, 1)
      assert.strictEqual(read(Common.queue_enable, 2), 0, "larger than the maximum")
      write(Common.device_status, 1, 15)
      assert.deepStrictEqual(device.driver?.queues.map((queue) => queue?.size), [4, undefined])
      assert.strictEqual(setUp(), 0, "after DRIVER_OK")
      write(Common.device_status, 1, 0)
      assert.deepStrictEqual([read(Common.queue_select, 2), read(Common.queue_enable, 2)], [0, 0])
      assert.deepStrictEqual([read(Common.queue_size, 2), read(Common.queue_desc, 4)], [8, 0])
    }))

  it.effect("maps vectors that there are, says which, and forgets them by a reset", () =>
    Effect.gen(function*() {
      const { read, write } = yield* started
      for (const vector of [0, 2, 3, 0x7ff, NO_VECTOR]) {
        const expected = vector < 3 ? vector : NO_VECTOR
        write(Common.config_msix_vector, 2, vector)
        assert.strictEqual(read(Common.config_msix_vector, 2), expected)
        for (const queue of [0, 1]) {
          write(Common.queue_select, 2, queue)
          write(Common.queue_msix_vector, 2, vector)
          assert.strictEqual(read(Common.queue_msix_vector, 2), expected)
        }
      }
      write(Common.queue_msix_vector, 2, 1)
      write(Common.config_msix_vector, 2, 1)
      write(Common.queue_select, 2, 5)
      write(Common.queue_msix_vector, 2, 1)
      assert.strictEqual(read(Common.queue_msix_vector, 2), NO_VECTOR)
      write(Common.device_status, 1, 0)
      write(Common.queue_select, 2, 1)
      assert.deepStrictEqual([read(Common.config_msix_vector, 2), read(Common.queue_msix_vector, 2)], [
        NO_VECTOR,
        NO_VECTOR
      ])
    }))

  it.effect("interrupts by the vector of the queue, and by the configuration's for everything else", () =>
    Effect.gen(function*() {
      const made = yield* started
      const { cpu, device, harness, load, place } = made
      const driver = works(made)
      assert.deepStrictEqual(sent(harness), [0, 1, 1])
      assert.deepStrictEqual(harness.messages[2], { addressLow: 0xfee0_0000, addressHigh: 0, data: 0x42, sent: 1 })
      device.context?.updateConfig((config) => config.setUint8(0, 9))
      assert.deepStrictEqual(sent(harness), [1, 1, 1])
      assert.deepStrictEqual(runGuest(driver.configuration(cpu, [{ offset: 0, size: 1 }])), [9])
      runGuest(driver.awaitConfigurationChange(cpu))
      // A read clears the status, in which only the configuration is shown while there are messages.
      assert.deepStrictEqual([load(place.isr, 1), load(place.isr, 1)], [2, 0])
    }))

  it.effect("interrupts once for queues that share a vector", () =>
    Effect.gen(function*() {
      const { cpu, device, harness, start, write } = yield* started
      const driver = start()
      for (const queue of [0, 1]) {
        write(Common.queue_select, 2, queue)
        write(Common.queue_msix_vector, 2, 2)
        runGuest(driver.send(cpu, queue, [[{ address: DATA_ADDRESS, length: 4, writable: true }]]))
      }
      harness.settle()
      for (const { chain, queue } of device.held.splice(0)) device.driver?.queues[queue]?.complete(chain, 1)
      harness.behaviour.signal?.(1)
      assert.deepStrictEqual(sent(harness), [0, 0, 1])
    }))

  it.effect("interrupts nobody for what is mapped to no vector", () =>
    Effect.gen(function*() {
      const { cpu, device, harness, start, write } = yield* started
      const driver = start()
      write(Common.queue_msix_vector, 2, NO_VECTOR)
      write(Common.config_msix_vector, 2, NO_VECTOR)
      for (const queue of [0, 1]) {
        write(Common.queue_select, 2, queue)
        write(Common.queue_msix_vector, 2, NO_VECTOR)
        runGuest(driver.send(cpu, queue, [[{ address: DATA_ADDRESS, length: 4, writable: true }]]))
        harness.settle()
        harness.behaviour.signal?.(0)
        assert.isDefined(driver.queue(queue).poll())
      }
      device.context?.updateConfig((config) => config.setUint8(0, 9))
      assert.deepStrictEqual(sent(harness), [0, 0, 0])
      assert.deepStrictEqual([0, 1, 2].map((entry) => runGuest(driver.isPending(cpu, entry))), [false, false, false])
    }))

  it.effect("without MSI-X says in its status registers what a driver that polls wants to know", () =>
    Effect.gen(function*() {
      const { cpu, device, harness, load, place, start, store } = yield* started
      const driver = start()
      store(place.msixCapability + 2, 2, 0)
      runGuest(driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 4, writable: true }]]))
      harness.settle()
      harness.behaviour.signal?.(0)
      assert.deepStrictEqual(sent(harness), [0, 0, 0])
      assert.strictEqual(load(place.config + 6, 2) & 0x08, 0x08)
      device.context?.updateConfig((config) => config.setUint8(0, 9))
      assert.deepStrictEqual([load(place.isr, 1), load(place.isr, 1), load(place.config + 6, 2) & 0x08], [3, 0, 0])
      assert.isDefined(driver.queue(0).poll())
    }))

  it.effect("takes notifications in any width, and knows the queue by the address", () =>
    Effect.gen(function*() {
      const { device, harness, place, start, store } = yield* started
      start()
      harness.settle()
      device.notified.length = 0
      store(place.notify + 4, 2, 0)
      harness.settle()
      store(place.notify + 4, 4, 0)
      harness.settle()
      store(place.notify, 1, 1)
      harness.settle()
      store(place.notify + 8, 4, 0)
      store(place.notify + 2, 4, 0)
      store(place.isr, 1, 0)
      harness.settle()
      assert.deepStrictEqual(device.notified, [1, 1, 0])
    }))

  it.effect("can be reached through its configuration space", () =>
    Effect.gen(function*() {
      const { device, harness, load, place, read, start, store } = yield* started
      // The capability that comes after MSI-X.
      const window = place.config + load(place.msixCapability + 1, 1)
      assert.deepStrictEqual([load(window, 1), load(window + 3, 1)], [0x09, 5])
      const at = (bar: number, offset: number, length: number) => {
        store(window + 4, 1, bar)
        store(window + 8, 4, offset)
        store(window + 12, 4, length)
        return {
          get: (size: AccessSize) => load(window + 16, size),
          set: (size: AccessSize, value: number) => store(window + 16, size, value)
        }
      }
      const status = at(0, Common.device_status, 1)
      assert.strictEqual(status.get(1), 0)
      status.set(1, 1)
      assert.deepStrictEqual([status.get(1), read(Common.device_status, 1)], [1, 1])
      status.set(1, 3)
      assert.strictEqual(status.get(1), 3)
      status.set(1, 0)
      start()
      // It follows what it shows.
      assert.strictEqual(status.get(1), 15)
      assert.strictEqual(at(0, Common.num_queues, 2).get(2), 2)
      assert.strictEqual(at(0, 0x100, 4).get(4), 0x0403_0201)
      at(0, 0x104, 2).set(2, 0xaabb)
      assert.deepStrictEqual(device.configWrites, [[4, 2, 0xaabb]])
      harness.settle()
      device.notified.length = 0
      at(2, 0x104, 2).set(2, 1)
      harness.settle()
      assert.deepStrictEqual(device.notified, [1])
      // What makes no sense is nothing.
      for (
        const [bar, offset, length] of [[1, 0, 4], [0, 0x2000, 4], [0, 1, 4], [0, 0, 3], [2, 0xfff, 2], [255, 0, 1]]
      ) {
        at(bar ?? 0, offset ?? 0, length ?? 0).set(4, 0)
      }
      assert.strictEqual(read(Common.device_status, 1), 15)
    }))

  it.effect("needs a reset when a driver breaks a queue, says so, and works after the reset", () =>
    Effect.gen(function*() {
      const made = yield* started
      const { cpu, device, harness, read } = made
      const driver = works(made)
      const before = sent(harness)
      driver.queue(1).writeDescriptor(0, 2 ** 40, 1, 0, 0)
      driver.queue(1).writeAvailable(1, 0)
      driver.queue(1).writeAvailableIndex(2)
      runGuest(driver.notify(cpu, 1))
      harness.settle()
      assert.strictEqual(read(Common.device_status, 1), 0x4f)
      assert.deepStrictEqual(sent(harness), [(before[0] ?? 0) + 1, before[1] ?? 0, before[2] ?? 0])
      assert.isUndefined(device.driver)
      works(made)
    }))

  it.effect("tells the driver of an earlier generation that a reset is needed, by the vectors that it has set up", () =>
    Effect.gen(function*() {
      const made = yield* started
      const { harness, load, place, read, scope } = made
      yield* Scope.close(scope, Exit.void)
      yield* harness.start
      assert.deepStrictEqual([read(Common.device_status, 1), sent(harness)], [0, [0, 0, 0]])
      works(made)
      const [before = 0] = sent(harness)
      const generation = read(Common.config_generation, 1)
      const command = load(place.config + 4, 2)
      yield* harness.start
      assert.strictEqual(read(Common.device_status, 1), 0x4f)
      assert.strictEqual(sent(harness)[0], before + 1)
      assert.notStrictEqual(read(Common.config_generation, 1), generation)
      assert.deepStrictEqual([load(place.config + 4, 2), load(place.msixCapability + 2, 2)], [command, 0x8002])
      works(made)
    }))

  it.effect("is reset only when the device is idle, and the one who asked waits until then", () =>
    Effect.gen(function*() {
      const made = yield* started
      const { cpu, device, harness, read, start, write } = made
      const driver = start()
      runGuest(driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 4, writable: true }]]))
      harness.settle()
      device.idle = false
      write(Common.device_status, 1, 0)
      assert.deepStrictEqual([read(Common.device_status, 1), harness.held], [15, 1])
      write(Common.device_status, 1, 15)
      device.idle = true
      harness.signals.add(0)
      harness.settle()
      assert.deepStrictEqual([read(Common.device_status, 1), harness.held], [0, 0])
      assert.isUndefined(driver.queue(0).poll())
      works(made)
    }))

  it("loses no interrupt behind a mask, and sends none through one", () => {
    const step = fc.record({
      kind: fc.constantFrom(
        "interrupt",
        "interrupt",
        "interrupt",
        "mask",
        "unmask",
        "function",
        "unfunction",
        "off",
        "on"
      ),
      entry: fc.nat(2)
    })
    fc.assert(
      fc.property(fc.array(step, { maxLength: 60, size: "max" }), (steps) =>
        Effect.runSync(Effect.gen(function*() {
          const { cpu, device, harness, place, start, store } = yield* started
          const driver = start()
          harness.settle()
          const masked = [false, false, false]
          const pending = [false, false, false]
          const expected = [0, 0, 0]
          let functionMasked = false
          let enabled = true
          const deliver = () => {
            for (const entry of [0, 1, 2]) {
              if (!enabled || functionMasked || masked[entry] === true || pending[entry] !== true) continue
              pending[entry] = false
              expected[entry] = (expected[entry] ?? 0) + 1
            }
          }
          const control = () =>
            store(place.msixCapability + 2, 2, (enabled ? 0x8000 : 0) | (functionMasked ? 0x4000 : 0))
          for (const { entry, kind } of steps) {
            switch (kind) {
              case "interrupt": {
                if (entry === 0) device.context?.updateConfig((config) => config.setUint8(0, 1))
                else {
                  driver.queue(entry - 1).enableInterrupts()
                  runGuest(driver.send(cpu, entry - 1, [[{ address: DATA_ADDRESS, length: 4, writable: true }]]))
                  harness.settle()
                  harness.behaviour.signal?.(0)
                  while (driver.queue(entry - 1).poll() !== undefined);
                }
                if (enabled) pending[entry] = true
                break
              }
              case "mask":
              case "unmask":
                masked[entry] = kind === "mask"
                runGuest(driver.maskVector(cpu, entry, kind === "mask"))
                break
              case "function":
              case "unfunction":
                functionMasked = kind === "function"
                control()
                break
              default:
                enabled = kind === "on"
                control()
            }
            deliver()
            assert.deepStrictEqual(sent(harness), expected)
            const shown = [0, 1, 2].map((number) => runGuest(driver.isPending(cpu, number)))
            assert.deepStrictEqual(shown, pending)
          }
        }))),
      { numRuns: 300 }
    )
  })

  it("sends a message to where the guest has last pointed it", () => {
    const change = fc.record({ address: fc.nat(0xff), data: fc.nat(0xff), masked: fc.boolean() })
    fc.assert(
      fc.property(fc.array(change, { maxLength: 20, size: "max" }), (changes) =>
        Effect.runSync(Effect.gen(function*() {
          const { device, harness, place, start, store } = yield* started
          start()
          for (const { address, data, masked } of changes) {
            if (masked) store(place.msixTable + 12, 4, 1)
            store(place.msixTable, 4, 0xfee0_0000 + address * 0x1000)
            store(place.msixTable + 8, 4, data)
            if (masked) store(place.msixTable + 12, 4, 0xffff_fffe)
            device.context?.updateConfig(() => undefined)
            const message = harness.messages[0]
            assert.deepStrictEqual(
              [message?.addressLow, message?.addressHigh, message?.data],
              [0xfee0_0000 + address * 0x1000, 0, data]
            )
          }
          assert.strictEqual(sent(harness)[0], changes.length)
        })))
    )
  })

  const sizes = fc.constantFrom<AccessSize>(1, 2, 4)
  const value = fc.oneof(
    fc.constantFrom(0, 1, 2, 3, 4, 8, 11, 15, 0x40, 0x80, 0x8f, 0xcf, 0xffff, 0xffff_ffff),
    fc.nat(0xffff_ffff)
  )
  const access = fc.oneof(
    fc.record({
      range: fc.constant(PAGES_RANGE),
      offset: fc.constantFrom<number>(...Object.values(Common), 0x24, 0x2c, 0x34, 0x3c),
      size: sizes,
      value
    }),
    fc.record({
      range: fc.constant(PAGES_RANGE),
      offset: fc.constant(Common.device_status),
      size: fc.constant(1),
      value
    }),
    fc.record({ range: fc.constant(PAGES_RANGE), offset: fc.nat(0x1fff), size: sizes, value }),
    fc.record({
      range: fc.constant(PAGES_RANGE),
      offset: fc.integer({ min: 0x1000, max: 0x1030 }),
      size: sizes,
      value
    }),
    fc.record({ range: fc.constant(CONFIG_RANGE), offset: fc.nat(0x80), size: sizes, value }),
    fc.record({ range: fc.constant(CONFIG_RANGE), offset: fc.nat(0xfff), size: sizes, value }),
    fc.record({
      range: fc.constant(CALLS_RANGE),
      offset: fc.constantFrom(0, 0x100, 0x104, 0x108, 0xffc),
      size: sizes,
      value
    })
  )

  it("survives any registers and any rings, and works after a reset", () => {
    const step = fc.oneof(
      { weight: 8, arbitrary: fc.record({ kind: fc.constant("access" as const), access }) },
      {
        weight: 4,
        arbitrary: fc.record({
          kind: fc.constant("memory" as const),
          at: fc.oneof(fc.constant((8 * 16 + 2) / 2), fc.nat(splitQueueMemory(8) / 2)),
          value: fc.oneof(fc.nat(16), fc.nat(0xffff))
        })
      },
      { weight: 1, arbitrary: fc.record({ kind: fc.constant("start" as const) }) },
      {
        weight: 2,
        arbitrary: fc.record({ kind: fc.constantFrom("settle" as const, "complete" as const, "read" as const) })
      }
    )
    const seen = new Set<number>()
    fc.assert(
      fc.property(fc.array(step, { maxLength: 60, size: "max" }), (steps) =>
        Effect.runSync(Effect.gen(function*() {
          const made = yield* started
          const { harness, load, place, read, start } = made
          const base = load(place.config, 4)
          for (const step of steps) {
            if (step.kind === "access") {
              const { offset, range, size, value } = step.access
              harness.write(range, offset, size, size === 4 ? value : value & (2 ** (8 * size) - 1))
            } else if (step.kind === "memory") {
              const region = harness.memory.regions[0]
              if (region !== undefined) region.words[QUEUES_ADDRESS / 2 + step.at] = step.value
            } else if (step.kind === "start") start()
            else if (step.kind === "settle") harness.settle()
            else if (step.kind === "complete") harness.signals.add(0)
            else {
              assert.isAtMost(harness.read(CALLS_RANGE, 0, 1), 3)
            }
            const status = read(Common.device_status, 1)
            seen.add(status)
            if ((status & 4) !== 0) assert.strictEqual(status & 0x0b, 0x0b)
            if ((status & 8) !== 0) assert.strictEqual(status & 0x03, 0x03)
            assert.strictEqual(load(place.config, 4), base)
          }
          harness.settle()
          works(made)
        }))),
      { numRuns: 200 }
    )
    for (const status of [0, 0x0f, 0x4f]) assert.isTrue(seen.has(status), `status ${status} was never reached`)
  })
})
