/** The user-mode network on real sockets of the loopback interface. */
import { assert, describe, it } from "@effect/vitest"
import { NetBackend } from "@troupe/core/NetBackend"
import { EntropySource } from "@troupe/devices/EntropySource"
import { type HostEndpoint, HostSockets } from "@troupe/devices/net/user/HostSockets"
import { allow, allowNetworks, type NetConnection, type NetPolicy, redirect } from "@troupe/devices/net/user/NetPolicy"
import { layerUserNet, type UserNetBackendOptions } from "@troupe/devices/net/user/UserNetBackend"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Scope from "effect/Scope"
import { randomFillSync } from "node:crypto"
import { createSocket, type RemoteInfo } from "node:dgram"
import { connect, createServer, type Server, type Socket } from "node:net"
import { layerWith, type NodeSocketsOptions } from "../../src/net/NodeSockets.ts"
import { GuestEnd } from "./GuestEnd.ts"

const REQUEST = { index: 0, name: "net0", macAddress: "52:55:0a:00:02:0f", enableBridge: false }

const layerEntropy = Layer.succeed(EntropySource, {
  fill: (bytes) => void randomFillSync(bytes)
})

/** A guest at the port of a network. */
const guestOn = (options: UserNetBackendOptions, sockets: NodeSocketsOptions = {}) =>
  Effect.gen(function*() {
    const layer = layerUserNet(options).pipe(Layer.provide([layerWith(sockets), layerEntropy]))
    const services = yield* Layer.build(layer)
    const backend = yield* NetBackend.pipe(Effect.provide(services))
    const port = yield* backend.open(REQUEST)
    return yield* Effect.acquireRelease(Effect.sync(() => new GuestEnd(port)), (guest) =>
      Effect.sync(() => guest.close()))
  })

/** A server on loopback. */
const serve = (handle: (socket: Socket) => void) =>
  Effect.acquireRelease(
    Effect.callback<{ readonly server: Server; readonly port: number; readonly sockets: Set<Socket> }>((resume) => {
      const sockets = new Set<Socket>()
      const server = createServer({ allowHalfOpen: true }, (socket) => {
        sockets.add(socket)
        socket.on("error", () => {})
        socket.on("close", () => sockets.delete(socket))
        handle(socket)
      })
      server.listen(0, "127.0.0.1", () => {
        const address = server.address()
        resume(Effect.succeed({ server, sockets, port: typeof address === "object" ? address!.port : 0 }))
      })
    }),
    ({ server, sockets }) =>
      Effect.sync(() => {
        for (const socket of sockets) socket.destroy()
        server.close()
      })
  )

/** Waits until something is so. */
const until = (what: () => boolean): Effect.Effect<void> =>
  Effect.suspend(() => what() ? Effect.void : Effect.andThen(Effect.sleep("1 millis"), until(what)))

const toLoopback = (port: number): NetPolicy => () => Effect.succeed(redirect("127.0.0.1", port))
const text = (value: string): Uint8Array => new TextEncoder().encode(value)

describe("user-mode network", () => {
  it.live("carries a large stream both ways, and both ends", () =>
    Effect.gen(function*() {
      const received: Array<Buffer> = []
      const size = 8_000_000
      const payload = Buffer.alloc(size, "0123456789abcdef-")
      let ended = false
      const { port } = yield* serve((socket) => {
        socket.on("data", (bytes: Buffer) => received.push(bytes))
        socket.on("end", () => {
          ended = true
          socket.end(payload)
        })
      })
      const guest = yield* guestOn({ policy: toLoopback(port) })
      const stream = guest.connect(80)
      for (let at = 0; at < size; at += 0x8000) {
        stream.events!.data(payload.subarray(at, at + 0x8000))
        if (stream.paused) yield* until(() => !stream.paused)
      }
      stream.events!.end()
      yield* until(() => ended)
      assert.isTrue(payload.equals(Buffer.concat(received)))
      yield* until(() => stream.ended)
      assert.isTrue(payload.equals(Buffer.concat(stream.received)))
    }))

  it.live("holds the host back when the guest does not read, and the guest when the host does not", () =>
    Effect.gen(function*() {
      let peer: Socket | undefined
      const { port } = yield* serve((socket) => {
        peer = socket
        socket.pause()
      })
      const guest = yield* guestOn({ policy: toLoopback(port) })
      const stream = guest.connect(80)
      stream.takes = false
      yield* until(() => peer !== undefined)
      // The guest's side keeps no more than its buffer, whatever the host sends.
      let drained = true
      peer!.on("drain", () => (drained = true))
      const piece = Buffer.alloc(0x1_0000, 1)
      let sent = 0
      for (let quiet = 0; quiet < 20;) {
        if (drained) {
          quiet = 0
          sent += piece.length
          drained = peer!.write(piece)
        } else {
          quiet++
          yield* Effect.sleep("5 millis")
        }
      }
      assert.isAtMost(stream.bytes, 0x8_0000)
      for (let at = 0; !stream.paused; at += piece.length) {
        stream.events!.data(piece)
        yield* Effect.sleep("1 millis")
        assert.isBelow(at, 64 * 2 ** 20)
      }
      // And goes on when it is read.
      stream.takes = true
      stream.take()
      peer!.resume()
      yield* until(() => stream.bytes === sent && !stream.paused)
    }))

  it.live("refuses what nobody listens to, and what the policy does not allow", () =>
    Effect.gen(function*() {
      const { port, server } = yield* serve(() => {})
      yield* Effect.callback<void>((resume) => void server.close(() => resume(Effect.void)))
      const refused = yield* guestOn({ policy: toLoopback(port) })
      const first = refused.connect(80)
      yield* until(() => first.wasReset)
      const asked: Array<NetConnection> = []
      const policy: NetPolicy = (connection) => {
        asked.push(connection)
        throw new Error("a policy with a defect")
      }
      const denied = yield* guestOn({ policy })
      const second = denied.connect(80)
      yield* until(() => second.wasReset)
      assert.deepStrictEqual(asked.map(({ destination }) => destination), [{ address: "192.0.2.1", port: 80 }])
    }))

  it.live("does not reach the host's loopback by default", () =>
    Effect.gen(function*() {
      let connections = 0
      const { port } = yield* serve(() => connections++)
      const layer = layerUserNet().pipe(Layer.provide([layerWith({}), layerEntropy]))
      const backend = yield* NetBackend.pipe(Effect.provide(yield* Layer.build(layer)))
      for (const remote of ["127.0.0.1", "10.0.2.2", "169.254.169.254"]) {
        const guest = new GuestEnd(yield* backend.open(REQUEST), remote)
        const stream = guest.connect(port)
        yield* until(() => stream.wasReset)
        guest.close()
      }
      assert.strictEqual(connections, 0)
    }))

  it.live("takes datagrams to a socket of the host and back, and queries to its name server", () =>
    Effect.gen(function*() {
      const bind = (handle: (bytes: Buffer, from: RemoteInfo, send: (answer: Uint8Array) => void) => void) =>
        Effect.acquireRelease(
          Effect.callback<{ readonly close: () => void; readonly at: HostEndpoint }>((resume) => {
            const socket = createSocket("udp4")
            socket.on(
              "message",
              (bytes, from) => handle(bytes, from, (answer) => socket.send(answer, from.port, from.address))
            )
            socket.bind(0, "127.0.0.1", () =>
              resume(Effect.succeed({
                close: () => socket.close(),
                at: { address: "127.0.0.1", port: socket.address().port }
              })))
          }),
          ({ close }) => Effect.sync(close)
        )
      const echo = yield* bind((bytes, _, send) => send(bytes))
      const queries: Array<Buffer> = []
      const dns = yield* bind((bytes, _, send) => {
        queries.push(bytes)
        send(text("answer"))
      })
      const policy: NetPolicy = (connection) =>
        connection.service === "dns"
          ? allowNetworks(connection)
          : Effect.succeed(redirect(echo.at.address, echo.at.port))
      const guest = yield* guestOn({ policy }, { nameservers: [dns.at] })
      guest.datagram(text("hello"), 7)
      yield* until(() => guest.datagrams.length === 1)
      assert.strictEqual(new TextDecoder().decode(guest.datagrams[0]), "hello")
      // Larger than the MTU: in pieces towards the host and back.
      guest.datagram(new Uint8Array(9000).fill(7), 7)
      yield* until(() => guest.datagrams.length === 2)
      assert.deepStrictEqual(guest.datagrams[1]!.length, 9000)
      const layer = layerUserNet({ policy }).pipe(Layer.provide([layerWith({ nameservers: [dns.at] }), layerEntropy]))
      const backend = yield* NetBackend.pipe(Effect.provide(yield* Layer.build(layer)))
      const asking = new GuestEnd(yield* backend.open(REQUEST), "10.0.2.3")
      asking.datagram(text("query"), 53)
      yield* until(() => asking.datagrams.length === 1)
      assert.strictEqual(queries[0]!.toString(), "query")
      asking.close()
    }))

  it.live("forwards ports of the host, and leaves nothing open when it ends", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const forwards: Array<HostEndpoint> = []
      const host = { address: "127.0.0.1", port: 0 }
      const guest = yield* guestOn({
        policy: () => Effect.succeed(allow),
        forwards: [{ protocol: "tcp", host, guestPort: 22 }, { protocol: "udp", host, guestPort: 53 }],
        onForward: (_, at) => forwards.push(at)
      }).pipe(Scope.provide(scope))
      assert.strictEqual(forwards.length, 2)
      const client = connect(forwards[0]!.port, "127.0.0.1")
      let over = false
      client.on("error", () => {})
      client.on("close", () => (over = true))
      // The guest of this test refuses: its own network sends a RST.
      yield* until(() => over)
      const waiting = connect(forwards[0]!.port, "127.0.0.1")
      waiting.on("error", () => {})
      let closed = false
      waiting.on("close", () => (closed = true))
      yield* Scope.close(scope, Exit.void)
      yield* until(() => closed)
      const late = connect(forwards[0]!.port, "127.0.0.1")
      let failed = false
      late.on("error", () => (failed = true))
      yield* until(() => failed)
      assert.deepStrictEqual(guest.net.usage, { tcp: 0, udp: 0, tcpBytes: 0, lost: 0 })
    }))

  it.live("closes the connections of a guest that goes away, however it goes", () =>
    Effect.gen(function*() {
      const { port, sockets } = yield* serve((socket) => void socket.resume())
      const opened = yield* Deferred.make<void>()
      const running = yield* Effect.forkChild(Effect.scoped(Effect.gen(function*() {
        const guest = yield* guestOn({ policy: toLoopback(port) })
        const streams = [guest.connect(80), guest.connect(81), guest.connect(82)]
        yield* until(() => sockets.size === streams.length)
        yield* Deferred.succeed(opened, undefined)
        return yield* Effect.never
      })))
      yield* Deferred.await(opened)
      yield* Fiber.interrupt(running)
      yield* until(() => sockets.size === 0)
    }))

  it.live("refuses what a policy sends to a place that is none", () =>
    Effect.gen(function*() {
      const guest = yield* guestOn({ policy: () => Effect.succeed(redirect("127.0.0.1", 70_000)) })
      const stream = guest.connect(80)
      yield* until(() => stream.wasReset)
      guest.datagram(text("lost"), 7)
      yield* Effect.sleep("5 millis")
      assert.deepStrictEqual(guest.datagrams, [])
    }))

  it.live("loses an answer to a sender that has no port, as a datagram may say", () =>
    Effect.gen(function*() {
      const sockets = yield* HostSockets.pipe(Effect.provide(yield* Layer.build(layerWith({}))))
      const heard: Array<number> = []
      const other = yield* sockets.bindUdp({ address: "127.0.0.1", port: 0 }, (bytes) => void heard.push(bytes.length))
      const server = yield* sockets.bindUdp({ address: "127.0.0.1", port: 0 }, () => {})
      server.send({ address: "127.0.0.1", port: 0 }, Uint8Array.of(1, 2))
      server.send(other.address, Uint8Array.of(1))
      yield* until(() => heard.length === 1)
      assert.deepStrictEqual(heard, [1])
    }))

  it.live("listens nowhere when it is interrupted before it does", () =>
    Effect.gen(function*() {
      const sockets = yield* HostSockets.pipe(Effect.provide(yield* Layer.build(layerWith({}))))
      const { port } = yield* Effect.scoped(sockets.listenTcp({ address: "127.0.0.1", port: 0 }, () => undefined))
      const listening = yield* Effect.forkChild(
        Effect.scoped(Effect.andThen(sockets.listenTcp({ address: "127.0.0.1", port }, () => undefined), Effect.never)),
        { startImmediately: true }
      )
      yield* Fiber.interrupt(listening)
      for (let i = 0; i < 5; i++) yield* Effect.yieldNow
      const client = connect(port, "127.0.0.1")
      let failure: string | undefined
      client.on("error", (error) => (failure = "code" in error ? String(error.code) : error.message))
      yield* until(() => failure !== undefined)
      assert.strictEqual(failure, "ECONNREFUSED")
    }))

  it.live("says which port of the host is taken", () =>
    Effect.gen(function*() {
      const { port } = yield* serve(() => {})
      const host = { address: "127.0.0.1", port }
      const failure = yield* Effect.flip(guestOn({ forwards: [{ protocol: "tcp", host, guestPort: 22 }] }))
      assert.include(failure.message, `127.0.0.1:${port}`)
    }))
})
