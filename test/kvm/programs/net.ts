/**
 * A guest on a TAP interface, in a network namespace that this process is root of. Arguments: the guest's kernel, what the host does
 * meanwhile, and the guest's words. Prints one object of JSON. See `Net.test.ts`.
 */
import { GuestLifecycle, type NetCounters } from "@troupe/core"
import { fromPath, KvmGuestLifecycle, Tap } from "@troupe/node"
import { Effect, Fiber, Layer, Stream } from "effect"
import { execFileSync } from "node:child_process"
import { createSocket } from "node:dgram"
import { once } from "node:events"

const [kernel = "", task = "", words = ""] = process.argv.slice(2)
const GUEST_MAC = "02:00:00:00:00:01"
const ip = (...args: ReadonlyArray<string>) => execFileSync("ip", args, { encoding: "utf8" })

interface Outcome {
  /** What the guest printed. */
  lines: ReadonlyArray<string>
  counters?: NetCounters
  events: Array<string>
  /** Round trips in microseconds. */
  trips: Array<number>
  /** Answers that were not what was asked. */
  wrong: number
}
const outcome: Outcome = { lines: [], events: [], trips: [], wrong: 0 }

/** Sends datagrams to the guest, one after the other, and waits for each of them to come back. */
const askAndWait = async (count: number, size: number) => {
  const socket = createSocket("udp4")
  socket.bind(0, "10.1.0.1")
  await once(socket, "listening")
  const answers: Array<Buffer> = []
  let wake = () => {}
  socket.on("message", (message) => {
    answers.push(message)
    wake()
  })
  for (let i = 0; i < count; i++) {
    const question = Buffer.alloc(size, i)
    question.writeUInt32LE(i)
    const asked = process.hrtime.bigint()
    socket.send(question, 7, "10.1.0.2")
    while (answers.length === 0) await new Promise<void>((resolve) => (wake = resolve))
    outcome.trips.push(Number(process.hrtime.bigint() - asked) / 1000)
    if (answers.shift()?.equals(question) !== true) outcome.wrong++
  }
  socket.close()
}

/** Sends frames that nobody answers as fast as they go, until the guest is gone. */
const flood = async (size: number, over: () => boolean) => {
  const socket = createSocket("udp4")
  const datagram = Buffer.alloc(size, 0x5a)
  while (!over()) {
    for (let i = 0; i < 64; i++) socket.send(datagram, 9, "10.1.0.2")
    await new Promise((resolve) => setImmediate(resolve))
  }
  socket.close()
}

const program = Effect.gen(function*() {
  const lifecycle = yield* GuestLifecycle
  yield* lifecycle.create({
    kernelType: "LINUX",
    kernel: fromPath(kernel),
    cmdline: `quiet ${words}`,
    cpus: 1,
    guestMemory: "32M",
    netDevices: [{ macAddress: GUEST_MAC, enableBridge: false }]
  })
  ip("link", "set", "lo", "up")
  ip("addr", "add", "10.1.0.1/24", "dev", "tap0")
  const guest = yield* lifecycle.bind
  const serial = yield* guest.getSerial
  const { interfaces } = yield* guest.getNetInterfaces
  const [net] = interfaces
  if (net === undefined) return yield* Effect.die("no interface")
  yield* Effect.forkChild(Stream.runForEach(net.events, (event) => Effect.sync(() => outcome.events.push(event._tag))))
  yield* Effect.yieldNow
  const running = yield* Effect.forkChild(lifecycle.run)
  const ready = Stream.takeUntil(
    Stream.splitLines(Stream.decodeText(serial.output)),
    (line) => line.includes("net ready")
  )
  const kind = task.split(",")[0]
  const numbers = task.split(",").slice(1).map(Number)
  if (kind !== "") yield* Stream.runDrain(ready)
  if (kind === "ask") yield* Effect.promise(() => askAndWait(numbers[0] ?? 1, numbers[1] ?? 64))
  if (kind === "flood") {
    // A guest that only listens does not answer ARP.
    ip("neigh", "replace", "10.1.0.2", "lladdr", GUEST_MAC, "dev", "tap0")
    let over = false
    const flooding = Effect.promise(() => flood(numbers[0] ?? 64, () => over))
    const fiber = yield* Effect.forkChild(flooding)
    yield* Fiber.await(running)
    over = true
    yield* Fiber.join(fiber)
  }
  if (kind === "cable") {
    yield* net.setLink(false)
    yield* net.setLink(true)
    yield* Effect.promise(() => askAndWait(numbers[0] ?? 1, 64))
  }
  const stop = yield* Fiber.join(running)
  outcome.lines = serial.log().map((line) => line.replace("troupe-guest: ", ""))
  outcome.counters = net.counters()
  return stop
}).pipe(
  Effect.provide(KvmGuestLifecycle.layer.pipe(Layer.provide(Tap.layer({ name: "tap0" }))))
)

const stop = await Effect.runPromise(program)
process.stdout.write(`${JSON.stringify({ stop, ...outcome })}\n`)
