/** The block device on the fake: requests of a guest against a model of its disk. */
import { assert, describe, it } from "@effect/vitest"
import { type BlockBackend, type BlockDone, makeMemoryBackend } from "@troupe/core/BlockBackend"
import type { BlockEvent } from "@troupe/core/BlockDevices"
import { startVirtioMmio, VirtioMmio } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import * as Effect from "effect/Effect"
import { virtioBlk } from "../src/block/VirtioBlk.ts"
import { BLOCK_QUEUE_SIZE, VirtioBlkStatus, VirtioBlkType } from "../src/block/VirtioBlkLayout.ts"
import { virtioMmio } from "../src/virtio/VirtioMmio.ts"
import { DeviceHarness } from "./DeviceHarness.ts"
import { HARNESS_PLACE, harnessCpu, runGuest } from "./HarnessCpu.ts"

const QUEUE_ADDRESS = 0x1_0000
const DATA_ADDRESS = 0x4_0000
const SECTOR = 512
const ALL_FEATURES = { low: 0xffff_ffff, high: 0 }

/** A back end whose operations end when a test says so. */
export const slow = (below: BlockBackend) => {
  const waiting: Array<() => void> = []
  const later = (call: (done: BlockDone) => void) => (done: BlockDone) => {
    waiting.push(() => call(done))
  }
  const backend: BlockBackend = {
    ...below,
    read: (offset, buffers, done) => later((done) => below.read(offset, buffers, done))(done),
    write: (offset, buffers, done) => later((done) => below.write(offset, buffers, done))(done),
    flush: (done) => later((done) => below.flush(done))(done)
  }
  return {
    backend,
    waiting,
    /** Ends one operation. */
    end: (index = 0) => waiting.splice(index, 1)[0]?.()
  }
}

interface StartOptions {
  readonly features?: { readonly low: number; readonly high: number }
  readonly eventIndex?: boolean
  readonly indirect?: boolean
}

const started = (backend: BlockBackend, id = "disk0") =>
  Effect.gen(function*() {
    const events: Array<BlockEvent> = []
    const disk = virtioBlk({ id, backend, onEvent: (event) => void events.push(event) })
    const harness = new DeviceHarness(virtioMmio(disk.device, { name: "block0" }))
    yield* harness.start
    const cpu = harnessCpu(harness)
    const start = (options: StartOptions = {}) =>
      runGuest(
        startVirtioMmio(cpu, HARNESS_PLACE, {
          memoryAddress: QUEUE_ADDRESS,
          queueSizes: [BLOCK_QUEUE_SIZE],
          features: ALL_FEATURES,
          ...options
        })
      )
    return { disk, events, harness, cpu, start, settle: settleIn(harness) }
  })

/** Lets everything happen that waits, tasks of the scheduler included. */
const settleIn = (harness: DeviceHarness) =>
  Effect.gen(function*() {
    for (let i = 0; i < 4; i++) {
      harness.settle()
      yield* Effect.yieldNow
    }
    harness.settle()
  })

const header = (type: number, sector: number): Uint8Array => {
  const bytes = new DataView(new ArrayBuffer(16))
  bytes.setUint32(0, type, true)
  bytes.setUint32(8, sector % 2 ** 32, true)
  bytes.setUint32(12, Math.floor(sector / 2 ** 32), true)
  return new Uint8Array(bytes.buffer)
}

describe("Block", () => {
  it.effect("says what it is", () =>
    Effect.gen(function*() {
      const { harness } = yield* started(makeMemoryBackend("m", new Uint8Array(1000 * SECTOR + 100)))
      const read = (register: number) => harness.read(0, register, 4)
      assert.deepStrictEqual(
        [VirtioMmio.DeviceID, VirtioMmio.QueueSizeMax, VirtioMmio.DeviceFeatures].map(read),
        [2, 256, 0x3000_0000 | 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14]
      )
      assert.deepStrictEqual([0, 4, 8, 12, 20].map((at) => read(VirtioMmio.Config + at)), [1000, 0, 0x1_0000, 254, 512])
    }))

  it.effect("reads what is there, writes what it is told", () =>
    Effect.gen(function*() {
      const store = Uint8Array.from({ length: 64 * SECTOR }, (_, i) => i * 7 + (i >> 9))
      const backend = makeMemoryBackend("m", store)
      const { cpu, harness, settle, start } = yield* started(backend)
      const driver = start()
      harness.memory.write(DATA_ADDRESS, header(VirtioBlkType.IN, 3))
      runGuest(driver.send(cpu, 0, [[
        { address: DATA_ADDRESS, length: 16, writable: false },
        { address: DATA_ADDRESS + 0x1000, length: 1024, writable: true },
        { address: DATA_ADDRESS + 0x2000, length: 1, writable: true }
      ]]))
      yield* settle
      const used = runGuest(driver.receive(cpu, 0))
      assert.strictEqual(used.written, 1025)
      assert.deepStrictEqual(harness.memory.slice(DATA_ADDRESS + 0x1000, 1024), store.slice(3 * SECTOR, 5 * SECTOR))
      assert.strictEqual(harness.memory.slice(DATA_ADDRESS + 0x2000, 1)?.[0], VirtioBlkStatus.OK)
    }))
})
