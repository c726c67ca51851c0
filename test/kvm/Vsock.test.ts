/** The socket device on a real KVM, driven by the small guest: bytes both ways, many connections, and ends of every kind. */
import { assert, describe, it } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core"
import type { HostVsockAcceptor, HostVsockEndpoint, VsockSocket } from "@troupe/core/HostVsockEndpoint"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import { Deferred, Effect, Fiber, Stream } from "effect"
import type { Scope } from "effect"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))
const MEBIBYTE = 2 ** 20
/** The pattern of the guest repeats after this. */
const PERIOD = 0x1_0000

const pattern = Uint8Array.from({ length: PERIOD }, (_, place) => (place * 7 + (place >> 8)) & 0xff)

interface Guest {
  readonly words: string
  readonly cpus?: number
  readonly listeners?: ReadonlyArray<{ readonly port: number; readonly acceptor: HostVsockAcceptor }>
}

/** Runs the guest with the host's part beside it, and returns the lines of its driver. */
const runGuest = <E = never>(
  { cpus = 1, listeners = [], words }: Guest,
  host: (endpoint: HostVsockEndpoint["Service"]) => Effect.Effect<unknown, E, Scope.Scope> = () => Effect.void
) =>
  Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({
      kernelType: "LINUX",
      kernel: fromPath(ELF),
      cmdline: `quiet ${words}`,
      cpus,
      guestMemory: "64M",
      virtioVsock: true,
      vsockListeners: listeners
    })
    const guest = yield* lifecycle.bind
    const serial = yield* guest.getSerial
    const fiber = yield* Effect.forkChild(Effect.scoped(host(yield* guest.getHostVsockEndpoint)))
    assert.deepStrictEqual(yield* lifecycle.run, { _tag: "PowerOff" })
    yield* Fiber.join(fiber)
    return serial.log().flatMap((line) => /^troupe-guest: vsock (.*)$/.exec(line)?.[1] ?? [])
  })

/** What was counted of connections: the times and counts that differ from run to run are left out. */
const results = (lines: ReadonlyArray<string>) => lines.map((line) => line.replace(/ tsc=.*$/, ""))

/** Reads everything, and counts what is as it should be. */
const sink = (counter: { bytes: number; wrong: number; connections: number }): HostVsockAcceptor => () =>
  Effect.succeed((socket) => {
    counter.connections++
    let place = 0
    return Stream.runForEach(socket.input, (bytes) =>
      Effect.sync(() => {
        for (const byte of bytes) if (byte !== pattern[place++ % PERIOD]) counter.wrong++
        counter.bytes += bytes.length
      }))
  })

const echo = (socket: VsockSocket, bytes: number) =>
  Effect.gen(function*() {
    const sender = yield* Effect.forkChild(Effect.gen(function*() {
      for (let sent = 0; sent < bytes; sent += PERIOD) {
        yield* socket.write(pattern.subarray(0, Math.min(PERIOD, bytes - sent)))
      }
      yield* socket.shutdown("send")
    }))
    let place = 0
    let wrong = 0
    yield* Stream.runForEach(socket.input, (chunk) =>
      Effect.sync(() => {
        for (const byte of chunk) if (byte !== pattern[place++ % PERIOD]) wrong++
      }))
    yield* Fiber.join(sender)
    assert.strictEqual(wrong, 0)
    return place
  })

describe.skipIf(kvmObstacle !== undefined)(onKvm("the socket device"), () => {
  it.layer(KvmGuestLifecycle.layer, { excludeTestServices: true })("of the small guest", (it) => {
    for (const cpus of [1, 2]) {
      it.effect(`takes what the guest sends, on one connection and on eight (${cpus} vCPUs)`, () =>
        Effect.gen(function*() {
          const counter = { bytes: 0, wrong: 0, connections: 0 }
          const lines = yield* runGuest({
            words: `vsock vsock=send,9,${5 * MEBIBYTE} vsock=send,9,${MEBIBYTE},8 poweroff`,
            cpus,
            listeners: [{ port: 9, acceptor: sink(counter) }]
          })
          assert.deepStrictEqual(results(lines).slice(1), [
            "ok",
            "connections 1 refused 0 reset 0",
            "ok",
            "connections 8 refused 0 reset 0",
            "ok"
          ])
          assert.match(lines[0] ?? "", /^device 0x[0-9a-f]+ irq \d+ cid 3$/)
          assert.deepStrictEqual(counter, { bytes: 13 * MEBIBYTE, wrong: 0, connections: 9 })
        }))
    }

    it.effect("gives the guest what the host sends, until either has enough", () =>
      Effect.gen(function*() {
        const acceptor: HostVsockAcceptor = () =>
          Effect.succeed((socket) => Effect.catch(Effect.forever(socket.write(pattern)), () => Effect.void))
        const lines = yield* runGuest({
          words: `vsock=take,19,${5 * MEBIBYTE} vsock=take,19,${MEBIBYTE},8 poweroff`,
          listeners: [{ port: 19, acceptor }]
        })
        assert.deepStrictEqual(results(lines), [
          "connections 1 refused 0 reset 0",
          "ok",
          "connections 8 refused 0 reset 0",
          "ok"
        ])
      }))

    it.effect("makes hundreds of short connections, and keeps none", () =>
      Effect.gen(function*() {
        const counter = { bytes: 0, wrong: 0, connections: 0 }
        const lines = yield* runGuest({
          words: "vsock=short,9,10,300 poweroff",
          listeners: [{ port: 9, acceptor: sink(counter) }]
        })
        assert.deepStrictEqual(results(lines), ["connections 300 refused 0 reset 0", "ok"])
        assert.deepStrictEqual(counter, { bytes: 3000, wrong: 0, connections: 300 })
      }))

    it.effect("connects to the guest, whose echo ends when the host's data does", () =>
      Effect.gen(function*() {
        const lines = yield* runGuest({ words: "vsock=echo,80,4 poweroff" }, (endpoint) =>
          Effect.gen(function*() {
            const echoes = yield* Effect.forEach(
              [0, 1, 70_000, 3 * MEBIBYTE],
              (bytes) => Effect.flatMap(endpoint.connect2(80), (socket) => echo(socket, bytes)),
              { concurrency: 4 }
            )
            assert.deepStrictEqual(echoes, [0, 1, 70_000, 3 * MEBIBYTE])
          }))
        assert.deepStrictEqual(results(lines), ["ready", "connections 4 refused 0 reset 0", "ok"])
      }))

    it.effect("refuses the guest where nobody listens", () =>
      Effect.gen(function*() {
        const lines = yield* runGuest({ words: "vsock=send,9,10 poweroff" })
        assert.deepStrictEqual(results(lines), ["connections 1 refused 1 reset 0", "ok"])
      }))

    it.effect("is refused by the guest where nobody listens", () =>
      Effect.gen(function*() {
        yield* runGuest({ words: "vsock=echo,80,1 poweroff" }, (endpoint) =>
          Effect.gen(function*() {
            const refused = yield* Effect.flip(endpoint.connect2(81))
            assert.deepInclude(refused, { status: "CONNECTION_REFUSED", guestPort: 81 })
            yield* Effect.flatMap(endpoint.connect2(80), (socket) => echo(socket, 5))
          }))
      }))

    it.effect("resets the connection of a handler that dies, and no other", () =>
      Effect.gen(function*() {
        const counter = { bytes: 0, wrong: 0, connections: 0 }
        const lines = yield* runGuest({
          words: `vsock=send,8,${5 * MEBIBYTE} vsock=send,9,${MEBIBYTE} poweroff`,
          listeners: [
            {
              port: 8,
              acceptor: () => Effect.succeed((socket) => Effect.andThen(socket.read, Effect.die(new Error("injected"))))
            },
            { port: 9, acceptor: sink(counter) }
          ]
        })
        assert.deepStrictEqual(results(lines), [
          "connections 1 refused 0 reset 1",
          "ok",
          "connections 1 refused 0 reset 0",
          "ok"
        ])
        assert.strictEqual(counter.bytes, MEBIBYTE)
      }))

    it.effect("tells the host of a guest that is stopped in the middle", () =>
      Effect.gen(function*() {
        const lifecycle = yield* GuestLifecycle
        const begun = yield* Deferred.make<void>()
        const ended = yield* Deferred.make<string>()
        const acceptor: HostVsockAcceptor = () =>
          Effect.succeed((socket) =>
            Effect.gen(function*() {
              yield* socket.read
              yield* Deferred.succeed(begun, undefined)
              const error = yield* Effect.flip(Stream.runDrain(socket.input))
              yield* Deferred.succeed(ended, error.status)
            })
          )
        yield* lifecycle.create({
          kernelType: "LINUX",
          kernel: fromPath(ELF),
          cmdline: "quiet vsock=raw-send,9,100000000000 poweroff",
          cpus: 1,
          guestMemory: "64M",
          virtioVsock: true,
          vsockListeners: [{ port: 9, acceptor }]
        })
        const run = yield* Effect.forkChild(lifecycle.run)
        yield* Deferred.await(begun)
        yield* lifecycle.stop
        yield* Fiber.await(run)
        assert.strictEqual(yield* Deferred.await(ended), "PEER_CLOSED")
      }))
  })
})
