/** Queues of every size that a driver may choose, set up through the registers of a transport, filled and used. */
import { assert, describe, it } from "@effect/vitest"
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import { packedQueueMemory } from "@troupe/core/testing/drivers/PackedQueueDriver"
import { splitQueueMemory } from "@troupe/core/testing/drivers/SplitQueueDriver"
import type { VirtioDriver } from "@troupe/core/testing/drivers/VirtioDriver"
import { VirtioMmioDriver } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import { findVirtioPci, startVirtioPci } from "@troupe/core/testing/drivers/VirtioPciDriver"
import * as Effect from "effect/Effect"
import { DescriptorChain } from "../src/virtio/DescriptorChain.ts"
import { makeFeatures } from "../src/virtio/Features.ts"
import { QUEUE_SIZE_MAX } from "../src/virtio/SplitQueue.ts"
import type { VirtioBehaviour, VirtioDevice } from "../src/virtio/VirtioDevice.ts"
import { virtioOn } from "../src/virtio/VirtioTransport.ts"
import { DeviceHarness, HARNESS_BASE } from "./DeviceHarness.ts"
import { HARNESS_PLACE, harnessCpu, runGuest } from "./HarnessCpu.ts"

const QUEUE_ADDRESS = 0x1_0000
/** Behind a queue of the largest size, with a table for each of its descriptors. */
const DATA_ADDRESS = 0x100_0000
const MEMORY_SIZE = 0x110_0000
const PER_TURN = 1000

/** Writes 4 bytes to every chain, in one queue of the largest size. */
const ones: VirtioDevice = {
  deviceId: 42,
  features: makeFeatures(),
  queueSizes: [QUEUE_SIZE_MAX],
  config: new Uint8Array(0),
  start: () =>
    Effect.sync((): VirtioBehaviour => {
      const chain = new DescriptorChain(QUEUE_SIZE_MAX)
      let queue: Parameters<VirtioBehaviour["activate"]>[0]["queues"][number]
      return {
        activate: ({ queues }) => {
          queue = queues[0]
        },
        notify: () => {
          if (queue === undefined) return false
          for (let chains = 0; chains < PER_TURN; chains++) {
            if (!queue.take(chain)) return queue.resumeNotifications()
            queue.complete(chain, chain.write(0, Uint8Array.of(1, 1, 1, 1)))
          }
          return true
        },
        reset: () => {
          queue = undefined
          return true
        }
      }
    })
}

const powersOfTwo = Array.from({ length: 16 }, (_, i) => 2 ** i)
const cases = (["mmio", "pci"] as const).flatMap((transport) => [
  { transport, packed: false, sizes: powersOfTwo },
  { transport, packed: true, sizes: [...powersOfTwo, 3, 1000, QUEUE_SIZE_MAX - 1] }
])

describe("A queue of any size", () => {
  it.each(cases)(
    "is set up, filled twice and emptied: $transport, packed $packed",
    ({ packed, sizes, transport }) =>
      Effect.runPromise(Effect.scoped(Effect.gen(function*() {
        const memory = new GuestMemory([new MemoryRegion(0, new ArrayBuffer(MEMORY_SIZE))])
        const choices = { virtioTransport: transport, virtioPackedRing: packed }
        const harness = new DeviceHarness(virtioOn(choices, ones, { name: "ones0" }), memory)
        yield* harness.start
        const cpu = harnessCpu(harness)
        const options = { memoryAddress: QUEUE_ADDRESS, packed, indirect: false }
        const start = (size: number): VirtioDriver => {
          if (transport === "mmio") {
            const driver = new VirtioMmioDriver(HARNESS_PLACE)
            runGuest(driver.start(cpu, { ...options, queueSizes: [size] }))
            return driver
          }
          const [place] = runGuest(findVirtioPci(cpu, HARNESS_BASE))
          if (place === undefined) throw new Error("there is no virtio function")
          return runGuest(startVirtioPci(cpu, place, { ...options, queueSizes: [size] }))
        }
        for (const size of sizes) {
          const driver = start(size)
          const ring = driver.ring(0)
          assert.strictEqual(ring.size, size)
          assert.strictEqual(driver.queues.length, packed ? 0 : 1)
          for (let lap = 0; lap < 2; lap++) {
            // A buffer for each entry of the queue; one more has no room.
            const buffers = Array.from({ length: size }, (_, i) => [{
              address: DATA_ADDRESS + 4 * i,
              length: 4,
              writable: true
            }])
            memory.slice(DATA_ADDRESS, 4 * size + 4)?.fill(0)
            assert.strictEqual(runGuest(driver.send(cpu, 0, [...buffers, ...buffers.slice(0, 1)])), size)
            harness.settle()
            const written = memory.slice(DATA_ADDRESS, 4 * size + 4) ?? new Uint8Array()
            assert.isTrue(written.every((byte, i) => byte === (i < 4 * size ? 1 : 0)))
            for (let i = 0; i < size; i++) assert.strictEqual(ring.poll()?.written, 4)
            assert.isUndefined(ring.poll())
          }
        }
      })))
  )

  it("has room in the memory of these tests", () => {
    for (const room of [splitQueueMemory(QUEUE_SIZE_MAX), packedQueueMemory(QUEUE_SIZE_MAX)]) {
      assert.isAtMost(QUEUE_ADDRESS + room, DATA_ADDRESS)
    }
  })
})
