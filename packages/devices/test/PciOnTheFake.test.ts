/** Devices on PCI in whole machines on the fake hypervisor, found and driven by guest programs. */
import { assert, describe, it } from "@effect/vitest"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import type { GuestConfigInput } from "@troupe/core/GuestConfig"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { MachinePolicy } from "@troupe/core/MachinePolicy"
import { FakeHypervisor, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import { SerialDriver } from "@troupe/core/testing/drivers/SerialDriver"
import type { VirtioDriver } from "@troupe/core/testing/drivers/VirtioDriver"
import { startVirtioMmio, VirtioStatus } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import { findVirtioPci, startVirtioPci, type VirtioPciPlace } from "@troupe/core/testing/drivers/VirtioPciDriver"
import { type AccessSize, type GuestCpu, type GuestRoutine, messageInterrupt } from "@troupe/core/testing/GuestCpu"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as fc from "fast-check"
import { layer } from "../src/Catalog.ts"
import { entropy, entropyPolicy, layerEntropy } from "../src/Entropy.ts"
import { EntropySource } from "../src/EntropySource.ts"
import { virtioOn } from "../src/virtio/VirtioTransport.ts"

const QUEUE_ADDRESS = 0x18_0000
const DATA_ADDRESS = 0x1a_0000

const counting = () => {
  let next = 0
  return Layer.succeed(EntropySource, {
    fill: (bytes) => {
      for (let i = 0; i < bytes.length; i++) bytes[i] = next++
    }
  })
}

const layerHost = (source: Layer.Layer<EntropySource> = counting(), more = (catalog: typeof layer) => catalog) =>
  GuestLifecycle.layer.pipe(
    Layer.provideMerge(Layer.merge(FakeHypervisor.layer(), Layer.provide(more(layer), source)))
  )

/** Runs a program to its end. Returns how it ended and what it printed. */
const runGuest = (program: GuestProgram.GuestProgram, config: Partial<GuestConfigInput> = {}) =>
  Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({
      kernelType: "LINUX",
      kernel: GuestProgram.kernel(program),
      cpus: 1,
      guestMemory: "4M",
      virtioRng: true,
      virtioTransport: "pci",
      ...config
    })
    const serial = yield* (yield* lifecycle.bind).getSerial
    const stop = yield* lifecycle.run
    const fake = yield* FakeHypervisor.FakeHypervisor
    assert.deepStrictEqual(yield* fake.violations, [])
    assert.deepStrictEqual(yield* fake.openResources, [])
    return { stop, log: serial.log() }
  })

function* findFunctions(cpu: GuestCpu): GuestRoutine<ReadonlyArray<VirtioPciPlace>> {
  const { pci } = GuestAcpi.find(cpu)
  if (pci === undefined) throw new Error("the machine has no PCI")
  return yield* findVirtioPci(cpu, pci.address)
}

/** Starts the entropy device on the transport that the machine has. */
function* startEntropy(cpu: GuestCpu): GuestRoutine<VirtioDriver> {
  const { virtioMmio: [mmio] } = GuestAcpi.find(cpu)
  if (mmio !== undefined) return yield* startVirtioMmio(cpu, mmio, { memoryAddress: QUEUE_ADDRESS })
  const [place] = yield* findFunctions(cpu)
  if (place?.type !== 4) throw new Error("the machine has no entropy device")
  return yield* startVirtioPci(cpu, place, { memoryAddress: QUEUE_ADDRESS })
}

const hex = (bytes: Uint8Array) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")

describe("Devices on PCI in a machine", () => {
  it("give a guest the same on either transport, by interrupts, in every order of events", () => {
    const drawing = (lengths: ReadonlyArray<number>) =>
      GuestProgram.make(function*(cpu) {
        const serial = new SerialDriver()
        yield* serial.setUp(cpu)
        const driver = yield* startEntropy(cpu)
        for (const length of lengths) {
          yield* driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length, writable: true }]])
          const { written } = yield* driver.receive(cpu, 0)
          yield* serial.print(cpu, `${written} ${hex(cpu.memory.slice(DATA_ADDRESS, written) ?? new Uint8Array())}\n`)
        }
        yield* GuestAcpi.powerOff(cpu)
      })
    fc.assert(
      fc.property(
        fc.record({
          lengths: fc.array(fc.integer({ min: 1, max: 60 }), { minLength: 1, maxLength: 5 }),
          virtioTransport: fc.constantFrom("mmio" as const, "pci" as const)
        }),
        fc.integer(),
        Simulation.property(({ lengths, virtioTransport }) =>
          Effect.gen(function*() {
            const { log, stop } = yield* Effect.provide(runGuest(drawing(lengths), { virtioTransport }), layerHost())
            assert.deepStrictEqual(stop, { _tag: "PowerOff" })
            let begin = 0
            const expected = lengths.map((length) => {
              begin += length
              return `${length} ${hex(Uint8Array.from({ length }, (_, i) => begin - length + i))}`
            })
            assert.deepStrictEqual(log, expected)
          })
        )
      ),
      { numRuns: 60 }
    )
  })

  it("cost a guest no call and no read that leaves it, once they are set up", () => {
    const program = GuestProgram.make(function*(cpu) {
      const driver = yield* startEntropy(cpu)
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
    const [begin, end] = kinds.flatMap((kind, index) => (kind === "open-bus-write" && index > 0 ? [index] : [])).slice(
      -2
    )
    const count = (kind: string) => kinds.slice(begin, end).filter((other) => other === kind).length
    assert.deepStrictEqual(
      ["call-read", "call-write", "posted", "shadowed-read"].map((kind) => count(kind)),
      [0, 0, 0, 0]
    )
    // Ten requests: each a notification and an interrupt, and nothing to acknowledge.
    assert.deepStrictEqual(["ring", "trigger", "page-read"].map((kind) => count(kind)), [10, 10, 0])
  })

  it("interrupt the vCPU that the guest has chosen for each vector", () => {
    const DONE = 0x1b_0000
    const program = GuestProgram.make(function*(cpu) {
      const [place] = yield* findFunctions(cpu)
      if (place === undefined) throw new Error("there is no function")
      const driver = yield* startVirtioPci(cpu, place, { memoryAddress: QUEUE_ADDRESS })
      yield* cpu.startVcpu(1, function*(second) {
        yield* driver.routeVector(second, 1)
        yield* driver.send(second, 0, [[{ address: DATA_ADDRESS, length: 8, writable: true }]])
        yield* driver.receive(second, 0)
        yield* second.store(DONE, 4, 1)
      })
      while ((yield* cpu.load(DONE, 4)) === 0) yield* cpu.yield()
      assert.deepStrictEqual([...cpu.interrupts.pending], [])
      yield* GuestAcpi.powerOff(cpu)
    })
    Simulation.explore(Effect.provide(runGuest(program, { cpus: 2 }), layerHost()), 30)
  })

  it("are many more than there are interrupt lines", () => {
    const COUNT = 200
    const program = GuestProgram.make(function*(cpu) {
      const serial = new SerialDriver()
      yield* serial.setUp(cpu)
      const places = yield* findFunctions(cpu)
      let sum = 0
      for (const [index, place] of places.entries()) {
        const driver = yield* startVirtioPci(cpu, place, {
          memoryAddress: QUEUE_ADDRESS + index * 0x2000,
          firstVector: 0x30 + index % 64
        })
        yield* driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 1, writable: true }]])
        yield* driver.receive(cpu, 0)
        sum += cpu.memory.slice(DATA_ADDRESS, 1)?.[0] ?? 0
        yield* driver.reset(cpu)
      }
      yield* serial.print(cpu, `${places.length} ${sum}\n`)
      yield* GuestAcpi.powerOff(cpu)
    })
    const more = (catalog: typeof layer) =>
      Layer.provide(
        DeviceCatalog.layerAdd(
          Effect.map(EntropySource, (source) => ({
            provides: "virtioRng" as const,
            devices: (config) =>
              Effect.succeed(
                Array.from(
                  { length: COUNT },
                  (_, i) => virtioOn(config, entropy(source), { name: `more${i}`, policy: entropyPolicy })
                )
              )
          }))
        ),
        catalog
      )
    const { log } = Simulation.check(Effect.provide(runGuest(program), layerHost(counting(), more)))
    assert.deepStrictEqual(log, [`${COUNT + 1} ${((COUNT + 1) * COUNT) / 2}`])
  })

  it("are refused by name when a bus has no more functions", () => {
    const more = (catalog: typeof layer) =>
      Layer.provide(
        DeviceCatalog.layerAdd(
          Effect.map(EntropySource, (source) => ({
            provides: "virtioRng" as const,
            devices: (config) =>
              Effect.succeed(
                Array.from({ length: 255 }, (_, i) => virtioOn(config, entropy(source), { name: `more${i}` }))
              )
          }))
        ),
        catalog
      )
    const program = GuestProgram.make(function*(cpu) {
      yield* cpu.halt()
    })
    const error = Simulation.check(Effect.provide(Effect.flip(runGuest(program)), layerHost(counting(), more)))
    assert.strictEqual(error.reason._tag, "DEVICE_INITIALIZATION_FAILURE")
    assert.include(error.message, "more254")
    assert.include(error.message, "no function of the PCI bus is free")
  })

  it("are refused by a catalog that has no host bridge", () => {
    const program = GuestProgram.make(function*(cpu) {
      yield* cpu.halt()
    })
    const catalog = layerEntropy.pipe(Layer.provide(DeviceCatalog.layerEmpty), Layer.provide(counting()))
    const host = GuestLifecycle.layer.pipe(Layer.provideMerge(Layer.merge(FakeHypervisor.layer(), catalog)))
    const error = Simulation.check(Effect.provide(Effect.flip(runGuest(program)), host))
    assert.strictEqual(error.reason._tag, "FAILED_SERVICE_CONNECT")
    assert.include(error.message, "layerPci")
  })

  it("leave what is not there to nobody: it reads as all ones, and writes are ignored", () => {
    const program = GuestProgram.make(function*(cpu) {
      const serial = new SerialDriver()
      yield* serial.setUp(cpu)
      const { pci } = GuestAcpi.find(cpu)
      if (pci === undefined) throw new Error("the machine has no PCI")
      const found: Array<number> = []
      for (let index = 0; index < 256; index++) {
        const page = pci.address + index * 0x1000
        yield* cpu.store(page + 4, 2, 0x6)
        if ((yield* cpu.load(page, 4)) !== 0xffff_ffff) found.push(index)
        else assert.deepStrictEqual([yield* cpu.load(page + 4, 2), yield* cpu.load(page + 0xfff, 1)], [0xffff, 0xff])
      }
      yield* serial.print(cpu, `${pci.firstBus} ${pci.lastBus} ${found.join(" ")}\n`)
      yield* GuestAcpi.powerOff(cpu)
    })
    const { log } = Simulation.check(Effect.provide(runGuest(program), layerHost()))
    assert.deepStrictEqual(log, ["0 0 0 1"])
  })

  it("are not announced to a machine with the other transport", () => {
    const program = GuestProgram.make(function*(cpu) {
      const serial = new SerialDriver()
      yield* serial.setUp(cpu)
      const { pci, virtioMmio } = GuestAcpi.find(cpu)
      yield* serial.print(cpu, `${pci === undefined} ${virtioMmio.length} ${yield* cpu.load(0xe000_0000, 4)}\n`)
      yield* GuestAcpi.powerOff(cpu)
    })
    const { log } = Simulation.check(Effect.provide(runGuest(program, { virtioTransport: "mmio" }), layerHost()))
    assert.deepStrictEqual(log, ["true 1 4294967295"])
  })

  it("are started again when they fail, and the guest that resets them goes on", () => {
    const program = GuestProgram.make(function*(cpu) {
      const serial = new SerialDriver()
      yield* serial.setUp(cpu)
      const request = [[{ address: DATA_ADDRESS, length: 8, writable: true }]]
      const first = yield* startEntropy(cpu)
      yield* first.send(cpu, 0, request)
      yield* first.awaitConfigurationChange(cpu)
      const status = yield* first.status(cpu)
      yield* serial.print(cpu, `${(status & VirtioStatus.DEVICE_NEEDS_RESET) !== 0}\n`)
      const again = yield* startEntropy(cpu)
      yield* again.send(cpu, 0, request)
      yield* serial.print(cpu, `${(yield* again.receive(cpu, 0)).written}\n`)
      yield* GuestAcpi.powerOff(cpu)
    })
    let failures = 1
    const failing = Layer.succeed(EntropySource, {
      fill: (bytes) => {
        if (failures-- > 0) throw new Error("no entropy today")
        bytes.fill(1)
      }
    })
    for (const virtioTransport of ["mmio", "pci"] as const) {
      failures = 1
      const { log } = Simulation.check(Effect.provide(runGuest(program, { virtioTransport }), layerHost(failing)))
      assert.deepStrictEqual(log, ["true", "8"])
    }
  })

  it("are as new in the next life of the guest", () => {
    let lives = 0
    const program = GuestProgram.make(function*(cpu) {
      const driver = yield* startEntropy(cpu)
      assert.deepStrictEqual([driver.configurationInterrupts, yield* driver.status(cpu)], [0, 15])
      yield* driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 8, writable: true }]])
      assert.strictEqual((yield* driver.receive(cpu, 0)).written, 8)
      if (++lives < 3) yield* GuestAcpi.reset(cpu)
      yield* GuestAcpi.powerOff(cpu)
    })
    const again = Effect.updateService(runGuest(program), MachinePolicy, (policy) => ({
      ...policy,
      reset: "run-again" as const
    }))
    const { stop } = Simulation.check(Effect.provide(again, layerHost()))
    assert.deepStrictEqual([stop, lives], [{ _tag: "PowerOff" }, 3])
  })

  it("survive a guest that writes anything to any of them, and a correct driver works after it", () => {
    const write = fc.record({
      window: fc.constantFrom("config", "pages", "calls"),
      offset: fc.oneof(fc.nat(0xff), fc.nat(0x1fff)),
      size: fc.constantFrom<AccessSize>(1, 2, 4),
      value: fc.oneof(fc.constantFrom(0, 1, 3, 8, 11, 15, 0xff, 0x8000, 0xc000, 0xffff_ffff), fc.nat(0xffff_ffff)),
      read: fc.boolean()
    })
    const program = (writes: ReadonlyArray<typeof write extends fc.Arbitrary<infer A> ? A : never>) =>
      GuestProgram.make(function*(cpu) {
        const serial = new SerialDriver()
        yield* serial.setUp(cpu)
        const [place] = yield* findFunctions(cpu)
        if (place === undefined) throw new Error("there is no function")
        yield* startVirtioPci(cpu, place, { memoryAddress: QUEUE_ADDRESS })
        const addresses: Array<readonly [register: number, value: number]> = []
        for (let at = place.config + 0x10; at < place.config + 0x28; at += 4) {
          addresses.push([at, yield* cpu.load(at, 4)])
        }
        for (const { offset, read, size, value, window } of writes) {
          const base = window === "config" ? place.config : window === "pages" ? place.common : place.isr
          const at = base + offset % (window === "pages" ? 0x2000 : 0x1000)
          yield* cpu.store(at, size, size === 4 ? value : value % 2 ** (8 * size))
          if (read) yield* cpu.load(at, size)
        }
        // Who has asked how large the memory is writes back where it was, before anybody else asks where it is.
        for (const [at, value] of addresses) yield* cpu.store(at, 4, value)
        const driver = yield* startEntropy(cpu)
        // What was pending under a mask may have come meanwhile.
        cpu.interrupts.acknowledge(messageInterrupt(0x41))
        yield* driver.send(cpu, 0, [[{ address: DATA_ADDRESS, length: 8, writable: true }]])
        yield* serial.print(cpu, `${(yield* driver.receive(cpu, 0)).written}\n`)
        yield* GuestAcpi.powerOff(cpu)
      })
    fc.assert(
      fc.property(
        fc.array(write, { maxLength: 100, size: "max" }),
        fc.integer(),
        Simulation.property((writes) =>
          Effect.gen(function*() {
            const quiet = Effect.provide(runGuest(program(writes)), layerHost())
            const { log, stop } = yield* Effect.provide(quiet, Logger.layer([]))
            assert.deepStrictEqual([log, stop], [["8"], { _tag: "PowerOff" }])
          })
        )
      ),
      {
        numRuns: 60,
        examples: [[[{ window: "config", offset: 0x10, size: 4, value: 0xffff_ffff, read: false }], 0]]
      }
    )
  })
})
