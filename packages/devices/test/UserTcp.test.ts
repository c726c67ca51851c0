import { assert, describe, it } from "@effect/vitest"
import { Offload } from "@troupe/core/NetBackend"
import { FRAME_NEEDS_CHECKSUM, GSO_TCPV4 } from "@troupe/core/NetFrame"
import * as fc from "fast-check"
import type { FakeTcp } from "./net/FakeSockets.ts"
import { NetworkUnderTest, type Received } from "./net/NetworkUnderTest.ts"
import { parseTcp, type SegmentFields, tcp } from "./net/ReferenceGuest.ts"
import { ReferenceTcp } from "./net/ReferenceTcp.ts"

const REMOTE = 0xc000_0201
const BUFFER = 0x4000
/** What may come after a socket was told to pause. */
const SLACK = 0x2000
/** Steps of a journey that is taken to have no end; the longest take a third of that. */
const STEPS_MAX = 50_000
/** The most bytes of a direction: much more than wait at once; fewer where segments are small, of which there are many then. */
const BYTES_MAX = 60_000
const SMALL_MSS = 100
const SMALL_BYTES_MAX = 20_000

/** What happens on the way, out of one seed. */
const makeChance = (seed: number) => {
  let state = seed | 1
  const next = () => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return state >>> 0
  }
  return {
    below: (limit: number) => next() % limit,
    in100: (percent: number) => next() % 100 < percent
  }
}

const pattern = (length: number, salt: number): Uint8Array =>
  Uint8Array.from({ length }, (_, i) => (i * 31 + (i >>> 8) * 7 + salt) & 255)

interface Journey {
  readonly seed: number
  readonly up: number
  readonly down: number
  readonly loss: number
  readonly twice: number
  readonly delay: number
  readonly mss: number
  readonly scale: number
  readonly room: number
  readonly offloads: number
  readonly guestEndsLast: boolean
  readonly hostTakes: number
  readonly guestReads: number
}

/** Frames on their way, which are lost, doubled and overtaken. */
class Way<A> {
  readonly #frames: Array<{ readonly at: number; readonly frame: A }> = []
  readonly #journey: Journey
  readonly #chance: ReturnType<typeof makeChance>

  constructor(journey: Journey, chance: ReturnType<typeof makeChance>) {
    this.#journey = journey
    this.#chance = chance
  }

  put(frame: A, now: number): void {
    if (this.#chance.in100(this.#journey.loss)) return
    const times = this.#chance.in100(this.#journey.twice) ? 2 : 1
    for (let i = 0; i < times; i++) this.#frames.push({ at: now + this.#chance.below(this.#journey.delay + 1), frame })
  }

  take(now: number): Array<A> {
    const due = this.#frames.filter((frame) => frame.at <= now).toSorted((a, b) => a.at - b.at)
    for (const frame of due) this.#frames.splice(this.#frames.indexOf(frame), 1)
    return due.map(({ frame }) => frame)
  }

  get next(): number {
    return this.#frames.reduce((next, { at }) => Math.min(next, at), Number.POSITIVE_INFINITY)
  }
}

/** Takes both streams through one connection, and checks all along. */
const travel = (journey: Journey) => {
  const chance = makeChance(journey.seed)
  const test = new NetworkUnderTest({ tcpBuffer: BUFFER }, journey.offloads)
  const most = journey.mss === SMALL_MSS ? SMALL_BYTES_MAX : BYTES_MAX
  const up = pattern(journey.up % (most + 1), 1)
  const down = pattern(journey.down % (most + 1), 2)
  const guest = new ReferenceTcp({
    port: 40_000,
    remote: REMOTE,
    remotePort: 80,
    initial: (journey.seed * 2_654_435_761) >>> 0,
    mss: journey.mss,
    scale: journey.scale,
    room: journey.room,
    segment: (journey.offloads & Offload.TSO4) === 0 ? Math.min(journey.mss === 0 ? 536 : journey.mss, 1460) : 8000,
    data: up
  })
  guest.mayEnd = !journey.guestEndsLast
  const toNet = new Way<SegmentFields>(journey, chance)
  const toGuest = new Way<Received>(journey, chance)
  let said = 0
  let finished = false
  let socket: FakeTcp | undefined
  let steps = 0
  const isOver = () => guest.done && guest.ended && test.net.usage.tcp === 0

  while (!isOver()) {
    if (++steps > STEPS_MAX) {
      throw new Error(`it does not end: ${guest.state}, ${guest.received.length} of ${down.length}`)
    }
    // A late copy of the last acknowledgment finds nothing any more, and is told so.
    if (!(guest.done && guest.ended)) assert.notStrictEqual(guest.state, "reset")
    socket ??= test.sockets.tcp[0]
    if (socket !== undefined) {
      if (chance.in100(50)) socket.connect()
      if (!socket.paused && said < down.length) {
        const piece = down.slice(said, said + 1 + chance.below(SLACK))
        said += piece.length
        socket.say(piece)
      } else if (said === down.length && !finished && chance.in100(30)) {
        finished = true
        socket.finish()
      }
      socket.take(chance.below(journey.hostTakes + 1))
      assert.isAtMost(socket.unwritten, BUFFER, "the guest may not send more than was promised")
    }
    if (guest.ended) guest.mayEnd = true
    guest.read(chance.below(journey.guestReads + 1))
    for (const segment of guest.poll(test.now)) toNet.put(segment, test.now)
    for (const segment of toNet.take(test.now)) {
      const partial = (journey.offloads & Offload.CHECKSUM) !== 0
      const large = (segment.payload?.length ?? 0) > guest.peerMss
      test.send(
        tcp({ ...segment, partial }),
        partial
          ? { flags: FRAME_NEEDS_CHECKSUM, ...(large ? { gsoType: GSO_TCPV4, gsoSize: guest.peerMss } : {}) }
          : {}
      )
    }
    for (let frames = chance.below(8); frames > 0; frames--) {
      const frame = test.receive(chance.in100(20) ? 700 : 65_553)
      if (frame === undefined) break
      if (frame.gsoType === GSO_TCPV4) assert.isTrue((journey.offloads & Offload.TSO4) !== 0 && frame.gsoSize > 0)
      else assert.isAtMost(frame.bytes.length, 1514)
      toGuest.put(frame, test.now)
    }
    for (const frame of toGuest.take(test.now)) {
      guest.receive(parseTcp(frame.bytes, frame.flags === FRAME_NEEDS_CHECKSUM), test.now)
    }
    assert.isAtMost(test.net.usage.tcpBytes, 3 * BUFFER + SLACK)
    const idle = chance.in100(50)
    const next = Math.min(test.wakeAt, guest.deadline, toNet.next, toGuest.next)
    test.pass(idle && next !== Number.POSITIVE_INFINITY ? Math.max(1, Math.min(2000, next - test.now)) : 1)
  }
  assert.deepStrictEqual(Buffer.from(socket!.bytes), Buffer.from(up))
  assert.deepStrictEqual(Buffer.from(guest.received), Buffer.from(down))
  assert.strictEqual(test.sockets.open, 0)
  assert.strictEqual(test.net.usage.tcpBytes, 0)
  return steps
}

const journeys = fc.record<Journey>({
  seed: fc.integer({ min: 1, max: 0x7fff_ffff }),
  up: fc.integer({ min: 0, max: BYTES_MAX }),
  down: fc.integer({ min: 0, max: BYTES_MAX }),
  loss: fc.constantFrom(0, 0, 3, 10),
  twice: fc.constantFrom(0, 10, 30),
  delay: fc.constantFrom(0, 1, 30),
  mss: fc.constantFrom(0, SMALL_MSS, 536, 1460, 9000),
  scale: fc.constantFrom(-1, 0, 7),
  room: fc.constantFrom(1000, 5000, 65_535, 200_000),
  offloads: fc.constantFrom(0, Offload.CHECKSUM, Offload.CHECKSUM | Offload.TSO4),
  guestEndsLast: fc.boolean(),
  hostTakes: fc.constantFrom(100, 5000, 100_000),
  guestReads: fc.constantFrom(100, 5000, 100_000)
})

describe("UserTcp", () => {
  it("brings both streams over, whatever happens on the way", () => {
    fc.assert(fc.property(journeys, (journey) => void travel(journey)), { numRuns: 60 })
  })
})
