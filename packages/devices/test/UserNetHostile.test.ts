/** The user-mode network and a guest that sends whatever it likes: nothing throws, nothing grows, nothing is left behind. */
import { assert, describe, it } from "@effect/vitest"
import { Offload } from "@troupe/core/NetBackend"
import { FRAME_NEEDS_CHECKSUM, GSO_TCPV4, GSO_UDP_L4, NetFrame } from "@troupe/core/NetFrame"
import * as fc from "fast-check"
import { allow, drop, type NetDecision, redirect, reset } from "../src/net/user/NetPolicy.ts"
import { OUTBOX_FRAMES_MAX } from "../src/net/user/Outbox.ts"
import { GATEWAY, GUEST, NAMESERVER, NetworkUnderTest } from "./net/NetworkUnderTest.ts"
import {
  ACK,
  dhcp,
  ethernet,
  FIN,
  icmp,
  ipv4,
  parseIp,
  parseTcp,
  RST,
  SYN,
  synOptions,
  tcp,
  udp
} from "./net/ReferenceGuest.ts"

/** Scripts that are played; a long run asks for more. */
const RUNS = Number(process.env["USER_NET_RUNS"] ?? 80)
const BUFFER = 0x4000
const CONNECTIONS = 8
const FLOWS = 6
const WINDOW_MAX = BUFFER
const REMOTE = 0xc000_0201

const u8 = fc.integer({ min: 0, max: 255 })
const address = fc.constantFrom(REMOTE, REMOTE + 1, GATEWAY, NAMESERVER, GUEST, 0x7f00_0001, 0xffff_ffff, 0)
const port = fc.constantFrom(1, 2, 53, 80)
const payload = fc.uint8Array({ maxLength: 3000, size: "max" })

type Step =
  | { readonly _tag: "frame"; readonly bytes: Uint8Array; readonly offloads: Partial<NetFrame> }
  | {
    readonly _tag: "segment"
    readonly ports: readonly [number, number]
    readonly destination: number
    readonly flags: number
    readonly ahead: number
    readonly acknowledges: number
    readonly window: number
    readonly payload: Uint8Array
    readonly options: ReadonlyArray<number>
  }
  | { readonly _tag: "host"; readonly which: number; readonly what: number; readonly bytes: Uint8Array }
  | { readonly _tag: "open"; readonly ports: readonly [number, number]; readonly window: number }
  | { readonly _tag: "follow"; readonly flags: number; readonly payload: Uint8Array }
  | { readonly _tag: "take"; readonly count: number; readonly room: number }
  | { readonly _tag: "pass"; readonly by: number }

const offloads = fc.record({
  flags: fc.constantFrom(0, 0, FRAME_NEEDS_CHECKSUM, 2, 255),
  gsoType: fc.constantFrom(0, 0, GSO_TCPV4, GSO_UDP_L4, 9),
  gsoSize: fc.constantFrom(0, 1, 100, 1448, 0xffff)
})
const whole: fc.Arbitrary<Uint8Array> = fc.oneof(
  fc.tuple(port, port, payload, address).map(([from, to, payload, destination]) =>
    udp(from, to, payload, { destination })
  ),
  fc.tuple(u8, u8, payload, address).map(([type, code, rest, destination]) => icmp(type, code, rest, destination)),
  fc.tuple(u8, payload, address, address, fc.integer({ min: 0, max: 0xffff })).map((
    [protocol, payload, source, destination, fragment]
  ) => ipv4(protocol, payload, { source, destination, fragment })),
  fc.integer({ min: 0, max: 9 }).map((type) => dhcp(type)),
  payload.map((bytes) => ethernet(0x0806, bytes)),
  payload
)
const frame: fc.Arbitrary<Step> = fc.tuple(
  whole,
  fc.array(fc.tuple(fc.nat(80), u8), { maxLength: 3 }),
  fc.option(fc.nat(100), { nil: 3000 }),
  offloads
).map(([right, changes, cut, offloads]) => {
  const bytes = Uint8Array.from(right.subarray(0, cut))
  for (const [at, value] of changes) if (at < bytes.length) bytes[at] = value
  return { _tag: "frame", bytes, offloads }
})
const segment: fc.Arbitrary<Step> = fc.record({
  _tag: fc.constant("segment" as const),
  ports: fc.tuple(port, port),
  destination: fc.constantFrom(REMOTE, REMOTE, NAMESERVER),
  flags: fc.oneof(
    fc.constantFrom(SYN, ACK, ACK, ACK | FIN, RST, SYN | ACK, ACK | RST),
    fc.integer({ min: 0, max: 63 })
  ),
  ahead: fc.oneof(
    fc.constant(0),
    fc.integer({ min: -3000, max: 3000 }),
    fc.integer({ min: -0x7fff_ffff, max: 0x7fff_ffff })
  ),
  acknowledges: fc.oneof(fc.constant(0), fc.integer({ min: -3000, max: 3000 })),
  window: fc.constantFrom(0, 1, 500, 0xffff),
  payload,
  options: fc.oneof(
    fc.constant([] as ReadonlyArray<number>),
    fc.constant(synOptions(1460, 7)),
    fc.constant(synOptions(1, 255)),
    fc.array(u8, { minLength: 4, maxLength: 4 })
  )
})
const host: fc.Arbitrary<Step> = fc.record({
  _tag: fc.constant("host" as const),
  which: fc.nat(20),
  what: fc.nat(9),
  bytes: payload
})
const take: fc.Arbitrary<Step> = fc.record({
  _tag: fc.constant("take" as const),
  count: fc.nat(20),
  room: fc.constantFrom(0, 10, 60, 63, 100, 1514, 65_553)
})
const open: fc.Arbitrary<Step> = fc.record({
  _tag: fc.constant("open" as const),
  ports: fc.tuple(port, port),
  window: fc.constantFrom(0, 1000, 0xffff)
})
/** What a right guest sends next on the connection that was opened last: so that scripts get beyond the beginning of one. */
const follow: fc.Arbitrary<Step> = fc.record({
  _tag: fc.constant("follow" as const),
  flags: fc.constantFrom(ACK, ACK, ACK | FIN),
  payload
})
const pass: fc.Arbitrary<Step> = fc.constantFrom(0, 1, 300, 5000, 150_000).map((by) => ({ _tag: "pass", by }))
const script = fc.array(fc.oneof(frame, open, follow, segment, segment, segment, host, host, take, pass), {
  maxLength: 200,
  size: "max"
})

/** Runs a script. What the guest knows of a connection it takes from the last frames, as an attacker would. */
const run = (steps: ReadonlyArray<Step>, decisions: ReadonlyArray<NetDecision | "later">, allowed: number) => {
  const test = new NetworkUnderTest({ tcpConnections: CONNECTIONS, udpFlows: FLOWS, tcpBuffer: BUFFER }, allowed)
  let decision = 0
  const waiting = new Set<() => void>()
  test.decide = (_, answer) => {
    const next = decisions[decision++ % decisions.length] ?? allow
    if (next !== "later") {
      answer(next)
      return () => {}
    }
    const later = () => answer(allow)
    waiting.add(later)
    return () => void waiting.delete(later)
  }
  const known = new Map<string, { readonly sequence: number; readonly acknowledgment: number }>()
  let opened: readonly [number, number] = [1, 1]
  const takeAll = (count: number, room: number) => {
    for (let i = 0; i < count; i++) {
      const received = test.receive(room)
      if (received === undefined) break
      if (received.bytes[12] !== 8 || received.bytes[13] !== 0) continue
      const ip = parseIp(received.bytes)
      if (ip.protocol !== 6) continue
      const { acknowledgment, destinationPort, flags, payload, sequence, sourcePort } = parseTcp(
        received.bytes,
        received.flags === FRAME_NEEDS_CHECKSUM
      )
      const length = payload.length + (flags & SYN) / SYN + (flags & FIN)
      known.set(`${destinationPort} ${sourcePort}`, { sequence: (sequence + length) >>> 0, acknowledgment })
    }
  }
  for (const step of steps) {
    switch (step._tag) {
      case "open": {
        opened = step.ports
        const [sourcePort, destinationPort] = opened
        const ends = { sourcePort, destinationPort, destination: REMOTE, window: step.window }
        test.send(tcp({ ...ends, sequence: 1000, flags: SYN }))
        test.sockets.tcp.at(-1)?.connect()
        takeAll(100, 1514)
        const last = known.get(`${sourcePort} ${destinationPort}`)
        if (last === undefined) break
        test.send(tcp({ ...ends, sequence: last.acknowledgment, acknowledgment: last.sequence, flags: ACK }))
        break
      }
      case "follow": {
        takeAll(100, 65_553)
        const [sourcePort, destinationPort] = opened
        const last = known.get(`${sourcePort} ${destinationPort}`)
        if (last === undefined) break
        const ends = { sourcePort, destinationPort, destination: REMOTE, window: 0xffff }
        const { flags, payload } = step
        test.send(tcp({ ...ends, sequence: last.acknowledgment, acknowledgment: last.sequence, flags, payload }))
        break
      }
      case "frame":
        test.send(step.bytes, step.offloads)
        break
      case "segment": {
        const { ports: [from, to] } = step
        const last = known.get(`${from} ${to}`) ?? { sequence: 1000, acknowledgment: 1000 }
        test.send(tcp({
          sourcePort: from,
          destinationPort: to,
          destination: step.destination,
          sequence: (last.acknowledgment + step.ahead) >>> 0,
          acknowledgment: (last.sequence + step.acknowledges) >>> 0,
          flags: step.flags,
          window: step.window,
          options: step.options,
          payload: step.payload
        }))
        break
      }
      case "host": {
        const { tcp: streams, udp: datagrams } = test.sockets
        const socket = streams.length === 0 ? undefined : streams[step.which % streams.length]
        if (step.what < 2) socket?.connect()
        else if (step.what === 2) socket?.say(step.bytes)
        else if (step.what === 3) socket?.take(step.bytes.length)
        else if (step.what === 4) socket?.finish()
        else if (step.what === 5) socket?.fail("reset")
        else if (step.what === 6) {
          const [first] = waiting
          if (first !== undefined) {
            waiting.delete(first)
            first()
          }
        } else if (datagrams.length > 0) datagrams[step.which % datagrams.length]!.say(step.bytes)
        break
      }
      case "take":
        takeAll(step.count, step.room)
        break
      case "pass":
        test.pass(step.by)
    }
    const { tcp: connections, tcpBytes, udp: flows } = test.net.usage
    assert.isAtMost(connections, CONNECTIONS)
    assert.isAtMost(flows, FLOWS)
    // Each connection: what waits for the guest and a piece more, what waits for the host, what waits for its turn.
    assert.isAtMost(tcpBytes, CONNECTIONS * (BUFFER + 3000 + WINDOW_MAX + BUFFER))
    assert.isAtMost(test.sockets.open, connections + flows, "a socket has outlived its connection")
    assert.isAtMost(waiting.size, connections + flows, "a question has outlived its connection")
  }
  return { test, waiting }
}

describe("UserNet and a hostile guest", () => {
  it("never throws, keeps to its bounds, and leaves nothing behind", () => {
    const decisions = fc.array(
      fc.constantFrom<NetDecision | "later">(allow, allow, reset, drop, "later", redirect("127.0.0.1", 1)),
      { minLength: 1, maxLength: 6 }
    )
    const seen = { data: 0, ended: 0, reset: 0 }
    fc.assert(
      fc.property(
        script,
        decisions,
        fc.constantFrom(0, Offload.CHECKSUM | Offload.TSO4),
        (steps, decisions, allowed) => {
          const { test, waiting } = run(steps, decisions, allowed)
          // A right guest is served as if nothing had been.
          test.receiveAll()
          test.decide = (_, answer) => {
            answer(allow)
            return () => {}
          }
          const before = test.sockets.udp.length
          test.send(udp(40_000, 40_001, Uint8Array.of(1), { destination: REMOTE + 5 }))
          assert.strictEqual(test.sockets.udp.length, before + 1)
          for (const socket of test.sockets.tcp) {
            if (socket.bytes.length > 0) seen.data++
            if (socket.ended) seen.ended++
            if (socket.wasReset) seen.reset++
          }
          test.net.close()
          assert.strictEqual(test.sockets.open, 0)
          assert.strictEqual(waiting.size, 0)
          assert.deepStrictEqual({ ...test.net.usage, lost: 0 }, { tcp: 0, udp: 0, tcpBytes: 0, lost: 0 })
          test.send(udp(1, 2, Uint8Array.of(1), { destination: REMOTE }))
          assert.isUndefined(test.receive())
        }
      ),
      { numRuns: RUNS }
    )
    // The scripts do reach what they are for.
    for (const count of Object.values(seen)) assert.isAtLeast(count, 1)
  })

  it("loses what a guest that takes nothing is sent", () => {
    const test = new NetworkUnderTest()
    for (let i = 0; i < 3 * OUTBOX_FRAMES_MAX; i++) test.send(icmp(8, 0, Uint8Array.of(0, 0, 0, 0)))
    assert.strictEqual(test.receiveAll().length, OUTBOX_FRAMES_MAX)
    assert.strictEqual(test.net.usage.lost, 2 * OUTBOX_FRAMES_MAX)
  })

  it("reads each byte of a frame within its length", () => {
    // A header that claims to be longer than the frame, over what an earlier frame has left behind.
    const test = new NetworkUnderTest()
    test.send(icmp(8, 0, Uint8Array.of(0, 0, 0, 0, 1, 2, 3)))
    test.receiveAll()
    const cut = icmp(8, 0, Uint8Array.of(0, 0, 0, 0, 1, 2, 3))
    for (let length = 0; length < cut.length; length++) test.send(cut.subarray(0, length))
    assert.deepStrictEqual(test.receiveAll(), [])
    const frame = new NetFrame()
    assert.isTrue(test.net.send(frame))
  })
})
