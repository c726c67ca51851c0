import { assert, describe, it } from "@effect/vitest"
import { SerialPort } from "@troupe/core/SerialPort"
import { Simulation } from "@troupe/core/testing"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as fc from "fast-check"
import { makeSerial } from "../src/Serial.ts"
import { INPUT_BUFFER_SIZE, LOG_LINES, OUTPUT_HISTORY_SIZE } from "../src/serial/SerialLine.ts"
import { DeviceHarness } from "./DeviceHarness.ts"

const DATA = 0x3f8
const IER = 0x3f9
const IIR = 0x3fa
const FCR = 0x3fa
const LCR = 0x3fb
const MCR = 0x3fc
const LSR = 0x3fd
const MSR = 0x3fe
const SCR = 0x3ff

const RTS = 0x02
const text = new TextEncoder()
const bytes = (value: string) => text.encode(value)

const portOf = (harness: DeviceHarness) =>
  Option.getOrThrow(Context.getOption(harness.device.services ?? Context.empty(), SerialPort))

const started = Effect.gen(function*() {
  const harness = new DeviceHarness(yield* makeSerial)
  yield* harness.start
  return { harness, port: portOf(harness) }
})

const send = (harness: DeviceHarness, value: string | Uint8Array) => {
  for (const byte of typeof value === "string" ? bytes(value) : value) harness.out8(DATA, byte)
  harness.settle()
}

const receive = (harness: DeviceHarness, limit = 100_000) => {
  const received: Array<number> = []
  while ((harness.in8(LSR) & 0x01) !== 0 && received.length < limit) received.push(harness.in8(DATA))
  return Uint8Array.from(received)
}

describe("Serial registers", () => {
  it.effect("passes the tests of Linux's 8250 driver", () =>
    Effect.gen(function*() {
      const { harness } = yield* started
      const { in8, out8 } = {
        in8: (port: number) => harness.in8(port),
        out8: (p: number, v: number) => harness.out8(p, v)
      }
      // The interrupt enable register keeps its four bits, and no more.
      out8(IER, 0)
      assert.strictEqual(in8(IER) & 0x0f, 0)
      out8(IER, 0x0f)
      assert.strictEqual(in8(IER) & 0x0f, 0x0f)
      out8(IER, 0x40)
      assert.strictEqual(in8(IER), 0)
      // Loopback: RTS is CTS, OUT2 is DCD.
      const mcr = in8(MCR)
      out8(MCR, 0x10 | 0x08 | 0x02)
      assert.strictEqual(in8(MSR) & 0xf0, 0x90)
      out8(MCR, mcr)
      // A 16550A has working FIFOs and says so, and no larger ones.
      out8(LCR, 0xbf)
      out8(FCR, 0)
      out8(LCR, 0)
      out8(FCR, 0x01)
      assert.strictEqual(in8(IIR) >> 6, 3)
      out8(FCR, 0x21)
      assert.strictEqual(in8(IIR) >> 5, 6)
      out8(LCR, 0x80)
      assert.notStrictEqual(in8(FCR), 0)
      out8(LCR, 0)
      for (const value of [0x00, 0x5a, 0xa5, 0xff]) {
        out8(SCR, value)
        assert.strictEqual(in8(SCR), value)
      }
      // Start-up: empty the FIFOs, read everything once.
      for (const value of [0x01, 0x07, 0x00]) out8(FCR, value)
      for (const port of [LSR, DATA, IIR, MSR]) in8(port)
      assert.strictEqual(in8(LSR), 0x60)
      // The transmitter's interrupt comes again each time it is enabled.
      for (let i = 0; i < 2; i++) {
        out8(IER, 0x02)
        assert.strictEqual(in8(IIR) & 0x0f, 0x02)
        assert.strictEqual(in8(IIR) & 0x0f, 0x01)
        out8(IER, 0)
      }
      out8(IER, 0x02)
      assert.strictEqual(in8(LSR) & 0x40, 0x40)
      assert.strictEqual(in8(IIR) & 0x01, 0)
    }))

  it.effect("keeps the divisor apart from the data and the interrupt enables", () =>
    Effect.gen(function*() {
      const { harness, port } = yield* started
      harness.out8(IER, 0x05)
      harness.out8(LCR, 0x83)
      harness.write(0, 0, 2, 0x1234)
      assert.strictEqual(harness.read(0, 0, 2), 0x1234)
      assert.strictEqual(harness.in8(LCR), 0x83)
      harness.out8(LCR, 0x03)
      assert.strictEqual(harness.in8(IER), 0x05)
      harness.settle()
      assert.deepStrictEqual(port.log(), [])
    }))

  it.effect("raises one interrupt for a burst of sent bytes", () =>
    Effect.gen(function*() {
      const { harness } = yield* started
      harness.out8(IER, 0x02)
      harness.settle()
      assert.strictEqual(harness.interrupts[0], 1)
      assert.strictEqual(harness.in8(IIR) & 0x0f, 0x02)
      send(harness, "sixteen bytes ok")
      assert.strictEqual(harness.interrupts[0], 2)
      assert.strictEqual(harness.in8(IIR) & 0x0f, 0x02)
      harness.settle()
      assert.strictEqual(harness.interrupts[0], 2)
    }))

  it.effect("identifies the interrupt of the highest priority, and an edge comes only when all were served", () =>
    Effect.gen(function*() {
      const { harness, port } = yield* started
      harness.out8(FCR, 0x01)
      harness.out8(MCR, RTS | 0x10)
      harness.in8(MSR)
      harness.out8(IER, 0x0f)
      for (let i = 0; i < 17; i++) harness.out8(DATA, i)
      harness.out8(MCR, RTS)
      harness.settle()
      // Once for the empty transmitter, which the first byte ended, and once for that byte's arrival.
      assert.strictEqual(harness.interrupts[0], 2)
      assert.strictEqual(harness.in8(IIR), 0xc6)
      assert.strictEqual(harness.in8(LSR), 0x63)
      assert.strictEqual(harness.in8(IIR), 0xc4)
      assert.deepStrictEqual(receive(harness), Uint8Array.from({ length: 16 }, (_, i) => i))
      assert.strictEqual(harness.in8(IIR), 0xc2)
      assert.strictEqual(harness.in8(IIR), 0xc0)
      // Leaving loopback changed CTS (it was RTS already), DSR and DCD.
      assert.strictEqual(harness.in8(MSR), 0xba)
      assert.strictEqual(harness.in8(IIR), 0xc1)
      assert.strictEqual(harness.interrupts[0], 2)
      yield* port.write(bytes("x"))
      harness.settle()
      assert.strictEqual(harness.interrupts[0], 3)
    }))

  it.effect("tells data at the trigger level from data below it", () =>
    Effect.gen(function*() {
      const { harness, port } = yield* started
      harness.out8(FCR, 0x81)
      harness.out8(IER, 0x01)
      yield* port.write(bytes("1234567"))
      harness.settle()
      assert.strictEqual(harness.in8(IIR), 0xcc)
      yield* port.write(bytes("8"))
      harness.settle()
      assert.strictEqual(harness.in8(IIR), 0xc4)
      assert.strictEqual(harness.in8(DATA), 0x31)
      assert.strictEqual(harness.in8(IIR), 0xcc)
    }))

  it.effect("overwrites the one receive buffer when the FIFO is off, and keeps the FIFO when it is on", () =>
    Effect.gen(function*() {
      const { harness } = yield* started
      harness.out8(MCR, 0x10)
      for (const byte of [1, 2]) harness.out8(DATA, byte)
      assert.strictEqual(harness.in8(LSR), 0x63)
      assert.strictEqual(harness.in8(LSR), 0x61)
      assert.deepStrictEqual(receive(harness), Uint8Array.of(2))
      harness.out8(FCR, 0x01)
      for (let i = 0; i < 20; i++) harness.out8(DATA, i)
      assert.strictEqual(harness.in8(LSR), 0x63)
      harness.out8(FCR, 0x03)
      assert.strictEqual(harness.in8(LSR), 0x60)
    }))

  it("reads the same as a port without posted writes and shadows, whatever the guest does", () => {
    const offset = fc.integer({ min: 0, max: 7 })
    const operation = fc.oneof(
      { weight: 4, arbitrary: fc.record({ kind: fc.constant("read" as const), offset, value: fc.constant(0) }) },
      { weight: 4, arbitrary: fc.record({ kind: fc.constant("write" as const), offset, value: fc.nat(255) }) },
      {
        weight: 2,
        arbitrary: fc.record({ kind: fc.constant("write" as const), offset: fc.constant(4), value: fc.nat(31) })
      },
      { weight: 1, arbitrary: fc.record({ kind: fc.constant("input" as const), offset, value: fc.nat(40) }) }
    )
    fc.assert(
      fc.property(
        fc.array(operation, { maxLength: 60, size: "max" }),
        (operations) =>
          Effect.runSync(Effect.scoped(Effect.gen(function*() {
            const { harness, port } = yield* started
            const { harness: plain, port: plainPort } = yield* started
            for (const { kind, offset, value } of operations) {
              if (kind === "input") {
                for (const [target, device] of [[port, harness], [plainPort, plain]] as const) {
                  yield* target.write(new Uint8Array(value).fill(offset))
                  device.settle()
                }
              } else if (kind === "write") {
                harness.out8(DATA + offset, value)
                plain.out8(DATA + offset, value)
                plain.settle()
              } else {
                const { offset: at, range } = plain.portRange(DATA + offset)
                assert.strictEqual(harness.in8(DATA + offset), plain.behaviour.read(range, at, 1), `register ${offset}`)
              }
            }
            harness.settle()
            assert.deepStrictEqual(port.log(), plainPort.log())
          })))
      ),
      { numRuns: 500 }
    )
  })
})

describe("Serial line", () => {
  it.effect("gives every reader the history, then everything in order, and ends with the machine", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const { harness, port } = yield* Scope.provide(started, scope)
      send(harness, "early ")
      const read = Effect.map(
        Stream.runCollect(port.output),
        (chunks) => new TextDecoder().decode(Buffer.concat(chunks))
      )
      const first = yield* Effect.forkChild(read, { startImmediately: true })
      send(harness, "middle ")
      yield* Effect.yieldNow
      const second = yield* Effect.forkChild(read, { startImmediately: true })
      send(harness, "late")
      yield* Scope.close(scope, Exit.void)
      assert.strictEqual(yield* Fiber.join(first), "early middle late")
      assert.strictEqual(yield* Fiber.join(second), "early middle late")
      assert.strictEqual(yield* read, "early middle late")
      assert.strictEqual(port.dropped(), 0)
      yield* port.write(new Uint8Array(10 * INPUT_BUFFER_SIZE))
    }))

  it.effect("drops and counts the oldest bytes for a reader that is too slow", () =>
    Effect.gen(function*() {
      const { harness, port } = yield* started
      const seen: Array<number> = []
      const reader = yield* Effect.forkChild(
        Stream.runForEach(port.output, (chunk) => Effect.sync(() => void seen.push(...chunk))),
        { startImmediately: true }
      )
      send(harness, Uint8Array.of(1, 2, 3))
      yield* Effect.yieldNow
      assert.deepStrictEqual(seen, [1, 2, 3])
      send(harness, new Uint8Array(OUTPUT_HISTORY_SIZE + 5))
      yield* Effect.yieldNow
      assert.strictEqual(seen.length, 3 + OUTPUT_HISTORY_SIZE)
      assert.strictEqual(port.dropped(), 5)
      yield* Fiber.interrupt(reader)
    }))

  it.effect("holds a writer back until the guest takes the bytes, and loses none", () =>
    Effect.gen(function*() {
      const { harness, port } = yield* started
      harness.out8(FCR, 0x01)
      const sent = Uint8Array.from({ length: 3 * INPUT_BUFFER_SIZE }, (_, i) => i % 251)
      const writer = yield* Effect.forkChild(port.write(sent), { startImmediately: true })
      const other = yield* Effect.forkChild(port.write(bytes("end")), { startImmediately: true })
      const received: Array<number> = []
      assert.isUndefined(writer.pollUnsafe())
      for (let turn = 0; turn < 10_000 && received.length < sent.length + 3; turn++) {
        harness.settle()
        received.push(...receive(harness, 7))
        yield* Effect.yieldNow
      }
      yield* Fiber.join(writer)
      yield* Fiber.join(other)
      assert.deepStrictEqual(Uint8Array.from(received), Uint8Array.of(...sent, ...bytes("end")))
    }))

  it("keeps what each writer types together, in every order of events", () => {
    const sizes = [3000, 1, 2500, 7000]
    Simulation.explore(
      Effect.gen(function*() {
        const { harness, port } = yield* started
        harness.out8(FCR, 0x01)
        const total = sizes.reduce((sum, size) => sum + size, 0)
        for (const [index, size] of sizes.entries()) {
          yield* Effect.forkChild(port.write(new Uint8Array(size).fill(index)))
        }
        const received: Array<number> = []
        while (received.length < total) {
          harness.settle()
          received.push(...receive(harness, 900))
          yield* Effect.yieldNow
        }
        const changes = received.filter((byte, i) => byte !== received[i - 1])
        assert.strictEqual(changes.length, sizes.length)
      }),
      20
    )
  })

  it.effect("keeps what was typed for a guest that is not ready, and drops what a ready guest throws away", () =>
    Effect.gen(function*() {
      const { harness, port } = yield* started
      yield* port.write(bytes("typed before the guest has booted"))
      harness.settle()
      for (const value of [0x01, 0x07, 0x00, 0x07]) harness.out8(FCR, value)
      harness.out8(MCR, 0x01)
      assert.strictEqual(harness.in8(LSR) & 0x01, 0x01)
      harness.out8(FCR, 0x07)
      assert.strictEqual(harness.in8(LSR) & 0x01, 0)
      harness.out8(MCR, 0x0b)
      assert.strictEqual(new TextDecoder().decode(receive(harness)), "typed before the guest has booted")
      yield* port.write(bytes("0123456789abcdefREST"))
      harness.settle()
      harness.out8(FCR, 0x07)
      assert.strictEqual(new TextDecoder().decode(receive(harness)), "REST")
    }))

  it.effect("keeps what the driver has set up in the next generation, and wakes a driver that waits to send", () =>
    Effect.gen(function*() {
      const { harness } = yield* started
      harness.out8(LCR, 0x80)
      harness.out8(DATA, 0x0c)
      harness.out8(LCR, 0x03)
      harness.out8(FCR, 0x81)
      harness.out8(MCR, 0x0b)
      harness.out8(IER, 0x03)
      harness.out8(SCR, 0x5a)
      harness.in8(IIR)
      harness.settle()
      const before = harness.interrupts[0] ?? 0
      yield* harness.start
      harness.settle()
      assert.strictEqual(harness.interrupts[0], before + 1)
      assert.strictEqual(harness.in8(IIR), 0xc2)
      assert.deepStrictEqual([IER, LCR, MCR, SCR].map((register) => harness.in8(register)), [0x03, 0x03, 0x0b, 0x5a])
      harness.out8(LCR, 0x83)
      assert.strictEqual(harness.in8(DATA), 0x0c)
    }))

  it.effect("goes on in the next generation of the device", () =>
    Effect.gen(function*() {
      const { harness, port } = yield* started
      send(harness, "one ")
      yield* harness.start
      send(harness, "two")
      assert.deepStrictEqual(port.log(), ["one two"])
      yield* port.write(bytes("in"))
      harness.settle()
      assert.strictEqual(new TextDecoder().decode(receive(harness)), "in")
    }))

  it.effect("logs the last lines as plain text", () =>
    Effect.gen(function*() {
      const { harness, port } = yield* started
      send(harness, "\u001b[1;32mgreen\u001b[0m\r\nünïcode → 𝄞\r\n\r\nbell\u0007\tx\n")
      send(harness, Uint8Array.of(0xff, 0x41, 0xe2, 0x82, 0x0a, 0xc0, 0x80))
      assert.deepStrictEqual(port.log(), ["green", "ünïcode → 𝄞", "", "bell\tx", "\ufffdA\ufffd\ufffd", "\ufffd\ufffd"])
      for (let i = 0; i < 5000; i++) send(harness, `line ${i}\n`)
      const log = port.log()
      assert.strictEqual(log.length, LOG_LINES)
      assert.strictEqual(log.at(-1), "line 4999")
      assert.strictEqual(log[0], `line ${5000 - LOG_LINES}`)
    }))
})
