import { assert, describe, it } from "@effect/vitest"
import { BALLOON_PAGE_SIZE, MemStatTag } from "@troupe/core/BalloonController"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import { FakeHypervisor, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import type { DriverBuffer } from "@troupe/core/testing/drivers/SplitQueueDriver"
import {
  startVirtioMmio,
  VirtioMmio,
  type VirtioMmioDriver,
  VirtioStatus
} from "@troupe/core/testing/drivers/VirtioMmioDriver"
import type { GuestCpu } from "@troupe/core/testing/GuestCpu"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/testing/TestClock"
import * as fc from "fast-check"
import {
  BALLOON_DISCARDS_PER_TURN,
  BALLOON_PAGES_PER_TURN,
  BalloonConfig,
  makeBalloon,
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_PAGE_POISON,
  VIRTIO_BALLOON_F_PAGE_REPORTING,
  VIRTIO_BALLOON_F_STATS_VQ
} from "../src/Balloon.ts"
import { layer as layerDevices } from "../src/Catalog.ts"
import { EntropySource } from "../src/EntropySource.ts"
import { virtioMmio } from "../src/virtio/VirtioMmio.ts"
import { DeviceHarness } from "./DeviceHarness.ts"
import { HARNESS_PLACE, harnessCpu, runGuest } from "./HarnessCpu.ts"

const INFLATE = 0
const DEFLATE = 1
const STATS = 2
const REPORTING = 3
const STATS_BIT = 1 << VIRTIO_BALLOON_F_STATS_VQ
const POISON_BIT = 1 << VIRTIO_BALLOON_F_PAGE_POISON
const REPORTING_BIT = 1 << VIRTIO_BALLOON_F_PAGE_REPORTING
const ALL = STATS_BIT | POISON_BIT | REPORTING_BIT | (1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM)

/** Two regions with a hole between them; the queues and buffers lie in the first pages, which no test gives away. */
const LOW_PAGES = 256
const HIGH_PAGE = 300
const HIGH_PAGES = 64
const QUEUE_ADDRESS = 0x1000
const BUFFER_ADDRESS = 0x2_0000
const FIRST_PAGE = 64
const FILL = 0xaa

interface Discard {
  readonly address: number
  readonly length: number
}

/** Memory full of {@link FILL}, which notes what is given back. */
const notingMemory = () => {
  const discards: Array<Discard> = []
  const region = (page: number, pages: number) => {
    const buffer = new ArrayBuffer(pages * BALLOON_PAGE_SIZE)
    return new MemoryRegion(page * BALLOON_PAGE_SIZE, buffer, (offset, length) => {
      discards.push({ address: page * BALLOON_PAGE_SIZE + offset, length })
      new Uint8Array(buffer, offset, length).fill(0)
    })
  }
  const memory = new GuestMemory([region(0, LOW_PAGES), region(HIGH_PAGE, HIGH_PAGES)])
  for (let page = 0; page < HIGH_PAGE + HIGH_PAGES; page++) {
    memory.slice(page * BALLOON_PAGE_SIZE, BALLOON_PAGE_SIZE)?.fill(FILL)
  }
  return { memory, discards }
}

const isPage = (page: number) => (page >= 0 && page < LOW_PAGES) || (page >= HIGH_PAGE && page < HIGH_PAGE + HIGH_PAGES)

const started = Effect.gen(function*() {
  const { discards, memory } = notingMemory()
  const balloon = yield* makeBalloon(LOW_PAGES + HIGH_PAGES)
  const harness = new DeviceHarness(virtioMmio(balloon.device, { name: "balloon0" }), memory)
  yield* harness.start
  const cpu = harnessCpu(harness)
  const start = (low = ALL, options: { readonly indirect?: boolean } = {}): VirtioMmioDriver =>
    runGuest(startVirtioMmio(cpu, HARNESS_PLACE, {
      memoryAddress: QUEUE_ADDRESS,
      queueSizes: [16, 16, 16, 16],
      features: { low, high: 0 },
      ...options
    }))
  /** Page frame numbers in buffers of these lengths, the last one as long as is needed. */
  const numbers = (
    pages: ReadonlyArray<number>,
    splits: ReadonlyArray<number> = [],
    extra = 0
  ): Array<DriverBuffer> => {
    const bytes = new Uint8Array(pages.length * 4 + extra)
    pages.forEach((page, i) => new DataView(bytes.buffer).setUint32(i * 4, page, true))
    memory.write(BUFFER_ADDRESS, bytes)
    const buffers: Array<DriverBuffer> = []
    let at = 0
    for (const split of [...splits, bytes.length]) {
      const length = Math.min(split, bytes.length - at)
      if (length > 0) buffers.push({ address: BUFFER_ADDRESS + at, length, writable: false })
      at += length
    }
    return buffers
  }
  const send = (driver: VirtioMmioDriver, queue: number, buffers: ReadonlyArray<DriverBuffer>) => {
    runGuest(driver.send(cpu, queue, [buffers]))
    return runGuest(driver.receive(cpu, queue))
  }
  const config = (offset: number) => harness.read(0, VirtioMmio.Config + offset, 4)
  const stats = (driver: VirtioMmioDriver, entries: ReadonlyArray<readonly [number, bigint]>, extra = 0) => {
    const view = new DataView(new ArrayBuffer(entries.length * 10 + extra))
    entries.forEach(([tag, val], i) => {
      view.setUint16(i * 10, tag, true)
      view.setBigUint64(i * 10 + 2, val, true)
    })
    memory.write(BUFFER_ADDRESS, new Uint8Array(view.buffer))
    runGuest(driver.send(cpu, STATS, [[{ address: BUFFER_ADDRESS, length: view.byteLength, writable: false }]]))
    harness.settle()
  }
  return { balloon, harness, memory, discards, cpu, start, numbers, send, config, stats }
})

/** Pages up and down, apart and together, twice, and now and then one that the guest does not have. */
const pageLists = fc.array(
  fc.oneof(
    {
      weight: 6,
      arbitrary: fc.record({
        first: fc.integer({ min: FIRST_PAGE, max: LOW_PAGES - 21 }),
        step: fc.constantFrom(1, -1, 2, 0),
        count: fc.integer({ min: 1, max: 20 })
      })
    },
    {
      weight: 3,
      arbitrary: fc.record({
        first: fc.integer({ min: HIGH_PAGE, max: HIGH_PAGE + HIGH_PAGES - 1 }),
        step: fc.constantFrom(1, -1),
        count: fc.integer({ min: 1, max: 8 })
      })
    },
    {
      weight: 1,
      arbitrary: fc.record({
        first: fc.constantFrom(LOW_PAGES - 2, HIGH_PAGE + 1, 0x10_0000, 0xffff_fffe),
        step: fc.constantFrom(1, -1),
        count: fc.integer({ min: 1, max: 4 })
      })
    }
  ),
  { minLength: 1, maxLength: 6, size: "max" }
).map((runs) =>
  runs.flatMap(({ count, first, step }) =>
    Array.from({ length: count }, (_, i) => Math.min(Math.max(FIRST_PAGE, first + i * step), 0xffff_ffff))
  )
)

/** The longest runs of neighbours that grow at either end, up to the first page that does not exist (its run is not whole). */
const runsOf = (pages: ReadonlyArray<number>) => {
  const runs: Array<{ first: number; count: number }> = []
  for (const page of pages) {
    const last = runs.at(-1)
    if (last !== undefined && page === last.first + last.count) last.count++
    else if (last !== undefined && page === last.first - 1) {
      last.first = page
      last.count++
    } else runs.push({ first: page, count: 1 })
  }
  return runs
}

const operations = fc.array(
  fc.oneof(
    fc.record({
      _tag: fc.constant("inflate" as const),
      pages: pageLists,
      splits: fc.array(fc.integer({ min: 1, max: 9 }), { maxLength: 6 }),
      extra: fc.integer({ min: 0, max: 3 })
    }),
    fc.record({ _tag: fc.constant("deflate" as const), pages: pageLists }),
    fc.record({
      _tag: fc.constant("report" as const),
      ranges: fc.array(
        fc.record({
          offset: fc.integer({ min: 0, max: 30 * BALLOON_PAGE_SIZE }),
          length: fc.integer({ min: 1, max: 10 * BALLOON_PAGE_SIZE }),
          whole: fc.boolean()
        }),
        { minLength: 1, maxLength: 4 }
      )
    }),
    fc.record({ _tag: fc.constant("touch" as const), pages: pageLists }),
    fc.record({ _tag: fc.constant("reset" as const) })
  ),
  { minLength: 1, maxLength: 20, size: "max" }
)

describe("Balloon", () => {
  it.effect("is device 5, offers what it does, and shows what the host asks for", () =>
    Effect.gen(function*() {
      const { balloon, config, harness, start } = yield* started
      assert.strictEqual(harness.read(0, VirtioMmio.DeviceID, 4), 5)
      assert.strictEqual(harness.read(0, VirtioMmio.DeviceFeatures, 4) & 0xff, ALL)
      yield* balloon.controller.requestNumPages(7)
      const driver = start()
      harness.settle()
      assert.strictEqual(config(BalloonConfig.num_pages), 7)
      const before = harness.interrupts[0] ?? 0
      yield* balloon.controller.requestNumPages(320)
      harness.settle()
      assert.strictEqual(config(BalloonConfig.num_pages), 320)
      assert.strictEqual(harness.interrupts[0], before + 1)
      harness.write(0, VirtioMmio.Config + BalloonConfig.actual, 4, 12)
      // A driver cannot change what the host has asked for.
      harness.write(0, VirtioMmio.Config + BalloonConfig.num_pages, 4, 1)
      assert.deepStrictEqual(yield* balloon.controller.getBalloonSize, { currentNumPages: 12, requestedNumPages: 320 })
      assert.deepStrictEqual([config(BalloonConfig.actual), config(BalloonConfig.num_pages)], [12, 320])
      assert.strictEqual(driver.features.low & 0xff, ALL)
      runGuest(startVirtioMmio(harnessCpu(harness), HARNESS_PLACE, { memoryAddress: QUEUE_ADDRESS }))
      assert.deepStrictEqual(yield* balloon.controller.getBalloonSize, { currentNumPages: 0, requestedNumPages: 320 })
    }))

  it.effect("refuses what is no number of pages that the guest has, and changes nothing", () =>
    Effect.gen(function*() {
      const { balloon } = yield* started
      yield* balloon.controller.requestNumPages(5)
      for (const pages of [-1, 1.5, Number.NaN, LOW_PAGES + HIGH_PAGES + 1, 2 ** 32]) {
        const error = yield* Effect.flip(balloon.controller.requestNumPages(pages))
        assert.strictEqual(error.status, "OUT_OF_RANGE")
      }
      assert.strictEqual((yield* balloon.controller.getBalloonSize).requestedNumPages, 5)
    }))

  it("gives back exactly the pages that it is told of, in whole runs, whatever is asked in whatever order", () => {
    fc.assert(
      fc.property(
        operations,
        fc.boolean(),
        fc.boolean(),
        (operations, poison, indirect) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { balloon, cpu, discards, harness, memory, numbers, send, start } = yield* started
            const restart = () => start(poison ? ALL : ALL & ~POISON_BIT, { indirect })
            let driver = restart()
            /** Pages that must read as zero; all others hold what was there. */
            const zero = new Set<number>()
            let inflated = 0
            for (const operation of operations) {
              const begin = discards.length
              switch (operation._tag) {
                case "inflate": {
                  const { extra, pages, splits } = operation
                  assert.strictEqual(send(driver, INFLATE, numbers(pages, splits, extra)).written, 0)
                  const wanted: Array<Discard> = []
                  for (const { count, first } of runsOf(pages)) {
                    const whole = Array.from({ length: count }, (_, i) => isPage(first + i)).every(Boolean)
                    if (whole) wanted.push({ address: first * BALLOON_PAGE_SIZE, length: count * BALLOON_PAGE_SIZE })
                    for (let i = 0; i < count && isPage(first + i); i++) {
                      zero.add(first + i)
                      if (!whole) wanted.push({ address: (first + i) * BALLOON_PAGE_SIZE, length: BALLOON_PAGE_SIZE })
                    }
                    inflated += count
                    if (!whole) break
                  }
                  assert.deepStrictEqual(discards.slice(begin), wanted)
                  break
                }
                case "deflate":
                  assert.strictEqual(send(driver, DEFLATE, numbers(operation.pages)).written, 0)
                  assert.strictEqual(discards.length, begin)
                  break
                case "report": {
                  const buffers = operation.ranges.map(({ length, offset, whole }) => ({
                    address: FIRST_PAGE * BALLOON_PAGE_SIZE + (whole ? offset - offset % BALLOON_PAGE_SIZE : offset),
                    length: whole ? Math.ceil(length / BALLOON_PAGE_SIZE) * BALLOON_PAGE_SIZE : length,
                    writable: true
                  }))
                  assert.strictEqual(send(driver, REPORTING, buffers).written, 0)
                  const wanted = buffers.flatMap(({ address, length }) => {
                    const first = Math.ceil(address / BALLOON_PAGE_SIZE)
                    const end = Math.floor((address + length) / BALLOON_PAGE_SIZE)
                    for (let page = first; page < end; page++) zero.add(page)
                    return first < end
                      ? [{ address: first * BALLOON_PAGE_SIZE, length: (end - first) * BALLOON_PAGE_SIZE }]
                      : []
                  })
                  assert.deepStrictEqual(discards.slice(begin), wanted)
                  break
                }
                case "touch":
                  for (const page of operation.pages.filter(isPage)) {
                    memory.slice(page * BALLOON_PAGE_SIZE, BALLOON_PAGE_SIZE)?.fill(FILL)
                    zero.delete(page)
                  }
                  break
                case "reset":
                  driver = restart()
              }
              for (let page = FIRST_PAGE; page < HIGH_PAGE + HIGH_PAGES; page++) {
                const bytes = memory.slice(page * BALLOON_PAGE_SIZE, BALLOON_PAGE_SIZE)
                if (bytes === undefined) continue
                assert.deepStrictEqual([bytes[0], bytes[BALLOON_PAGE_SIZE - 1]], zero.has(page) ? [0, 0] : [FILL, FILL])
              }
            }
            const counters = balloon.controller.counters()
            assert.strictEqual(counters.discards, discards.length)
            assert.strictEqual(counters.discardedBytes, discards.reduce((sum, { length }) => sum + length, 0))
            assert.isAtLeast(counters.inflatedPages, inflated > 0 ? 1 : 0)
            // Whatever the guest named, its driver needs no reset.
            assert.strictEqual(runGuest(driver.status(cpu)) & VirtioStatus.DEVICE_NEEDS_RESET, 0)
            harness.settle()
          })))
      ),
      { numRuns: 80 }
    )
  })

  it.effect("keeps to its bounds in each turn", () =>
    Effect.gen(function*() {
      const { cpu, discards, harness, memory, numbers, send, start } = yield* started
      const driver = start()
      // The same run of all pages again and again, so that the page budget counts.
      const pages = Array.from({ length: 16_384 }, (_, i) => FIRST_PAGE + i % 128)
      const bytes = new Uint8Array(Uint32Array.from(pages).buffer)
      memory.write(BUFFER_ADDRESS, bytes)
      runGuest(driver.send(cpu, INFLATE, [[{ address: BUFFER_ADDRESS, length: bytes.length, writable: false }]]))
      const turn = () => {
        const before = discards.length
        const more = harness.behaviour.doorbell?.(0, INFLATE) ?? false
        const done = discards.slice(before)
        assert.isAtMost(done.length, BALLOON_DISCARDS_PER_TURN)
        assert.isAtMost(
          done.reduce((sum, { length }) => sum + length, 0),
          (BALLOON_PAGES_PER_TURN + 128) * BALLOON_PAGE_SIZE
        )
        return more
      }
      let turns = 0
      while (turn()) {
        if (turns++ > 100) assert.fail("it does not end")
      }
      assert.isAtLeast(turns, pages.length / BALLOON_PAGES_PER_TURN - 1)
      // A reset in the middle of a request ends it, and leaves nothing for the next driver.
      runGuest(driver.send(cpu, INFLATE, [[{ address: BUFFER_ADDRESS, length: bytes.length, writable: false }]]))
      assert.isTrue(turn())
      const next = start()
      const begin = discards.length
      send(next, INFLATE, numbers([FIRST_PAGE + 3]))
      assert.deepStrictEqual(discards.slice(begin), [{
        address: (FIRST_PAGE + 3) * BALLOON_PAGE_SIZE,
        length: BALLOON_PAGE_SIZE
      }])
    }))

  it.effect("leaves reported pages alone that the guest has filled, and discards those of the balloon all the same", () =>
    Effect.gen(function*() {
      const { config, cpu, discards, harness, numbers, send, start } = yield* started
      const page = [{ address: FIRST_PAGE * BALLOON_PAGE_SIZE, length: BALLOON_PAGE_SIZE, writable: true }]
      const withPoison = (value: number) => {
        // A start up to FEATURES_OK leaves the time to write the field.
        harness.write(0, VirtioMmio.Status, 4, 0)
        for (const status of [1, 3]) harness.write(0, VirtioMmio.Status, 4, status)
        for (const [select, bits] of [[0, ALL], [1, 1]] as const) {
          harness.write(0, VirtioMmio.DriverFeaturesSel, 4, select)
          harness.write(0, VirtioMmio.DriverFeatures, 4, bits)
        }
        harness.write(0, VirtioMmio.Status, 4, 11)
        harness.write(0, VirtioMmio.Config + BalloonConfig.poison_val, 4, value)
        assert.strictEqual(config(BalloonConfig.poison_val), value)
        return cpu
      }
      withPoison(0xaaaa_aaaa)
      // What is written before a reset is forgotten with it.
      send(start(), REPORTING, page)
      assert.strictEqual(discards.length, 1)
      const driver = runGuest(startPoisoned(cpu, 0xaaaa_aaaa))
      send(driver, REPORTING, page)
      assert.strictEqual(discards.length, 1)
      // It is too late to change it now.
      harness.write(0, VirtioMmio.Config + BalloonConfig.poison_val, 4, 0)
      assert.strictEqual(config(BalloonConfig.poison_val), 0xaaaa_aaaa)
      send(driver, REPORTING, page)
      assert.strictEqual(discards.length, 1)
      send(driver, INFLATE, numbers([FIRST_PAGE]))
      assert.strictEqual(discards.length, 2)
      send(runGuest(startPoisoned(cpu, 0)), REPORTING, page)
      assert.strictEqual(discards.length, 3)
    }))

  it.effect("finds the reports wherever a driver numbers their queue", () =>
    Effect.gen(function*() {
      const { cpu, discards, send } = yield* started
      const page = [{ address: FIRST_PAGE * BALLOON_PAGE_SIZE, length: BALLOON_PAGE_SIZE, writable: true }]
      const numberings = [
        { low: REPORTING_BIT, queue: 2 },
        { low: REPORTING_BIT | STATS_BIT, queue: 3 },
        { low: REPORTING_BIT | STATS_BIT, queue: 4 }
      ]
      for (const { low, queue } of numberings) {
        const driver = runGuest(startVirtioMmio(cpu, HARNESS_PLACE, {
          memoryAddress: QUEUE_ADDRESS,
          queueSizes: Array.from({ length: queue + 1 }, () => 8),
          features: { low, high: 0 }
        }))
        const before = discards.length
        send(driver, queue, page)
        assert.strictEqual(discards.length, before + 1)
      }
    }))

  it.effect("gives fresh statistics, or the last ones with their age, or says why there are none", () =>
    Effect.gen(function*() {
      const { balloon, cpu, harness, start, stats } = yield* started
      const { controller } = balloon
      /** Asks, lets the device hear it, and has the driver do its part. */
      const ask = (answer: (driver: VirtioMmioDriver) => void) =>
        Effect.gen(function*() {
          const fiber = yield* Effect.forkChild(controller.getMemStats)
          yield* TestClock.adjust(1)
          harness.settle()
          answer(driver)
          yield* TestClock.adjust("2 seconds")
          return yield* Fiber.await(fiber)
        })
      const noDriver = yield* Effect.forkChild(Effect.flip(controller.getMemStats))
      yield* TestClock.adjust("1 second")
      assert.strictEqual((yield* Fiber.join(noDriver)).status, "TIMED_OUT")
      const without = start(ALL & ~STATS_BIT)
      assert.strictEqual(without.features.low & STATS_BIT, 0)
      assert.strictEqual((yield* Effect.flip(controller.getMemStats)).status, "NOT_SUPPORTED")

      const driver = start()
      assert.strictEqual((yield* Effect.flip(controller.getMemStatsWithin(0))).status, "TIMED_OUT")
      stats(driver, [[MemStatTag.MEMFREE, 5n]], 9)
      yield* TestClock.adjust("10 seconds")
      assert.deepStrictEqual(yield* controller.getMemStatsWithin(0), { stats: [{ tag: 4, val: 5 }], ageMillis: 10_000 })
      // The device keeps the buffer until somebody asks.
      harness.settle()
      assert.isUndefined(driver.queue(STATS).poll())

      const fresh = yield* ask((driver) => {
        assert.strictEqual(driver.queue(STATS).poll()?.written, 0)
        stats(driver, [[0x1234, 2n ** 64n - 1n], [MemStatTag.MEMTOT, 7n]])
      })
      assert.deepStrictEqual(
        Exit.isSuccess(fresh) && fresh.value,
        { stats: [{ tag: 0x1234, val: Number.MAX_SAFE_INTEGER }, { tag: 5, val: 7 }], ageMillis: 0 }
      )
      const stale = yield* ask(() => {})
      assert.strictEqual(Exit.isSuccess(stale) && stale.value.ageMillis, 2000 + 1000)
      // The driver is late; what it gives then is there for the next one who asks.
      assert.strictEqual(driver.queue(STATS).poll()?.written, 0)
      stats(driver, [])
      assert.deepStrictEqual(yield* controller.getMemStatsWithin(0), { stats: [], ageMillis: 0 })
      // A new driver has not said anything.
      start()
      assert.strictEqual((yield* Effect.flip(controller.getMemStatsWithin(0))).status, "TIMED_OUT")
      assert.strictEqual(runGuest(driver.status(cpu)) & VirtioStatus.DEVICE_NEEDS_RESET, 0)
    }))

  it.effect("asks for the same again when the device fails and is started again, and who waits for statistics gets them", () =>
    Effect.gen(function*() {
      const { balloon, config, harness, start, stats } = yield* started
      yield* balloon.controller.requestNumPages(9)
      start()
      harness.settle()
      const waits = yield* Effect.forkChild(balloon.controller.getMemStats)
      yield* TestClock.adjust(1)
      yield* harness.start
      assert.strictEqual(harness.read(0, VirtioMmio.Status, 4) & VirtioStatus.DEVICE_NEEDS_RESET, 64)
      const driver = start()
      harness.settle()
      assert.strictEqual(config(BalloonConfig.num_pages), 9)
      stats(driver, [[MemStatTag.MEMFREE, 3n]])
      assert.deepStrictEqual((yield* Fiber.join(waits)).stats, [{ tag: MemStatTag.MEMFREE, val: 3 }])
    }))

  it.effect("says that the machine is gone, to those who wait as well", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const { controller } = yield* Scope.provide(makeBalloon(10), scope)
      const waits = yield* Effect.forkChild(Effect.flip(controller.getMemStats))
      const sizes = yield* Effect.forkChild(Stream.runCollect(controller.changes))
      yield* TestClock.adjust(1)
      yield* controller.requestNumPages(3)
      yield* TestClock.adjust(1)
      yield* Scope.close(scope, Exit.void)
      assert.strictEqual((yield* Fiber.join(waits)).status, "PEER_CLOSED")
      assert.deepStrictEqual(
        (yield* Fiber.join(sizes)).map(({ requestedNumPages }) => requestedNumPages),
        [0, 3]
      )
      for (const operation of [controller.getBalloonSize, controller.requestNumPages(1), controller.getMemStats]) {
        assert.strictEqual((yield* Effect.flip(operation)).status, "PEER_CLOSED")
      }
    }))
})

/** {@link startVirtioMmio} with a value for free pages, written when a driver writes it: before DRIVER_OK. */
function* startPoisoned(cpu: GuestCpu, value: number) {
  const store = cpu.store
  const spy: GuestCpu = {
    ...cpu,
    store: (address, size, written) => {
      const isReady = address === HARNESS_PLACE.base + VirtioMmio.Status && (written & VirtioStatus.DRIVER_OK) !== 0
      if (isReady) runGuest(one(store(HARNESS_PLACE.base + VirtioMmio.Config + BalloonConfig.poison_val, 4, value)))
      return store(address, size, written)
    }
  }
  return yield* startVirtioMmio(spy, HARNESS_PLACE, {
    memoryAddress: QUEUE_ADDRESS,
    queueSizes: [16, 16, 16, 16],
    features: { low: ALL, high: 0 }
  })
}

function* one(operation: ReturnType<GuestCpu["store"]>) {
  yield* operation
}

const layerHost = GuestLifecycle.layer.pipe(
  Layer.provide(Layer.provide(layerDevices, EntropySource.layerRandom)),
  Layer.provideMerge(FakeHypervisor.layer())
)

/** A driver that follows the host's wishes with the pages from 64 on until it is turned off by a wish for 3 pages. */
const following = GuestProgram.make(function*(cpu) {
  const place = GuestAcpi.find(cpu).virtioMmio[0]
  if (place === undefined) throw new Error("the machine has no virtio device")
  const driver = yield* startVirtioMmio(cpu, place, {
    memoryAddress: 0x18_0000,
    queueSizes: [16, 16, 16, 16],
    features: { low: ALL, high: 0 }
  })
  let actual = 0
  for (;;) {
    const [target = 0] = yield* driver.configuration(cpu, [{ offset: BalloonConfig.num_pages, size: 4 }])
    while (actual !== target) {
      const inflate = actual < target
      const page = 64 + (inflate ? actual : actual - 1)
      cpu.memory.write(0x1a_0000, new Uint8Array(Uint32Array.of(page).buffer))
      yield* driver.send(cpu, inflate ? INFLATE : DEFLATE, [[{ address: 0x1a_0000, length: 4, writable: false }]])
      yield* driver.receive(cpu, inflate ? INFLATE : DEFLATE)
      actual += inflate ? 1 : -1
      yield* cpu.store(place.base + VirtioMmio.Config + BalloonConfig.actual, 4, actual)
    }
    if (target === 3) return yield* GuestAcpi.powerOff(cpu)
    yield* cpu.waitForInterrupt(place.gsi)
    yield* driver.handleInterrupt(cpu)
  }
})

describe("The balloon in a machine", () => {
  it("is where the host wants it, in every order of events", () => {
    Simulation.explore(
      Effect.gen(function*() {
        const lifecycle = yield* GuestLifecycle
        yield* lifecycle.create({
          kernelType: "LINUX",
          kernel: GuestProgram.kernel(following),
          cpus: 1,
          guestMemory: "2M",
          virtioBalloon: true
        })
        const controller = yield* (yield* lifecycle.bind).getBalloonController
        const reach = (pages: number) =>
          Effect.andThen(
            controller.requestNumPages(pages),
            Stream.runHead(Stream.filter(controller.changes, (size) => size.currentNumPages === pages))
          )
        const host = yield* Effect.forkChild(Effect.forEach([10, 4, 20, 0, 3], reach))
        assert.deepStrictEqual(yield* lifecycle.run, { _tag: "PowerOff" })
        yield* Fiber.join(host)
        const { deflatedPages, discardedBytes, inflatedPages } = controller.counters()
        assert.deepStrictEqual([inflatedPages, deflatedPages], [29, 26])
        assert.strictEqual(discardedBytes, 29 * BALLOON_PAGE_SIZE)
        const fake = yield* FakeHypervisor.FakeHypervisor
        assert.deepStrictEqual(yield* fake.violations, [])
        assert.deepStrictEqual(yield* fake.openResources, [])
      }).pipe(Effect.provide(layerHost)),
      30
    )
  })

  it("is not there when it was not asked for", () => {
    Simulation.check(
      Effect.gen(function*() {
        const lifecycle = yield* GuestLifecycle
        const kernel = GuestProgram.kernel(following)
        yield* lifecycle.create({ kernelType: "LINUX", kernel, cpus: 1, guestMemory: "2M" })
        const error = yield* Effect.flip((yield* lifecycle.bind).getBalloonController)
        assert.strictEqual(error.reason._tag, "DEVICE_NOT_PRESENT")
      }).pipe(Effect.provide(layerHost))
    )
  })
})
