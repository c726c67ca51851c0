import { assert, describe, it } from "@effect/vitest"
import { splitQueueMemory } from "@troupe/core/testing/drivers/SplitQueueDriver"
import { startVirtioMmio, VirtioMmio } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import * as Effect from "effect/Effect"
import * as Random from "effect/Random"
import * as fc from "fast-check"
import { entropy, ENTROPY_BYTES_PER_TURN, ENTROPY_CHAINS_PER_TURN, ENTROPY_QUEUE_SIZE } from "../src/Entropy.ts"
import { EntropySource } from "../src/EntropySource.ts"
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
