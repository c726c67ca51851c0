/** The network device on a harness, against a driver that checks it. */
import { assert, describe, it } from "@effect/vitest"
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import { Offload, OFFLOADS_ALL } from "@troupe/core/NetBackend"
import {
  NetDriverFeature as F,
  type NetDriverOptions,
  PLAIN_HEADER,
  startNet
} from "@troupe/core/testing/drivers/NetDriver"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/testing/TestClock"
import * as fc from "fast-check"
import { NetLine, type NetLineOptions } from "../src/net/NetLine.ts"
import { NetReceive } from "../src/net/NetReceive.ts"
import { NET_FRAMES_PER_TURN } from "../src/net/NetTransmit.ts"
import { ReceiveFilter } from "../src/net/ReceiveFilter.ts"
import { withSoftwareOffloads } from "../src/net/SoftwareOffloads.ts"
import { virtioNet } from "../src/net/VirtioNet.ts"
import { makeThrottle } from "../src/Throttle.ts"
import { virtioMmio } from "../src/virtio/VirtioMmio.ts"
import type { Virtqueue } from "../src/virtio/Virtqueue.ts"
import { DeviceHarness } from "./DeviceHarness.ts"
import { FakePort, type FakePortOptions } from "./FakePort.ts"
import { HARNESS_PLACE, harnessCpu, runGuest } from "./HarnessCpu.ts"

const MAC = "02:00:00:00:00:01"
const MEMORY_ADDRESS = 0x1_0000
const MEMORY_SIZE = 0x40_0000

const started = (options: FakePortOptions = {}, lineOptions: Partial<NetLineOptions> = {}) =>
  Effect.gen(function*() {
    const port = new FakePort(options)
    const line = yield* NetLine.make({
      index: 0,
      name: "net0",
      macAddress: MAC,
      port: withSoftwareOffloads(port),
      ...lineOptions
    })
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

/** The header of a frame that is larger than the MTU. */
const SEGMENTED = { ...PLAIN_HEADER, flags: 1, gsoType: 1, gsoSize: 1448, checksumStart: 34, checksumOffset: 16 }

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
            for (const [seed, length] of lengths.entries()) {
              port.put(frameOf(length, seed), length > 1518 ? SEGMENTED : PLAIN_HEADER)
            }
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

  it("takes only headers that make sense, loses the rest, and goes on", () => {
    const header = fc.record({
      flags: fc.constantFrom(0, 1, 1, 2, 0xff),
      gsoType: fc.constantFrom(0, 0, 1, 3, 4, 5, 0x81, 0xff),
      headerLength: fc.integer({ min: 0, max: 0xffff }),
      gsoSize: fc.constantFrom(0, 1, 536, 1448, 0xffff),
      checksumStart: fc.oneof(fc.nat(100), fc.nat(0xffff)),
      checksumOffset: fc.oneof(fc.nat(30), fc.nat(0xffff))
    })
    const frame = fc.record({
      header,
      length: fc.oneof(fc.nat(200), fc.nat(70_000)),
      splits: fc.array(fc.integer({ min: 1, max: 40 }), { maxLength: 5 })
    })
    fc.assert(
      fc.property(
        fc.array(frame, { minLength: 1, maxLength: 40, size: "max" }),
        fc.subarray(ALL),
        fc.integer({ min: 0, max: OFFLOADS_ALL }),
        (frames, wanted, accepts) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const features = ALL.filter((bit) => wanted.includes(bit))
              // What others of them need.
              .concat(F.CSUM, F.GUEST_CSUM, F.CTRL_VQ)
            const { cpu, harness, line, port, start } = yield* started({ accepts })
            const driver = start({ features })
            const possible = new Set([
              driver.has(F.HOST_TSO4) ? 1 : 0,
              driver.has(F.HOST_TSO6) ? 4 : 0,
              driver.has(F.HOST_USO) ? 5 : 0
            ])
            for (const { header, length, splits } of frames) {
              const before = port.sent.length
              while (!runGuest(driver.send(frameOf(length, 1), header, splits))) {
                harness.settle()
                driver.reclaim()
              }
              harness.settle()
              driver.reclaim()
              const sent = port.sent.slice(before)
              const partial = (header.flags & 1) !== 0
              const inFrame = header.checksumStart >= 14 && header.checksumStart + header.checksumOffset + 2 <= length
              const whole = header.gsoType === 0
              const legal = length >= 14 && length <= 65_553 && (!partial || inFrame) && (whole
                ? length <= 1518
                : partial && possible.has(header.gsoType) && header.gsoSize > 0)
              if (!legal) assert.strictEqual(sent.length, 0)
              else if (whole) assert.strictEqual(sent.length, 1)
              for (const { bytes, header: given } of sent) {
                if (given.gsoType === 0) assert.isAtMost(bytes.length, 1522)
                if ((given.flags & 1) !== 0) {
                  assert.isAtMost(given.checksumStart + given.checksumOffset + 2, bytes.length)
                  assert.strictEqual(accepts & Offload.CHECKSUM, Offload.CHECKSUM)
                }
              }
            }
            assert.strictEqual(driver.sending, 0)
            const lost = line.dropped.reduce((sum, count) => sum + count, 0)
            assert.strictEqual(line.sentFrames + lost, frames.length)
            assert.strictEqual(runGuest(driver.virtio.status(cpu)) & 0x40, 0)
            runGuest(driver.send(frameOf(100, 9)))
            harness.settle()
            assert.deepStrictEqual(port.sent.at(-1)?.bytes, frameOf(100, 9))
          })))
      ),
      { numRuns: 60 }
    )
  })

  it.effect("takes a checksum that ends with the frame, and none that begins before the payload or ends behind it", () =>
    Effect.gen(function*() {
      const { harness, port, start } = yield* started({ accepts: OFFLOADS_ALL })
      const driver = start({ features: [F.CSUM] })
      const taken = (checksumStart: number, checksumOffset: number) => {
        const before = port.sent.length
        runGuest(driver.send(frameOf(100, 0), { ...PLAIN_HEADER, flags: 1, checksumStart, checksumOffset }))
        harness.settle()
        driver.reclaim()
        return port.sent.length - before
      }
      assert.deepStrictEqual([13, 14, 34, 97, 98, 99, 100].map((at) => taken(at, 0)), [0, 1, 1, 1, 1, 0, 0])
      assert.deepStrictEqual([0, 63, 64, 65, 66, 0xffff].map((offset) => taken(34, offset)), [1, 1, 1, 0, 0, 0])
    }))

  it("loses chains that are too short for a frame, and too long", () => {
    fc.assert(
      fc.property(
        fc.array(fc.oneof(fc.integer({ min: 1, max: 25 }), fc.integer({ min: 65_566, max: 80_000 })), {
          maxLength: 20
        }),
        (lengths) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { harness, line, port, start } = yield* started()
            const driver = start()
            for (const length of lengths) {
              runGuest(driver.sendRaw(new Uint8Array(length)))
              harness.settle()
              driver.reclaim()
            }
            assert.strictEqual(driver.sending, 0)
            assert.strictEqual(port.sent.length, 0)
            assert.strictEqual(line.interface.counters().dropped["bad-size"], lengths.length)
          })))
      )
    )
  })

  it.effect("refuses features without those that they need", () =>
    Effect.gen(function*() {
      const { start } = yield* started({ accepts: OFFLOADS_ALL, delivers: OFFLOADS_ALL })
      for (
        const [feature, needed] of [
          [F.GUEST_TSO4, F.GUEST_CSUM],
          [F.GUEST_TSO6, F.GUEST_CSUM],
          [F.GUEST_USO4, F.GUEST_CSUM],
          [F.HOST_TSO4, F.CSUM],
          [F.HOST_TSO6, F.CSUM],
          [F.HOST_USO, F.CSUM],
          [F.CTRL_RX, F.CTRL_VQ],
          [F.CTRL_MAC_ADDR, F.CTRL_VQ],
          [F.CTRL_GUEST_OFFLOADS, F.CTRL_VQ]
        ] as const
      ) {
        assert.throws(() => start({ features: [feature] }), /refuses the features/)
        start({ features: [feature, needed] })
      }
    }))

  it("delivers the frames that the driver has asked for, and no others", () => {
    const mac = fc.constantFrom(...[
      "02:00:00:00:00:01",
      "02:00:00:00:00:02",
      "ff:ff:ff:ff:ff:ff",
      "01:00:5e:00:00:01",
      "33:33:00:00:00:01",
      "02:00:00:00:00:09"
    ])
    const bytesOf = (text: string) => text.split(":").map((pair) => Number.parseInt(pair, 16))
    const table = (addresses: ReadonlyArray<string>) => [addresses.length, 0, 0, 0, ...addresses.flatMap(bytesOf)]
    const command = fc.oneof(
      fc.record({ tag: fc.constant("mode" as const), mode: fc.integer({ min: 0, max: 5 }), on: fc.boolean() }),
      fc.record({ tag: fc.constant("tables" as const), unicast: fc.uniqueArray(mac), multicast: fc.uniqueArray(mac) }),
      fc.record({ tag: fc.constant("address" as const), address: mac })
    )
    fc.assert(
      fc.property(
        fc.array(command, { maxLength: 12, size: "max" }),
        (commands) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { harness, port, start } = yield* started()
            const driver = start({ features: ALL })
            const modes = [true, false, false, false, false, false]
            let own = MAC
            let unicast: ReadonlyArray<string> = []
            let multicast: ReadonlyArray<string> = []
            for (const step of commands) {
              if (step.tag === "mode") {
                modes[step.mode] = step.on
                assert.strictEqual(runGuest(driver.command(0, step.mode, Uint8Array.of(step.on ? 1 : 0))), 0)
              } else if (step.tag === "tables") {
                ;({ multicast, unicast } = step)
                const data = Uint8Array.from([...table(unicast), ...table(multicast)])
                assert.strictEqual(runGuest(driver.command(1, 0, data)), 0)
              } else {
                const legal = step.address.startsWith("02")
                if (legal) own = step.address
                const answer = runGuest(driver.command(1, 1, Uint8Array.from(bytesOf(step.address))))
                assert.strictEqual(answer, legal ? 0 : 1)
              }
            }
            const [promiscuous, allMulticast, allUnicast, noMulticast, noUnicast, noBroadcast] = modes
            for (let i = 0; i < 20; i++) runGuest(driver.supply([1600]))
            for (
              const to of [
                "02:00:00:00:00:01",
                "02:00:00:00:00:02",
                "ff:ff:ff:ff:ff:ff",
                "01:00:5e:00:00:01",
                "02:00:00:00:00:09"
              ]
            ) {
              const frame = frameOf(60, 3)
              frame.set(bytesOf(to))
              port.put(frame)
              harness.settle()
              const group = (bytesOf(to)[0] ?? 0) % 2 === 1
              const wanted = promiscuous || (to === "ff:ff:ff:ff:ff:ff"
                ? !noBroadcast
                : group
                ? !noMulticast && (allMulticast || multicast.includes(to))
                : !noUnicast && (allUnicast || to === own || unicast.includes(to)))
              assert.deepStrictEqual(driver.poll()?.bytes, wanted ? frame : undefined, to)
            }
            // After a reset the driver gets everything again, and the address is that of the configuration.
            const again = start({ features: ALL })
            runGuest(again.supply([1600]))
            port.put(frameOf(60, 5))
            harness.settle()
            assert.deepStrictEqual(again.poll()?.bytes, frameOf(60, 5))
            assert.deepStrictEqual([0, 1, 2, 3, 4, 5].map((at) => harness.read(0, 0x100 + at, 1)), bytesOf(MAC))
          })))
      ),
      { numRuns: 100 }
    )
  })

  it("answers every command, however malformed", () => {
    fc.assert(
      fc.property(
        fc.array(
          fc.record({ class_: fc.nat(6), command: fc.nat(6), data: fc.uint8Array({ minLength: 1, maxLength: 40 }) }),
          {
            maxLength: 30,
            size: "max"
          }
        ),
        (commands) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { cpu, start } = yield* started()
            const driver = start({ features: ALL })
            for (const { class_, command, data } of commands) {
              assert.include([0, 1], runGuest(driver.command(class_, command, data)))
            }
            assert.strictEqual(runGuest(driver.virtio.status(cpu)) & 0x40, 0)
          })))
      )
    )
  })

  it.effect("loses what does not fit a driver's buffers, and what comes while the link is down", () =>
    Effect.gen(function*() {
      const { harness, line, port, start } = yield* started()
      const driver = start()
      for (let i = 0; i < 4; i++) runGuest(driver.supply([112]))
      for (const [seed, length] of [60, 101, 100, 70].entries()) port.put(frameOf(length, seed))
      harness.settle()
      assert.deepStrictEqual([driver.poll()?.bytes.length, driver.poll()?.bytes.length, driver.poll()?.bytes.length], [
        60,
        100,
        70
      ])
      assert.strictEqual(line.interface.counters().dropped["no-room"], 1)
      yield* line.interface.setLink(false)
      harness.settle()
      for (let i = 0; i < 300; i++) port.put(frameOf(60, i))
      harness.settle()
      assert.strictEqual(port.waiting.length, 0)
      assert.strictEqual(line.interface.counters().dropped["link-down"], 300)
      yield* line.interface.setLink(true)
      harness.settle()
      port.put(frameOf(61, 7))
      harness.settle()
      assert.deepStrictEqual(driver.poll()?.bytes, frameOf(61, 7))
    }))

  it.effect("loses all that waits either way when the link goes down, and works on when it comes back", () =>
    Effect.gen(function*() {
      for (const whose of ["cable", "port"] as const) {
        for (const limited of [false, true]) {
          const limit = { operations: { size: 1, refillTimeMillis: 1000, oneTimeBurst: 0 } }
          const { harness, line, port, start } = yield* started({}, {
            ...(limited ? { sendThrottle: yield* makeThrottle(limit) } : {})
          })
          const setLink = (up: boolean) =>
            whose === "cable" ? line.interface.setLink(up) : Effect.sync(() => port.setLink(up))
          const driver = start()
          if (!limited) port.room = 0
          for (let i = 0; i < 3; i++) runGuest(driver.send(frameOf(60, i)))
          // The driver has no room for what comes.
          for (let i = 0; i < 3 * NET_FRAMES_PER_TURN; i++) port.put(frameOf(60, i))
          harness.settle()
          const sent = limited ? 1 : 0
          assert.strictEqual(driver.reclaim(), sent)
          yield* setLink(false)
          harness.settle()
          assert.strictEqual(driver.reclaim(), 3 - sent)
          assert.strictEqual(port.waiting.length, 0)
          assert.strictEqual(line.interface.counters().dropped["link-down"], 3 - sent + 3 * NET_FRAMES_PER_TURN)
          yield* setLink(true)
          port.makeRoom(10)
          harness.settle()
          assert.strictEqual(port.sent.length, sent)
          runGuest(driver.supply([100]))
          port.put(frameOf(61, 7))
          if (!limited) runGuest(driver.send(frameOf(62, 7)))
          harness.settle()
          assert.deepStrictEqual(driver.poll()?.bytes, frameOf(61, 7))
          if (!limited) assert.deepStrictEqual(port.sent[0]?.bytes, frameOf(62, 7))
        }
      }
    }))

  it.effect("gives a driver no frame and no offload that it does not know of", () =>
    Effect.gen(function*() {
      const { harness, line, port, start } = yield* started({ delivers: OFFLOADS_ALL })
      const known: ReadonlyArray<readonly [features: ReadonlyArray<number>, gsoTypes: ReadonlyArray<number>]> = [
        [[], []],
        [[F.GUEST_CSUM], []],
        [[F.GUEST_CSUM, F.GUEST_TSO4], [1]],
        [[F.GUEST_CSUM, F.GUEST_TSO6], [4]],
        [[F.GUEST_CSUM, F.GUEST_USO4], []],
        [[F.GUEST_CSUM, F.GUEST_USO4, F.GUEST_USO6], [5]]
      ]
      for (const [features, gsoTypes] of known) {
        const driver = start({ features })
        const checksums = features.includes(F.GUEST_CSUM)
        for (const flags of [0, 1, 2, 3]) {
          for (const gsoType of [0, 1, 3, 4, 5]) {
            runGuest(driver.supply([12, 65_553]))
            const header = { ...SEGMENTED, flags, gsoType, gsoSize: gsoType === 0 ? 0 : 1448 }
            port.put(frameOf(gsoType === 0 ? 100 : 3000, flags), header)
            harness.settle()
            const got = driver.poll()
            const takes = (gsoType === 0 || gsoTypes.includes(gsoType)) && (checksums || (flags & 1) === 0)
            const wanted = takes ? { ...header, flags: checksums ? flags : 0 } : undefined
            assert.deepStrictEqual(got?.header, wanted, `${features.join()} ${flags} ${gsoType}`)
          }
        }
      }
      assert.isAbove(line.interface.counters().dropped["bad-header"], 0)
      const driver = start({ features: [F.MTU] })
      for (let i = 0; i < 3; i++) runGuest(driver.supply([12, 4000]))
      for (const length of [1518, 1519, 1514]) port.put(frameOf(length, 1))
      harness.settle()
      assert.deepStrictEqual([driver.poll()?.bytes.length, driver.poll()?.bytes.length], [1518, 1514])
    }))

  it.effect("holds no more buffers than the frames of late have needed", () =>
    Effect.gen(function*() {
      const port = new FakePort()
      const line = yield* NetLine.make({ index: 0, name: "net0", macAddress: MAC, port })
      const region = new MemoryRegion(0, new ArrayBuffer(0x1_0000))
      let held = 0
      const queue: Virtqueue = {
        size: 64,
        fault: undefined,
        inFlight: 0,
        take: (chain) => {
          chain.clear()
          chain.head = held++
          chain.add(region, 0, 1600, true)
          return true
        },
        complete: (chain) => {
          held--
          chain.clear()
        },
        publish: () => false,
        suppressNotifications: () => undefined,
        resumeNotifications: () => false,
        reject: () => undefined,
        close: () => undefined
      }
      const receive = new NetReceive(line, new ReceiveFilter(line.macBytes))
      receive.start(queue, true, Offload.CHECKSUM | Offload.TSO4, undefined)
      const frames = (count: number, length: number) => {
        for (let i = 0; i < count; i++) port.waiting.push({ bytes: frameOf(length, i), header: PLAIN_HEADER })
        while (receive.turn());
        assert.strictEqual(port.waiting.length, 0)
      }
      frames(200, 100)
      assert.strictEqual(held, 1)
      port.waiting.push({ bytes: frameOf(20_000, 0), header: SEGMENTED })
      while (receive.turn());
      assert.isAtMost(held, 41)
      // Many small frames use up what is held, and no more is taken.
      frames(300, 100)
      assert.strictEqual(held, 1)
      receive.stop()
    }))

  it.effect("leaves frames in the port while the driver has given no buffers", () =>
    Effect.gen(function*() {
      const { harness, port, start } = yield* started()
      const driver = start({ features: ALL })
      for (let seed = 0; seed < 10; seed++) port.put(frameOf(100, seed))
      harness.settle()
      assert.strictEqual(port.waiting.length, 10)
      for (let seed = 0; seed < 10; seed++) {
        runGuest(driver.supply([1600]))
        assert.deepStrictEqual(runGuest(driver.receive()).bytes, frameOf(100, seed))
      }
    }))

  it.effect("forgets a frame that waits when it is reset, and keeps the port through a restart", () =>
    Effect.gen(function*() {
      const { harness, port, start } = yield* started()
      port.room = 0
      const first = start()
      runGuest(first.send(frameOf(100, 1)))
      harness.settle()
      assert.strictEqual(first.reclaim(), 0)
      const second = start()
      runGuest(second.send(frameOf(100, 2)))
      port.makeRoom(5)
      harness.settle()
      assert.deepStrictEqual(port.sent.map(({ bytes }) => bytes), [frameOf(100, 2)])
      // The next generation.
      yield* Effect.scoped(harness.start)
      assert.isFalse(port.listening)
      yield* harness.start
      assert.isTrue(port.listening)
      const third = start()
      runGuest(third.send(frameOf(100, 3)))
      harness.settle()
      assert.deepStrictEqual(port.sent.at(-1)?.bytes, frameOf(100, 3))
    }))

  it.effect("works at most a turn's frames in a turn", () =>
    Effect.gen(function*() {
      const { harness, port, start } = yield* started()
      const driver = start({ queueSize: 256, indirect: false })
      for (let i = 0; i < 256; i++) runGuest(driver.send(frameOf(60, i)))
      const before = port.sent.length
      assert.isTrue(harness.behaviour.doorbell?.(0, 1))
      assert.strictEqual(port.sent.length - before, NET_FRAMES_PER_TURN)
      harness.settle()
      assert.strictEqual(port.sent.length, 256)
      for (let i = 0; i < 256; i++) runGuest(driver.supply([100]))
      for (let i = 0; i < 256; i++) port.waiting.push({ bytes: frameOf(60, i), header: PLAIN_HEADER })
      assert.isTrue(harness.behaviour.doorbell?.(0, 0))
      assert.strictEqual(port.waiting.length, 256 - NET_FRAMES_PER_TURN)
    }))

  it.effect("counts small segments in a turn's budget: each of them costs", () =>
    Effect.gen(function*() {
      const { harness, port, start } = yield* started({ accepts: OFFLOADS_ALL })
      const driver = start({ features: [F.CSUM, F.HOST_TSO4] })
      for (let i = 0; i < 4; i++) {
        assert.isTrue(runGuest(driver.send(frameOf(60_000, i), { ...SEGMENTED, gsoSize: 64 })))
      }
      assert.isTrue(harness.behaviour.doorbell?.(0, 1))
      assert.isBelow(port.sent.length, 4)
      harness.settle()
      assert.strictEqual(port.sent.length, 4)
    }))

  it.effect("keeps to its rate limits, either way, and loses nothing by them", () =>
    Effect.gen(function*() {
      const limit = { operations: { size: 10, refillTimeMillis: 1000, oneTimeBurst: 0 } }
      const { harness, port, start } = yield* started({}, {
        sendThrottle: yield* makeThrottle(limit),
        receiveThrottle: yield* makeThrottle(limit)
      })
      yield* Effect.forkChild(harness.behaviour.run ?? Effect.never)
      yield* Effect.yieldNow
      const driver = start()
      for (let seed = 0; seed < 25; seed++) {
        runGuest(driver.supply([100]))
        runGuest(driver.send(frameOf(60, seed)))
        port.put(frameOf(60, seed))
      }
      const received: Array<Uint8Array> = []
      for (const wanted of [10, 20, 25]) {
        harness.settle()
        for (let frame = driver.poll(); frame !== undefined; frame = driver.poll()) received.push(frame.bytes)
        assert.strictEqual(received.length, wanted)
        assert.strictEqual(port.sent.length, wanted)
        yield* TestClock.adjust("1 second")
      }
      assert.deepStrictEqual(received, Array.from({ length: 25 }, (_, seed) => frameOf(60, seed)))
      assert.deepStrictEqual(port.sent.map(({ bytes }) => bytes), received)
    }))

  it.effect("tells its host what happens", () =>
    Effect.gen(function*() {
      const { harness, line, port, start } = yield* started()
      const events = yield* Effect.forkChild(Stream.runCollect(Stream.take(line.interface.events, 6)))
      yield* Effect.yieldNow
      const driver = start({ features: ALL })
      runGuest(driver.command(1, 1, Uint8Array.of(2, 0, 0, 0, 0, 0x77)))
      port.setLink(false)
      harness.settle()
      runGuest(driver.send(frameOf(60, 0)))
      runGuest(driver.send(frameOf(60, 0)))
      harness.settle()
      port.setLink(true)
      harness.settle()
      start({ features: ALL })
      assert.deepStrictEqual(yield* Fiber.join(events), [
        { _tag: "DriverReady", sends: OFFLOADS_ALL, receives: Offload.CHECKSUM },
        { _tag: "MacAddressChanged", macAddress: "02:00:00:00:00:77" },
        { _tag: "LinkChanged", up: false },
        { _tag: "FramesDropped", reason: "link-down", count: 2 },
        { _tag: "LinkChanged", up: true },
        { _tag: "DriverGone" }
      ])
    }))
})
