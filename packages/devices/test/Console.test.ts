import { assert, describe, it } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import { FakeHypervisor, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import {
  startVirtioMmio,
  VirtioMmio,
  type VirtioMmioDriver,
  VirtioStatus
} from "@troupe/core/testing/drivers/VirtioMmioDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as fc from "fast-check"
import { layer as layerDevices } from "../src/Catalog.ts"
import { makeConsole } from "../src/Console.ts"
import { ConsoleConfig, ConsoleEvent } from "../src/console/ConsoleLayout.ts"
import { CONSOLE_OUTPUT_SIZE } from "../src/console/ConsoleLine.ts"
import { EntropySource } from "../src/EntropySource.ts"
import { virtioMmio } from "../src/virtio/VirtioMmio.ts"
import { DeviceHarness } from "./DeviceHarness.ts"
import { HARNESS_PLACE, harnessCpu, runGuest } from "./HarnessCpu.ts"

const SIZE_BIT = 1
const MULTIPORT_BIT = 2
const QUEUE_ADDRESS = 0x1000
const DATA_ADDRESS = 0x10_0000
const DATA_SIZE = 0x20_0000

/** Bytes that no two places of a stream of some length have in common: wrong order and doubles show. */
const pattern = (length: number, from = 0) =>
  Uint8Array.from({ length }, (_, i) => ((from + i) * 167 + ((from + i) >> 8)) & 0xff)

const concat = (parts: ReadonlyArray<Uint8Array>) => Uint8Array.from(parts.flatMap((part) => [...part]))

const started = Effect.fnUntraced(function*(portsMax = 1, names: ReadonlyArray<string> = []) {
  const memory = new GuestMemory([new MemoryRegion(0, new ArrayBuffer(DATA_ADDRESS + DATA_SIZE))])
  const { console, device } = yield* makeConsole(portsMax, names)
  const harness = new DeviceHarness(virtioMmio(device, { name: "console0" }), memory)
  yield* harness.start
  const cpu = harnessCpu(harness)
  const start = (low = SIZE_BIT | MULTIPORT_BIT, queues = device.queueSizes.length) =>
    runGuest(startVirtioMmio(cpu, HARNESS_PLACE, {
      memoryAddress: QUEUE_ADDRESS,
      queueSizes: Array.from({ length: queues }, () => 16),
      features: { low, high: 0 }
    }))
  /** Lets the fibers of the host run, and then the device. */
  const settle = Effect.gen(function*() {
    for (let i = 0; i < 20; i++) {
      yield* Effect.yieldNow
      harness.settle()
    }
  })
  /** Reads what waits at the moment. */
  const read = Effect.map(
    Effect.forkChild(Stream.runHead(console.output), { startImmediately: true }),
    (fiber) => {
      const exit = fiber.pollUnsafe()
      if (exit === undefined) fiber.interruptUnsafe()
      return exit !== undefined && Exit.isSuccess(exit) && exit.value._tag === "Some"
        ? exit.value.value
        : new Uint8Array()
    }
  )
  return { console, cpu, harness, memory, settle, start, read }
})

/** A driver's part in sending: chains of readable buffers of these lengths, filled from a stream of bytes. */
const outputBuffers = (memory: GuestMemory, bytes: Uint8Array, lengths: ReadonlyArray<number>, place = 0) => {
  let at = 0
  const buffers: Array<{ address: number; length: number; writable: boolean }> = []
  for (const length of lengths) {
    const address = DATA_ADDRESS + place + at
    memory.write(address, bytes.subarray(at, at + length))
    buffers.push({ address, length, writable: false })
    at += length
  }
  return buffers
}

describe("Console", () => {
  it.effect("is device 3 with two queues for one port, and shows the size of the terminal", () =>
    Effect.gen(function*() {
      const { console, harness, start } = yield* started()
      const read = (register: number, size = 4) => harness.read(0, register, size)
      assert.deepStrictEqual([VirtioMmio.DeviceID, VirtioMmio.DeviceFeatures].map((r) => read(r) & 0xff), [3, 0b101])
      harness.write(0, VirtioMmio.QueueSel, 4, 2)
      assert.strictEqual(read(VirtioMmio.QueueSizeMax), 0)
      yield* console.resize({ cols: 80, rows: 25 })
      const size = () => [ConsoleConfig.cols, ConsoleConfig.rows].map((field) => read(VirtioMmio.Config + field, 2))
      harness.settle()
      assert.deepStrictEqual(size(), [80, 25])
      const driver = start()
      assert.strictEqual(read(VirtioMmio.Config + ConsoleConfig.max_nr_ports), 1)
      const before = harness.interrupts[0] ?? 0
      yield* console.resize({ cols: 65_535, rows: 0 })
      harness.settle()
      assert.deepStrictEqual([size(), harness.interrupts[0]], [[65_535, 0], before + 1])
      runGuest(driver.handleInterrupt(harnessCpu(harness)))
      assert.strictEqual(driver.configurationInterrupts, 1)
      for (const wrong of [{ cols: -1, rows: 1 }, { cols: 1, rows: 65_536 }, { cols: 1.5, rows: 1 }]) {
        assert.strictEqual((yield* Effect.flip(console.resize(wrong))).status, "OUT_OF_RANGE")
      }
      assert.deepStrictEqual(console.size(), { cols: 65_535, rows: 0 })
    }))

  it("brings every byte of the guest to the host in order and once, for any split and any pace, with bounded memory", () => {
    const chain = fc.array(fc.oneof(fc.integer({ min: 1, max: 20 }), fc.integer({ min: 1, max: 12_000 })), {
      minLength: 1,
      maxLength: 4
    })
    fc.assert(
      fc.property(
        fc.array(chain, { minLength: 1, maxLength: 30, size: "max" }),
        fc.array(fc.boolean(), { minLength: 1, maxLength: 40, size: "max" }),
        fc.boolean(),
        (chains, reads, indirect) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { cpu, harness, memory, read, start } = yield* started()
            const driver = start()
            const total = chains.flat().reduce((sum, length) => sum + length, 0)
            const sent = pattern(total)
            let at = 0
            let taken = 0
            const parts: Array<Uint8Array> = []
            let next = 0
            for (let step = 0; taken < total; step++) {
              if (step > 10_000) assert.fail("it does not end")
              // The driver sends when it has room, and the host reads as it likes, and always when nothing else goes on.
              const before = next
              const lengths = chains[next]
              if (lengths !== undefined) {
                const length = lengths.reduce((sum, length) => sum + length, 0)
                const buffers = outputBuffers(memory, sent.subarray(at), lengths, at)
                if (runGuest(driver.send(cpu, 1, [buffers], indirect)) === 1) {
                  at += length
                  next++
                }
              }
              harness.settle()
              while (driver.queue(1).poll() !== undefined);
              if (next === before || reads[step % reads.length] === true) {
                const bytes = yield* read
                assert.isAtMost(bytes.length, CONSOLE_OUTPUT_SIZE)
                taken += bytes.length
                parts.push(bytes)
              }
            }
            assert.deepStrictEqual(concat(parts), sent)
            harness.settle()
            while (driver.queue(1).poll() !== undefined);
            assert.strictEqual(driver.queue(1).inFlight, 0)
          })))
      ),
      { numRuns: 25 }
    )
  })

  it("brings every byte of the host to the guest in order and once, for any split and any pace, and stores none", () =>
    fc.assert(
      fc.asyncProperty(
        fc.array(fc.integer({ min: 0, max: 3000 }), { minLength: 1, maxLength: 20, size: "max" }),
        fc.array(fc.array(fc.integer({ min: 1, max: 700 }), { minLength: 1, maxLength: 4 }), {
          minLength: 1,
          maxLength: 20,
          size: "max"
        }),
        (writes, rooms) =>
          Effect.runPromise(Effect.scoped(Effect.gen(function*() {
            const { console, cpu, harness, memory, settle, start } = yield* started()
            const total = writes.reduce((sum, length) => sum + length, 0)
            const sent = pattern(total)
            let begin = 0
            const parts = writes.map((length) => sent.subarray(begin, begin += length))
            let written = 0
            const writer = yield* Effect.forkChild(Effect.forEach(parts, (part) =>
              Effect.map(console.write(part), () => {
                written += part.length
              })))
            yield* settle
            const driver = start()
            assert.strictEqual(written, 0)
            const given = new Map<number, Array<{ address: number; length: number; writable: boolean }>>()
            const got: Array<Uint8Array> = []
            let received = 0
            for (let step = 0; received < total; step++) {
              if (step > 20_000) assert.fail("it does not end")
              // Each chain has its own place: at most 16 are given at a time.
              let at = DATA_ADDRESS + 4096 * (step % 64)
              const placed = (rooms[step % rooms.length] ?? []).map((length) => {
                at += length + 3
                return { address: at - length, length, writable: true }
              })
              const head = driver.queue(0).add(placed)
              if (head !== undefined) given.set(head, placed)
              if (driver.queue(0).publish()) runGuest(driver.notify(cpu, 0))
              yield* settle
              for (let used = driver.queue(0).poll(); used !== undefined; used = driver.queue(0).poll()) {
                let left = used.written
                for (const { address, length } of given.get(used.head) ?? []) {
                  got.push(memory.slice(address, Math.min(left, length))?.slice() ?? new Uint8Array())
                  left -= Math.min(left, length)
                }
                assert.isAbove(used.written, 0)
                received += used.written
              }
              // A write ends when the guest has all of it, and not before.
              assert.isAtMost(written, received)
            }
            yield* Fiber.join(writer)
            assert.deepStrictEqual(concat(got), sent)
            harness.settle()
          })))
      ),
      { numRuns: 25 }
    ))

  it.effect("holds the guest's output back while nobody reads, and nothing else", () =>
    Effect.gen(function*() {
      const { console, cpu, memory, read, settle, start } = yield* started()
      const driver = start()
      const bytes = pattern(CONSOLE_OUTPUT_SIZE + 1000)
      runGuest(driver.send(cpu, 1, [
        outputBuffers(memory, bytes, [CONSOLE_OUTPUT_SIZE]),
        outputBuffers(memory, bytes, [500]),
        outputBuffers(memory, bytes, [500])
      ]))
      yield* settle
      // The first is all in the host, the others wait, and input goes on.
      assert.isDefined(driver.queue(1).poll())
      assert.isUndefined(driver.queue(1).poll())
      const writer = yield* Effect.forkChild(console.write(Uint8Array.of(7)))
      runGuest(driver.send(cpu, 0, [[{ address: DATA_ADDRESS + 0x8_0000, length: 10, writable: true }]]))
      yield* settle
      yield* Fiber.join(writer)
      assert.strictEqual(driver.queue(0).poll()?.written, 1)
      assert.strictEqual((yield* read).length, CONSOLE_OUTPUT_SIZE)
      yield* settle
      assert.deepStrictEqual([driver.queue(1).poll()?.written, driver.queue(1).poll()?.written], [0, 0])
      assert.deepStrictEqual(yield* read, concat([bytes.subarray(0, 500), bytes.subarray(0, 500)]))
    }))

  it.effect("begins anew with each driver: what a reset interrupts is done no further, and what waits is for the next one", () =>
    Effect.gen(function*() {
      const { console, cpu, memory, read, settle, start } = yield* started()
      const first = start()
      runGuest(first.send(cpu, 1, [outputBuffers(memory, pattern(100_000), [100_000])]))
      const writer = yield* Effect.forkChild(console.write(pattern(50)))
      runGuest(first.send(cpu, 0, [[{ address: DATA_ADDRESS + 0x10_0000, length: 20, writable: true }]]))
      yield* settle
      assert.isTrue(console.guestOpen())
      const second = start()
      assert.isTrue(console.guestOpen())
      yield* settle
      assert.deepStrictEqual(yield* read, pattern(CONSOLE_OUTPUT_SIZE))
      yield* settle
      assert.strictEqual((yield* read).length, 0)
      runGuest(second.send(cpu, 1, [outputBuffers(memory, pattern(3), [3])]))
      runGuest(second.send(cpu, 0, [[{ address: DATA_ADDRESS + 0x10_0000, length: 100, writable: true }]]))
      yield* settle
      assert.deepStrictEqual(yield* read, pattern(3))
      yield* Fiber.join(writer)
      assert.strictEqual(second.queue(0).poll()?.written, 30)
      assert.deepStrictEqual(memory.slice(DATA_ADDRESS + 0x10_0000, 30), pattern(30, 20))
    }))

  it.effect("keeps its streams, its size and what waits when the device fails and is started again", () =>
    Effect.gen(function*() {
      const { console, cpu, harness, memory, read, settle, start } = yield* started(2, ["one"])
      const scope = yield* Scope.make()
      const first = start(SIZE_BIT)
      runGuest(first.send(cpu, 1, [outputBuffers(memory, pattern(4), [4])]))
      const writer = yield* Effect.forkChild(console.write(pattern(6)))
      yield* console.resize({ cols: 7, rows: 8 })
      yield* settle
      yield* Scope.provide(harness.start, scope)
      assert.isFalse(writer.pollUnsafe() !== undefined)
      assert.strictEqual(harness.read(0, VirtioMmio.Status, 4) & VirtioStatus.DEVICE_NEEDS_RESET, 64)
      const second = start(SIZE_BIT)
      assert.strictEqual(harness.read(0, VirtioMmio.Config + ConsoleConfig.cols, 2), 7)
      runGuest(second.send(cpu, 0, [[{ address: DATA_ADDRESS + 0x8_0000, length: 10, writable: true }]]))
      runGuest(second.send(cpu, 1, [outputBuffers(memory, pattern(3), [3])]))
      yield* settle
      yield* Fiber.join(writer)
      assert.strictEqual(second.queue(0).poll()?.written, 6)
      assert.deepStrictEqual(yield* read, concat([pattern(4), pattern(3)]))
      assert.deepStrictEqual(console.ports().map(({ name }) => name), ["one"])
      yield* Scope.close(scope, Exit.void)
    }))

  it.effect("needs a reset for output that is not readable, gives back input that is not writable, and works after it", () =>
    Effect.gen(function*() {
      const { console, cpu, harness, read, settle, start } = yield* started()
      const address = DATA_ADDRESS
      runGuest(
        start().send(cpu, 1, [[{ address, length: 4, writable: false }, { address, length: 4, writable: true }]])
      )
      harness.settle()
      assert.strictEqual(harness.read(0, VirtioMmio.Status, 4) & VirtioStatus.DEVICE_NEEDS_RESET, 64)
      const driver = start()
      const writer = yield* Effect.forkChild(console.write(Uint8Array.of(1, 2)))
      runGuest(driver.send(cpu, 0, [
        [{ address, length: 4, writable: false }],
        [{ address, length: 4, writable: false }, { address: address + 8, length: 4, writable: true }],
        [{ address: address + 16, length: 4, writable: true }]
      ]))
      yield* settle
      yield* Fiber.join(writer)
      assert.deepStrictEqual([0, 1, 2].map(() => driver.queue(0).poll()?.written), [0, 0, 2])
      assert.deepStrictEqual(harness.memory.slice(address, 18)?.slice(16), Uint8Array.of(1, 2))
      assert.strictEqual((yield* read).length, 0)
      assert.strictEqual(harness.read(0, VirtioMmio.Status, 4) & VirtioStatus.DEVICE_NEEDS_RESET, 0)
    }))

  it.effect("takes single bytes through its configuration, from a driver that has not begun as well", () =>
    Effect.gen(function*() {
      const { harness, read, start } = yield* started()
      const write = (offset: number, size: number, value: number) =>
        harness.write(0, VirtioMmio.Config + offset, size, value)
      write(ConsoleConfig.emerg_wr, 4, 0x1234_5648)
      start()
      write(ConsoleConfig.emerg_wr, 1, 0x49)
      write(ConsoleConfig.cols, 2, 7)
      assert.deepStrictEqual(yield* read, Uint8Array.of(0x48, 0x49))
      // Nothing can be held back here: what nobody reads is lost.
      for (let i = 0; i < CONSOLE_OUTPUT_SIZE + 5; i++) write(ConsoleConfig.emerg_wr, 4, 1)
      assert.strictEqual((yield* read).length, CONSOLE_OUTPUT_SIZE)
      assert.strictEqual(harness.read(0, VirtioMmio.Config + ConsoleConfig.cols, 2), 0)
    }))

  it.effect("ends its streams with the machine, and gives up a write that is interrupted", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const { console } = yield* Scope.provide(makeConsole(), scope)
      const interrupted = yield* Effect.forkChild(console.write(Uint8Array.of(1)))
      yield* Effect.yieldNow
      yield* Fiber.interrupt(interrupted)
      const writer = yield* Effect.forkChild(console.write(Uint8Array.of(1)))
      const reader = yield* Effect.forkChild(Stream.runCollect(console.output))
      yield* Effect.yieldNow
      yield* Scope.close(scope, Exit.void)
      yield* Fiber.join(writer)
      assert.deepStrictEqual(yield* Fiber.join(reader), [])
      yield* console.write(Uint8Array.of(1))
      assert.strictEqual((yield* Effect.flip(console.resize({ cols: 1, rows: 1 }))).status, "PEER_CLOSED")
    }))
})

interface Message {
  readonly id: number
  readonly event: number
  readonly value: number
  readonly text: string
}

/** The control queues of a driver: buffers for messages to it, and messages from it. */
class ControlDriver {
  readonly driver: VirtioMmioDriver
  readonly #cpu: GuestCpu

  constructor(cpu: GuestCpu, driver: VirtioMmioDriver) {
    this.#cpu = cpu
    this.driver = driver
  }

  say(id: number, event: number, value: number, length = 8): void {
    const view = new DataView(new ArrayBuffer(8))
    view.setUint32(0, id, true)
    view.setUint16(4, event, true)
    view.setUint16(6, value, true)
    this.#cpu.memory.write(DATA_ADDRESS + 0x1_0000, new Uint8Array(view.buffer))
    runGuest(this.driver.send(this.#cpu, 3, [[{ address: DATA_ADDRESS + 0x1_0000, length, writable: false }]]))
    runGuest(this.driver.receive(this.#cpu, 3))
  }

  /** Gives the device buffers until it has nothing more to say. */
  hear(length = 128): ReadonlyArray<Message> {
    const messages: Array<Message> = []
    for (;;) {
      const address = DATA_ADDRESS + 0x2_0000
      if (this.driver.queue(2).inFlight === 0) {
        runGuest(this.driver.send(this.#cpu, 2, [[{ address, length, writable: true }]]))
      }
      runGuest(settleOnce(this.#cpu))
      const used = this.driver.queue(2).poll()
      if (used === undefined) return messages
      const bytes = this.#cpu.memory.slice(address, used.written)?.slice() ?? new Uint8Array()
      const view = new DataView(bytes.buffer)
      // A buffer without room for a message comes back as it was.
      if (used.written < 8) return messages
      const event = view.getUint16(4, true)
      const text = event === ConsoleEvent.RESIZE
        ? `${view.getUint16(8, true)}x${view.getUint16(10, true)}`
        : new TextDecoder().decode(bytes.subarray(8))
      messages.push({ id: view.getUint32(0, true), event, value: view.getUint16(6, true), text })
    }
  }
}

function* settleOnce(cpu: GuestCpu): GuestRoutine {
  yield* cpu.yield()
}

const message = (id: number, event: number, value: number, text = ""): Message => ({ id, event, value, text })

describe("Console with further ports", () => {
  const { CONSOLE_PORT, DEVICE_ADD, DEVICE_READY, DEVICE_REMOVE, PORT_NAME, PORT_OPEN, PORT_READY, RESIZE } =
    ConsoleEvent

  it.effect("introduces its ports, one after the other and each once", () =>
    Effect.gen(function*() {
      const { console, cpu, harness, start } = yield* started(4, ["agent", "größe"])
      assert.strictEqual(harness.read(0, VirtioMmio.DeviceFeatures, 4) & 0xff, 0b111)
      assert.strictEqual(harness.read(0, VirtioMmio.Config + ConsoleConfig.max_nr_ports, 4), 4)
      yield* console.resize({ cols: 80, rows: 24 })
      const control = new ControlDriver(cpu, start())
      assert.deepStrictEqual(control.hear(), [])
      control.say(0, PORT_READY, 1)
      assert.deepStrictEqual(control.hear(), [])
      control.say(0, DEVICE_READY, 1)
      control.say(0, DEVICE_READY, 1)
      assert.deepStrictEqual(control.hear(), [0, 1, 2].map((id) => message(id, DEVICE_ADD, 0)))
      control.say(0, DEVICE_READY, 1)
      assert.deepStrictEqual(control.hear(), [])
      control.say(0, PORT_READY, 1)
      assert.deepStrictEqual(control.hear(), [
        message(0, CONSOLE_PORT, 1),
        message(0, RESIZE, 0, "80x24"),
        message(0, PORT_OPEN, 1)
      ])
      control.say(2, PORT_READY, 1)
      assert.deepStrictEqual(control.hear(), [message(2, PORT_NAME, 1, "größe"), message(2, PORT_OPEN, 1)])
      yield* console.resize({ cols: 100, rows: 30 })
      yield* console.resize({ cols: 100, rows: 31 })
      assert.deepStrictEqual(control.hear(), [message(0, RESIZE, 0, "100x31")])
      const port = yield* console.port("größe")
      yield* port.setOpen(false)
      assert.deepStrictEqual(control.hear(), [message(2, PORT_OPEN, 0)])
      assert.isFalse(port.guestOpen())
      control.say(2, PORT_OPEN, 1)
      assert.isTrue(port.guestOpen())
      assert.strictEqual((yield* Effect.flip(console.port("none"))).status, "NOT_FOUND")
      assert.deepStrictEqual(console.ports().map(({ name }) => name), ["agent", "größe"])
      start()
      assert.isFalse(port.guestOpen())
    }))

  it.effect("moves bytes of a port while the guest has it open, and holds up no other port", () =>
    Effect.gen(function*() {
      const { console, cpu, memory, settle, start } = yield* started(3, ["a", "b"])
      const control = new ControlDriver(cpu, start())
      const { driver } = control
      control.say(0, DEVICE_READY, 1)
      control.hear()
      for (const id of [0, 1, 2]) control.say(id, PORT_READY, 1)
      control.hear()
      const [a, b] = [yield* console.port("a"), yield* console.port("b")]
      const writer = yield* Effect.forkChild(a.write(pattern(5)))
      runGuest(driver.send(cpu, 4, [[{ address: DATA_ADDRESS, length: 10, writable: true }]]))
      yield* settle
      assert.isUndefined(driver.queue(4).poll())
      control.say(1, PORT_OPEN, 1)
      yield* settle
      assert.strictEqual(driver.queue(4).poll()?.written, 5)
      yield* Fiber.join(writer)
      // Nobody reads `a`, and it fills; `b` goes on.
      const flood = outputBuffers(memory, pattern(100_000), [100_000])
      runGuest(driver.send(cpu, 5, [flood]))
      yield* settle
      runGuest(driver.send(cpu, 7, [outputBuffers(memory, pattern(9), [9])]))
      const head = yield* Effect.forkChild(Stream.runHead(b.output))
      yield* settle
      assert.deepStrictEqual(yield* Fiber.join(head), yield* Stream.runHead(Stream.make(pattern(9))))
      assert.deepStrictEqual([driver.queue(5).inFlight, driver.queue(7).poll()?.written], [1, 0])
    }))

  it.effect("plugs ports in and out, and gives back what was in hand", () =>
    Effect.gen(function*() {
      const { console, cpu, memory, settle, start } = yield* started(2)
      const control = new ControlDriver(cpu, start())
      control.say(0, DEVICE_READY, 1)
      control.hear()
      const scope = yield* Scope.make()
      const port = yield* Scope.provide(console.addPort("extra"), scope)
      assert.strictEqual(port.id, 1)
      assert.strictEqual((yield* Effect.flip(console.addPort("extra"))).status, "ALREADY_EXISTS")
      assert.strictEqual((yield* Effect.flip(console.addPort("more"))).status, "NO_RESOURCES")
      assert.strictEqual((yield* Effect.flip(console.addPort(""))).status, "OUT_OF_RANGE")
      assert.deepStrictEqual(control.hear(), [message(1, DEVICE_ADD, 0)])
      control.say(1, PORT_READY, 1)
      control.say(1, PORT_OPEN, 1)
      assert.deepStrictEqual(control.hear(), [message(1, PORT_NAME, 1, "extra"), message(1, PORT_OPEN, 1)])
      runGuest(control.driver.send(cpu, 5, [outputBuffers(memory, pattern(100_000), [100_000])]))
      yield* settle
      const writer = yield* Effect.forkChild(port.write(pattern(5)))
      yield* Effect.yieldNow
      yield* Scope.close(scope, Exit.void)
      yield* Fiber.join(writer)
      // Its number is free when the driver has been told.
      assert.strictEqual((yield* Effect.flip(console.addPort("next"))).status, "NO_RESOURCES")
      yield* settle
      assert.strictEqual(control.driver.queue(5).poll()?.written, 0)
      assert.deepStrictEqual(control.hear(), [message(1, DEVICE_REMOVE, 0)])
      const next = yield* console.addPort("next")
      assert.deepStrictEqual([next.id, control.hear()], [1, [message(1, DEVICE_ADD, 0)]])
      assert.deepStrictEqual(console.ports().map(({ name }) => name), ["next"])
    }))

  it.effect("lets a host that is woken by output do what it likes, such as to unplug the port", () =>
    Effect.gen(function*() {
      const { console, cpu, memory, settle, start } = yield* started(2)
      const control = new ControlDriver(cpu, start())
      control.say(0, DEVICE_READY, 1)
      const host = yield* Effect.forkChild(Effect.scoped(Effect.gen(function*() {
        const port = yield* console.addPort("short")
        yield* port.write(pattern(3))
        yield* Stream.runHead(port.output)
      })))
      yield* settle
      control.hear()
      control.say(1, PORT_READY, 1)
      control.say(1, PORT_OPEN, 1)
      control.hear()
      runGuest(control.driver.send(cpu, 4, [[{ address: DATA_ADDRESS, length: 10, writable: true }]]))
      runGuest(control.driver.send(cpu, 5, [outputBuffers(memory, pattern(9), [9])]))
      yield* settle
      yield* Fiber.join(host)
      assert.deepStrictEqual(control.hear(), [message(1, DEVICE_REMOVE, 0)])
      assert.deepStrictEqual([control.driver.queue(4).poll()?.written, control.driver.queue(5).poll()?.written], [3, 0])
    }))

  it("keeps to its rules whatever the driver says, and the guest costs it no memory", () => {
    const { ADD, REMOVE } = { ADD: DEVICE_ADD, REMOVE: DEVICE_REMOVE }
    const step = fc.oneof(
      fc.record({
        _tag: fc.constant("say" as const),
        id: fc.oneof(fc.integer({ min: 0, max: 5 }), fc.constant(0xffff_ffff)),
        event: fc.oneof(fc.integer({ min: 0, max: 9 }), fc.constant(0xffff)),
        value: fc.constantFrom(0, 1, 2),
        length: fc.constantFrom(8, 8, 8, 3, 12)
      }),
      fc.record({ _tag: fc.constant("hear" as const), length: fc.constantFrom(128, 8, 4, 10) }),
      fc.record({ _tag: fc.constant("add" as const) }),
      fc.record({ _tag: fc.constant("remove" as const) }),
      fc.record({ _tag: fc.constant("reset" as const) })
    )
    fc.assert(
      fc.property(
        fc.array(step, { size: "max", maxLength: 60 }),
        (steps) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { console, cpu, harness, start } = yield* started(4, ["one"])
            let control = new ControlDriver(cpu, start())
            let known = new Set<number>()
            const scopes: Array<Scope.Closeable> = []
            let names = 0
            for (const step of steps) {
              switch (step._tag) {
                case "say":
                  control.say(step.id, step.event, step.value, step.length)
                  break
                case "hear":
                  for (const { event, id } of control.hear(step.length)) {
                    assert.isBelow(id, 4)
                    if (event === ADD) assert.isFalse(known.has(id))
                    else assert.isTrue(known.has(id))
                    if (event === ADD) known.add(id)
                    if (event === REMOVE) known.delete(id)
                  }
                  break
                case "add": {
                  const scope = yield* Scope.make()
                  const exit = yield* Effect.exit(Scope.provide(console.addPort(`port ${names++}`), scope))
                  if (Exit.isSuccess(exit)) scopes.push(scope)
                  break
                }
                case "remove": {
                  const scope = scopes.shift()
                  if (scope !== undefined) yield* Scope.close(scope, Exit.void)
                  break
                }
                case "reset":
                  control = new ControlDriver(cpu, start())
                  known = new Set()
              }
            }
            harness.settle()
            assert.strictEqual(harness.read(0, VirtioMmio.Status, 4) & VirtioStatus.DEVICE_NEEDS_RESET, 0)
          })))
      ),
      { numRuns: 60 }
    )
  })
})

const layerHost = GuestLifecycle.layer.pipe(
  Layer.provide(Layer.provide(layerDevices, EntropySource.layerRandom)),
  Layer.provideMerge(FakeHypervisor.layer())
)

/** Sends back what it receives, in pieces of at most 7 bytes, until it has had `total` of them. */
const echo = (total: number) =>
  GuestProgram.make(function*(cpu) {
    const place = GuestAcpi.find(cpu).virtioMmio[0]
    if (place === undefined) throw new Error("the machine has no virtio device")
    const driver = yield* startVirtioMmio(cpu, place, { memoryAddress: 0x18_0000, queueSizes: [8, 8] })
    for (let had = 0; had < total;) {
      yield* driver.send(cpu, 0, [[{ address: 0x1a_0000, length: 7, writable: true }]])
      const { written } = yield* driver.receive(cpu, 0)
      had += written
      yield* driver.send(cpu, 1, [[{ address: 0x1a_0000, length: written, writable: false }]])
      yield* driver.receive(cpu, 1)
    }
    yield* GuestAcpi.powerOff(cpu)
  })

describe("The console in a machine", () => {
  it("is an echo, in every order of events", () => {
    fc.assert(
      fc.property(
        fc.array(fc.integer({ min: 0, max: 40 }), { minLength: 1, maxLength: 6 }),
        fc.integer(),
        Simulation.property((writes) =>
          Effect.gen(function*() {
            const total = writes.reduce((sum, length) => sum + length, 0)
            const lifecycle = yield* GuestLifecycle
            yield* lifecycle.create({
              kernelType: "LINUX",
              kernel: GuestProgram.kernel(echo(total)),
              cpus: 1,
              guestMemory: "2M",
              virtioConsole: true
            })
            const console = yield* (yield* lifecycle.bind).getConsole
            const reader = yield* Effect.forkChild(Stream.runCollect(console.output))
            let at = 0
            const writer = yield* Effect.forkChild(
              Effect.forEach(writes, (length) => console.write(pattern(length, (at += length) - length)))
            )
            assert.deepStrictEqual(yield* lifecycle.run, { _tag: "PowerOff" })
            yield* Fiber.join(writer)
            assert.deepStrictEqual(concat(yield* Fiber.join(reader)), pattern(total))
            const fake = yield* FakeHypervisor.FakeHypervisor
            assert.deepStrictEqual(yield* fake.violations, [])
            assert.deepStrictEqual(yield* fake.openResources, [])
          }).pipe(Effect.provide(layerHost))
        )
      ),
      { numRuns: 60 }
    )
  })

  it("is not there when it was not asked for", () => {
    Simulation.check(
      Effect.gen(function*() {
        const lifecycle = yield* GuestLifecycle
        const kernel = GuestProgram.kernel(echo(1))
        yield* lifecycle.create({ kernelType: "LINUX", kernel, cpus: 1, guestMemory: "2M" })
        const error = yield* Effect.flip((yield* lifecycle.bind).getConsole)
        assert.strictEqual(error.reason._tag, "DEVICE_NOT_PRESENT")
      }).pipe(Effect.provide(layerHost))
    )
  })
})
