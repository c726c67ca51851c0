/**
 * A guest that keeps to the protocol, a host, and everything that can happen between them, step by step. What each side has
 * sent is a pattern of which only the length is kept; whoever receives it checks that it goes on where it was.
 *
 * Packets are on their way for as long as the script says, in order in each direction, as on the queues of the device.
 */
import { assert } from "@effect/vitest"
import * as Exit from "effect/Exit"
import * as fc from "fast-check"
import type { VsockConnection } from "../src/VsockConnection.ts"
import {
  Op,
  SHUTDOWN_BOTH,
  VIRTIO_VSOCK_SEQ_EOM,
  VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
  VIRTIO_VSOCK_SHUTDOWN_F_SEND,
  VIRTIO_VSOCK_TYPE_SEQPACKET,
  VIRTIO_VSOCK_TYPE_STREAM
} from "../src/VsockPacket.ts"
import { QUARANTINE_MILLIS } from "../src/VsockPorts.ts"
import { CLOSE_TIMEOUT_MILLIS } from "../src/VsockSession.ts"
import { type Packet, SessionGuest } from "./SessionGuest.ts"

/** A guest's port that refuses the host. */
const REFUSING_PORT = 9
const LISTENING_PORT = 1
/** What the guest's connections buffer: little, so that credit runs out. */
const GUEST_BUFFER = 300

/** What both sides send repeats after this many bytes; each side of each connection begins at another place. */
const PERIOD = 0x1_0000
const table = Buffer.from(
  Uint8Array.from({ length: 8 * PERIOD }, (_, place) => (place * 7 + ((place % PERIOD) >> 8)) & 0xff)
)

const pattern = (from: number, length: number, seed: number): Uint8Array => {
  const first = (from + seed * 259) % PERIOD
  return table.subarray(first, first + length)
}

const checkPattern = (from: number, bytes: Uint8Array, seed: number): void => {
  if (table.compare(bytes, 0, bytes.length, ...rangeOf(from, bytes.length, seed)) !== 0) {
    assert.fail(`what begins at byte ${from} of a stream is not what was sent there`)
  }
}

const rangeOf = (from: number, length: number, seed: number): readonly [number, number] => {
  const first = (from + seed * 259) % PERIOD
  return [first, first + length]
}

/** The test framework's own assertions take most of the time where there are millions of them. */
const check = (condition: boolean, detail: string): void => {
  if (!condition) assert.fail(detail)
}

/** One end of a connection in the guest. */
interface GuestEnd {
  readonly port: number
  readonly hostPort: number
  readonly seed: number
  state: "asking" | "open" | "closing" | "closed"
  /** Ended by a RST that no SHUTDOWN of both directions came before. */
  isReset: boolean
  sent: number
  received: number
  read: number
  hostBufAlloc: number
  hostFwdCnt: number
  shut: number
  hostShut: number
  readonly isSeqpacket: boolean
  /** Bytes of the message that the guest is sending, and of the one that it is receiving. */
  partSent: number
  partReceived: number
  /** Lengths of the whole messages that the guest has sent, as far as the host has not read them. */
  readonly messages: Array<number>
  /** How many bytes they and those before them have. */
  whole: number
}

/** One end of a connection in the host. */
interface HostEnd {
  readonly connection: VsockConnection
  written: number
  /** Bytes of writes that were done. */
  delivered: number
  read: number
  writes: number
  writesDone: number
  decided: number
  hasShutReceive: boolean
  hasShutSend: boolean
  hasClosed: boolean
  hasReset: boolean
  /** Lengths of the messages that the host has sent, as far as the guest has not received them. */
  readonly messages: Array<number>
  /** Somebody waits for input, or for the end. */
  readerWaits: boolean
  endHeard: number
}

/** The commands of a script. */
export const COMMANDS = [
  "guestConnects",
  "hostConnects",
  "hostConnectsInVain",
  "hostAccepts",
  "hostRefuses",
  "guestSends",
  "hostWrites",
  "guestReads",
  "hostReads",
  "guestShutsSend",
  "guestShutsReceive",
  "guestCloses",
  "guestResets",
  "guestAsksForCredit",
  "hostShutsSend",
  "hostShutsReceive",
  "hostCloses",
  "hostResets",
  "hostTakesBack",
  "hostWaits",
  "hostWaitsNoMore",
  "packetsArriveAtHost",
  "packetsArriveAtGuest",
  "timePasses",
  "driverRestarts"
] as const
export type Command = (typeof COMMANDS)[number]
/** A command, which connection it is about, and how much. */
export type Step = readonly [Command, number, number]

/** What moves data and packets: most of a script, so that something is under way when the rest of it happens. */
const MOVING: ReadonlyArray<Command> = [
  "guestSends",
  "hostWrites",
  "guestReads",
  "hostReads",
  "packetsArriveAtHost",
  "packetsArriveAtGuest"
]

/** The steps by which a connection is opened, of a guest or of a host. */
const opening = (byGuest: boolean, which: number, amount: number): ReadonlyArray<Step> =>
  byGuest
    ? [["guestConnects", 0, amount], ["packetsArriveAtHost", 0, 7], ["hostAccepts", 0, 0], [
      "packetsArriveAtGuest",
      0,
      7
    ]]
    : [["hostConnects", which, amount], ["packetsArriveAtGuest", 0, 7], ["packetsArriveAtHost", 0, 7]]

const amount = fc.nat({ max: 400 })
const which = fc.nat({ max: 3 })

/** Scripts, that shrink to what matters in them: some connections are open when it begins, as a rule. */
export const script: fc.Arbitrary<ReadonlyArray<Step>> = fc.tuple(
  fc.array(fc.tuple(fc.boolean(), which, amount), { size: "max", maxLength: 3 }),
  fc.array(
    fc.tuple(
      fc.oneof(
        { arbitrary: fc.constantFrom(...COMMANDS), weight: 2 },
        { arbitrary: fc.constantFrom(...MOVING), weight: 3 }
      ),
      which,
      amount
    ),
    { size: "max", maxLength: 50 }
  )
).map(([openings, steps]) => openings.flatMap((each) => opening(...each)).concat(steps))

/** The connection that a command is about: one that is not over, where there is one, or one of all. */
const chosen = <A>(
  ends: ReadonlyArray<A>,
  isOver: (end: A) => boolean,
  which: number,
  amount: number
): A | undefined => {
  const alive = amount % 8 === 0 ? [] : ends.filter((end) => !isOver(end))
  const from = alive.length === 0 ? ends : alive
  return from[which % from.length]
}

/** What scripts have come to: how often a packet or a command met a connection in a state, and how many commands did something. */
export interface Coverage {
  /** By `state: packet` and `state: command`; `none` is where there is no connection any more. */
  readonly met: Map<string, number>
  schedules: number
  commands: number
  packets: number
}

export const makeCoverage = (): Coverage => ({ met: new Map(), schedules: 0, commands: 0, packets: 0 })

/** Commands of a host about one of its connections. */
const HOST_COMMANDS: ReadonlySet<Command> = new Set<Command>([
  "hostWrites",
  "hostReads",
  "hostShutsSend",
  "hostShutsReceive",
  "hostCloses",
  "hostResets",
  "hostWaits"
])

const OP_NAMES = new Map<number, string>(Object.entries(Op).map(([name, op]) => [op, name]))

/** One run of a script. */
export class ConnectionModel {
  readonly #coverage: Coverage
  #guest = new SessionGuest()
  #guestEnds: Array<GuestEnd> = []
  readonly #hostEnds: Array<HostEnd> = []
  #toHost: Array<() => void> = []
  #toGuest: Array<Packet> = []
  #nextGuestPort = 1000
  #takeBacks: Array<() => void> = []
  readonly #waiters = new Map<HostEnd, () => void>()

  constructor(coverage: Coverage = makeCoverage()) {
    this.#coverage = coverage
  }

  /** Runs a script, then lets everything come to its end, and checks what has become of it. */
  run(steps: ReadonlyArray<Step>): void {
    this.#coverage.schedules++
    for (const [command, which, amount] of steps) {
      if (HOST_COMMANDS.has(command)) this.#met(this.#host(which, amount)?.connection.state, command)
      const before = this.#activity
      this.#do(command, which, amount)
      if (this.#activity !== before) this.#coverage.commands++
      this.#check()
    }
    this.#settle()
    this.#checkEnd()
  }

  #met(state: string | undefined, what: string): void {
    const { met } = this.#coverage
    const key = `${state ?? "none"}: ${what}`
    met.set(key, (met.get(key) ?? 0) + 1)
  }

  /** A number that is another one after a command that has done something. */
  get #activity(): number {
    let sum = this.#toHost.length + this.#toGuest.length + this.#guest.arrived.length + this.#guest.session.waiting +
      this.#coverage.packets + this.#guest.time
    for (const end of this.#hostEnds) {
      sum += 1 + end.read + end.writes + (end.hasShutReceive ? 1 : 0) + (end.hasShutSend ? 1 : 0) +
        (end.hasClosed ? 1 : 0) +
        (end.hasReset ? 1 : 0) + (end.readerWaits ? 1 : 0)
    }
    for (const end of this.#guestEnds) sum += 1 + end.sent + end.received + end.read + end.shut
    return sum
  }

  #host(which: number, amount: number): HostEnd | undefined {
    return chosen(this.#hostEnds, ({ connection }) => connection.isOver, which, amount)
  }

  #do(command: Command, which: number, amount: number): void {
    const guest = this.#guest
    const end = chosen(this.#guestEnds, ({ state }) => state === "closed", which, amount)
    const host = this.#host(which, amount)
    switch (command) {
      case "guestConnects":
        return this.#guestConnects(amount % 3 === 0)
      case "hostConnects":
        return this.#hostConnects(80 + which, amount % 3 === 0)
      case "hostConnectsInVain":
        return this.#hostConnects(REFUSING_PORT, false)
      case "hostAccepts":
        return this.#decide(true)
      case "hostRefuses":
        return this.#decide(false)
      case "guestSends": {
        if (end?.state !== "open" || (end.shut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) !== 0) return
        if ((end.hostShut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) !== 0) return
        const length = Math.min(amount * amount, end.hostBufAlloc - ((end.sent - end.hostFwdCnt) >>> 0))
        if (length <= 0) return
        // A message that is longer than the host's buffer would never end.
        return this.#guestSends(end, length, amount % 4 !== 0 || end.partSent > PERIOD)
      }
      case "hostWrites":
        return host === undefined ? undefined : this.#hostWrites(host, amount)
      case "guestReads":
        if (end?.state !== "open" || end.received === end.read) return
        end.read += Math.min(amount, end.received - end.read)
        return this.#send(end, Op.CREDIT_UPDATE)
      case "hostReads":
        return host === undefined ? undefined : this.#hostReads(host)
      case "guestShutsSend":
        return end?.state === "open" ? this.#guestShuts(end, VIRTIO_VSOCK_SHUTDOWN_F_SEND) : undefined
      case "guestShutsReceive":
        return end?.state === "open" ? this.#guestShuts(end, VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) : undefined
      case "guestCloses":
        return end?.state === "open" ? this.#guestShuts(end, SHUTDOWN_BOTH) : undefined
      case "guestResets":
        if (end === undefined || end.state === "closed") return
        end.state = "closed"
        end.isReset = true
        return this.#send(end, Op.RST)
      case "guestAsksForCredit":
        return end?.state === "open" ? this.#send(end, Op.CREDIT_REQUEST) : undefined
      case "hostShutsSend":
        if (host === undefined || host.connection.state !== "ReadWrite") return
        host.hasShutSend = true
        return host.connection.shutdown("send")
      case "hostShutsReceive":
        if (host === undefined || host.connection.state !== "ReadWrite") return
        host.hasShutReceive = true
        return host.connection.shutdown("receive")
      case "hostCloses":
        if (host === undefined) return
        host.hasClosed = true
        return host.connection.close()
      case "hostResets":
        if (host === undefined) return
        host.hasReset = true
        return host.connection.reset()
      case "hostTakesBack":
        this.#takeBacks.pop()?.()
        return
      case "hostWaits":
        if (host === undefined || host.readerWaits || host.connection.end !== "open") return
        this.#hostReads(host)
        host.readerWaits = true
        this.#waiters.set(
          host,
          host.connection.awaitInput(() => {
            check(host.readerWaits, "a reader is woken who does not wait any more")
            host.readerWaits = false
          })
        )
        return
      case "hostWaitsNoMore":
        if (host?.readerWaits !== true) return
        this.#waiters.get(host)?.()
        host.readerWaits = false
        return
      case "packetsArriveAtHost":
        for (const packet of this.#toHost.splice(0, 1 + amount % 8)) packet()
        return
      case "packetsArriveAtGuest":
        this.#toGuest.push(...guest.receive(1 + amount % 8))
        for (const packet of this.#toGuest.splice(0, 1 + amount % 5)) this.#arrive(packet)
        return
      case "timePasses":
        return this.#passTime(amount * 20)
      case "driverRestarts":
        return amount < 40 ? this.#restart(amount % 2 === 0) : undefined
    }
  }

  #send(end: GuestEnd, op: number, flags = 0, data: Uint8Array = new Uint8Array(0)): void {
    const packet = {
      op,
      flags,
      data,
      type: end.isSeqpacket ? VIRTIO_VSOCK_TYPE_SEQPACKET : VIRTIO_VSOCK_TYPE_STREAM,
      srcPort: end.port,
      dstPort: end.hostPort,
      bufAlloc: GUEST_BUFFER,
      fwdCnt: end.read
    }
    const guest = this.#guest
    this.#toHost.push(() => {
      this.#coverage.packets++
      const connection = guest.session.connections().find(({ local, peer }) =>
        local.port === end.hostPort && peer.port === end.port
      )
      this.#met(connection?.state, OP_NAMES.get(op) ?? String(op))
      guest.send(packet)
    })
  }

  #guestSends(end: GuestEnd, length: number, isEnd: boolean): void {
    const isMessage = end.isSeqpacket && isEnd
    this.#send(end, Op.RW, isMessage ? VIRTIO_VSOCK_SEQ_EOM : 0, pattern(end.sent, length, end.seed))
    end.sent += length
    end.partSent += length
    if (!isMessage) return
    end.messages.push(end.partSent)
    end.whole += end.partSent
    end.partSent = 0
  }

  #guestConnects(isSeqpacket: boolean): void {
    const end = this.#newGuestEnd(this.#nextGuestPort++, LISTENING_PORT, isSeqpacket, "asking")
    this.#send(end, Op.REQUEST)
  }

  #newGuestEnd(port: number, hostPort: number, isSeqpacket: boolean, state: GuestEnd["state"]): GuestEnd {
    const end: GuestEnd = {
      port,
      hostPort,
      seed: (port * 13 + hostPort) & 0xff,
      state,
      isReset: false,
      sent: 0,
      received: 0,
      read: 0,
      hostBufAlloc: 0,
      hostFwdCnt: 0,
      shut: 0,
      hostShut: 0,
      isSeqpacket,
      partSent: 0,
      partReceived: 0,
      messages: [],
      whole: 0
    }
    this.#guestEnds.push(end)
    return end
  }

  #newHostEnd(connection: VsockConnection): HostEnd {
    const end: HostEnd = {
      connection,
      written: 0,
      delivered: 0,
      read: 0,
      writes: 0,
      writesDone: 0,
      decided: 0,
      hasShutReceive: false,
      hasShutSend: false,
      hasClosed: false,
      hasReset: false,
      messages: [],
      readerWaits: false,
      endHeard: 0
    }
    connection.awaitOver(() => end.endHeard++)
    this.#hostEnds.push(end)
    return end
  }

  #hostConnects(guestPort: number, isSeqpacket: boolean): void {
    const connection = this.#guest.session.connect(isSeqpacket ? "seqpacket" : "stream", 2, undefined, guestPort)
    if (typeof connection === "string") assert.fail(connection)
    const end = this.#newHostEnd(connection)
    connection.ask((exit) => {
      end.decided++
      check(guestPort !== REFUSING_PORT || Exit.isFailure(exit), "a refused connection is open")
    })
  }

  #decide(isAccepted: boolean): void {
    const connection = this.#guest.arrived.shift()
    if (connection === undefined) return
    const end = this.#newHostEnd(connection)
    end.decided = 1
    if (isAccepted) {
      connection.accept()
      return
    }
    end.hasReset = true
    connection.reset()
  }

  #hostWrites(host: HostEnd, length: number): void {
    const bytes = pattern(host.written, length, this.#seedOf(host))
    const isMessage = host.connection.type === "seqpacket"
    const isOpen = host.connection.state === "ReadWrite" && !host.hasShutSend && !(isMessage && length > GUEST_BUFFER)
    host.writes++
    if (isOpen) host.written += length
    let isDone = false
    let isTakenBack = false
    const takeBack = host.connection.write(bytes, (exit) => {
      // Its end was decided already when it was taken back.
      if (isTakenBack) return
      check(!isDone, "a write was done twice")
      isDone = true
      host.writesDone++
      if (Exit.isSuccess(exit)) host.delivered += length
      else if (isOpen) host.written = Number.NaN
    })
    if (isOpen && isMessage) host.messages.push(length)
    if (!isOpen) return
    this.#takeBacks.push(() => {
      if (isDone) return
      takeBack()
      // What was taken back is not told to anybody any more; the stream has a hole, so nothing more of it is checked.
      isTakenBack = true
      host.writesDone++
      host.written = Number.NaN
      host.hasReset = true
      host.connection.reset()
    })
  }

  #seedOf(host: HostEnd): number {
    return (host.connection.peer.port * 17 + host.connection.local.port + 5) & 0xff
  }

  #hostReads(host: HostEnd): void {
    for (let bytes = host.connection.take(); bytes !== undefined; bytes = host.connection.take()) {
      const { local, peer } = host.connection
      checkPattern(host.read, bytes, (peer.port * 13 + local.port) & 0xff)
      host.read += bytes.length
      if (host.connection.type === "stream") continue
      const end = this.#guestEndOf(host)
      check(end?.messages.shift() === bytes.length, "a message has another length than it had")
    }
  }

  #guestEndOf(host: HostEnd): GuestEnd | undefined {
    const { local, peer } = host.connection
    return this.#guestEnds.findLast((end) => end.port === peer.port && end.hostPort === local.port)
  }

  #hostEndOf(end: GuestEnd): HostEnd | undefined {
    return this.#hostEnds.find(({ connection }) =>
      connection.peer.port === end.port && connection.local.port === end.hostPort
    )
  }

  #guestShuts(end: GuestEnd, flags: number): void {
    end.shut |= flags
    this.#send(end, Op.SHUTDOWN, end.shut)
    if (end.shut === SHUTDOWN_BOTH) end.state = "closing"
  }

  /** A packet of the host comes to the guest. */
  #arrive(packet: Packet): void {
    if (packet.op === Op.REQUEST) {
      if (packet.dstPort === REFUSING_PORT) {
        const guest = this.#guest
        this.#toHost.push(() => guest.send({ op: Op.RST, srcPort: packet.dstPort, dstPort: packet.srcPort }))
        return
      }
      const isSeqpacket = packet.type === VIRTIO_VSOCK_TYPE_SEQPACKET
      const end = this.#newGuestEnd(packet.dstPort, packet.srcPort, isSeqpacket, "open")
      end.hostBufAlloc = packet.bufAlloc
      end.hostFwdCnt = packet.fwdCnt
      return this.#send(end, Op.RESPONSE)
    }
    const end = this.#guestEnds.findLast((end) => end.port === packet.dstPort && end.hostPort === packet.srcPort)
    if (end === undefined) {
      // A RST that has crossed the guest's own.
      if (packet.op === Op.RST) return
      assert.fail(`a packet ${packet.op} of no connection`)
    }
    if (packet.op === Op.RST) {
      if (end.state === "open" || end.state === "asking") end.isReset = true
      end.state = "closed"
      return
    }
    if (end.state === "closed") {
      const guest = this.#guest
      this.#toHost.push(() => guest.send({ op: Op.RST, srcPort: packet.dstPort, dstPort: packet.srcPort }))
      return
    }
    end.hostBufAlloc = packet.bufAlloc
    end.hostFwdCnt = packet.fwdCnt
    check(packet.fwdCnt <= end.sent, "the host has read what was not sent")
    check((packet.type === 1) !== end.isSeqpacket, "a packet of another type")
    switch (packet.op) {
      case Op.RESPONSE:
        check(end.state === "asking", "an answer that nobody has asked for")
        end.state = "open"
        return
      case Op.RW: {
        const host = this.#hostEndOf(end)
        if (host === undefined) assert.fail("data of nobody")
        check((end.hostShut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) === 0, "data after the end of data")
        checkPattern(end.received, packet.data, this.#seedOf(host))
        end.received += packet.data.length
        check(end.received - end.read <= GUEST_BUFFER, "the host has sent more than it may")
        if (!end.isSeqpacket) return check(packet.flags === 0, "flags of a message in a stream")
        end.partReceived += packet.data.length
        if (packet.flags === 0) return
        check(host.messages.shift() === end.partReceived, "a message has another length than it had")
        end.partReceived = 0
        return
      }
      case Op.SHUTDOWN:
        end.hostShut |= packet.flags
        if (end.hostShut === SHUTDOWN_BOTH) {
          end.state = "closed"
          this.#send(end, Op.RST)
        }
        return
      case Op.CREDIT_REQUEST:
        if (end.state === "open") this.#send(end, Op.CREDIT_UPDATE)
        return
    }
  }

  #passTime(millis: number): void {
    this.#guest.time += millis
    this.#guest.session.turn(() => this.#guest.session.expire())
  }

  /** The driver resets the device: all connections are gone for both sides, and nothing on its way arrives. */
  #restart(isCrash: boolean): void {
    const { time } = this.#guest
    if (isCrash) this.#crash()
    this.#guest.session.end()
    this.#checkOver()
    this.#guest = new SessionGuest()
    this.#guest.time = time
    this.#toHost = []
    this.#toGuest = []
    this.#guestEnds = []
    this.#hostEnds.length = 0
    this.#takeBacks = []
  }

  /** The device fails in the middle of a turn. */
  #crash(): void {
    try {
      this.#guest.session.turn(() => {
        for (const { connection } of this.#hostEnds) connection.take()
        throw new Error("as the script says")
      })
    } catch {
      // Its next generation has a new session.
    }
  }

  /** What always holds. */
  #check(): void {
    this.#guest.session.turn(() => {})
    for (const { connection, endHeard, readerWaits } of this.#hostEnds) {
      const hasInput = connection.end !== "open" || (connection.type === "stream" && connection.unread > 0)
      check(!readerWaits || !hasInput, "a reader waits although there is something to read, or an end")
      check(endHeard === (connection.isOver ? 1 : 0), "the end of a connection is told once")
      check(connection.unread <= connection.bufAlloc, "more waits than the guest has credit for")
    }
  }

  /** Everything arrives, everybody reads, until nothing happens any more. */
  #settle(): void {
    for (let round = 0; round < 10_000; round++) {
      const before = this.#toHost.length + this.#toGuest.length
      this.#guest.session.turn(() => {})
      while (this.#guest.arrived.length > 0) this.#decide(true)
      for (const packet of this.#toHost.splice(0)) packet()
      this.#toGuest.push(...this.#guest.receive())
      for (const packet of this.#toGuest.splice(0)) this.#arrive(packet)
      for (const host of this.#hostEnds) this.#hostReads(host)
      this.#endMessages()
      for (const end of this.#guestEnds) {
        if (end.state !== "open" || end.read === end.received) continue
        end.read = end.received
        this.#send(end, Op.CREDIT_UPDATE)
      }
      if (before + this.#toHost.length + this.#toGuest.length === 0 && !this.#guest.session.hasPackets) return
    }
    assert.fail("it does not come to rest")
  }

  /** The guest ends the messages that it has begun. */
  #endMessages(): void {
    for (const end of this.#guestEnds) {
      if (!end.isSeqpacket || end.partSent === 0 || end.state !== "open") continue
      if ((end.shut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) === 0) this.#guestSends(end, 0, true)
    }
  }

  #checkEnd(): void {
    for (const end of this.#guestEnds) {
      const host = this.#hostEndOf(end)
      if (host === undefined || end.isReset || host.hasReset || host.connection.end === "reset") continue
      if (!host.hasClosed && !host.hasShutReceive) {
        check(host.read === (end.isSeqpacket ? end.whole : end.sent), "bytes of the guest were lost")
      }
      if ((end.shut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) === 0 && !host.hasClosed && !Number.isNaN(host.written)) {
        check(end.received === host.written, "bytes of the host were lost")
        check(host.delivered === host.written, "a write was not done")
        check(host.messages.length === 0, "a message of the host was lost")
      }
    }
    for (const host of this.#hostEnds) check(host.decided === 1, "nobody heard what became of a connection")
    this.#passTime(CLOSE_TIMEOUT_MILLIS)
    this.#settle()
    const open = this.#hostEnds.filter(({ connection }) => !connection.isOver).length
    check(this.#guest.session.size === open, "a connection that is over was kept")
    this.#guest.session.end()
    this.#checkOver()
    // A pair that was kept back is free after a while, and nothing else was ever taken.
    this.#guest.time += QUARANTINE_MILLIS + 1
    check(this.#guest.hostPorts.findEphemeral(this.#guest.time) !== undefined, "all ports are taken")
    check(this.#guest.hostPorts.quarantined === 0, "ports are kept back for ever")
    for (const { connection } of this.#hostEnds) {
      check(!this.#guest.hostPorts.isActive(connection.local.port), "the port of a connection that is over is taken")
    }
  }

  #checkOver(): void {
    for (const host of this.#hostEnds) {
      check(host.connection.isOver, "a connection outlives its driver")
      check(host.endHeard === 1, "the end of a connection was not told")
      check(!host.readerWaits, "a reader waits for ever")
      check(host.writesDone === host.writes, "a writer waits for ever")
    }
    check(this.#guest.session.size === 0, "a connection outlives its session")
  }
}

/** Plays schedules; the same seed plays the same. The smallest script that fails, in words, or `undefined`. */
export const failingSchedule = (seed: number, count: number, beforeEach = () => true): string | undefined => {
  const { counterexample, errorInstance, failed } = fc.check(
    fc.property(script, (steps) => {
      if (beforeEach()) new ConnectionModel().run(steps)
    }),
    { seed, numRuns: count }
  )
  if (!failed || counterexample === null) return undefined
  return [
    `The connections do not stand a schedule of the ${count} from seed ${seed}: ${String(errorInstance)}`,
    ...counterexample[0].map((step) => `  ${JSON.stringify(step)}`)
  ].join("\n")
}
