/** The network device on a harness, against a driver that checks it. */
import { assert, describe, it } from "@effect/vitest"
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import { Offload, OFFLOADS_ALL } from "@troupe/core/NetBackend"
import { NetDriverFeature as F, type NetDriverOptions, startNet } from "@troupe/core/testing/drivers/NetDriver"
import * as Effect from "effect/Effect"
import * as fc from "fast-check"
import { NetLine } from "../src/net/NetLine.ts"
import { withSoftwareOffloads } from "../src/net/SoftwareOffloads.ts"
import { virtioNet } from "../src/net/VirtioNet.ts"
import { virtioMmio } from "../src/virtio/VirtioMmio.ts"
import { DeviceHarness } from "./DeviceHarness.ts"
import { FakePort, type FakePortOptions } from "./FakePort.ts"
import { HARNESS_PLACE, harnessCpu, runGuest } from "./HarnessCpu.ts"

const MAC = "02:00:00:00:00:01"
const MEMORY_ADDRESS = 0x1_0000
const MEMORY_SIZE = 0x40_0000

const started = (options: FakePortOptions = {}) =>
  Effect.gen(function*() {
    const port = new FakePort(options)
    const line = yield* NetLine.make({ index: 0, name: "net0", macAddress: MAC, port: withSoftwareOffloads(port) })
    const memory = new GuestMemory([new MemoryRegion(0, new ArrayBuffer(MEMORY_ADDRESS + MEMORY_SIZE))])
    const harness = new DeviceHarness(virtioMmio(virtioNet(line), { name: "net0" }), memory)
    yield* harness.start
    const cpu = harnessCpu(harness)
    const start = (options: Partial<NetDriverOptions> = {}) => {
      const driver = runGuest(
        startNet(cpu, HARNESS_PLACE, { memoryAddress: MEMORY_ADDRESS, memorySize: MEMORY_SIZE, ...options })
      )
      harness.settle()
      return driver
    }
    return { port, line, harness, cpu, start }
  })

/** A frame of `length` bytes whose contents depend on a number. */
const frameOf = (length: number, seed: number) =>
  Uint8Array.from({ length }, (_, i) => (i * 31 + seed * 17 + (i >> 8)) & 0xff)

const ALL = Object.values(F)

describe("Net", () => {
  it("sends every frame once, in order and intact, however it is split", () => {
    const frame = fc.record({
      length: fc.integer({ min: 14, max: 1518 }),
      splits: fc.array(fc.integer({ min: 1, max: 600 }), { maxLength: 6 }),
      indirect: fc.boolean()
    })
    fc.assert(
      fc.property(
        fc.array(frame, { minLength: 1, maxLength: 200, size: "max" }),
        fc.record({ indirect: fc.boolean(), eventIndex: fc.boolean() }),
        fc.array(fc.integer({ min: 1, max: 20 }), { maxLength: 10 }),
        (frames, options, rooms) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { harness, line, port, start } = yield* started()
            const driver = start(options)
            if (rooms.length > 0) port.room = 0
            const waits = [...rooms]
            const progress = () => {
              harness.settle()
              driver.reclaim()
              if (waits.length > 0) port.makeRoom(waits.shift() ?? 0)
              else if (port.room === 0) port.makeRoom(1000)
            }
            for (const [seed, { indirect, length, splits }] of frames.entries()) {
              for (let tries = 0; !runGuest(driver.send(frameOf(length, seed), undefined, splits, indirect)); tries++) {
                assert.isBelow(tries, 1000)
                progress()
              }
            }
            while (driver.sending > 0) progress()
            assert.strictEqual(port.sent.length, frames.length)
            for (const [seed, { length }] of frames.entries()) {
              assert.deepStrictEqual(port.sent[seed]?.bytes, frameOf(length, seed))
            }
            assert.strictEqual(line.sentFrames, frames.length)
            assert.isTrue(line.dropped.every((count) => count === 0))
          })))
      ),
      { numRuns: 50 }
    )
  })

  it("receives every frame once, in order and intact, in buffers of any shape", () => {
    fc.assert(
      fc.property(
        fc.array(
          fc.oneof({ weight: 4, arbitrary: fc.integer({ min: 14, max: 1518 }) }, fc.integer({ min: 14, max: 65_550 })),
          {
            minLength: 1,
            maxLength: 60,
            size: "max"
          }
        ),
        fc.array(fc.array(fc.integer({ min: 1, max: 3000 }), { minLength: 1, maxLength: 4 }), {
          minLength: 1,
          maxLength: 20
        }),
        fc.record({ indirect: fc.boolean(), eventIndex: fc.boolean(), mergeable: fc.boolean() }),
        (wanted, shapes, { mergeable, ...options }) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { harness, line, port, start } = yield* started({ delivers: OFFLOADS_ALL })
            const driver = start({
              ...options,
              features: mergeable ? ALL : ALL.filter((bit) => bit !== F.MRG_RXBUF)
            })
            const next = (i: number) =>
              mergeable
                ? (shapes[i % shapes.length] ?? [12]).map((length, at) => at === 0 ? Math.max(12, length) : length)
                : [12, 40_000, 25_550]
            // A queue of 64 descriptors has room for 16 chains of four, whichever these are.
            const rooms = shapes.map((_, i) => next(i).reduce((sum, length) => sum + length, 0))
            const largest = mergeable ? 16 * Math.min(...rooms) - 12 : 65_550
            const lengths = wanted.map((length) => Math.min(length, largest))
            let supplied = 0
            const supply = () => {
              while (supplied < 20_000 && runGuest(driver.supply(next(supplied), options.indirect))) supplied++
            }
            for (const [seed, length] of lengths.entries()) port.put(frameOf(length, seed))
            const received: Array<Uint8Array> = []
            for (let idle = 0; received.length < lengths.length && idle < 3000; idle++) {
              supply()
              harness.settle()
              for (let frame = driver.poll(); frame !== undefined; frame = driver.poll()) received.push(frame.bytes)
            }
            assert.strictEqual(received.length, lengths.length)
            for (const [seed, length] of lengths.entries()) {
              assert.deepStrictEqual(received[seed], frameOf(length, seed))
            }
            assert.isTrue(line.dropped.every((count) => count === 0))
          })))
      ),
      { numRuns: 50 }
    )
  })

  it.effect("shows its address, its link and its MTU", () =>
    Effect.gen(function*() {
      const { cpu, harness, line, port, start } = yield* started({ mtu: 9000 })
      const driver = start({ features: ALL })
      const config = () =>
        runGuest(driver.virtio.configuration(cpu, [
          ...Array.from({ length: 6 }, (_, offset) => ({ offset, size: 1 as const })),
          { offset: 6, size: 2 },
          { offset: 10, size: 2 }
        ]))
      assert.deepStrictEqual(config(), [2, 0, 0, 0, 0, 1, 1, 9000])
      port.setLink(false)
      harness.settle()
      assert.strictEqual(config()[6], 0)
      assert.strictEqual(runGuest(driver.virtio.handleInterrupt(cpu)) & 2, 2)
      runGuest(driver.send(frameOf(60, 1)))
      harness.settle()
      assert.strictEqual(driver.reclaim(), 1)
      assert.strictEqual(line.interface.counters().dropped["link-down"], 1)
      port.setLink(true)
      harness.settle()
      assert.strictEqual(config()[6], 1)
      yield* line.interface.setLink(false)
      harness.settle()
      assert.strictEqual(config()[6], 0)
    }))

  it.effect("lets the port deliver what was negotiated, and nothing else", () =>
    Effect.gen(function*() {
      const { port, start } = yield* started({ delivers: OFFLOADS_ALL, accepts: OFFLOADS_ALL })
      start({ features: [F.GUEST_CSUM, F.GUEST_TSO4] })
      assert.strictEqual(port.allowed, Offload.CHECKSUM | Offload.TSO4)
      const driver = start({ features: ALL })
      assert.strictEqual(port.allowed, OFFLOADS_ALL)
      const offloads = (low: number, high = 0) => {
        const data = new Uint8Array(8)
        new DataView(data.buffer).setUint32(0, low, true)
        new DataView(data.buffer).setUint32(4, high, true)
        return runGuest(driver.command(5, 0, data))
      }
      assert.strictEqual(offloads(1 << F.GUEST_CSUM), 0)
      assert.strictEqual(port.allowed, Offload.CHECKSUM)
      assert.strictEqual(offloads(1 << F.GUEST_TSO4), 1)
      assert.strictEqual(offloads(1 << F.MRG_RXBUF), 1)
      assert.strictEqual(port.allowed, Offload.CHECKSUM)
      assert.strictEqual(offloads(0), 0)
      assert.strictEqual(port.allowed, 0)
    }))
})
