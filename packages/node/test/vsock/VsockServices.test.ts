/** Services of Node and Effect on a guest's vsock ports: whole machines on the fake hypervisor, real streams and sockets of the host. */
import { assert, describe, it } from "@effect/vitest"
import type { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { HostVsockEndpoint } from "@troupe/core/HostVsockEndpoint"
import { FakeHypervisor, GuestAcpi, GuestProgram } from "@troupe/core/testing"
import { startVsock, type VsockDriver, VsockStream } from "@troupe/core/testing/drivers/VsockDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import { layerVsock, VsockManager } from "@troupe/vsock"
import * as Effect from "effect/Effect"
import * as HttpServer from "effect/http/HttpServer"
import * as HttpServerRequest from "effect/http/HttpServerRequest"
import * as HttpServerResponse from "effect/http/HttpServerResponse"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import * as Socket from "effect/socket/Socket"
import { SocketServer } from "effect/socket/SocketServer"
import * as Stream from "effect/Stream"
import { mkdtempSync, rmSync } from "node:fs"
import { connect, createServer } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import * as VsockEffectSocket from "../../src/vsock/VsockEffectSocket.ts"
import * as VsockHttpServer from "../../src/vsock/VsockHttpServer.ts"
import * as VsockUnixSockets from "../../src/vsock/VsockUnixSockets.ts"

const catalog: Layer.Layer<DeviceCatalog> = layerVsock.pipe(
  Layer.provide(VsockManager.layer),
  Layer.provide(layerDevices),
  Layer.provide(EntropySource.layerRandom)
)
const layerHost = GuestLifecycle.layer.pipe(Layer.provide(Layer.merge(FakeHypervisor.layer(), catalog)))

const guestOf = (work: (cpu: GuestCpu, vsock: VsockDriver) => GuestRoutine) =>
  GuestProgram.make(function*(cpu) {
    const place = GuestAcpi.find(cpu).virtioMmio[0]
    if (place === undefined) throw new Error("the machine has no virtio device")
    yield* work(cpu, yield* startVsock(cpu, place, { memoryAddress: 0x18_0000 }))
    yield* GuestAcpi.powerOff(cpu)
  })

/** Runs a guest once the host has set its services up. */
const run = <E>(
  program: GuestProgram.GuestProgram,
  setUp: (endpoint: HostVsockEndpoint["Service"]) => Effect.Effect<unknown, E, Scope.Scope>
) =>
  Effect.scoped(Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({
      kernelType: "LINUX",
      kernel: GuestProgram.kernel(program),
      cpus: 1,
      guestMemory: "2M",
      virtioVsock: true
    })
    yield* setUp(yield* (yield* lifecycle.bind).getHostVsockEndpoint)
    yield* lifecycle.run
  })).pipe(Effect.provide(layerHost))

function* readAll(cpu: GuestCpu, stream: VsockStream): GuestRoutine<string> {
  let text = ""
  for (let bytes = yield* stream.read(cpu); bytes !== undefined; bytes = yield* stream.read(cpu)) {
    text += new TextDecoder().decode(bytes)
  }
  return text
}

const encode = (text: string) => new TextEncoder().encode(text)

function* connectTo(cpu: GuestCpu, vsock: VsockDriver, port: number): GuestRoutine<VsockStream> {
  const stream = yield* VsockStream.connect(cpu, vsock, 1024, port)
  if (stream === undefined) throw new Error("refused")
  return stream
}

describe("An HTTP server on a guest's port", () => {
  it.live("answers the guest", () =>
    Effect.gen(function*() {
      let answer = ""
      const program = guestOf(function*(cpu, vsock) {
        const stream = yield* connectTo(cpu, vsock, 80)
        const body = "x".repeat(70_000)
        yield* stream.write(
          cpu,
          encode(`POST /echo HTTP/1.1\r\nHost: host\r\nConnection: close\r\nContent-Length: ${body.length}\r\n\r\n`)
        )
        yield* stream.write(cpu, encode(body))
        answer = yield* readAll(cpu, stream)
      })
      const app = Effect.gen(function*() {
        const request = yield* HttpServerRequest.HttpServerRequest
        return HttpServerResponse.text(`${request.method} ${request.url} ${(yield* request.text).length}`)
      })
      yield* run(program, (endpoint) =>
        Layer.build(
          HttpServer.serve(app).pipe(
            Layer.provide(VsockHttpServer.layer(80)),
            Layer.provide(Layer.succeed(HostVsockEndpoint, endpoint))
          )
        ))
      assert.match(answer, /^HTTP\/1\.1 200 OK\r\n/)
      assert.match(answer, /POST \/echo 70000/)
    }))
})

describe("Effect's sockets", () => {
  it.live("serve a guest, and end as it does", () =>
    Effect.gen(function*() {
      let answer = ""
      const program = guestOf(function*(cpu, vsock) {
        const stream = yield* connectTo(cpu, vsock, 7)
        yield* stream.write(cpu, encode("echo"))
        const bytes = yield* stream.read(cpu)
        answer = new TextDecoder().decode(bytes)
        yield* stream.close(cpu)
      })
      yield* run(program, (endpoint) =>
        Effect.gen(function*() {
          const server = yield* VsockEffectSocket.makeServer(endpoint, 7)
          assert.strictEqual(SocketServer.of(server).address._tag, "UnixPathAddress")
          yield* Effect.forkScoped(server.run((socket) =>
            Effect.scoped(Effect.gen(function*() {
              const writer = yield* socket.writer
              yield* Stream.runForEach(Socket.toStream(socket), (bytes) => writer.write(bytes))
            }))
          ))
        }))
      assert.strictEqual(answer, "echo")
    }))
})

describe("Unix sockets", () => {
  const inFolder = <A, E, R>(use: (path: string) => Effect.Effect<A, E, R>) =>
    Effect.acquireUseRelease(
      Effect.sync(() => mkdtempSync(join(tmpdir(), "vsock-"))),
      (folder) => use(join(folder, "v.sock")),
      (folder) => Effect.sync(() => rmSync(folder, { recursive: true }))
    )

  it.live("reach a guest's port by the line CONNECT", () =>
    inFolder((path) =>
      Effect.gen(function*() {
        const program = guestOf(function*(cpu, vsock) {
          const stream = yield* VsockStream.accept(cpu, vsock, 5000)
          const question = yield* stream.read(cpu)
          if (question !== undefined) yield* stream.write(cpu, question.toReversed())
          while ((yield* stream.read(cpu)) !== undefined);
        })
        let answer = ""
        yield* run(program, (endpoint) =>
          Effect.gen(function*() {
            yield* VsockUnixSockets.serve(endpoint, path)
            yield* Effect.acquireRelease(
              Effect.sync(() => {
                const client = connect(path)
                client.on("data", (bytes) => {
                  answer += bytes.toString()
                  if (answer.endsWith("cba")) client.end()
                })
                client.write("CONNECT 5000\nabc")
                return client
              }),
              (client) => Effect.sync(() => client.destroy())
            )
          }))
        assert.strictEqual(answer, "OK 49152\ncba")
      })
    ))

  it.live("are reached by the guest at the path of the port", () =>
    inFolder((path) =>
      Effect.gen(function*() {
        let answer = ""
        const program = guestOf(function*(cpu, vsock) {
          const refused = yield* VsockStream.connect(cpu, vsock, 1000, 53)
          assert.isUndefined(refused)
          const stream = yield* connectTo(cpu, vsock, 52)
          yield* stream.write(cpu, encode("guest"))
          answer = yield* readAll(cpu, stream)
        })
        yield* run(program, (endpoint) =>
          Effect.gen(function*() {
            yield* VsockUnixSockets.serve(endpoint, path)
            yield* Effect.acquireRelease(
              Effect.callback<ReturnType<typeof createServer>>((resume) => {
                const server = createServer((client) =>
                  client.once("data", (bytes) => client.end(`hello ${bytes.toString()}`))
                )
                server.listen(`${path}_52`, () => resume(Effect.succeed(server)))
              }),
              (server) => Effect.sync(() => server.close())
            )
          }))
        assert.strictEqual(answer, "hello guest")
      })
    ))
})
