import { assert, describe, it } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { FakeHypervisor, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import { splitQueueMemory } from "@troupe/core/testing/drivers/SplitQueueDriver"
import { startVirtioMmio, VirtioMmio } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Random from "effect/Random"
import * as fc from "fast-check"
import { layer as layerDevices } from "../src/Catalog.ts"
import { entropy, ENTROPY_BYTES_PER_TURN, ENTROPY_CHAINS_PER_TURN, ENTROPY_QUEUE_SIZE } from "../src/Entropy.ts"
import { EntropySource } from "../src/EntropySource.ts"
import { Throttle } from "../src/Throttle.ts"
import { virtioMmio } from "../src/virtio/VirtioMmio.ts"
import { DeviceHarness } from "./DeviceHarness.ts"
import { HARNESS_PLACE, harnessCpu, runGuest } from "./HarnessCpu.ts"

const QUEUE_ADDRESS = 0x1_0000
const DATA_ADDRESS = 0x4_0000
const DATA_SIZE = 0xb_0000

/** A source that writes 0xff and counts. */
const countingSource = () => {
  const source = {
    bytes: 0,
    calls: 0,
    fill: (bytes: Uint8Array) => {
      source.calls++
      source.bytes += bytes.length
      bytes.fill(0xff)
    }
  }
  return source
}

const started = Effect.gen(function*() {
  const source = countingSource()
  const harness = new DeviceHarness(virtioMmio(entropy(source), { name: "rng0" }))
  yield* harness.start
  const cpu = harnessCpu(harness)
  const start = (options: { readonly eventIndex?: boolean; readonly indirect?: boolean } = {}) =>
    runGuest(
      startVirtioMmio(cpu, HARNESS_PLACE, {
        memoryAddress: QUEUE_ADDRESS,
        queueSizes: [ENTROPY_QUEUE_SIZE],
        ...options
      })
    )
  return { source, harness, cpu, start }
})

describe("Entropy", () => {
  it.effect("is device 4 with one queue, no features and no configuration", () =>
    Effect.gen(function*() {
      const { harness } = yield* started
      const read = (register: number) => harness.read(0, register, 4)
      assert.deepStrictEqual(
        [VirtioMmio.DeviceID, VirtioMmio.QueueSizeMax, VirtioMmio.DeviceFeatures, VirtioMmio.Config].map(read),
        [4, 64, 0x3000_0000, 0]
      )
      harness.write(0, VirtioMmio.QueueSel, 4, 1)
      assert.strictEqual(read(VirtioMmio.QueueSizeMax), 0)
    }))

  it("fills the buffers of every request, and nothing else", () => {
    const request = fc.array(fc.integer({ min: 1, max: 5000 }), { minLength: 1, maxLength: 5 })
    fc.assert(
      fc.property(
        fc.array(request, { minLength: 1, maxLength: 20, size: "max" }),
        fc.boolean(),
        fc.boolean(),
        (requests, eventIndex, indirect) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { cpu, harness, source, start } = yield* started
            const driver = start({ eventIndex, indirect })
            const rooms = new Map<number, number>()
            const wanted = new Uint8Array(DATA_SIZE)
            let address = DATA_ADDRESS
            const queue = driver.queue(0)
            for (const lengths of requests) {
              const buffers = lengths.map((length) => {
                // A gap between any two buffers, so that a byte too many is seen.
                address += length + 1
                return { address: address - length - 1, length, writable: true }
              })
              const head = queue.add(buffers, indirect)
              if (head === undefined || address > DATA_ADDRESS + DATA_SIZE) break
              rooms.set(head, lengths.reduce((sum, length) => sum + length, 0))
              for (const buffer of buffers) {
                wanted.fill(0xff, buffer.address - DATA_ADDRESS, buffer.address + buffer.length - DATA_ADDRESS)
              }
            }
            if (queue.publish()) runGuest(driver.notify(cpu, 0))
            const total = [...rooms.values()].reduce((sum, room) => sum + room, 0)
            while (rooms.size > 0) {
              const { head, written } = runGuest(driver.receive(cpu, 0))
              assert.isAtLeast(written, 1)
              // Less than the buffers have room for is legal where a turn ends: the rest is not touched.
              if (total <= ENTROPY_BYTES_PER_TURN) assert.strictEqual(written, rooms.get(head))
              rooms.delete(head)
            }
            assert.isAtMost(source.bytes, total)
            if (total <= ENTROPY_BYTES_PER_TURN) {
              assert.deepStrictEqual(harness.memory.slice(DATA_ADDRESS, DATA_SIZE), wanted)
            }
            const data = harness.memory.slice(DATA_ADDRESS, DATA_SIZE) ?? new Uint8Array()
            assert.isTrue(data.every((byte, i) => byte <= (wanted[i] ?? 0)))
          })))
      ),
      { numRuns: 60 }
    )
  })

  it.effect("makes at most a turn's bytes in a turn, whatever is asked", () =>
    Effect.gen(function*() {
      const { cpu, harness, source, start } = yield* started
      const driver = start()
      const huge = [{ address: DATA_ADDRESS, length: DATA_SIZE, writable: true }]
      runGuest(driver.send(cpu, 0, Array.from({ length: 4 }, () => huge)))
      for (let turn = 1; turn <= 4; turn++) {
        assert.isTrue(harness.behaviour.doorbell?.(0, 0))
        assert.strictEqual(source.bytes, turn * ENTROPY_BYTES_PER_TURN)
        assert.strictEqual(driver.queue(0).poll()?.written, ENTROPY_BYTES_PER_TURN)
      }
      assert.isFalse(harness.behaviour.doorbell?.(0, 0))
      const small = [{ address: DATA_ADDRESS, length: 1, writable: true }]
      runGuest(driver.send(cpu, 0, Array.from({ length: ENTROPY_QUEUE_SIZE }, () => small)))
      source.calls = 0
      harness.behaviour.doorbell?.(0, 0)
      assert.isAtMost(source.calls, ENTROPY_CHAINS_PER_TURN)
    }))

  it.effect("needs a reset for a request that is not one, and works after it", () =>
    Effect.gen(function*() {
      const { cpu, harness, start } = yield* started
      const bad = [
        [{ address: DATA_ADDRESS, length: 4, writable: false }],
        [{ address: DATA_ADDRESS, length: 4, writable: false }, { address: DATA_ADDRESS, length: 4, writable: true }],
        [{ address: DATA_ADDRESS, length: 0, writable: true }]
      ]
      for (const buffers of bad) {
        runGuest(start().send(cpu, 0, [buffers]))
        harness.settle()
        assert.strictEqual(harness.read(0, VirtioMmio.Status, 4), 0x4f)
      }
      const driver = start()
      runGuest(driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 9, writable: true }]]))
      assert.strictEqual(runGuest(driver.receive(cpu, 0)).written, 9)
    }))

  it("keeps to its rate limit whatever is asked, answers everything in the end, and a reset fills no bucket", () => {
    const bucket = fc.record({
      size: fc.integer({ min: 50, max: 2000 }),
      refillTimeMillis: fc.integer({ min: 1, max: 30 }),
      oneTimeBurst: fc.nat({ max: 2000 })
    })
    const rounds = fc.array(fc.array(fc.integer({ min: 1, max: 3000 }), { minLength: 1, maxLength: 6 }), {
      minLength: 1,
      maxLength: 5
    })
    fc.assert(
      fc.property(bucket, rounds, (bucket, rounds) =>
        Effect.runSync(Effect.scoped(Effect.gen(function*() {
          let now = 0
          const source = countingSource()
          const throttle = new Throttle({ bytes: bucket }, () => now)
          const harness = new DeviceHarness(virtioMmio(entropy(source, throttle), { name: "rng0" }))
          yield* harness.start
          const cpu = harnessCpu(harness)
          const most = () => bucket.size + bucket.oneTimeBurst + now * bucket.size / bucket.refillTimeMillis
          for (const [round, lengths] of rounds.entries()) {
            const driver = runGuest(
              startVirtioMmio(cpu, HARNESS_PLACE, { memoryAddress: QUEUE_ADDRESS, queueSizes: [ENTROPY_QUEUE_SIZE] })
            )
            const requests = lengths.map((length) => [{ address: DATA_ADDRESS, length, writable: true }])
            runGuest(driver.send(cpu, 0, requests))
            harness.settle()
            assert.isAtMost(source.bytes, most())
            // Every other round is reset in the middle.
            if (round % 2 === 1) continue
            const all = lengths.reduce((sum, length) => sum + length, 0)
            const end = now + Math.ceil(all / bucket.size * bucket.refillTimeMillis) + lengths.length
            for (let answered = 0; answered < lengths.length; now++) {
              harness.signals.add(0)
              harness.settle()
              while (driver.queue(0).poll() !== undefined) answered++
              assert.isAtMost(source.bytes, most())
              assert.isAtMost(now, end)
            }
          }
        })))),
      { numRuns: 60 }
    )
  })

  it.effect("writes nothing to the buffers of a queue that its driver has stopped while they waited for tokens", () =>
    Effect.gen(function*() {
      let now = 0
      const source = countingSource()
      const throttle = new Throttle({ bytes: { size: 100, refillTimeMillis: 10, oneTimeBurst: 0 } }, () => now)
      const harness = new DeviceHarness(virtioMmio(entropy(source, throttle), { name: "rng0" }))
      yield* harness.start
      const cpu = harnessCpu(harness)
      const start = () => runGuest(startVirtioMmio(cpu, HARNESS_PLACE, { memoryAddress: QUEUE_ADDRESS }))
      const request = [{ address: DATA_ADDRESS, length: 100, writable: true }]
      const driver = start()
      runGuest(driver.send(cpu, 0, [request, request]))
      harness.settle()
      assert.strictEqual(source.bytes, 100)
      harness.write(0, VirtioMmio.QueueSel, 4, 0)
      harness.write(0, VirtioMmio.QueueReady, 4, 0)
      harness.memory.slice(DATA_ADDRESS, DATA_SIZE)?.fill(0)
      now = 1000
      harness.signals.add(0)
      harness.settle()
      assert.strictEqual(source.bytes, 100)
      assert.strictEqual(harness.memory.slice(DATA_ADDRESS, 100)?.some((byte) => byte !== 0), false)
      const again = start()
      runGuest(again.send(cpu, 0, [request]))
      assert.strictEqual(runGuest(again.receive(cpu, 0)).written, 100)
    }))

  it("waits for tokens in a machine, and is woken by the clock", () => {
    const program = GuestProgram.make(function*(cpu) {
      const place = GuestAcpi.find(cpu).virtioMmio[0]
      if (place === undefined) throw new Error("the machine has no virtio device")
      const driver = yield* startVirtioMmio(cpu, place, { memoryAddress: 0x18_0000 })
      for (let i = 0; i < 10; i++) {
        yield* driver.send(cpu, 0, [[{ address: 0x1a_0000, length: 100, writable: true }]])
        if ((yield* driver.receive(cpu, 0)).written !== 100) throw new Error("the request was not answered in full")
      }
      yield* GuestAcpi.powerOff(cpu)
    })
    const layer = GuestLifecycle.layer.pipe(
      Layer.provide(Layer.provide(layerDevices, EntropySource.layerRandom)),
      Layer.provide(FakeHypervisor.layer())
    )
    Simulation.explore(
      Effect.gen(function*() {
        const lifecycle = yield* GuestLifecycle
        yield* lifecycle.create({
          kernelType: "LINUX",
          kernel: GuestProgram.kernel(program),
          cpus: 1,
          guestMemory: "2M",
          virtioRng: true,
          entropyRateLimit: { bytes: { size: 200, refillTimeMillis: 1000 } }
        })
        const begin = yield* Clock.currentTimeMillis
        assert.deepStrictEqual(yield* lifecycle.run, { _tag: "PowerOff" })
        assert.strictEqual((yield* Clock.currentTimeMillis) - begin, 4000)
      }).pipe(Effect.provide(layer)),
      20
    )
  })

  it.effect("gives the same bytes for the same seed", () =>
    Effect.gen(function*() {
      const draw = EntropySource.pipe(
        Effect.map(({ fill }) => {
          const bytes = new Uint8Array(64)
          fill(bytes)
          return bytes
        }),
        Effect.provide(EntropySource.layerRandom, { local: true })
      )
      const first = yield* Random.withSeed(draw, "seed")
      assert.deepStrictEqual(yield* Random.withSeed(draw, "seed"), first)
      assert.notDeepEqual(yield* Random.withSeed(draw, "other"), first)
      assert.isAbove(new Set(first).size, 32)
    }))

  it("needs the memory that its driver says", () => {
    assert.isBelow(QUEUE_ADDRESS + splitQueueMemory(ENTROPY_QUEUE_SIZE), DATA_ADDRESS)
  })
})
