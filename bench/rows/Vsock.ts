// Sockets between guest and host, beside a plain Unix socket between two processes of this host, which is the most there can be.
import type { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import type { HostVsockAcceptor, HostVsockEndpoint } from "@troupe/core/HostVsockEndpoint"
import { FakeHypervisor, GuestAcpi, GuestProgram } from "@troupe/core/testing"
import { startVsock } from "@troupe/core/testing/drivers/VsockDriver"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import { type WakeCounts, WakeObserver } from "@troupe/node/kvm/WakeCounts"
import { layerVsock, VsockManager } from "@troupe/vsock"
import { HEADER_SIZE, Op, VsockHeader } from "@troupe/vsock/VsockPacket"
import { VsockPorts } from "@troupe/vsock/VsockPorts"
import { VsockSession } from "@troupe/vsock/VsockSession"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { spawn } from "node:child_process"
import { mkdtempSync, rmSync } from "node:fs"
import { createServer, type Socket } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { setFlagsFromString } from "node:v8"
import { runInNewContext } from "node:vm"
import { Worker } from "node:worker_threads"
import { BenchError, type Effort, root, type Row } from "../Row.ts"
import { median, spread } from "../Statistics.ts"

const KERNEL = join(root, "test", "guest", "troupe-guest.elf")
export const GUEST_PORT = 80
const HOST_PORT = 9
const PACKET = 0x1_0000
const MEBIBYTE = 2 ** 20
const PACKETS_PER_MEBIBYTE = MEBIBYTE / PACKET
const GIBIBYTE = 2 ** 30
/** Rounds of which each is one of ours and one of the anchor's. */
const ROUNDS = 7
const QUICK_ROUNDS = 2

export const gigabits = (bytes: number, seconds: number): number => bytes * 8 / seconds / 1e9
export const rounds = (effort: Effort): number => effort.quick ? QUICK_ROUNDS : ROUNDS

// --- Ours ------------------------------------------------------------------------------------------------------------------

export interface GuestRun<A> {
  /** The numbers of the driver's last line. */
  readonly numbers: Readonly<Record<string, number>>
  readonly result: A
  /** Processor time of this process meanwhile, the vCPU's thread included, in seconds. */
  readonly processor: number
  /** How often the event loop of this process was woken for the machine. */
  readonly wakes: WakeCounts
}

/** Runs the small guest on KVM with the host's part beside it. */
export const runGuest = <A>(
  words: string,
  acceptor: HostVsockAcceptor,
  host: (endpoint: HostVsockEndpoint["Service"]) => Effect.Effect<A, unknown, Scope.Scope>
): Promise<GuestRun<A>> => {
  let wakes: WakeCounts = { doorbells: 0, messages: 0 }
  const observed = KvmGuestLifecycle.layer.pipe(
    Layer.provide(Layer.succeed(WakeObserver, (counts) => {
      wakes = counts
    }))
  )
  return Effect.runPromise(
    Effect.scoped(Effect.gen(function*() {
      const lifecycle = yield* GuestLifecycle
      yield* lifecycle.create({
        kernelType: "LINUX",
        kernel: fromPath(KERNEL),
        cmdline: `quiet ${words} poweroff`,
        cpus: 1,
        guestMemory: "64M",
        virtioVsock: true,
        vsockListeners: [{ port: HOST_PORT, acceptor }]
      })
      const guest = yield* lifecycle.bind
      const fiber = yield* Effect.forkChild(Effect.scoped(host(yield* guest.getHostVsockEndpoint)))
      const cpu = process.cpuUsage()
      const before = { ...wakes }
      yield* lifecycle.run
      const { system, user } = process.cpuUsage(cpu)
      const result = yield* Fiber.join(fiber)
      const log = (yield* guest.getSerial).log()
      const line = log.find((line) => line.includes("vsock connections"))
      if (line === undefined || !log.some((line) => line.endsWith("vsock ok"))) {
        return yield* Effect.die(new BenchError(`the guest failed: ${log.slice(-3).join(" / ")}`))
      }
      const numbers = Object.fromEntries(
        Array.from(line.matchAll(/(\w+)[ =](\d+)/g), ([, name = "", value]) => [name, Number(value)])
      )
      return {
        numbers,
        result,
        processor: (system + user) / 1e6,
        wakes: { doorbells: wakes.doorbells - before.doorbells, messages: wakes.messages - before.messages }
      }
    })).pipe(Effect.provide(observed))
  )
}

const nothing = () => Effect.void

export const sink: HostVsockAcceptor = () => Effect.succeed((socket) => Stream.runDrain(socket.input))

export const chunk = new Uint8Array(PACKET)
const source: HostVsockAcceptor = () =>
  Effect.succeed((socket) => Effect.catch(Effect.forever(socket.write(chunk)), () => Effect.void))

// --- The ceiling -----------------------------------------------------------------------------------------------------------

/** Runs a client in a process of its own, and hands its connections to `serve` until all have ended. */
const unixSocket = async (client: string, serve: (socket: Socket) => void, connections = 1): Promise<void> => {
  const folder = mkdtempSync(join(tmpdir(), "troupe-bench-"))
  const path = join(folder, "socket")
  let open = 0
  let ended = 0
  try {
    await new Promise<void>((resolve, reject) => {
      const server = createServer((socket) => {
        open++
        socket.on("error", reject)
        socket.on("close", () => {
          if (++ended === connections) server.close(() => resolve())
        })
        serve(socket)
      })
      server.listen(path, () => {
        const child = spawn(process.execPath, [
          "-e",
          `const net = require("node:net"), path = ${JSON.stringify(path)}\n${client}`
        ], {
          stdio: "inherit"
        })
        child.on("exit", (code) => {
          if (code !== 0) {
            reject(new BenchError(`the client of the Unix socket ended with ${code} after ${open} connections`))
          }
        })
      })
    })
  } finally {
    rmSync(folder, { recursive: true })
  }
}

/** Gb/s of a stream through a Unix socket from another process. */
const unixThroughput = async (bytes: number): Promise<number> => {
  let received = 0
  let begun = 0
  await unixSocket(
    `const socket = net.connect(path), chunk = Buffer.alloc(${PACKET}); let left = ${bytes / PACKET}
     const send = () => { while (left-- > 0) if (!socket.write(chunk)) return socket.once("drain", send); socket.end() }
     send()`,
    (socket) => {
      socket.on("data", (data) => {
        if (received === 0) begun = performance.now()
        received += data.length
      })
    }
  )
  if (received < bytes) throw new BenchError(`${received} of ${bytes} bytes came through the Unix socket`)
  return gigabits(bytes, (performance.now() - begun) / 1000)
}

export const ONE_BYTE = new Uint8Array(1)

/** Round trips of a byte through a Unix socket to another process, in microseconds. */
const unixRoundTrips = async (count: number): Promise<ReadonlyArray<number>> => {
  const times: Array<number> = []
  await unixSocket(`const socket = net.connect(path); socket.pipe(socket)`, (socket) => {
    let sent = performance.now()
    socket.setNoDelay()
    socket.write(ONE_BYTE)
    socket.on("data", () => {
      const now = performance.now()
      times.push((now - sent) * 1000)
      if (times.length === count) {
        socket.end()
        return
      }
      sent = now
      socket.write(ONE_BYTE)
    })
  })
  return times
}

/** Connections a second through a Unix socket: each is made, carries a few bytes and ends, one after the other. */
const unixConnects = async (count: number): Promise<number> => {
  let begun = 0
  await unixSocket(
    `let left = ${count}; const next = () => { if (left-- === 0) return; const socket = net.connect(path); socket.end("0123456789")
     socket.resume(); socket.on("close", next) }; next()`,
    (socket) => {
      begun ||= performance.now()
      socket.resume()
      socket.on("end", () => socket.end())
    },
    count
  )
  return count / ((performance.now() - begun) / 1000)
}

// --- Rows ------------------------------------------------------------------------------------------------------------------

const throughput = async (name: string, words: string, bytes: number, effort: Effort): Promise<Row> => {
  const ours: Array<number> = []
  const ceilings: Array<number> = []
  const kicks: Array<number> = []
  const interrupts: Array<number> = []
  const processor: Array<number> = []
  const woken: Array<number> = []
  for (let round = -1; round < rounds(effort); round++) {
    const { numbers, processor: seconds, wakes } = await runGuest(words, name === "vsock-h2g" ? source : sink, nothing)
    const ceiling = await unixThroughput(Math.min(bytes, 512 * MEBIBYTE))
    if (round < 0) continue
    ours.push(gigabits(bytes, (numbers["ns"] ?? Number.NaN) / 1e9))
    ceilings.push(ceiling)
    kicks.push((numbers["kicks"] ?? Number.NaN) / (bytes / PACKET))
    interrupts.push((numbers["interrupts"] ?? Number.NaN) / (bytes / PACKET))
    processor.push(seconds / (bytes / GIBIBYTE))
    woken.push((wakes.doorbells + wakes.messages) / (bytes / MEBIBYTE))
  }
  const value = median(ours)
  const anchorValue = median(ceilings)
  return {
    name,
    value,
    unit: "Gb/s",
    anchor: "a Unix socket between two Node processes",
    anchorValue,
    ratio: value / anchorValue,
    goal: "≤ 0.1 kicks and interrupts per 64 KiB",
    met: median(kicks) <= 0.1 && median(interrupts) <= 0.1,
    detail: {
      bytes,
      quartiles: spread(ours, 2),
      "kicks per 64 KiB": Number(median(kicks).toFixed(4)),
      "interrupts per 64 KiB": Number(median(interrupts).toFixed(4)),
      "kicks per MiB": Number((median(kicks) * PACKETS_PER_MEBIBYTE).toFixed(3)),
      "interrupts per MiB": Number((median(interrupts) * PACKETS_PER_MEBIBYTE).toFixed(3)),
      "wakes of the event loop per MiB": Number(median(woken).toFixed(3)),
      "processor seconds per GiB, the vCPU included": Number(median(processor).toFixed(2))
    }
  }
}

const bytesOf = (effort: Effort): number => effort.quick ? 128 * MEBIBYTE : GIBIBYTE

export const guestToHost = (effort: Effort): Promise<Row> =>
  throughput("vsock-g2h", `vsock=raw-send,${HOST_PORT},${bytesOf(effort)}`, bytesOf(effort), effort)

export const hostToGuest = (effort: Effort): Promise<Row> =>
  throughput("vsock-h2g", `vsock=raw-take,${HOST_PORT},${bytesOf(effort)}`, bytesOf(effort), effort)

export const guestToHostOnEight = (effort: Effort): Promise<Row> =>
  throughput("vsock-g2h-8", `vsock=raw-send,${HOST_PORT},${bytesOf(effort) / 8},8`, bytesOf(effort), effort)

export const percentile = (values: ReadonlyArray<number>, part: number): number =>
  values.toSorted((a, b) => a - b)[Math.floor(values.length * part)] ?? Number.NaN

/** What it costs to wake a thread that sleeps, in microseconds: half of a round trip. */
const threadWake = async (): Promise<number> => {
  const shared = new Int32Array(new SharedArrayBuffer(8))
  const worker = new Worker(
    `const { workerData } = require("node:worker_threads")
     for (let i = 0; ; i++) { Atomics.wait(workerData, 0, i); if (Atomics.load(workerData, 0) < 0) break
       Atomics.store(workerData, 1, i + 1); Atomics.notify(workerData, 1) }`,
    { eval: true, workerData: shared }
  )
  await new Promise((resolve) => worker.once("online", resolve))
  const times: Array<number> = []
  for (let i = 0; i < 2000; i++) {
    const begun = performance.now()
    Atomics.store(shared, 0, i + 1)
    Atomics.notify(shared, 0)
    Atomics.wait(shared, 1, i)
    times.push((performance.now() - begun) * 1000)
  }
  Atomics.store(shared, 0, -1)
  Atomics.notify(shared, 0)
  await worker.terminate()
  return median(times) / 2
}

/** The round trip of a byte from the host to the guest's echo and back. */
export const roundTrip = async (effort: Effort): Promise<Row> => {
  const count = effort.quick ? 500 : 5000
  const ours: Array<number> = []
  const tails: Array<number> = []
  const ceilings: Array<number> = []
  const ceilingTails: Array<number> = []
  const wakes: Array<number> = []
  for (let round = -1; round < rounds(effort); round++) {
    const { result: times } = await runGuest(`vsock=echo,${GUEST_PORT}`, sink, (endpoint) =>
      Effect.gen(function*() {
        const socket = yield* endpoint.connect2(GUEST_PORT)
        const times: Array<number> = []
        for (let i = 0; i < count; i++) {
          const begun = performance.now()
          yield* socket.write(ONE_BYTE)
          yield* socket.read
          times.push((performance.now() - begun) * 1000)
        }
        return times
      }))
    const ceiling = await unixRoundTrips(count)
    const wake = await threadWake()
    if (round < 0) continue
    ours.push(median(times))
    tails.push(percentile(times, 0.99))
    ceilings.push(median(ceiling))
    ceilingTails.push(percentile(ceiling, 0.99))
    wakes.push(wake)
  }
  const value = median(ours)
  const anchorValue = median(ceilings)
  const wake = median(wakes)
  return {
    name: "vsock-rtt",
    value,
    unit: "µs",
    anchor: "a Unix socket between two Node processes",
    anchorValue,
    ratio: value / anchorValue,
    goal: "at most two thread wakes over the anchor",
    met: value <= anchorValue + 2 * wake,
    detail: {
      "round trips a round": count,
      quartiles: spread(ours, 1),
      p99: Number(median(tails).toFixed(1)),
      "p99 of the anchor": Number(median(ceilingTails).toFixed(1)),
      "a thread wake": Number(wake.toFixed(1))
    }
  }
}

/** Connections a second, one after the other, that the guest makes. */
export const connects = async (effort: Effort): Promise<Row> => {
  const count = effort.quick ? 300 : 3000
  const ours: Array<number> = []
  const ceilings: Array<number> = []
  for (let round = -1; round < rounds(effort); round++) {
    const { numbers } = await runGuest(`vsock=short,${HOST_PORT},10,${count}`, sink, nothing)
    const ceiling = await unixConnects(count)
    if (round < 0) continue
    ours.push(count / ((numbers["ns"] ?? Number.NaN) / 1e9))
    ceilings.push(ceiling)
  }
  const value = median(ours)
  const anchorValue = median(ceilings)
  return {
    name: "vsock-connects",
    value,
    unit: "connections/s",
    anchor: "a Unix socket between two Node processes",
    anchorValue,
    ratio: value / anchorValue,
    goal: null,
    met: null,
    detail: { "connections a round": count, quartiles: spread(ours, 0) }
  }
}

/** How fast the device's part is without a machine: packets of 64 KiB of a guest, read by their host, on one core. */
export const loop = async (effort: Effort): Promise<Row> => {
  const rates: Array<number> = []
  const copies: Array<number> = []
  const bytes = new Uint8Array(HEADER_SIZE + PACKET)
  const target = new Uint8Array(PACKET)
  for (let round = -2; round < rounds(effort); round++) {
    const session = new VsockSession({
      guestCid: 3,
      hasSeqpacket: true,
      hostPorts: new VsockPorts(),
      now: () => 0,
      signal: () => {},
      listens: () => true,
      arrived: (connection) => void connection.accept(),
      closing: () => {},
      onShutdown: () => {}
    })
    let connection: { readonly take: () => Uint8Array | undefined } | undefined
    const packet = {
      readableBytes: HEADER_SIZE,
      read: (at: number, to: Uint8Array) => {
        to.set(bytes.subarray(at, at + to.length))
        return to.length
      }
    }
    const header = new VsockHeader()
    const send = (op: number, length: number) => {
      header.set(3, 1000, 2, 1, 1, op, 0)
      header.len = length
      header.setCredit(0x4_0000, 0)
      bytes.set(header.bytes)
      packet.readableBytes = HEADER_SIZE + length
      session.receive(packet)
    }
    const buffer = { readableBytes: 0, writableBytes: 4096, write: (_: number, from: Uint8Array) => from.length }
    send(Op.REQUEST, 0)
    connection = session.connections()[0]
    const packets = effort.quick ? 2000 : 20_000
    const begun = process.cpuUsage()
    for (let i = 0; i < packets; i++) {
      session.turn(() => send(Op.RW, PACKET))
      connection?.take()
      session.turn(() => {
        while (session.hasPackets) session.send(buffer)
      })
    }
    const { system, user } = process.cpuUsage(begun)
    const copyBegun = process.cpuUsage()
    for (let i = 0; i < packets; i++) target.set(bytes.subarray(HEADER_SIZE))
    const copy = process.cpuUsage(copyBegun)
    if (round < 0) continue
    rates.push(gigabits(packets * PACKET, (system + user) / 1e6))
    copies.push(gigabits(packets * PACKET, (copy.system + copy.user) / 1e6))
  }
  const value = median(rates)
  const anchorValue = median(copies)
  return {
    name: "vsock-loop",
    value,
    unit: "Gb/s",
    anchor: "one copy of the same bytes",
    anchorValue,
    ratio: value / anchorValue,
    goal: "≥ 8 Gb/s of processor time",
    met: value >= 8,
    detail: { "bytes a packet": PACKET, quartiles: spread(rates, 1) }
  }
}

/** What connections cost that do nothing: the guest has opened them, and a fiber of the host waits on each. */
export const idleMemory = async (effort: Effort): Promise<Row> => {
  const count = effort.quick ? 1000 : 10_000
  setFlagsFromString("--expose-gc")
  const collect: unknown = runInNewContext("gc")
  if (typeof collect !== "function") throw new BenchError("there is no way to collect garbage now")
  const used = (): number => {
    for (let i = 0; i < 4; i++) collect()
    const { arrayBuffers, heapUsed } = process.memoryUsage()
    return heapUsed + arrayBuffers
  }
  const opened = Deferred.makeUnsafe<void>()
  const measured = Deferred.makeUnsafe<void>()
  const guest = GuestProgram.make(function*(cpu) {
    const place = GuestAcpi.find(cpu).virtioMmio[0]
    if (place === undefined) throw new Error("the machine has no virtio device")
    const vsock = yield* startVsock(cpu, place, { memoryAddress: 0x18_0000 })
    for (let i = 0; i < count; i++) {
      yield* vsock.send(cpu, { op: Op.REQUEST, srcPort: 1000 + i, dstPort: 1, bufAlloc: 0x1_0000 })
      const { op } = yield* vsock.receive(cpu)
      if (op !== Op.RESPONSE) throw new Error(`the host answered ${op}`)
    }
    Deferred.doneUnsafe(opened, Effect.void)
    yield* vsock.receive(cpu)
  })
  const catalog: Layer.Layer<DeviceCatalog> = layerVsock.pipe(
    Layer.provide(VsockManager.layer),
    Layer.provide(layerDevices),
    Layer.provide(EntropySource.layerRandom)
  )
  const machine = GuestLifecycle.layer.pipe(Layer.provide(catalog), Layer.provide(FakeHypervisor.layer()))
  const perConnection = await Effect.runPromise(
    Effect.gen(function*() {
      const lifecycle = yield* GuestLifecycle
      yield* lifecycle.create({
        kernelType: "LINUX",
        kernel: GuestProgram.kernel(guest),
        cpus: 1,
        guestMemory: "2M",
        virtioVsock: true,
        vsockListeners: [{ port: 1, acceptor: sink }]
      })
      const before = used()
      const run = yield* Effect.forkChild(lifecycle.run)
      yield* Deferred.await(opened)
      const each = (used() - before) / count
      Deferred.doneUnsafe(measured, Effect.void)
      yield* Fiber.interrupt(run)
      return each
    }).pipe(Effect.provide(machine), Effect.scoped)
  )
  const sockets: Array<Socket> = []
  let perSocket = Number.NaN
  const before = used()
  await unixSocket(
    `let left = ${count}; const open = () => { if (left === 0) return; const socket = net.connect(path, () => { left--; open() })
     socket.resume().on("end", () => socket.destroy()).on("error", () => setTimeout(open, 5)) }; open()`,
    (socket) => {
      sockets.push(socket)
      socket.resume()
      if (sockets.length < count) return
      perSocket = (used() - before) / count
      for (const each of sockets) each.destroy()
    },
    count
  )
  return {
    name: "vsock-idle-memory",
    value: perConnection / 1024,
    unit: "KiB a connection",
    anchor: "an idle Unix socket of Node",
    anchorValue: perSocket / 1024,
    ratio: perConnection / perSocket,
    goal: null,
    met: null,
    detail: { connections: count, "with each": "its handler's fiber, which waits for data" }
  }
}
