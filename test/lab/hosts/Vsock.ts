/** A host that talks with a program in an unmodified Linux over vsock: both ways, many times, and to every kind of end. */
import type { HostVsockAcceptor, VsockSocket } from "@troupe/core/HostVsockEndpoint"
import { BlockFile, KvmGuestLifecycle } from "@troupe/node"
import * as VsockUnixSockets from "@troupe/node/vsock/VsockUnixSockets"
import * as Console from "effect/Console"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Schedule from "effect/Schedule"
import * as Stream from "effect/Stream"
import * as assert from "node:assert"
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs"
import { connect } from "node:net"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { labPaths } from "../../../scripts/lab/RootImage.ts"
import { runHost, startLinux, until } from "./LinuxHost.ts"

const PROGRAM = fileURLToPath(new URL("../../guest/linux/vsock", import.meta.url))
const SECTOR = 512
const MEBIBYTE = 2 ** 20
const PERIOD = 0x1_0000
const HOST = 2
const SINK = 1
const SOURCE = 2
const ECHO = 3
const FAILING = 4
const HELD = 5
const NOBODY = 6
const GUEST_PORT = 80
const SOCAT_PORT = 81
/** Bytes of the long transfers. */
const LONG = Number(process.env["TROUPE_VSOCK_BYTES"] ?? 64 * MEBIBYTE)
const SHORT_CONNECTIONS = Number(process.env["TROUPE_VSOCK_CONNECTIONS"] ?? 1000)
const ROUND_TRIPS = 100
/** Half seconds until something that takes long is given up: a quarter of an hour. */
const LONG_TRIES = 1800

const pattern = Buffer.from(
  Uint8Array.from({ length: 2 * PERIOD }, (_, place) => (place * 7 + ((place % PERIOD) >> 8)) & 0xff)
)

/** Reads everything, and whether it was the pattern. */
const readPattern = Effect.fnUntraced(function*(socket: VsockSocket) {
  let total = 0
  let isRight = true
  yield* Stream.runForEach(socket.input, (bytes) =>
    Effect.sync(() => {
      for (let at = 0; at < bytes.length; at += PERIOD) {
        const part = bytes.subarray(at, at + PERIOD)
        const from = total % PERIOD
        if (!pattern.subarray(from, from + part.length).equals(part)) isRight = false
        total += part.length
      }
    }))
  return `${total} ${isRight ? "right" : "wrong"}`
})

const writePattern = Effect.fnUntraced(function*(socket: VsockSocket, bytes: number) {
  for (let sent = 0; sent < bytes; sent += PERIOD) {
    yield* socket.write(pattern.subarray(0, Math.min(PERIOD, bytes - sent)))
  }
})

const serve = (handler: (socket: VsockSocket) => Effect.Effect<void, unknown>): HostVsockAcceptor => () =>
  Effect.succeed(handler)

/** The program on a disk of whole sectors. */
const programDisk = Effect.sync(() => {
  const program = readFileSync(PROGRAM)
  const path = join(mkdtempSync("/tmp/vsock-"), "disk")
  writeFileSync(path, Buffer.concat([program, Buffer.alloc(-program.length & (SECTOR - 1))]))
  return path
})

const main = Effect.gen(function*() {
  const path = yield* programDisk
  const holding = yield* Deferred.make<void>()
  const held = yield* Deferred.make<string>()
  const listeners = [
    {
      port: SINK,
      acceptor: serve((socket) => Effect.flatMap(readPattern(socket), (text) => socket.write(Buffer.from(`${text}\n`))))
    },
    { port: SOURCE, acceptor: serve((socket) => writePattern(socket, LONG)) },
    { port: ECHO, acceptor: serve((socket) => Stream.runForEach(socket.input, (bytes) => socket.write(bytes))) },
    {
      port: FAILING,
      acceptor: serve((socket) => Effect.andThen(socket.read, Effect.die(new Error("as it was told"))))
    },
    {
      port: HELD,
      acceptor: serve((socket) =>
        Deferred.succeed(holding, undefined).pipe(
          Effect.andThen(Stream.runDrain(socket.input)),
          Effect.exit,
          Effect.flatMap((exit) => Deferred.succeed(held, exit._tag))
        )
      )
    }
  ]
  const linux = yield* startLinux({
    guestMemory: "256M",
    virtioVsock: true,
    vsockListeners: listeners,
    blockDevices: [
      { id: "program", mode: "READ_ONLY", format: "FILE", client: BlockFile.fromPath(path) },
      { id: "socat", mode: "READ_ONLY", format: "FILE", client: BlockFile.fromPath(labPaths.socat) }
    ]
  })
  const endpoint = yield* linux.guest.getHostVsockEndpoint
  yield* linux.run("dd if=/dev/vda of=/tmp/vsock bs=4096 2>/dev/null && chmod +x /tmp/vsock")

  /** Starts a program in the background. The file for what it prints is there, and empty, before it runs. */
  const start = (command: string, output: string) => linux.run(`: > ${output}; (${command}) > ${output} 2>&1 &`)

  /** What a program prints that takes longer than a command of the shell may, and how long it took in seconds. */
  const runLong = Effect.fnUntraced(function*(command: string) {
    yield* start(`${command}; echo done`, "/tmp/long")
    const begun = performance.now()
    const text = yield* until(linux.run("cat /tmp/long"), (text) => text.endsWith("\ndone"), LONG_TRIES)
    return { text: text.slice(0, -"\ndone".length), seconds: (performance.now() - begun) / 1000 }
  })
  const transfer = Effect.fnUntraced(function*(command: string) {
    const { seconds, text } = yield* runLong(command)
    yield* Console.log(`${(LONG * 8 / seconds / 1e6).toFixed(0)} Mb/s`)
    return text
  })
  yield* linux.step(
    `guest to host, ${LONG / MEBIBYTE} MiB`,
    Effect.gen(function*() {
      assert.strictEqual(yield* transfer(`/tmp/vsock send ${HOST} ${SINK} ${LONG}`), `${LONG} right`)
    })
  )
  yield* linux.step(
    `host to guest, ${LONG / MEBIBYTE} MiB`,
    Effect.gen(function*() {
      assert.strictEqual(yield* transfer(`/tmp/vsock take ${HOST} ${SOURCE}`), `took ${LONG} right`)
    })
  )
  yield* linux.step(
    `${SHORT_CONNECTIONS} connections of the guest`,
    Effect.gen(function*() {
      const { seconds, text } = yield* runLong(`/tmp/vsock short ${HOST} ${ECHO} ${SHORT_CONNECTIONS}`)
      assert.strictEqual(text, `made ${SHORT_CONNECTIONS}`)
      yield* Console.log(`${(SHORT_CONNECTIONS / seconds).toFixed(0)} connections/s`)
    })
  )
  yield* linux.step(
    "messages",
    Effect.gen(function*() {
      assert.strictEqual(yield* linux.run(`/tmp/vsock messages ${HOST} ${ECHO}`), "messages 5")
    })
  )
  yield* linux.step(
    "a port that nobody listens on",
    Effect.gen(function*() {
      const refused = yield* linux.attempt(`/tmp/vsock take ${HOST} ${NOBODY}`)
      assert.match(refused.output, /connect failed with 104/)
      const error = yield* Effect.flip(Effect.scoped(endpoint.connect2(NOBODY)))
      assert.strictEqual(error.status, "CONNECTION_REFUSED")
    })
  )

  const CONNECTIONS = 20
  const unix = "/tmp/v.sock"
  yield* linux.step(
    "connections of the host",
    Effect.gen(function*() {
      yield* VsockUnixSockets.serve(endpoint, unix)
      yield* start(`/tmp/vsock echo ${GUEST_PORT} ${CONNECTIONS + 2}`, "/tmp/echo")
      yield* until(linux.run("cat /tmp/echo"), (text) => text.includes("listening"))
      const echoes = yield* Effect.forEach(
        Array.from({ length: CONNECTIONS }, (_, i) => i * 5000),
        (bytes) =>
          Effect.scoped(Effect.gen(function*() {
            const socket = yield* endpoint.connect2(GUEST_PORT)
            const sending = yield* Effect.forkScoped(
              Effect.andThen(writePattern(socket, bytes), socket.shutdown("send"))
            )
            const text = yield* readPattern(socket)
            yield* Fiber.join(sending)
            return text === `${bytes} right`
          })),
        { concurrency: 5 }
      )
      assert.ok(echoes.every((isRight) => isRight))
      const times = yield* Effect.scoped(Effect.gen(function*() {
        const socket = yield* endpoint.connect2(GUEST_PORT)
        const times: Array<number> = []
        for (let i = 0; i < ROUND_TRIPS; i++) {
          const begun = performance.now()
          yield* socket.write(Uint8Array.of(i))
          assert.deepStrictEqual(Array.from((yield* socket.read) ?? []), [i])
          times.push(performance.now() - begun)
        }
        return times.toSorted((a, b) => a - b)
      }))
      yield* Console.log(`round trip ${times[ROUND_TRIPS / 2]?.toFixed(2)} ms, p99 ${times.at(-2)?.toFixed(2)} ms`)
      const answer = yield* Effect.callback<string>((resume) => {
        const client = connect({ path: unix, allowHalfOpen: true })
        let text = ""
        client.on("data", (bytes) => {
          text += bytes.toString()
        })
        client.on("end", () => resume(Effect.succeed(text)))
        client.end(`CONNECT ${GUEST_PORT}\nover a Unix socket`)
      })
      assert.match(answer, /^OK \d+\nover a Unix socket$/)
      yield* until(linux.run("cat /tmp/echo"), (text) => text.includes("echoed"))
    })
  )
  yield* linux.step(
    "socat, both ways",
    Effect.gen(function*() {
      yield* linux.run("mkdir -p /tmp/root && tar xf /dev/vdb -C /tmp/root")
      const socat = "chroot /tmp/root /usr/bin/socat -t 30"
      assert.strictEqual(
        yield* linux.run(`echo from socat | ${socat} - VSOCK-CONNECT:${HOST}:${ECHO},retry=20`),
        "from socat"
      )
      yield* start(`${socat} VSOCK-LISTEN:${SOCAT_PORT} PIPE`, "/tmp/socat")
      const connected = endpoint.connect2(SOCAT_PORT).pipe(
        Effect.retry(Schedule.spaced("500 millis").pipe(Schedule.upTo({ times: 240 })))
      )
      const answer = yield* Effect.scoped(Effect.gen(function*() {
        const socket = yield* connected
        yield* socket.write(Buffer.from("to socat"))
        yield* socket.shutdown("send")
        let text = ""
        yield* Stream.runForEach(socket.input, (bytes) =>
          Effect.sync(() => {
            text += Buffer.from(bytes).toString()
          }))
        return text
      }))
      assert.strictEqual(answer, "to socat")
    })
  )
  yield* linux.step(
    "a handler that dies",
    Effect.gen(function*() {
      const result = yield* linux.attempt(`/tmp/vsock send ${HOST} ${FAILING} ${16 * MEBIBYTE}`)
      assert.match(result.output, /(write|read|shutdown) failed with (32|104|107)/)
    })
  )
  yield* linux.step(
    "a program of the guest that is killed",
    Effect.gen(function*() {
      yield* linux.run(`/tmp/vsock hold ${HOST} ${HELD} & echo $! > /tmp/holding`)
      yield* Deferred.await(holding)
      yield* linux.run("kill -9 $(cat /tmp/holding)")
      // The kernel closes it in good order, as it does for any program that ends.
      assert.strictEqual(yield* Deferred.await(held), "Success")
    })
  )
  yield* linux.step(
    "the driver leaves and comes back",
    Effect.gen(function*() {
      const begun = yield* Deferred.make<void>()
      const ended = yield* Deferred.make<string>()
      yield* endpoint.listen(
        7,
        () =>
          Effect.succeed((socket) =>
            Effect.andThen(socket.read, Deferred.succeed(begun, undefined)).pipe(
              Effect.andThen(Effect.flip(Stream.runDrain(socket.input))),
              Effect.flatMap((error) => Deferred.succeed(ended, error.status))
            )
          )
      )
      yield* linux.run(`/tmp/vsock hold ${HOST} 7 > /dev/null 2>&1 &`)
      yield* Deferred.await(begun)
      yield* linux.run(
        "cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport && device=$(basename virtio*) && echo $device > unbind && " +
          "echo $device > bind; cd /"
      )
      assert.strictEqual(yield* Deferred.await(ended), "PEER_CLOSED")
      assert.strictEqual(yield* linux.run(`/tmp/vsock short ${HOST} ${ECHO} 10`), "made 10")
    })
  )
  yield* linux.step(
    "poweroff",
    Effect.gen(function*() {
      yield* Effect.forkScoped(Effect.ignore(linux.attempt("poweroff -f")))
      assert.deepStrictEqual(yield* linux.end, { _tag: "PowerOff" })
    })
  )
})

runHost(main, KvmGuestLifecycle.layer)
