// Whether connections with little to send get their turn beside one that sends as much as it can.
import type { VsockConnection } from "@troupe/vsock/VsockConnection"
import { HEADER_SIZE, Op, VIRTIO_VSOCK_TYPE_STREAM, VsockHeader } from "@troupe/vsock/VsockPacket"
import { VsockPorts } from "@troupe/vsock/VsockPorts"
import { VsockSession } from "@troupe/vsock/VsockSession"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Stream from "effect/Stream"
import type { Effort, Row } from "../Row.ts"
import { median, spread } from "../Statistics.ts"
import { chunk, gigabits, GUEST_PORT, type GuestRun, ONE_BYTE, percentile, rounds, runGuest, sink } from "./Vsock.ts"

/** Connections that each have one byte on its way, beside the greedy one. */
const MODEST = 8

/** What the modest connections waited for their bytes, in microseconds, and how much the greedy one has sent. */
interface Waits {
  readonly p50: number
  readonly p99: number
  readonly worst: number
  readonly greedy: number
}

/** Round trips on several connections at a time, alone and then beside one that sends and receives as much as it can. */
const waits = (count: number): Promise<GuestRun<readonly [alone: Waits, beside: Waits]>> =>
  runGuest(`vsock=echo,${GUEST_PORT},${MODEST + 1}`, sink, (endpoint) =>
    Effect.gen(function*() {
      const greedy = yield* endpoint.connect2(GUEST_PORT)
      const modest = yield* Effect.forEach(Array.from({ length: MODEST }), () => endpoint.connect2(GUEST_PORT))
      let sent = 0
      const measure = Effect.gen(function*() {
        const begun = performance.now()
        const sentBefore = sent
        const times: Array<number> = []
        yield* Effect.forEach(modest, (socket) =>
          Effect.gen(function*() {
            for (let i = 0; i < count; i++) {
              const begun = performance.now()
              yield* socket.write(ONE_BYTE)
              yield* socket.read
              times.push((performance.now() - begun) * 1000)
            }
          }), { concurrency: "unbounded" })
        return {
          p50: median(times),
          p99: percentile(times, 0.99),
          worst: Math.max(...times),
          greedy: gigabits(sent - sentBefore, (performance.now() - begun) / 1000)
        }
      })
      const alone = yield* measure
      const write = Effect.forever(Effect.tap(greedy.write(chunk), () =>
        Effect.sync(() => {
          sent += chunk.length
        })))
      const writer = yield* Effect.forkChild(write)
      const reader = yield* Effect.forkChild(Stream.runDrain(greedy.input))
      const beside = yield* measure
      yield* Fiber.interrupt(writer)
      yield* greedy.shutdown("send")
      yield* Fiber.join(reader)
      return [alone, beside] as const
    }))

/** Bytes that the guest of {@link foreignPackets} buffers for each connection: more than is sent. */
const AMPLE = 2 ** 31
/** Bytes of a buffer of the guest, as Linux has them. */
const BUFFER = 4096

/**
 * The most packets of others that leave for the guest between a modest connection's write and its packet: on the session
 * without a machine, so that nothing of chance is in it. Each modest connection writes again when its packet has left.
 */
const foreignPackets = (): number => {
  const connections: Array<VsockConnection> = []
  const header = new VsockHeader()
  const session = new VsockSession({
    guestCid: 3,
    hasSeqpacket: true,
    hostPorts: new VsockPorts(),
    now: () => 0,
    signal: () => {},
    listens: () => true,
    arrived: (connection) => {
      connection.accept()
      connections.push(connection)
    },
    closing: () => {},
    onShutdown: () => {}
  })
  const buffer = {
    readableBytes: 0,
    writableBytes: BUFFER,
    write: (at: number, from: Uint8Array) => {
      if (at === 0) header.bytes.set(from.subarray(0, HEADER_SIZE))
      return from.length
    }
  }
  for (let port = 0; port <= MODEST; port++) {
    header.set(3, 1000 + port, 2, 1, VIRTIO_VSOCK_TYPE_STREAM, Op.REQUEST, 0)
    header.len = 0
    header.setCredit(AMPLE, 0)
    const bytes = header.bytes.slice()
    const read = (at: number, to: Uint8Array): number => {
      to.set(bytes.subarray(at, at + to.length))
      return to.length
    }
    session.receive({ readableBytes: HEADER_SIZE, read })
  }
  while (session.hasPackets) session.send(buffer)
  const [greedy, ...modest] = connections
  greedy?.write(new Uint8Array(64 * 2 ** 20), () => {})
  const since = new Map<number, number>()
  const write = (connection: VsockConnection): void => {
    since.set(connection.peer.port, 0)
    connection.write(ONE_BYTE, () => {})
  }
  for (const connection of modest) write(connection)
  let worst = 0
  for (let packets = 0; packets < 10_000; packets++) {
    session.turn(() => session.send(buffer))
    const port = header.dstPort
    for (const [other, count] of since) {
      if (other !== port) since.set(other, count + 1)
    }
    const waited = since.get(port)
    const connection = modest.find(({ peer }) => peer.port === port)
    if (waited === undefined || connection === undefined) continue
    worst = Math.max(worst, waited)
    write(connection)
  }
  return worst
}

/** How long connections with little to send wait beside one that sends as much as it can. */
export const fairness = async (effort: Effort): Promise<Row> => {
  const count = effort.quick ? 200 : 2000
  const alone: Array<Waits> = []
  const beside: Array<Waits> = []
  for (let round = -1; round < rounds(effort); round++) {
    const { result } = await waits(count)
    if (round < 0) continue
    alone.push(result[0])
    beside.push(result[1])
  }
  const middle = (waits: ReadonlyArray<Waits>, part: keyof Waits) =>
    Number(median(waits.map((w) => w[part])).toFixed(1))
  const value = middle(beside, "worst")
  const anchorValue = middle(alone, "worst")
  const packets = foreignPackets()
  return {
    name: "vsock-fairness",
    value,
    unit: "µs",
    anchor: "the same connections without the greedy one",
    anchorValue,
    ratio: value / anchorValue,
    goal: "≤ one packet of each other connection",
    met: packets <= MODEST,
    detail: {
      "modest connections": MODEST,
      "round trips of each": count,
      "quartiles of the worst": spread(beside.map(({ worst }) => worst), 0),
      "p50": middle(beside, "p50"),
      "p50 alone": middle(alone, "p50"),
      "p99": middle(beside, "p99"),
      "p99 alone": middle(alone, "p99"),
      "Gb/s of the greedy one, each way": Number(median(beside.map(({ greedy }) => greedy)).toFixed(2)),
      "packets of others before one's own, at most": packets
    }
  }
}
