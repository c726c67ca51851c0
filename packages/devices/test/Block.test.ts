/** The block device against a model of its disk: every request, every answer of its back end, every moment of a reset. */
import { assert, describe, it } from "@effect/vitest"
import { type BlockBackend, BlockBackendError, type BlockDone, makeMemoryBackend } from "@troupe/core/BlockBackend"
import type { BlockEvent } from "@troupe/core/BlockDevices"
import { startVirtioMmio, VirtioMmio } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import { Seed } from "@troupe/core/testing/Seed"
import * as Effect from "effect/Effect"
import * as fc from "fast-check"
import { virtioBlk, type VirtioBlkOptions } from "../src/block/VirtioBlk.ts"
import {
  BLOCK_BYTES_MAX,
  BLOCK_QUEUE_SIZE,
  BLOCK_RANGE_SECTORS_MAX,
  BLOCK_REQUESTS_MAX,
  VirtioBlkStatus,
  VirtioBlkType
} from "../src/block/VirtioBlkLayout.ts"
import { makeVolatileBackend } from "../src/block/VolatileBackend.ts"
import { Throttle } from "../src/Throttle.ts"
import { virtioMmio } from "../src/virtio/VirtioMmio.ts"
import { DeviceHarness } from "./DeviceHarness.ts"
import { DATA_MAX, DiskDriver, type DiskRequest } from "./DiskDriver.ts"
import { HARNESS_PLACE, harnessCpu, runGuest } from "./HarnessCpu.ts"

const { IOERR, OK, UNSUPP } = VirtioBlkStatus
const { DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES } = VirtioBlkType
const QUEUE_ADDRESS = 0x1_0000
const SECTOR = 512
const ALL_FEATURES = { low: 0x0fff_ffff, high: 0 }
const FLUSH_FEATURE = 1 << 9

type Operation = "read" | "write" | "flush" | "discard" | "writeZeroes"

/** A back end whose operations end when a test says so, in any order, with or without success. */
const deferred = (below: BlockBackend) => {
  const waiting: Array<{ readonly operation: Operation; readonly run: () => void; readonly fail: () => void }> = []
  const later = (operation: Operation, call: (done: BlockDone) => void) => (done: BlockDone) => {
    const error = new BlockBackendError({ name: "deferred", operation, kind: "io", detail: "the test says so" })
    waiting.push({ operation, run: () => call(done), fail: () => done(error) })
  }
  const backend: BlockBackend = {
    ...below,
    read: (offset, buffers, done) => later("read", (done) => below.read(offset, buffers, done))(done),
    write: (offset, buffers, done) => later("write", (done) => below.write(offset, buffers, done))(done),
    flush: (done) => later("flush", (done) => below.flush(done))(done),
    discard: (offset, length, done) => later("discard", (done) => below.discard?.(offset, length, done))(done),
    writeZeroes: (offset, length, unmap, done) =>
      later("writeZeroes", (done) => below.writeZeroes?.(offset, length, unmap, done))(done)
  }
  return { backend, waiting }
}

interface StartOptions {
  readonly features?: { readonly low: number; readonly high: number }
  readonly eventIndex?: boolean
  readonly indirect?: boolean
}

const started = (backend: BlockBackend, more: Partial<VirtioBlkOptions> = {}) =>
  Effect.gen(function*() {
    const events: Array<BlockEvent> = []
    const disk = virtioBlk({ id: "disk0", backend, onEvent: (event) => void events.push(event), ...more })
    const harness = new DeviceHarness(virtioMmio(disk.device, { name: "block0" }))
    yield* harness.start
    const cpu = harnessCpu(harness)
    const start = (options: StartOptions = {}) =>
      new DiskDriver(
        harness,
        cpu,
        runGuest(
          startVirtioMmio(cpu, HARNESS_PLACE, {
            memoryAddress: QUEUE_ADDRESS,
            queueSizes: [BLOCK_QUEUE_SIZE],
            features: ALL_FEATURES,
            ...options
          })
        )
      )
    /** Everything that can happen without the back end, tasks of the scheduler included. */
    const settle = Effect.gen(function*() {
      for (let i = 0; i < 3; i++) {
        harness.settle()
        yield* Effect.yieldNow
      }
      harness.settle()
    })
    return { disk, events, harness, cpu, start, settle }
  })

const pattern = (length: number, seed: number): Uint8Array<ArrayBuffer> => {
  const bytes = new Uint8Array(length)
  for (let i = 0; i < length; i++) bytes[i] = (i >> 9) * 31 + i * 7 + seed + 1
  return bytes
}

const range = (sector: number, sectors: number, flags = 0): Uint8Array => {
  const view = new DataView(new ArrayBuffer(16))
  view.setUint32(0, sector, true)
  view.setUint32(8, sectors, true)
  view.setUint32(12, flags, true)
  return new Uint8Array(view.buffer)
}

const join = (...parts: ReadonlyArray<Uint8Array>): Uint8Array => new Uint8Array(Buffer.concat(parts))

describe("virtioBlk", () => {
  it.effect("says what it is", () =>
    Effect.gen(function*() {
      const { harness } = yield* started(makeMemoryBackend("m", new Uint8Array(1000 * SECTOR + 100)))
      const read = (register: number) => harness.read(0, register, 4)
      assert.deepStrictEqual([VirtioMmio.DeviceID, VirtioMmio.QueueSizeMax].map(read), [2, 256])
      assert.strictEqual(
        read(VirtioMmio.DeviceFeatures) & 0x00ff_ffff,
        1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14
      )
      const config = (at: number) => read(VirtioMmio.Config + at)
      assert.deepStrictEqual([0, 4, 8, 12, 20].map(config), [1000, 0, 0x1_0000, 254, 512])
      assert.deepStrictEqual([36, 40, 44, 48, 52, 56].map(config), [0x1_0000, 4, 1, 0x1_0000, 4, 1])
      const readOnly = yield* started(makeMemoryBackend("m", new Uint8Array(SECTOR), { readOnly: true }))
      assert.strictEqual(
        readOnly.harness.read(0, VirtioMmio.DeviceFeatures, 4) & 0x00ff_ffff,
        1 << 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 9
      )
    }))

  it.effect("answers each wrong request with its status, and touches nothing", () =>
    Effect.gen(function*() {
      const sectors = 64
      const store = pattern(sectors * SECTOR, 1)
      const { events, settle, start } = yield* started(makeMemoryBackend("m", store.slice()))
      const driver = start()
      const readOnly = yield* started(makeMemoryBackend("m", store.slice(), { readOnly: true }))
      const readOnlyDriver = readOnly.start()
      const ask = (request: DiskRequest, on = driver, settled = settle) =>
        Effect.gen(function*() {
          on.send(request)
          yield* settled
          on.poll()
          return on.answer(request)
        })
      const zeros = (length: number) => new Uint8Array(length)
      const cases: ReadonlyArray<readonly [DiskRequest, number, number]> = [
        // Beyond the end, by one sector, by an overflow; not whole sectors; more to read than a header.
        [{ type: IN, sector: sectors, room: SECTOR }, IOERR, SECTOR + 1],
        [{ type: IN, sector: sectors - 1, room: 2 * SECTOR }, IOERR, 2 * SECTOR + 1],
        [{ type: IN, sector: 2 ** 64 - 2 ** 20, room: SECTOR }, IOERR, SECTOR + 1],
        [{ type: IN, sector: 2 ** 55, room: SECTOR }, IOERR, SECTOR + 1],
        [{ type: IN, sector: 0, room: SECTOR - 1 }, IOERR, SECTOR],
        [{ type: IN, sector: 0, room: SECTOR, out: zeros(1) }, IOERR, SECTOR + 1],
        [{ type: OUT, sector: sectors, out: zeros(SECTOR) }, IOERR, 1],
        [{ type: OUT, sector: 0, out: zeros(SECTOR + 1) }, IOERR, 1],
        [{ type: FLUSH, sector: 1 }, IOERR, 1],
        [{ type: GET_ID, sector: 0, room: 19 }, IOERR, 20],
        [{ type: GET_ID, sector: 0, room: 21 }, IOERR, 22],
        [{ type: 99, sector: 0, room: 4 }, UNSUPP, 5],
        [{ type: 99, sector: 0 }, UNSUPP, 1],
        [{ type: DISCARD, sector: 0 }, IOERR, 1],
        [{ type: DISCARD, sector: 0, out: zeros(15) }, IOERR, 1],
        [{ type: DISCARD, sector: 0, out: range(0, 8, 1) }, UNSUPP, 1],
        [{ type: DISCARD, sector: 0, out: range(0, BLOCK_RANGE_SECTORS_MAX + 1) }, IOERR, 1],
        [{ type: DISCARD, sector: 0, out: join(range(0, 8), range(60, 8)) }, IOERR, 1],
        [{ type: DISCARD, sector: 0, out: join(...Array.from({ length: 5 }, () => range(0, 1))) }, IOERR, 1],
        [{ type: WRITE_ZEROES, sector: 0, out: range(0, 8, 2) }, UNSUPP, 1],
        [{ type: WRITE_ZEROES, sector: 0, out: range(sectors, 1) }, IOERR, 1]
      ]
      for (const [request, status, written] of cases) {
        const answer = yield* ask(request)
        assert.deepStrictEqual(
          answer,
          { status, written, data: zeros(request.room ?? 0) },
          JSON.stringify({ ...request, out: request.out?.length })
        )
      }
      // What is right, at its edges.
      const right: ReadonlyArray<readonly [DiskRequest, Uint8Array]> = [
        [{ type: IN, sector: sectors - 1, room: SECTOR }, store.slice(-SECTOR)],
        [{ type: IN, sector: 3, room: 0 }, zeros(0)],
        [{ type: FLUSH, sector: 0, out: zeros(10) }, zeros(0)],
        [{ type: GET_ID, sector: 5, room: 20 }, join(new TextEncoder().encode("disk0"), zeros(15))]
      ]
      for (const [request, data] of right) {
        assert.deepStrictEqual(yield* ask(request), { status: OK, written: data.length + 1, data })
      }
      assert.strictEqual(
        (yield* ask({ type: OUT, sector: 0, out: zeros(SECTOR) }, readOnlyDriver, readOnly.settle))?.status,
        IOERR
      )
      const all: DiskRequest = { type: IN, sector: 0, room: 6 * SECTOR }
      assert.deepStrictEqual((yield* ask(all))?.data, store.slice(0, 6 * SECTOR))
      assert.deepStrictEqual(events, [], "what a guest does wrong is no event")
    }))

  it.effect("needs a reset where a request has no room for its status", () =>
    Effect.gen(function*() {
      const { cpu, harness, settle } = yield* started(makeMemoryBackend("m", new Uint8Array(SECTOR)))
      const driver = runGuest(startVirtioMmio(cpu, HARNESS_PLACE, { memoryAddress: QUEUE_ADDRESS }))
      runGuest(driver.send(cpu, 0, [[{ address: 0x4_0000, length: 16, writable: false }]]))
      yield* settle
      assert.strictEqual(harness.read(0, VirtioMmio.Status, 4) & 64, 64)
    }))

  it("is an array of bytes, whatever is asked at a time, in whatever order and way it ends", () => {
    const sectors = 256
    const one = fc.record({
      type: fc.constantFrom(IN, IN, OUT, OUT, DISCARD, WRITE_ZEROES, FLUSH),
      at: fc.nat(sectors - 1),
      sectors: fc.integer({ min: 1, max: Math.floor(DATA_MAX / SECTOR) }),
      seed: fc.nat(255),
      piece: fc.constantFrom(undefined, 512, 100, 1000),
      joined: fc.boolean()
    })
    const batches = fc.array(fc.array(one, { minLength: 1, maxLength: 24, size: "max" }), {
      minLength: 1,
      maxLength: 8
    })
    fc.assert(
      fc.property(
        batches,
        fc.integer(),
        fc.boolean(),
        fc.boolean(),
        fc.nat(100),
        (batches, seed, eventIndex, indirect, failures) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { choose } = new Seed(seed)
            const model = pattern(sectors * SECTOR, 5)
            const { backend, waiting } = deferred(makeMemoryBackend("m", model.slice()))
            const { disk, events, settle, start } = yield* started(backend)
            const driver = start({ eventIndex, indirect })
            let asked = 0
            let failed = 0
            for (const batch of batches) {
              // Requests of one batch are of different sectors: their order says nothing.
              const taken = new Uint8Array(sectors)
              const requests = batch.flatMap((one) => {
                const count = Math.min(one.sectors, sectors - one.at)
                if (one.type !== FLUSH && taken.subarray(one.at, one.at + count).some((taken) => taken === 1)) return []
                if (one.type !== FLUSH) taken.fill(1, one.at, one.at + count)
                const bytes = count * SECTOR
                const common = {
                  type: one.type,
                  joined: one.joined,
                  ...(one.piece === undefined ? {} : { piece: one.piece })
                }
                const request: DiskRequest = one.type === IN
                  ? { ...common, sector: one.at, room: bytes }
                  : one.type === OUT
                  ? { ...common, sector: one.at, out: pattern(bytes, one.seed), joined: false }
                  : one.type === FLUSH
                  ? { ...common, sector: 0 }
                  : { ...common, sector: 0, out: range(one.at, count) }
                return [{ request, at: one.at * SECTOR, bytes }]
              })
              // Some are sent while others are on their way.
              const first = choose(requests.length + 1)
              driver.send(...requests.slice(0, first).map(({ request }) => request))
              if (choose(2) === 0) yield* settle
              driver.send(...requests.slice(first).map(({ request }) => request))
              yield* settle
              const broken = new Set<number>()
              while (waiting.length > 0) {
                const [operation] = waiting.splice(choose(waiting.length), 1)
                if (operation === undefined) break
                if (choose(100) < failures / 4) {
                  failed++
                  broken.add(failed)
                  operation.fail()
                } else {
                  operation.run()
                }
                if (choose(3) === 0) yield* settle
              }
              yield* settle
              driver.poll()
              assert.strictEqual(driver.waiting, 0)
              let failuresHere = 0
              for (const { at, bytes, request } of requests) {
                asked++
                const answer = driver.answer(request)
                if (answer === undefined) return assert.fail("a request was not answered")
                assert.strictEqual(answer.written, (request.room ?? 0) + 1)
                if (answer.status === IOERR) {
                  failuresHere++
                  assert.isTrue(answer.data.every((byte) => byte === 0), "a failed read shows nothing")
                  continue
                }
                assert.strictEqual(answer.status, OK)
                if (request.type === IN) assert.deepStrictEqual(answer.data, model.slice(at, at + bytes))
                else if (request.type === OUT) model.set(request.out ?? [], at)
                else if (request.type !== FLUSH) model.fill(0, at, at + bytes)
              }
              assert.strictEqual(failuresHere, broken.size)
            }
            assert.strictEqual(events.length, failed)
            assert.deepStrictEqual([disk.statistics().requests, disk.statistics().failures], [asked, failed])
          })))
      ),
      { numRuns: 100 }
    )
  })

  it("is idle before a reset is done, and touches no memory after it", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 150 }),
        fc.nat(150),
        fc.integer(),
        (count, ended, seed) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { choose } = new Seed(seed)
            const store = pattern(64 * SECTOR, 9)
            const { backend, waiting } = deferred(makeMemoryBackend("m", store))
            const { harness, settle, start } = yield* started(backend)
            const driver = start()
            driver.send(
              ...Array.from({ length: count }, (): DiskRequest => ({ type: IN, sector: choose(64), room: SECTOR }))
            )
            yield* settle
            for (let i = 0; i < ended && waiting.length > 0; i++) waiting.splice(choose(waiting.length), 1)[0]?.run()
            if (choose(2) === 0) yield* settle
            const status = () => harness.read(0, VirtioMmio.Status, 4)
            harness.write(0, VirtioMmio.Status, 4, 0)
            while (waiting.length > 0) {
              yield* settle
              assert.notStrictEqual(status(), 0, "the reset is done while the back end has memory of the guest")
              waiting.splice(choose(waiting.length), 1)[0]?.run()
            }
            yield* settle
            assert.strictEqual(status(), 0)
            const after = start()
            const request: DiskRequest = { type: IN, sector: 7, room: SECTOR }
            after.send(request)
            yield* settle
            assert.strictEqual(waiting.length, 1)
            waiting.splice(0, 1)[0]?.run()
            yield* settle
            assert.strictEqual(after.poll(), 1)
            assert.deepStrictEqual(after.answer(request)?.data, store.slice(7 * SECTOR, 8 * SECTOR))
          })))
      ),
      { numRuns: 100 }
    )
  })

  it.effect("has a bound of requests under way; the others wait, and are begun when there is room", () =>
    Effect.gen(function*() {
      const { backend, waiting } = deferred(makeMemoryBackend("m", new Uint8Array(64 * SECTOR)))
      const { settle, start } = yield* started(backend)
      const driver = start()
      const count = BLOCK_REQUESTS_MAX + 40
      driver.send(...Array.from({ length: count }, (): DiskRequest => ({ type: IN, sector: 1, room: SECTOR })))
      yield* settle
      assert.strictEqual(waiting.length, BLOCK_REQUESTS_MAX)
      for (let i = 0; i < 10; i++) waiting.shift()?.run()
      yield* settle
      assert.strictEqual(driver.poll(), 10)
      assert.strictEqual(waiting.length, BLOCK_REQUESTS_MAX)
      while (waiting.length > 0) {
        waiting.shift()?.run()
        yield* settle
      }
      assert.strictEqual(driver.poll(), count - 10)
    }))

  it.effect("has a bound of bytes under way, whatever a back end needs for them", () =>
    Effect.gen(function*() {
      const sizes: Array<number> = []
      const waiting: Array<BlockDone> = []
      const backend: BlockBackend = {
        ...makeMemoryBackend("m", new Uint8Array(0)),
        capacity: 2 ** 30,
        read: (_, buffers, done) => {
          sizes.push(buffers.reduce((sum, buffer) => sum + buffer.length, 0))
          waiting.push(done)
        }
      }
      const { cpu, harness, settle } = yield* started(backend)
      const driver = runGuest(startVirtioMmio(cpu, HARNESS_PLACE, {
        memoryAddress: QUEUE_ADDRESS,
        queueSizes: [BLOCK_QUEUE_SIZE],
        features: ALL_FEATURES
      }))
      // The same memory again and again: a small guest asks for much.
      const piece = { address: 0x8_0000, length: 0x8_0000, writable: true }
      harness.memory.write(0x4_0000, new Uint8Array(16))
      const chain = [
        { address: 0x4_0000, length: 16, writable: false },
        ...Array.from({ length: 30 }, () => piece),
        { address: 0x4_0010, length: 1, writable: true }
      ]
      const count = 8
      for (let i = 0; i < count; i++) driver.queue(0).add(chain)
      if (driver.queue(0).publish()) runGuest(driver.notify(cpu, 0))
      yield* settle
      const size = 30 * 0x8_0000
      assert.deepStrictEqual(sizes, sizes.map(() => size))
      assert.strictEqual(waiting.length, Math.ceil(BLOCK_BYTES_MAX / size))
      for (let answered = 0; answered < count;) {
        assert.isAtMost(waiting.length, Math.ceil(BLOCK_BYTES_MAX / size))
        waiting.shift()?.()
        yield* settle
        while (driver.queue(0).poll() !== undefined) answered++
      }
    }))

  it.effect("ends after a back end that throws, also when it had ended the operation before", () =>
    Effect.gen(function*() {
      for (const before of [false, true]) {
        const backend: BlockBackend = {
          ...makeMemoryBackend("m", new Uint8Array(64 * SECTOR)),
          read: (_, __, done) => {
            if (before) done()
            throw new Error("the test says so")
          }
        }
        yield* Effect.scoped(Effect.gen(function*() {
          const { harness, start } = yield* started(backend)
          const driver = start()
          assert.throws(() => {
            driver.send({ type: IN, sector: 1, room: SECTOR })
            harness.settle()
          }, "the test says so")
        }))
      }
    }))

  it.effect("ends many requests with one interrupt", () =>
    Effect.gen(function*() {
      for (const eventIndex of [true, false]) {
        const { backend, waiting } = deferred(makeMemoryBackend("m", new Uint8Array(64 * SECTOR)))
        const { harness, settle, start } = yield* started(backend)
        const driver = start({ eventIndex })
        const before = harness.interrupts[0] ?? 0
        driver.send(...Array.from({ length: 64 }, (): DiskRequest => ({ type: IN, sector: 1, room: SECTOR })))
        yield* settle
        for (const operation of waiting.splice(0)) operation.run()
        yield* settle
        assert.strictEqual(driver.poll(), 64)
        assert.strictEqual((harness.interrupts[0] ?? 0) - before, 1)
      }
    }))

  it.effect("makes each write durable before it answers where the driver knows of no flush", () =>
    Effect.gen(function*() {
      const { backend, waiting } = deferred(makeMemoryBackend("m", new Uint8Array(64 * SECTOR)))
      const { events, settle, start } = yield* started(backend)
      const driver = start({ features: { low: ALL_FEATURES.low & ~FLUSH_FEATURE, high: 0 } })
      const write: DiskRequest = { type: OUT, sector: 1, out: pattern(SECTOR, 1) }
      const end = (how: "run" | "fail") =>
        Effect.andThen(
          Effect.sync(() => {
            const operation = waiting.shift()
            operation?.[how]()
            return operation?.operation
          }),
          (operation) => Effect.as(settle, operation)
        )
      driver.send(write)
      yield* settle
      assert.strictEqual(yield* end("run"), "write")
      assert.strictEqual(driver.poll(), 0)
      assert.strictEqual(yield* end("run"), "flush")
      assert.strictEqual(driver.poll(), 1)
      assert.strictEqual(driver.answer(write)?.status, OK)
      driver.send(write)
      yield* settle
      yield* end("run")
      yield* end("fail")
      driver.poll()
      assert.strictEqual(driver.answer(write)?.status, IOERR)
      assert.strictEqual(events[0]?.operation, "flush")
    }))

  it.effect("keeps to its rate limit, and forgets nothing that waits for it", () =>
    Effect.gen(function*() {
      let now = 0
      const throttle = new Throttle(
        { bytes: { size: 2 * SECTOR, refillTimeMillis: 10, oneTimeBurst: 0 } },
        () => now
      )
      const { harness, settle, start } = yield* started(makeMemoryBackend("m", new Uint8Array(64 * SECTOR)), {
        throttle
      })
      const driver = start()
      driver.send(...Array.from({ length: 6 }, (): DiskRequest => ({ type: IN, sector: 1, room: SECTOR })))
      yield* settle
      assert.strictEqual(driver.poll(), 2)
      now = 5
      harness.signals.add(1)
      yield* settle
      assert.strictEqual(driver.poll(), 1)
      now = 1000
      harness.signals.add(1)
      yield* settle
      assert.strictEqual(driver.poll(), 2)
      // The one that waits is given up by a reset.
      harness.write(0, VirtioMmio.Status, 4, 0)
      assert.strictEqual(harness.read(0, VirtioMmio.Status, 4), 0)
      now = 2000
      const after = start()
      after.send({ type: IN, sector: 1, room: SECTOR })
      yield* settle
      assert.strictEqual(after.poll(), 1)
    }))

  it.effect("counts all ranges of a discard, not the last one", () =>
    Effect.gen(function*() {
      let now = 0
      const throttle = new Throttle(
        { bytes: { size: 8 * SECTOR, refillTimeMillis: 8, oneTimeBurst: 0 } },
        () => now
      )
      const { harness, settle, start } = yield* started(makeMemoryBackend("m", new Uint8Array(64 * SECTOR)), {
        throttle
      })
      const driver = start()
      driver.send({ type: DISCARD, sector: 0, out: join(range(0, 8), range(8, 4), range(0, 0)) })
      yield* settle
      assert.strictEqual(driver.poll(), 0)
      now = 4
      harness.signals.add(1)
      yield* settle
      assert.strictEqual(driver.poll(), 1)
    }))
})

describe("makeVolatileBackend", () => {
  it("is an array of bytes over what is below, which it never changes, within its memory", () => {
    const sectors = 200
    const action = fc.record({
      kind: fc.constantFrom("write" as const, "write" as const, "read" as const, "discard" as const, "zero" as const),
      at: fc.nat(sectors - 1),
      sectors: fc.integer({ min: 1, max: 30 }),
      seed: fc.nat(255),
      cut: fc.nat(3000)
    })
    fc.assert(
      fc.property(
        fc.array(action, { maxLength: 40, size: "max" }),
        fc.integer({ min: 0, max: 120_000 }),
        (actions, limit) => {
          const base = pattern(sectors * SECTOR, 77)
          const below = makeMemoryBackend("below", base.slice(), { readOnly: true })
          const disk = makeVolatileBackend(below, limit)
          const model = base.slice()
          for (const action of actions) {
            const offset = action.at * SECTOR
            const length = Math.min(action.sectors, sectors - action.at) * SECTOR
            const bytes = action.kind === "write" ? pattern(length, action.seed) : new Uint8Array(length)
            const cut = Math.min(action.cut, length)
            const buffers = [bytes.subarray(0, cut), bytes.subarray(cut)]
            const outcomes: Array<BlockBackendError | undefined> = []
            const done: BlockDone = (error) => void outcomes.push(error)
            if (action.kind === "read") {
              disk.read(offset, buffers, done)
              assert.deepStrictEqual(outcomes, [undefined])
              assert.isTrue(Buffer.from(bytes.buffer).equals(model.subarray(offset, offset + length)))
              continue
            }
            if (action.kind === "write") disk.write(offset, buffers, done)
            else if (action.kind === "zero") disk.writeZeroes?.(offset, length, true, done)
            else disk.discard?.(offset, length, done)
            const [error] = outcomes
            if (error !== undefined) {
              assert.include(error.hint, "volatileLimit")
              assert.isBelow(limit, 120_000, "all of it would fit")
              // Part of it may have been done: that is what a failed write is.
              const now = new Uint8Array(length)
              disk.read(offset, [now], () => undefined)
              assert.isTrue(now.every((byte, i) => byte === bytes[i] || byte === model[offset + i]))
              model.set(now, offset)
              continue
            }
            if (action.kind === "discard") {
              const now = new Uint8Array(length)
              disk.read(offset, [now], () => undefined)
              assert.isTrue(now.every((byte, i) => byte === 0 || byte === model[offset + i]))
              model.set(now, offset)
            } else {
              model.set(bytes, offset)
            }
          }
          assert.isTrue(Buffer.from(below.bytes()).equals(base))
        }
      ),
      { numRuns: 60 }
    )
  })
})
