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
import { Op, SHUTDOWN_BOTH, VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE, VIRTIO_VSOCK_SHUTDOWN_F_SEND } from "../src/VsockPacket.ts"
import { QUARANTINE_MILLIS } from "../src/VsockPorts.ts"
import { CLOSE_TIMEOUT_MILLIS } from "../src/VsockSession.ts"
import { type Packet, SessionGuest } from "./SessionGuest.ts"

/** A guest's port that refuses the host. */
const REFUSING_PORT = 9
const LISTENING_PORT = 1
/** What the guest's connections buffer: little, so that credit runs out. */
const GUEST_BUFFER = 300

/** The byte at a place of what one side of a connection sends. */
const patternAt = (place: number, seed: number): number => (place * 7 + (place >> 8) + seed) & 0xff

const pattern = (from: number, length: number, seed: number): Uint8Array => {
  const bytes = new Uint8Array(length)
  for (let i = 0; i < length; i++) bytes[i] = patternAt(from + i, seed)
  return bytes
}

const checkPattern = (from: number, bytes: Uint8Array, seed: number): void => {
  for (let i = 0; i < bytes.length; i++) {
    if (bytes[i] !== patternAt(from + i, seed)) assert.fail(`byte ${from + i} of a stream is not what was sent there`)
  }
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
  /** The host's end, once there is one. */
  host: HostEnd | undefined
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
  "packetsArriveAtHost",
  "packetsArriveAtGuest",
  "timePasses",
  "driverRestarts"
] as const
export type Command = (typeof COMMANDS)[number]
/** A command, which connection it is about, and how much. */
export type Step = readonly [Command, number, number]

/** Scripts, that shrink to what matters in them. */
export const script: fc.Arbitrary<ReadonlyArray<Step>> = fc.array(
  fc.tuple(
    fc.oneof(
      { arbitrary: fc.constantFrom(...COMMANDS), weight: 2 },
      {
        arbitrary: fc.constantFrom<Command>(
          "guestSends",
          "hostWrites",
          "guestReads",
          "hostReads",
          "packetsArriveAtHost",
          "packetsArriveAtGuest",
          "hostAccepts"
        ),
        weight: 3
      }
    ),
    fc.nat({ max: 3 }),
    fc.nat({ max: 400 })
  ),
  { size: "max", maxLength: 50 }
)

/** One run of a script. */
export class ConnectionModel {
  #guest = new SessionGuest()
  #guestEnds: Array<GuestEnd> = []
  readonly #hostEnds: Array<HostEnd> = []
  #toHost: Array<() => void> = []
  #toGuest: Array<Packet> = []
  #nextGuestPort = 1000
  #takeBacks: Array<() => void> = []

  /** Runs a script, then lets everything come to its end, and checks what has become of it. */
  run(steps: ReadonlyArray<Step>): void {
    for (const [command, which, amount] of steps) {
      this.#do(command, which, amount)
      this.#check()
    }
    this.#settle()
    this.#checkEnd()
  }

  #do(command: Command, which: number, amount: number): void {
    const guest = this.#guest
    const end = this.#guestEnds.at(-1 - which)
    const host = this.#hostEnds.at(-1 - which)
    switch (command) {
      case "guestConnects":
        return this.#guestConnects()
      case "hostConnects":
        return this.#hostConnects(80 + which)
      case "hostConnectsInVain":
        return this.#hostConnects(REFUSING_PORT)
      case "hostAccepts":
        return this.#decide(true)
      case "hostRefuses":
        return this.#decide(false)
      case "guestSends": {
        if (end?.state !== "open" || (end.shut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) !== 0) return
        if ((end.hostShut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) !== 0) return
        const length = Math.min(amount * amount, end.hostBufAlloc - ((end.sent - end.hostFwdCnt) >>> 0))
        if (length <= 0) return
        this.#send(end, Op.RW, 0, pattern(end.sent, length, end.seed))
        end.sent += length
        return
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
        return amount < 40 ? this.#restart() : undefined
    }
  }

  #send(end: GuestEnd, op: number, flags = 0, data: Uint8Array = new Uint8Array(0)): void {
    const packet = {
      op,
      flags,
      data,
      srcPort: end.port,
      dstPort: end.hostPort,
      bufAlloc: GUEST_BUFFER,
      fwdCnt: end.read
    }
    const guest = this.#guest
    this.#toHost.push(() => guest.send(packet))
  }

  #guestConnects(): void {
    const end = this.#newGuestEnd(this.#nextGuestPort++, LISTENING_PORT, "asking")
    this.#send(end, Op.REQUEST)
  }

  #newGuestEnd(port: number, hostPort: number, state: GuestEnd["state"]): GuestEnd {
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
      host: undefined
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
      hasReset: false
    }
    this.#hostEnds.push(end)
    return end
  }

  #hostConnects(guestPort: number): void {
    const connection = this.#guest.session.connect("stream", 2, undefined, guestPort)
    if (typeof connection === "string") assert.fail(connection)
    const end = this.#newHostEnd(connection)
    connection.ask((exit) => {
      end.decided++
      if (guestPort === REFUSING_PORT) assert.isTrue(Exit.isFailure(exit))
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
    const isOpen = host.connection.state === "ReadWrite" && !host.hasShutSend
    host.writes++
    if (isOpen) host.written += length
    let isDone = false
    let isTakenBack = false
    const takeBack = host.connection.write(bytes, (exit) => {
      // Its end was decided already when it was taken back.
      if (isTakenBack) return
      assert.isFalse(isDone, "a write was done twice")
      isDone = true
      host.writesDone++
      if (Exit.isSuccess(exit)) host.delivered += length
      else if (isOpen) host.written = Number.NaN
    })
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
    }
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
      const end = this.#newGuestEnd(packet.dstPort, packet.srcPort, "open")
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
    assert.isAtMost((end.sent - packet.fwdCnt) >>> 0, end.sent, "the host has read what was not sent")
    switch (packet.op) {
      case Op.RESPONSE:
        assert.strictEqual(end.state, "asking")
        end.state = "open"
        return
      case Op.RW: {
        const host = this.#hostEnds.find(({ connection }) =>
          connection.peer.port === end.port && connection.local.port === end.hostPort
        )
        if (host === undefined) assert.fail("data of nobody")
        assert.strictEqual(end.hostShut & VIRTIO_VSOCK_SHUTDOWN_F_SEND, 0, "data after the end of data")
        checkPattern(end.received, packet.data, this.#seedOf(host))
        end.received += packet.data.length
        assert.isAtMost(end.received - end.read, GUEST_BUFFER, "the host has sent more than it may")
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
  #restart(): void {
    const { time } = this.#guest
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

  /** What always holds. */
  #check(): void {
    for (const { connection } of this.#hostEnds) {
      assert.isAtMost(connection.unread, connection.bufAlloc, "more waits than the guest has credit for")
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
      for (const end of this.#guestEnds) {
        if (end.state !== "open" || end.read === end.received) continue
        end.read = end.received
        this.#send(end, Op.CREDIT_UPDATE)
      }
      if (before + this.#toHost.length + this.#toGuest.length === 0 && !this.#guest.session.hasPackets) return
    }
    assert.fail("it does not come to rest")
  }

  #checkEnd(): void {
    for (const end of this.#guestEnds) {
      const host = this.#hostEnds.find(({ connection }) =>
        connection.peer.port === end.port && connection.local.port === end.hostPort
      )
      if (host === undefined || end.isReset || host.hasReset || host.connection.end === "reset") continue
      if (!host.hasClosed && !host.hasShutReceive) {
        assert.strictEqual(host.read, end.sent, "bytes of the guest were lost")
      }
      if ((end.shut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) === 0 && !host.hasClosed && !Number.isNaN(host.written)) {
        assert.strictEqual(end.received, host.written, "bytes of the host were lost")
        assert.strictEqual(host.delivered, host.written, "a write was not done")
      }
    }
    for (const host of this.#hostEnds) assert.strictEqual(host.decided, 1, "nobody heard what became of a connection")
    this.#passTime(CLOSE_TIMEOUT_MILLIS)
    this.#settle()
    const open = this.#hostEnds.filter(({ connection }) => !connection.isOver).length
    assert.strictEqual(this.#guest.session.size, open, "a connection that is over was kept")
    this.#guest.session.end()
    this.#checkOver()
    // A pair that was kept back is free after a while, and nothing else was ever taken.
    this.#guest.time += QUARANTINE_MILLIS + 1
    assert.isDefined(this.#guest.hostPorts.findEphemeral(this.#guest.time))
    assert.strictEqual(this.#guest.hostPorts.quarantined, 0)
    for (const { connection } of this.#hostEnds) assert.isFalse(this.#guest.hostPorts.isActive(connection.local.port))
  }

  #checkOver(): void {
    for (const host of this.#hostEnds) {
      assert.isTrue(host.connection.isOver)
      assert.strictEqual(host.writesDone, host.writes, "a writer waits for ever")
    }
    assert.strictEqual(this.#guest.session.size, 0)
  }
}
