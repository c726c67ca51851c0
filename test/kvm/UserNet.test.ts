/** The user-mode network on a real KVM: datagrams of this process reach the small guest through a forwarded port, and come back. */
import { assert, describe, it } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core"
import type { HostEndpoint } from "@troupe/devices/net/user/HostSockets"
import type { NetConnection } from "@troupe/devices/net/user/NetPolicy"
import { allow } from "@troupe/devices/net/user/NetPolicy"
import { fromPath, KvmGuestLifecycle, UserNetwork } from "@troupe/node"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"
import { createSocket, type Socket } from "node:dgram"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))
const COUNT = 50

const openSocket = Effect.acquireRelease(
  Effect.callback<Socket>((resume) => {
    const socket = createSocket("udp4")
    socket.bind(0, "127.0.0.1", () => resume(Effect.succeed(socket)))
  }),
  (socket) => Effect.sync(() => socket.close())
)

/** Sends a datagram and waits for the next one. */
const ask = (socket: Socket, to: HostEndpoint, question: Buffer) =>
  Effect.callback<Buffer>((resume) => {
    const heard = (answer: Buffer) => resume(Effect.succeed(answer))
    socket.once("message", heard)
    socket.send(question, to.port, to.address)
    return Effect.sync(() => socket.off("message", heard))
  })

describe.skipIf(kvmObstacle !== undefined)(onKvm("the user-mode network of the small guest"), () => {
  it.live.each([4, 1472])("takes datagrams of %i bytes to the guest and back", (size) => {
    const forwarded: Array<HostEndpoint> = []
    const asked: Array<NetConnection> = []
    const network = UserNetwork.layer({
      policy: (connection) => Effect.sync(() => asked.push(connection)).pipe(Effect.as(allow)),
      forwards: [{ protocol: "udp", host: { address: "127.0.0.1", port: 0 }, guestPort: 7 }],
      onForward: (_, at) => forwarded.push(at)
    })
    return Effect.gen(function*() {
      const lifecycle = yield* GuestLifecycle
      yield* lifecycle.create({
        kernelType: "LINUX",
        kernel: fromPath(ELF),
        cmdline: `quiet ip=10.0.2.15 net=echo,${COUNT}`,
        cpus: 1,
        guestMemory: "32M",
        netDevices: [{ macAddress: "02:00:00:00:00:01", enableBridge: false }]
      })
      const guest = yield* lifecycle.bind
      const serial = yield* guest.getSerial
      const lines = Stream.splitLines(Stream.decodeText(serial.output))
      const running = yield* Effect.forkChild(lifecycle.run)
      yield* Stream.runDrain(Stream.takeUntil(lines, (line) => line.includes("net ready")))
      const socket = yield* openSocket
      const to = forwarded[0] ?? assert.fail("the port is not forwarded")
      for (let i = 0; i < COUNT; i++) {
        const question = Buffer.alloc(size, i)
        question.writeUInt32LE(i)
        assert.deepStrictEqual(yield* ask(socket, to, question), question)
      }
      assert.deepStrictEqual(yield* Fiber.join(running), { _tag: "PowerOff" })
      assert.include(serial.log().join("\n"), `net echo ${COUNT} udp`)
      assert.deepStrictEqual(asked.map(({ destination, direction }) => ({ destination, direction })), [
        { direction: "incoming", destination: { address: "10.0.2.15", port: 7 } }
      ])
    }).pipe(Effect.scoped, Effect.provide(KvmGuestLifecycle.layer.pipe(Layer.provide(network))))
  })
})
