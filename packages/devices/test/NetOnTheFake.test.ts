/** The network device in whole machines on the fake hypervisor, with networks that are streams of frames. */
import { assert, describe, it } from "@effect/vitest"
import type { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import type { NetSpec } from "@troupe/core/GuestConfig"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { NetBackend, NetBackendError } from "@troupe/core/NetBackend"
import type { NetEvent } from "@troupe/core/NetInterfaces"
import * as NetStreams from "@troupe/core/NetStreams"
import { DeviceDefects, FakeHypervisor, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import { NetDriverFeature as F, startNet } from "@troupe/core/testing/drivers/NetDriver"
import { SerialDriver } from "@troupe/core/testing/drivers/SerialDriver"
import type { GuestCpu } from "@troupe/core/testing/GuestCpu"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Ref from "effect/Ref"
import * as References from "effect/References"
import * as Stream from "effect/Stream"
import * as fc from "fast-check"
import { layer } from "../src/Catalog.ts"
import { EntropySource } from "../src/EntropySource.ts"
import { netPolicy } from "../src/Net.ts"

const MEMORY_ADDRESS = 0x10_0000
const MEMORY_SIZE = 0x20_0000
const SPEC: NetSpec = { macAddress: "02:00:00:00:00:01", enableBridge: false }

const layerHost = (network: Layer.Layer<NetBackend>, defects?: DeviceDefects.DeviceDefects) => {
  const devices: Layer.Layer<DeviceCatalog> = layer.pipe(
    Layer.provide(EntropySource.layerRandom),
    Layer.provide(network)
  )
  const catalog = defects === undefined
    ? devices
    : DeviceDefects.layer((device) =>
      device.name.startsWith("net") ? { ...DeviceDefects.breaking(device, defects), policy: netPolicy } : device
    ).pipe(Layer.provide(devices))
  return GuestLifecycle.layer.pipe(Layer.provideMerge(Layer.merge(FakeHypervisor.layer(), catalog)))
}

const configOf = (program: GuestProgram.GuestProgram, netDevices: ReadonlyArray<NetSpec> = [SPEC]) => ({
  kernelType: "LINUX" as const,
  kernel: GuestProgram.kernel(program),
  cpus: 1,
  guestMemory: "4M",
  netDevices
})

/** Runs a program to its end; `drive` is the host's part. Returns what it printed. */
const runGuest = <E = never>(
  config: ReturnType<typeof configOf>,
  drive: (lifecycle: GuestLifecycle["Service"]) => Effect.Effect<unknown, E> = () => Effect.void
) =>
  Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create(config)
    const serial = yield* (yield* lifecycle.bind).getSerial
    const host = yield* Effect.forkChild(drive(lifecycle))
    assert.deepStrictEqual(yield* lifecycle.run, { _tag: "PowerOff" })
    yield* Fiber.join(host)
    const fake = yield* FakeHypervisor.FakeHypervisor
    assert.deepStrictEqual(yield* fake.violations, [])
    assert.deepStrictEqual(yield* fake.openResources, [])
    return serial.log()
  })

const placeOf = (cpu: GuestCpu, index = 0) => {
  const place = GuestAcpi.find(cpu).virtioMmio[index]
  return place ?? assert.fail("the machine has no such device")
}

const frameOf = (length: number, seed: number) => Uint8Array.from({ length }, (_, i) => (i * 7 + seed) & 0xff)
const sum = (bytes: Uint8Array) => bytes.reduce((sum, byte) => (sum * 31 + byte) % 65_521, 1)

/** Sends frames while it receives those that come, and prints what came. */
const talking = (lengths: ReadonlyArray<number>, answers: number, features: ReadonlyArray<number>) =>
  GuestProgram.make(function*(cpu) {
    const serial = new SerialDriver()
    yield* serial.setUp(cpu)
    const driver = yield* startNet(cpu, placeOf(cpu), {
      memoryAddress: MEMORY_ADDRESS,
      memorySize: MEMORY_SIZE,
      queueSize: 16,
      features
    })
    const supply = function*() {
      while (yield* driver.supply([1600]));
    }
    yield* supply()
    let received = 0
    for (const [seed, length] of lengths.entries()) {
      while (!(yield* driver.send(frameOf(length, seed)))) {
        driver.reclaim()
        yield* cpu.yield()
      }
    }
    while (received < answers) {
      const frame = yield* driver.receive()
      received++
      yield* serial.print(cpu, `${frame.bytes.length} ${sum(frame.bytes)}\n`)
      yield* supply()
    }
    yield* GuestAcpi.powerOff(cpu)
  })

const echo = NetStreams.layer(({ fromGuest, toGuest }) => Stream.run(fromGuest, toGuest), { framesWaiting: 3 })

describe("The network device in a machine", () => {
  it("carries frames both ways, in order, whatever happens when", () => {
    fc.assert(
      fc.property(
        fc.array(fc.integer({ min: 14, max: 1514 }), { minLength: 1, maxLength: 12, size: "max" }),
        fc.integer(),
        Simulation.property((lengths) =>
          Effect.gen(function*() {
            const program = talking(lengths, lengths.length, [F.MRG_RXBUF])
            const log = yield* Effect.provide(runGuest(configOf(program)), layerHost(echo))
            assert.deepStrictEqual(log, lengths.map((length, seed) => `${length} ${sum(frameOf(length, seed))}`))
          })
        )
      ),
      { numRuns: 60 }
    )
  })

  it("has an interface of its own for each that is asked for", () => {
    Simulation.explore(
      Effect.gen(function*() {
        const seen = yield* Ref.make<ReadonlyArray<string>>([])
        const network = Layer.effect(
          NetBackend,
          Effect.map(NetStreams.make(({ fromGuest, toGuest }) => Stream.run(fromGuest, toGuest)), (backend) => ({
            open: (request) =>
              Ref.update(seen, (list) => [...list, `${request.index} ${request.name} ${request.macAddress}`]).pipe(
                Effect.andThen(backend.open(request))
              )
          }))
        )
        const program = GuestProgram.make(function*(cpu) {
          const serial = new SerialDriver()
          yield* serial.setUp(cpu)
          for (const index of [0, 1]) {
            const driver = yield* startNet(cpu, placeOf(cpu, index), {
              memoryAddress: MEMORY_ADDRESS + index * 0x8_0000,
              memorySize: 0x8_0000,
              queueSize: 16
            })
            yield* driver.supply([1600])
            yield* driver.send(frameOf(60 + index, 1))
            yield* serial.print(cpu, `${(yield* driver.receive()).bytes.length}\n`)
          }
          yield* GuestAcpi.powerOff(cpu)
        })
        const config = configOf(program, [SPEC, { ...SPEC, macAddress: "02:00:00:00:00:0B" }])
        const watch = (lifecycle: GuestLifecycle["Service"]) =>
          Effect.gen(function*() {
            const { interfaces } = yield* (yield* lifecycle.bind).getNetInterfaces
            assert.deepStrictEqual(interfaces.map(({ index, name }) => [index, name]), [[0, "net0"], [1, "net1"]])
          })
        assert.deepStrictEqual(yield* Effect.provide(runGuest(config, watch), layerHost(network)), ["60", "61"])
        assert.deepStrictEqual(yield* Ref.get(seen), ["0 net0 02:00:00:00:00:01", "1 net1 02:00:00:00:00:0b"])
      }),
      10
    )
  })

  it("tells the guest of its link, and the host of the guest", () => {
    Simulation.explore(
      Effect.gen(function*() {
        const program = GuestProgram.make(function*(cpu) {
          const serial = new SerialDriver()
          yield* serial.setUp(cpu)
          const place = placeOf(cpu)
          const driver = yield* startNet(cpu, place, {
            memoryAddress: MEMORY_ADDRESS,
            memorySize: MEMORY_SIZE,
            features: [F.STATUS]
          })
          for (const wanted of [0, 1]) {
            for (;;) {
              const [status] = yield* driver.virtio.configuration(cpu, [{ offset: 6, size: 2 }])
              if (status === wanted) break
              yield* cpu.waitForInterrupt(place.gsi)
              yield* driver.virtio.handleInterrupt(cpu)
            }
            yield* serial.print(cpu, `link ${wanted}\n`)
          }
          yield* GuestAcpi.powerOff(cpu)
        })
        const events: Array<NetEvent["_tag"]> = []
        const drive = (lifecycle: GuestLifecycle["Service"]) =>
          Effect.gen(function*() {
            const { interfaces } = yield* (yield* lifecycle.bind).getNetInterfaces
            const net = interfaces[0] ?? assert.fail("no interface")
            yield* Effect.forkChild(Stream.runForEach(net.events, ({ _tag }) => Effect.sync(() => events.push(_tag))))
            yield* Effect.sleep("1 second")
            yield* net.setLink(false)
            yield* net.setLink(false)
            assert.isFalse(net.linkUp())
            yield* Effect.sleep("1 second")
            yield* net.setLink(true)
          })
        const log = yield* Effect.provide(runGuest(configOf(program), drive), layerHost(echo))
        assert.deepStrictEqual(log, ["link 0", "link 1"])
        assert.deepStrictEqual(events.slice(0, 3), ["DriverReady", "LinkChanged", "LinkChanged"])
      }),
      10
    )
  })

  it("has no link when its network has failed, and the machine goes on", () => {
    Simulation.explore(
      Effect.gen(function*() {
        const program = GuestProgram.make(function*(cpu) {
          const place = placeOf(cpu)
          const driver = yield* startNet(cpu, place, {
            memoryAddress: MEMORY_ADDRESS,
            memorySize: MEMORY_SIZE,
            features: [F.STATUS]
          })
          yield* driver.send(frameOf(60, 0))
          for (;;) {
            const [status] = yield* driver.virtio.configuration(cpu, [{ offset: 6, size: 2 }])
            if (status === 0) break
            yield* cpu.waitForInterrupt(place.gsi)
            yield* driver.virtio.handleInterrupt(cpu)
          }
          // What is sent now is lost, and its buffers come back.
          for (let i = 0; i < 20; i++) {
            yield* driver.send(frameOf(60, i))
            while (driver.reclaim() === 0) yield* cpu.yield()
          }
          yield* GuestAcpi.powerOff(cpu)
        })
        const failing = NetStreams.layer(({ fromGuest }) =>
          Stream.runForEach(fromGuest, () => Effect.fail("the network is full of holes"))
        )
        yield* Effect.provide(runGuest(configOf(program)), layerHost(failing)).pipe(
          Effect.provideService(References.MinimumLogLevel, "Error")
        )
      }),
      20
    )
  })

  it("is started again when it breaks, at any point, and the driver that resets it goes on", () => {
    const wanted = 12
    const program = GuestProgram.make(function*(cpu) {
      const serial = new SerialDriver()
      yield* serial.setUp(cpu)
      const place = placeOf(cpu)
      const start = () =>
        startNet(cpu, place, {
          memoryAddress: MEMORY_ADDRESS,
          memorySize: MEMORY_SIZE,
          queueSize: 16,
          features: [F.MRG_RXBUF]
        })
      let answered = 0
      while (answered < wanted) {
        try {
          const driver = yield* start()
          yield* driver.supply([1600])
          yield* driver.send(frameOf(60, answered))
          for (let tries = 0; tries < 20; tries++) {
            const frame = driver.poll()
            if (frame !== undefined) {
              // What the network had for the driver before it was reset may come first.
              if (sum(frame.bytes) === sum(frameOf(60, answered))) answered++
              break
            }
            yield* cpu.sleep(20)
          }
        } catch (cause) {
          if (!/refuses|reset/.test(String(cause))) throw cause
          yield* cpu.sleep(50)
        }
      }
      yield* serial.print(cpu, `${answered} answers\n`)
      yield* GuestAcpi.powerOff(cpu)
    })
    const counted = new DeviceDefects.DeviceDefects()
    Simulation.check(Effect.provide(runGuest(configOf(program)), layerHost(echo, counted)))
    assert.isAbove(counted.points(), 100)
    fc.assert(
      fc.property(
        fc.uniqueArray(fc.nat(counted.points() - 1), { minLength: 1, maxLength: 3 }),
        fc.integer(),
        Simulation.property((points) =>
          Effect.gen(function*() {
            const defects = new DeviceDefects.DeviceDefects((point, place) =>
              place !== "start" && points.includes(point)
            )
            const log = yield* Effect.provide(runGuest(configOf(program)), layerHost(echo, defects)).pipe(
              Effect.provideService(References.MinimumLogLevel, "Error")
            )
            assert.deepStrictEqual(log, [`${wanted} answers`])
          })
        )
      ),
      { numRuns: 100 }
    )
  })

  it("refuses a machine whose interface has no network, and says what to do", () => {
    const program = GuestProgram.make(function*(cpu) {
      yield* GuestAcpi.powerOff(cpu)
    })
    const create = Effect.flatMap(GuestLifecycle, (lifecycle) => Effect.flip(lifecycle.create(configOf(program))))
    const none = GuestLifecycle.layer.pipe(
      Layer.provide(Layer.merge(FakeHypervisor.layer(), Layer.provide(layer, EntropySource.layerRandom)))
    )
    assert.match(Simulation.check(Effect.provide(create, none)).message, /no network[^]*NetBackend/)
    const refusing = Layer.succeed(NetBackend, {
      open: () => Effect.fail(new NetBackendError({ operation: "open it", detail: "it is raining", hint: "Wait" }))
    })
    assert.match(Simulation.check(Effect.provide(create, layerHost(refusing))).message, /it is raining[^]*Wait/)
  })
})
