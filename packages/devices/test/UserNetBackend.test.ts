/** The user-mode network as a service: its policy as fibers, its deadlines in virtual time, its end. */
import { assert, describe, it } from "@effect/vitest"
import { NetBackend, type NetPort } from "@troupe/core/NetBackend"
import { NetFrame } from "@troupe/core/NetFrame"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Scope from "effect/Scope"
import { TestClock } from "effect/testing"
import { EntropySource } from "../src/EntropySource.ts"
import { HostSockets } from "../src/net/user/HostSockets.ts"
import { allow } from "../src/net/user/NetPolicy.ts"
import { layerUserNet, type UserNetBackendOptions } from "../src/net/user/UserNetBackend.ts"
import { FakeSockets } from "./net/FakeSockets.ts"
import { parseTcp, RST, SYN, tcp, udp } from "./net/ReferenceGuest.ts"

const REMOTE = 0xc000_0201
const REQUEST = { index: 0, name: "net0", macAddress: "02:00:00:00:00:01", enableBridge: false }

const open = (options: UserNetBackendOptions, request: Partial<typeof REQUEST> = {}) =>
  Effect.gen(function*() {
    const sockets = new FakeSockets()
    const layer = layerUserNet(options).pipe(
      Layer.provide(Layer.succeed(HostSockets, sockets.service)),
      Layer.provide(EntropySource.layerRandom)
    )
    const backend = yield* NetBackend.pipe(Effect.provide(yield* Layer.build(layer)))
    const port = yield* backend.open({ ...REQUEST, ...request })
    return { sockets, port }
  })

const send = (port: NetPort, bytes: Uint8Array): void => {
  const frame = new NetFrame()
  frame.add(Uint8Array.from(bytes), 0, bytes.length)
  port.send(frame)
  port.flush?.()
}

const receive = (port: NetPort): Uint8Array | undefined => {
  const buffer = new Uint8Array(2000)
  const frame = new NetFrame()
  frame.add(buffer, 0, buffer.length)
  const length = port.receive(frame)
  return length > 0 ? buffer.slice(0, length) : undefined
}

const syn = tcp({ sourcePort: 1, destinationPort: 80, destination: REMOTE, sequence: 100, flags: SYN })

describe("layerUserNet", () => {
  it.effect("ends what is silent when its time has come", () =>
    Effect.gen(function*() {
      const { port, sockets } = yield* open({})
      send(port, udp(1, 7, Uint8Array.of(1), { destination: REMOTE }))
      yield* Effect.yieldNow
      assert.strictEqual(sockets.open, 1)
      yield* TestClock.adjust("119 seconds")
      assert.strictEqual(sockets.open, 1)
      yield* TestClock.adjust("1 second")
      assert.strictEqual(sockets.open, 0)
    }))

  it.effect("repeats what is not answered, and tells the device", () =>
    Effect.gen(function*() {
      const { port, sockets } = yield* open({})
      let told = 0
      port.listen({ readable: () => told++, writable: () => {}, linkChanged: () => {} })
      send(port, syn)
      yield* Effect.yieldNow
      sockets.tcp[0]!.connect()
      assert.strictEqual(told, 1)
      const first = parseTcp(receive(port)!)
      assert.isUndefined(receive(port))
      yield* TestClock.adjust("999 millis")
      assert.strictEqual(told, 1)
      yield* TestClock.adjust("1 millis")
      assert.strictEqual(told, 2)
      assert.deepStrictEqual(parseTcp(receive(port)!), first)
    }))

  it.effect("waits for a policy that takes its time, and interrupts it when nobody waits any more", () =>
    Effect.gen(function*() {
      let interrupted = 0
      const { port, sockets } = yield* open({
        policy: () =>
          Effect.as(Effect.sleep("5 seconds"), allow).pipe(Effect.onInterrupt(() => Effect.sync(() => interrupted++)))
      })
      send(port, syn)
      yield* TestClock.adjust("4 seconds")
      assert.strictEqual(sockets.tcp.length, 0)
      yield* TestClock.adjust("1 second")
      assert.strictEqual(sockets.tcp.length, 1)
      const other = { sourcePort: 2, destinationPort: 80, destination: REMOTE }
      send(port, tcp({ ...other, sequence: 100, flags: SYN }))
      yield* TestClock.adjust("1 second")
      send(port, tcp({ ...other, sequence: 101, flags: RST }))
      yield* TestClock.adjust("10 seconds")
      assert.strictEqual(interrupted, 1)
      assert.strictEqual(sockets.tcp.length, 1)
    }))

  it.effect("refuses the one connection about which the policy dies", () =>
    Effect.gen(function*() {
      const { port, sockets } = yield* open({
        policy: ({ source }) => source.port === 1 ? Effect.die("a defect") : Effect.succeed(allow)
      })
      send(port, syn)
      yield* TestClock.adjust("1 millis")
      assert.strictEqual(parseTcp(receive(port)!).flags & RST, RST)
      send(port, tcp({ sourcePort: 2, destinationPort: 80, destination: REMOTE, sequence: 100, flags: SYN }))
      yield* TestClock.adjust("1 millis")
      assert.strictEqual(sockets.tcp.length, 1)
    }))

  it.effect("leaves nothing behind when its scope closes, and loses what comes later", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      let interrupted = 0
      const { port, sockets } = yield* open({
        policy: ({ source }) =>
          source.port === 1
            ? Effect.succeed(allow)
            : Effect.never.pipe(Effect.onInterrupt(() => Effect.sync(() => interrupted++)))
      }).pipe(Scope.provide(scope))
      send(port, syn)
      send(port, udp(1, 7, Uint8Array.of(1), { destination: REMOTE }))
      send(port, tcp({ sourcePort: 2, destinationPort: 80, destination: REMOTE, sequence: 100, flags: SYN }))
      yield* TestClock.adjust("1 millis")
      assert.strictEqual(sockets.open, 2)
      yield* Scope.close(scope, Exit.void)
      assert.strictEqual(sockets.open, 0)
      assert.strictEqual(interrupted, 1)
      send(port, syn)
      assert.isUndefined(receive(port))
      assert.strictEqual(sockets.tcp.length, 1)
    }))

  it.effect("says what is wrong with its options", () =>
    Effect.gen(function*() {
      const problem = (options: UserNetBackendOptions, request: Partial<typeof REQUEST> = {}) =>
        Effect.map(Effect.flip(open(options, request)), ({ message }) => message)
      assert.include(yield* problem({ subnet: "10.0.2.1/24" }), "\"10.0.2.1/24\" is not a network")
      assert.include(yield* problem({ mtu: 100 }), "an MTU of 100")
      assert.include(yield* problem({ tcpConnections: 0 }), "tcpConnections")
      assert.include(yield* problem({}, { enableBridge: true }), "use a TAP interface")
      const host = { address: "127.0.0.1", port: 1 }
      assert.include(yield* problem({ forwards: [{ protocol: "tcp", host, guestPort: 0 }] }), "no port 0")
    }))

  it.effect("has addresses of its own on any network", () =>
    Effect.gen(function*() {
      const { port, sockets } = yield* open({ subnet: "192.168.100.0/29" })
      const frame = udp(1, 53, Uint8Array.of(1), {
        source: 0xc0a8_6406,
        destination: 0xc0a8_6403,
        to: Uint8Array.of(0x52, 0x55, 192, 168, 100, 2)
      })
      send(port, frame)
      yield* Effect.yieldNow
      assert.deepStrictEqual(sockets.udp.map(({ to }) => to.port), [53])
    }))
})
