/** The socket device in whole machines on the fake hypervisor. */
import { assert, describe, it } from "@effect/vitest"
import type { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { type HostVsockAcceptor, type HostVsockEndpoint, VsockError } from "@troupe/core/HostVsockEndpoint"
import { FakeHypervisor, GuestAcpi, GuestProgram } from "@troupe/core/testing"
import { startVsock, type VsockDriver, VsockStream } from "@troupe/core/testing/drivers/VsockDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Metric from "effect/Metric"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { layerVsock, VsockManager } from "../src/index.ts"

const catalog: Layer.Layer<DeviceCatalog> = layerVsock.pipe(
  Layer.provide(VsockManager.layer),
  Layer.provide(layerDevices),
  Layer.provide(EntropySource.layerRandom)
)
const layerHost = GuestLifecycle.layer.pipe(Layer.provideMerge(Layer.merge(FakeHypervisor.layer(), catalog)))

/** A guest that does this with its socket device, and powers off. */
const guestOf = (work: (cpu: GuestCpu, vsock: VsockDriver) => GuestRoutine) =>
  GuestProgram.make(function*(cpu) {
    const place = GuestAcpi.find(cpu).virtioMmio[0]
    if (place === undefined) throw new Error("the machine has no virtio device")
    const vsock = yield* startVsock(cpu, place, { memoryAddress: 0x18_0000 })
    yield* work(cpu, vsock)
    yield* GuestAcpi.powerOff(cpu)
  })

/** Runs the guest with the host's part beside it. */
const run = <A, E>(
  program: GuestProgram.GuestProgram,
  host: (endpoint: HostVsockEndpoint["Service"]) => Effect.Effect<A, E, Scope.Scope>,
  listeners: ReadonlyArray<{ readonly port: number; readonly acceptor?: HostVsockAcceptor }> = []
) =>
  Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({
      kernelType: "LINUX",
      kernel: GuestProgram.kernel(program),
      cpus: 1,
      guestMemory: "2M",
      virtioVsock: true,
      vsockListeners: listeners
    })
    const endpoint = yield* (yield* lifecycle.bind).getHostVsockEndpoint
    const fiber = yield* Effect.forkChild(Effect.scoped(host(endpoint)), { startImmediately: true })
    const stop = yield* lifecycle.run
    const result = yield* Fiber.join(fiber)
    const fake = yield* FakeHypervisor.FakeHypervisor
    assert.deepStrictEqual(yield* fake.violations, [])
    assert.deepStrictEqual(yield* fake.openResources, [])
    return { stop, result }
  }).pipe(Effect.provide(layerHost))

const bytesOf = (length: number, seed: number) => Uint8Array.from({ length }, (_, index) => (index * 31 + seed) & 0xff)

const joined = (chunks: ReadonlyArray<Uint8Array>) => {
  const bytes = new Uint8Array(chunks.reduce((sum, chunk) => sum + chunk.length, 0))
  let at = 0
  for (const chunk of chunks) {
    bytes.set(chunk, at)
    at += chunk.length
  }
  return bytes
}

describe("A guest", () => {
  it.effect("has an echo service on the host", () =>
    Effect.gen(function*() {
      const sent = bytesOf(200_000, 1)
      const got: Array<Uint8Array> = []
      const program = guestOf(function*(cpu, vsock) {
        assert.strictEqual(vsock.cid, 3)
        const stream = yield* VsockStream.connect(cpu, vsock, 1024, 7)
        if (stream === undefined) throw new Error("refused")
        for (let at = 0; at < sent.length; at += 40_000) {
          const part = sent.subarray(at, at + 40_000)
          yield* stream.write(cpu, part)
          for (let left = part.length; left > 0;) {
            const bytes = yield* stream.read(cpu)
            if (bytes === undefined) throw new Error("ended")
            got.push(bytes)
            left -= bytes.length
          }
        }
        yield* stream.close(cpu)
      })
      yield* run(program, () => Effect.void, [{
        port: 7,
        acceptor: () => Effect.succeed((socket) => Stream.runForEach(socket.input, (bytes) => socket.write(bytes)))
      }])
      assert.deepStrictEqual(joined(got), sent)
    }))

  it.effect("is connected to by the host, which may begin before there is a driver", () =>
    Effect.gen(function*() {
      const program = guestOf(function*(cpu, vsock) {
        const stream = yield* VsockStream.accept(cpu, vsock, 80)
        const question = yield* stream.read(cpu)
        if (question !== undefined) yield* stream.write(cpu, question.toReversed())
        while ((yield* stream.read(cpu)) !== undefined);
      })
      const { result } = yield* run(program, (endpoint) =>
        Effect.gen(function*() {
          const socket = yield* endpoint.connect2(80)
          yield* socket.write(bytesOf(5, 0))
          return yield* socket.read
        }))
      assert.deepStrictEqual(result, bytesOf(5, 0).toReversed())
    }))

  it.effect("refuses the host's connection, and the host hears why", () =>
    Effect.gen(function*() {
      const program = guestOf(function*(cpu, vsock) {
        const request = yield* vsock.receive(cpu)
        yield* vsock.send(cpu, { op: 3, srcPort: request.dstPort, dstPort: request.srcPort })
      })
      const { result } = yield* run(program, (endpoint) => Effect.flip(endpoint.connect2(81)))
      assert.instanceOf(result, VsockError)
      assert.deepInclude(result, { status: "CONNECTION_REFUSED", guestPort: 81 })
    }))
})

describe("The last words of a guest", () => {
  it.effect("reach a handler that has not read them when the machine ends", () =>
    Effect.gen(function*() {
      const heard = yield* Deferred.make<{ readonly bytes: number; readonly error: string }>()
      const words = bytesOf(30_000, 7)
      const program = guestOf(function*(cpu, vsock) {
        const stream = yield* VsockStream.connect(cpu, vsock, 1024, 7)
        yield* stream?.write(cpu, words) ?? []
      })
      const acceptor: HostVsockAcceptor = () =>
        Effect.succeed((socket) =>
          Effect.gen(function*() {
            let bytes = 0
            const error = yield* Effect.flip(Stream.runForEach(socket.input, (chunk) =>
              Effect.gen(function*() {
                assert.deepStrictEqual(chunk, words.subarray(bytes, bytes + chunk.length))
                for (let i = 0; i < 100; i++) yield* Effect.yieldNow
                bytes += chunk.length
              })))
            yield* Deferred.succeed(heard, { bytes, error: error.status })
          })
        )
      const lifecycle = yield* GuestLifecycle
      yield* lifecycle.create({
        kernelType: "LINUX",
        kernel: GuestProgram.kernel(program),
        cpus: 1,
        guestMemory: "2M",
        virtioVsock: true,
        vsockListeners: [{ port: 7, acceptor }]
      })
      yield* lifecycle.run
      // The guest did not end its data, so its host must not take it for all there is.
      assert.deepStrictEqual(yield* Deferred.await(heard), { bytes: words.length, error: "PEER_CLOSED" })
    }).pipe(Effect.provide(layerHost)))
})

describe("A greedy connection", () => {
  it.effect("has others wait for what the guest's queue holds and one packet of each", () =>
    Effect.gen(function*() {
      const MODEST = 8
      const PACKETS = 50
      const BUFFERS = 8
      let worst = 0
      let greedyPackets = 0
      const program = guestOf(function*(cpu, vsock) {
        const credit = { bufAlloc: 2 ** 31 }
        for (let port = 0; port <= MODEST; port++) {
          yield* vsock.send(cpu, { ...credit, op: 1, srcPort: 1000 + port, dstPort: port === 0 ? 7 : 8 })
        }
        const since = new Map<number, number>()
        const counts = new Map<number, number>()
        while (counts.size < MODEST || Math.min(...counts.values()) < PACKETS) {
          const { dstPort, op } = yield* vsock.receive(cpu)
          if (op !== 5) continue
          if (dstPort === 1000) greedyPackets++
          for (const [port, count] of since) {
            if (port !== dstPort) since.set(port, count + 1)
          }
          const waited = since.get(dstPort)
          if (dstPort === 1000) continue
          const count = (counts.get(dstPort) ?? 0) + 1
          counts.set(dstPort, count)
          if (count === PACKETS) since.delete(dstPort)
          else since.set(dstPort, 0)
          worst = Math.max(worst, waited ?? 0)
        }
      })
      yield* run(program, () => Effect.void, [
        { port: 7, acceptor: () => Effect.succeed((socket) => socket.write(new Uint8Array(16 * 2 ** 20))) },
        {
          port: 8,
          acceptor: () =>
            Effect.succeed((socket) =>
              Effect.andThen(Effect.replicateEffect(socket.write(bytesOf(1, 0)), PACKETS), Effect.never)
            )
        }
      ])
      assert.isAtLeast(greedyPackets, PACKETS)
      assert.isAtMost(worst, BUFFERS + MODEST)
    }))
})

describe("The fibers of a machine", () => {
  it.effect("are as many after its connections as before, however those ended", () => {
    let alive = 0
    const counter: Metric.FiberRuntimeMetricsService = {
      recordFiberStart: () => void alive++,
      recordFiberEnd: () => void alive--
    }
    return Effect.gen(function*() {
      const counts: Array<number> = []
      const program = guestOf(function*(cpu, vsock) {
        for (let round = 0; round < 40; round++) {
          for (const port of [7, 8, 9]) {
            const stream = yield* VsockStream.connect(cpu, vsock, 2000 + round, port)
            if (stream === undefined) throw new Error("refused")
            yield* stream.write(cpu, bytesOf(10, round))
            yield* stream.read(cpu)
            if (round % 2 === 0 || port === 9) yield* stream.close(cpu)
            else yield* vsock.send(cpu, { op: 3, srcPort: stream.port, dstPort: stream.hostPort })
            // An answer to a packet of no connection: the host has done what came before.
            yield* vsock.send(cpu, { op: 5, srcPort: 1, dstPort: 1 })
            while ((yield* vsock.receive(cpu)).dstPort !== 1);
          }
          counts.push(alive)
        }
      })
      yield* run(program, () => Effect.void, [
        {
          port: 7,
          acceptor: () => Effect.succeed((socket) => Stream.runForEach(socket.input, (bytes) => socket.write(bytes)))
        },
        {
          port: 8,
          acceptor: () =>
            Effect.succeed((socket) =>
              Effect.gen(function*() {
                yield* Effect.forkScoped(Effect.never)
                yield* Effect.forkChild(Effect.never)
                yield* socket.write(bytesOf(1, 0))
                yield* socket.closed
              })
            )
        },
        {
          port: 9,
          acceptor: () => Effect.succeed((socket) => Effect.andThen(socket.write(bytesOf(1, 0)), Effect.die("as told")))
        }
      ])
      assert.strictEqual(counts.length, 40)
      assert.deepStrictEqual(new Set(counts.slice(1)), new Set([counts[1]]))
    }).pipe(Effect.provideService(Metric.FiberRuntimeMetrics, counter))
  })
})
