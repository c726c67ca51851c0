/** The devices in whole machines on the fake hypervisor, driven by guest programs. */
import { assert, describe, it } from "@effect/vitest"
import type { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { FakeHypervisor, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import { driveHostile } from "@troupe/core/testing/drivers/HostileVirtioDriver"
import { SerialDriver } from "@troupe/core/testing/drivers/SerialDriver"
import { probeVirtioMmio, startVirtioMmio, VirtioStatus } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import type { GuestCpu } from "@troupe/core/testing/GuestCpu"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"
import * as fc from "fast-check"
import { layer } from "../src/Catalog.ts"
import { EntropySource } from "../src/EntropySource.ts"

const QUEUE_ADDRESS = 0x18_0000
const DATA_ADDRESS = 0x1a_0000

const layerHost = (entropy: Layer.Layer<EntropySource> = EntropySource.layerRandom) => {
  const catalog: Layer.Layer<DeviceCatalog> = Layer.provide(layer, entropy)
  return GuestLifecycle.layer.pipe(Layer.provideMerge(Layer.merge(FakeHypervisor.layer(), catalog)))
}

const configOf = (program: GuestProgram.GuestProgram) => ({
  kernelType: "LINUX" as const,
  kernel: GuestProgram.kernel(program),
  cpus: 1,
  guestMemory: "2M",
  virtioRng: true
})

/** Runs a program to its end. `drive` is the host's part meanwhile. Returns how it ended and what it printed. */
const runGuest = <E = never>(
  program: GuestProgram.GuestProgram,
  drive: (lifecycle: GuestLifecycle["Service"]) => Effect.Effect<unknown, E> = () => Effect.void,
  change: { readonly virtioPackedRing?: boolean } = {}
) =>
  Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({ ...configOf(program), ...change })
    const serial = yield* (yield* lifecycle.bind).getSerial
    const host = yield* Effect.forkChild(drive(lifecycle))
    const stop = yield* lifecycle.run
    yield* Fiber.join(host)
    const fake = yield* FakeHypervisor.FakeHypervisor
    assert.deepStrictEqual(yield* fake.violations, [])
    assert.deepStrictEqual(yield* fake.openResources, [])
    return { stop, log: serial.log() }
  })

const entropyPlace = (cpu: GuestCpu) => {
  const place = GuestAcpi.find(cpu).virtioMmio[0]
  if (place === undefined) throw new Error("the machine has no virtio device")
  return place
}

const hex = (bytes: Uint8Array) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")

/** Draws random bytes in a few requests and prints them. */
const drawing = (lengths: ReadonlyArray<number>) =>
  GuestProgram.make(function*(cpu) {
    const serial = new SerialDriver()
    yield* serial.setUp(cpu)
    const place = entropyPlace(cpu)
    if ((yield* probeVirtioMmio(cpu, place)) !== 4) throw new Error("the device is not an entropy device")
    const driver = yield* startVirtioMmio(cpu, place, { memoryAddress: QUEUE_ADDRESS })
    for (const length of lengths) {
      yield* driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length, writable: true }]])
      const { written } = yield* driver.receive(cpu, 0)
      const bytes = cpu.memory.slice(DATA_ADDRESS, written)
      yield* serial.print(cpu, `${written} ${bytes === undefined ? "" : hex(bytes)}\n`)
    }
    yield* GuestAcpi.powerOff(cpu)
  })

describe("The entropy device in a machine", () => {
  it("gives a guest the bytes of its source, by interrupts, in every order of events", () => {
    fc.assert(
      fc.property(
        fc.array(fc.integer({ min: 1, max: 60 }), { minLength: 1, maxLength: 5 }),
        fc.integer(),
        Simulation.property((lengths) =>
          Effect.gen(function*() {
            let next = 0
            const source = Layer.succeed(EntropySource, {
              fill: (bytes) => {
                for (let i = 0; i < bytes.length; i++) bytes[i] = next++
              }
            })
            const { log, stop } = yield* Effect.provide(runGuest(drawing(lengths)), layerHost(source))
            assert.deepStrictEqual(stop, { _tag: "PowerOff" })
            let begin = 0
            assert.deepStrictEqual(
              log,
              lengths.map((length) => {
                begin += length
                return `${length} ${hex(Uint8Array.from({ length }, (_, i) => begin - length + i))}`
              })
            )
          })
        )
      ),
      { numRuns: 100 }
    )
  })

  it("costs a guest no call and no read that leaves it, once it is set up", () => {
    const program = GuestProgram.make(function*(cpu) {
      const driver = yield* startVirtioMmio(cpu, entropyPlace(cpu), { memoryAddress: QUEUE_ADDRESS })
      yield* cpu.out8(0x80, 1)
      for (let i = 0; i < 10; i++) {
        yield* driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 8, writable: true }]])
        yield* driver.receive(cpu, 0)
      }
      yield* cpu.out8(0x80, 2)
      yield* GuestAcpi.powerOff(cpu)
    })
    const result = Simulation.run(Effect.provide(runGuest(program), layerHost()))
    assert.strictEqual(result.exit._tag, "Success", Simulation.report(result))
    const kinds = result.trace.events.map((event) => event.kind)
    // The writes to port 0x80, which no device has, are the marks.
    const [begin, end] = kinds.flatMap((kind, index) => (kind === "open-bus-write" ? [index] : []))
    const count = (kind: string) => kinds.slice(begin, end).filter((other) => other === kind).length
    assert.deepStrictEqual(
      ["call-read", "call-write", "posted", "shadowed-read"].map((kind) => count(kind)),
      [0, 0, 0, 0]
    )
    // Ten requests: each a notification, an interrupt, its cause read from the page, and its acknowledgement.
    assert.deepStrictEqual(["ring", "trigger", "page-read"].map((kind) => count(kind)), [20, 10, 10])
  })

  it("is started again when its source fails, and the guest that resets it goes on", () => {
    const program = GuestProgram.make(function*(cpu) {
      const serial = new SerialDriver()
      yield* serial.setUp(cpu)
      const place = entropyPlace(cpu)
      const request = [[{ address: DATA_ADDRESS, length: 8, writable: true }]]
      const first = yield* startVirtioMmio(cpu, place, { memoryAddress: QUEUE_ADDRESS })
      yield* first.send(cpu, 0, request)
      yield* cpu.waitForInterrupt(place.gsi)
      const causes = yield* first.handleInterrupt(cpu)
      const status = yield* first.status(cpu)
      yield* serial.print(cpu, `causes ${causes} needs reset ${(status & VirtioStatus.DEVICE_NEEDS_RESET) !== 0}\n`)
      const second = yield* startVirtioMmio(cpu, place, { memoryAddress: QUEUE_ADDRESS })
      yield* second.send(cpu, 0, request)
      yield* serial.print(cpu, `then ${(yield* second.receive(cpu, 0)).written}\n`)
      yield* GuestAcpi.powerOff(cpu)
    })
    Simulation.explore(
      Effect.gen(function*() {
        let failures = 1
        const source = Layer.succeed(EntropySource, {
          fill: (bytes) => {
            if (failures-- > 0) throw new Error("no entropy today")
            bytes.fill(1)
          }
        })
        const { log } = yield* Effect.provide(runGuest(program), layerHost(source))
        assert.deepStrictEqual(log, ["causes 2 needs reset true", "then 8"])
      }),
      20
    )
  })

  it("works through a packed queue where its machine offers that", () => {
    const program = GuestProgram.make(function*(cpu) {
      const serial = new SerialDriver()
      yield* serial.setUp(cpu)
      const driver = yield* startVirtioMmio(cpu, entropyPlace(cpu), { memoryAddress: QUEUE_ADDRESS, packed: true })
      // More than a lap around the ring.
      for (let i = 1; i <= 40; i++) {
        yield* driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: i, writable: true }]])
        const { written } = yield* driver.receive(cpu, 0)
        if (written !== i) throw new Error(`${written} bytes of ${i}`)
      }
      yield* serial.print(cpu, `${driver.queues.length} split of ${driver.rings.length}\n`)
      yield* GuestAcpi.powerOff(cpu)
    })
    const logs = [false, true].map((virtioPackedRing) =>
      Simulation.explore(Effect.provide(runGuest(program, undefined, { virtioPackedRing }), layerHost()), 10)
        .map(({ log }) => log)
    )
    assert.deepStrictEqual(logs.map((all) => Array.from(new Set(all.flat()))), [["1 split of 1"], ["0 split of 1"]])
  })

  it("survives hostile drivers of every degree, and a correct one works after them", () => {
    fc.assert(
      fc.property(
        fc.record({ seed: fc.integer(), hostility: fc.constantFrom(0, 0.2, 0.5, 0.9, 1) }),
        fc.integer(),
        Simulation.property(({ hostility, seed }) =>
          Effect.gen(function*() {
            const program = GuestProgram.make(function*(cpu) {
              const serial = new SerialDriver()
              yield* serial.setUp(cpu)
              // Before a device is told to write where the machine keeps its tables.
              const acpi = GuestAcpi.find(cpu)
              const place = entropyPlace(cpu)
              yield* driveHostile(cpu, place, {
                memoryAddress: QUEUE_ADDRESS,
                steps: 60,
                hostility,
                seed
              })
              yield* serial.print(cpu, "the others live\n")
              const driver = yield* startVirtioMmio(cpu, place, { memoryAddress: QUEUE_ADDRESS })
              yield* driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 77, writable: true }]])
              yield* serial.print(cpu, `${(yield* driver.receive(cpu, 0)).written} bytes\n`)
              yield* GuestAcpi.powerOff(cpu, acpi)
            })
            const { log } = yield* Effect.provide(runGuest(program), layerHost())
            assert.deepStrictEqual(log, ["the others live", "77 bytes"])
          })
        )
      ),
      { numRuns: 200 }
    )
  })
})

describe("The serial port in a machine", () => {
  it("sends by interrupts, one for each FIFO, and loses nothing", () => {
    Simulation.explore(
      Effect.gen(function*() {
        const text = "The quick brown fox jumps over the lazy dog"
        const program = GuestProgram.make(function*(cpu) {
          const serial = new SerialDriver()
          yield* serial.setUp(cpu)
          const interrupts = yield* serial.printByInterrupts(cpu, `${text}\n`)
          yield* serial.print(cpu, `${interrupts}`)
          yield* GuestAcpi.powerOff(cpu)
        })
        const { log } = yield* Effect.provide(runGuest(program), layerHost())
        assert.deepStrictEqual(log, [text, "3"])
      }),
      20
    )
  })

  it("is a terminal: what is typed comes back, whoever reads and whenever it is typed", () => {
    fc.assert(
      fc.property(
        fc.array(fc.stringMatching(/^[a-z]{1,40}$/), { minLength: 1, maxLength: 5 }),
        fc.integer(),
        Simulation.property((lines) =>
          Effect.gen(function*() {
            const program = GuestProgram.make(function*(cpu) {
              const serial = new SerialDriver()
              yield* serial.setUp(cpu)
              for (let i = 0; i < lines.length; i++) yield* serial.print(cpu, `<${yield* serial.readLine(cpu)}>\n`)
              yield* GuestAcpi.powerOff(cpu)
            })
            const read = (lifecycle: GuestLifecycle["Service"]) =>
              Effect.gen(function*() {
                const port = yield* (yield* lifecycle.bind).getSerial
                const reader = yield* Effect.forkChild(Stream.runCollect(port.output))
                yield* Stream.run(
                  Stream.map(Stream.fromIterable(lines), (line) => new TextEncoder().encode(`${line}\n`)),
                  port.input
                )
                const chunks = yield* Fiber.join(reader)
                return new TextDecoder().decode(Buffer.concat(chunks))
              })
            let output = ""
            const { log } = yield* Effect.provide(
              runGuest(program, (lifecycle) => Effect.map(read(lifecycle), (text) => void (output = text))),
              layerHost()
            )
            assert.deepStrictEqual(log, lines.map((line) => `<${line}>`))
            assert.strictEqual(output, lines.map((line) => `<${line}>\n`).join(""))
          })
        )
      ),
      { numRuns: 50 }
    )
  })
})
