/**
 * The TCP connections of a user-mode network: finds the one a segment belongs to, makes new ones as the policy says, and takes
 * turns among those that have something for the guest.
 */
import type { NetFrame } from "@troupe/core/NetFrame"
import type { DnsNames } from "./DnsNames.ts"
import type { HostEndpoint, HostSocketFailure, HostTcp, HostTcpEvents } from "./HostSockets.ts"
import { UNREACHABLE_HOST } from "./Icmp.ts"
import { encodeIpv4, formatIpv4, IPV4_HEADER, isInBlock, parseIpv4, PROTOCOL_TCP } from "./Ipv4.ts"
import type { NetDecision } from "./NetPolicy.ts"
import { putU16, putU32 } from "./Octets.ts"
import { TcpConnection } from "./TcpConnection.ts"
import { peerOf, TcpFlow, type TcpFlowOwner, TcpFlowTable } from "./TcpFlow.ts"
import { sequenceAdd, TCP_ACK, TCP_FIN, TCP_HEADER, TCP_RST, TCP_SYN, type TcpHeader } from "./TcpHeader.ts"
import { type TcpLimits, TcpPlan, TcpState } from "./TcpState.ts"
import { type Ends, TCP_HEADERS, TCP_HEADERS_MAX, type UserLink } from "./UserLink.ts"
import type { UserNetHost } from "./UserNetHost.ts"
import { TCP_BUFFER_MIN } from "./UserNetPlan.ts"

/** How long the host's end of a connection that is over for the guest may take to pass on what it has, in milliseconds. */
export const TCP_LINGER = 60_000
/** The port of name servers. */
export const DNS_PORT = 53
/** Ports of connections that come in from the host, chosen by chance (RFC 6056). */
const EPHEMERAL_FIRST = 0x8000

/** The connections of one network. */
export class UserTcp implements TcpFlowOwner {
  readonly #host: UserNetHost
  readonly now: () => number
  readonly #link: UserLink
  readonly #names: DnsNames
  readonly #notify: () => void
  /** Those that a segment can belong to. */
  readonly #flows = new TcpFlowTable()
  /** All that have a socket or a state: those in the table, and those whose socket only passes on what it has. */
  readonly #all = new Set<TcpFlow>()
  #lastReady: TcpFlow | undefined
  readonly #plan = new TcpPlan()
  /** Whether {@link take} has asked for more room than a header needs. */
  #largeRefused = false
  /** Whether there was no room for a large segment. */
  #smallRoom = false
  #closed = false

  readonly #limits: TcpLimits

  constructor(link: UserLink, host: UserNetHost, names: DnsNames, notify: () => void) {
    this.#link = link
    this.#host = host
    this.now = host.now
    this.#names = names
    this.#notify = notify
    const share = () => this.#share
    this.#limits = {
      get buffer() {
        return share()
      },
      mss: link.plan.mtu - IPV4_HEADER - TCP_HEADER
    }
  }

  /** Connections that are there, in whatever state. */
  get count(): number {
    return this.#all.size
  }

  /** Bytes that wait in all connections. */
  get buffered(): number {
    let sum = 0
    for (const flow of this.#all) sum += flow.connection.buffered
    return sum
  }

  /** Takes a segment of the guest: its header, its ends, and a copy of its payload. */
  receive(header: TcpHeader, ends: Ends, payload: Uint8Array): void {
    const now = this.#host.now()
    const flow = this.#flows.find(ends)
    const isSyn = (header.flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) === TCP_SYN
    if (flow === undefined || (isSyn && flow.connection.canBeReplacedBy(header))) {
      if (flow !== undefined) this.#forget(flow)
      if (isSyn) this.#begin(header, ends, now)
      else if ((header.flags & TCP_RST) === 0) this.#refuse(ends, header, payload.length)
      return
    }
    if (flow.connection.receive(header, payload, now)) this.#refuse(ends, header, payload.length)
    this.changed(flow)
  }

  /** A connection that has come to the host and is forwarded. */
  accept(socket: HostTcp, from: HostEndpoint, guestPort: number): HostTcpEvents | undefined {
    if (this.#closed || !this.#makeRoom()) return undefined
    const ends = this.#incomingEnds(guestPort)
    if (ends === undefined) return undefined
    const now = this.#host.now()
    const flow = this.#add(ends, new TcpConnection(this.#limits, this.#host.random32(), now))
    flow.socket = socket
    const giveUp = this.#host.decide({
      protocol: "tcp",
      direction: "incoming",
      source: from,
      destination: { address: formatIpv4(ends.guestAddress), port: guestPort }
    }, (decision) => {
      flow.decided = true
      flow.giveUp = undefined
      if (!this.#all.has(flow) || flow.connection.isOver) return
      if (decision._tag === "allow") {
        flow.connection.attach(peerOf(flow))
        socket.resume()
      } else {
        flow.connection.abort()
        flow.socket?.reset()
        flow.socket = undefined
      }
      this.changed(flow)
    })
    if (!flow.decided) flow.giveUp = giveUp
    return flow
  }

  /**
   * Puts the next segment into buffers. Returns its length, 0 when there is none, and minus the room that it wants: large segments
   * ask for the room that they need, until they are told by {@link discard} that there is none.
   */
  take(frame: NetFrame): number {
    for (;;) {
      const last = this.#lastReady
      const flow = last?.nextReady
      if (last === undefined || flow === undefined) return 0
      this.#largeRefused = frame.size > TCP_HEADERS_MAX
      if (!this.#largeRefused) return -(TCP_HEADERS_MAX + 1)
      const { connection } = flow
      const room = frame.size - TCP_HEADERS
      let payload = connection.next(this.#link.payloadMax(connection))
      if (payload > room) {
        if (!this.#smallRoom) return -(TCP_HEADERS + payload)
        payload = room
      }
      this.#unqueue(last, flow)
      const took = connection.take(this.#plan, payload, this.#host.now())
      const length = took ? this.#link.writeSegment(frame, flow, connection, this.#plan) : 0
      this.changed(flow)
      if (took) return length
    }
  }

  /**
   * There is no room for the next segment: from now on segments are as large as the room that there is. One that finds no room
   * at all is lost as on a wire, and repeated as such.
   */
  discard(): void {
    if (this.#largeRefused) {
      this.#smallRoom = true
      return
    }
    const last = this.#lastReady
    const flow = last?.nextReady
    if (last === undefined || flow === undefined) return
    this.#unqueue(last, flow)
    const { connection } = flow
    connection.take(this.#plan, connection.next(this.#link.payloadMax(connection)), this.#host.now())
    this.changed(flow)
  }

  /** The offloads have changed, and with them the room perhaps. */
  forgetRoom(): void {
    this.#smallRoom = false
  }

  /** Whether some connection has something for the guest. */
  get wants(): boolean {
    return this.#lastReady !== undefined
  }

  /** Looks after all connections whose time has come. Returns when to look again. */
  tick(now: number): number {
    let next = Number.POSITIVE_INFINITY
    for (const flow of this.#all) {
      if (now >= flow.lingerUntil) {
        flow.socket?.reset()
        flow.socket = undefined
      }
      if (now >= flow.connection.deadline) {
        const opening = flow.connection.state === TcpState.OPENING
        if (flow.connection.tick(now)) {
          if (opening) this.#unreachable(flow)
          else this.#sendReset(flow)
        }
      }
      this.changed(flow)
      next = Math.min(next, flow.connection.deadline, flow.lingerUntil)
    }
    return next
  }

  /** Ends all connections at once, without a word to the guest. */
  close(): void {
    this.#closed = true
    for (const flow of this.#all) {
      flow.giveUp?.()
      flow.connection.abort()
      flow.socket?.reset()
      flow.socket = undefined
    }
    this.#all.clear()
    this.#flows.clear()
    this.#lastReady = undefined
  }

  /** Something has happened to a connection. */
  changed(flow: TcpFlow): void {
    const { connection } = flow
    if (connection.state === TcpState.CLOSED) {
      this.#forget(flow)
      return
    }
    if (flow.nextReady === undefined && flow.decided && connection.wants) this.#enqueue(flow)
    if (connection.deadline !== Number.POSITIVE_INFINITY) this.#host.wakeAt(connection.deadline)
  }

  /** The host's socket has failed. */
  failed(flow: TcpFlow, failure: HostSocketFailure): void {
    const { connection } = flow
    if (!connection.isOver) {
      const opening = connection.state === TcpState.OPENING
      connection.abort()
      if (opening && (failure === "unreachable" || failure === "timedOut")) this.#unreachable(flow)
      else this.#sendReset(flow)
    }
    this.changed(flow)
    this.#notify()
  }

  /** The share of a connection's direction in the memory of all, one third of which is for what comes before its turn. */
  get #share(): number {
    const { tcpBuffer, tcpMemory } = this.#link.plan
    return Math.min(tcpBuffer, Math.max(TCP_BUFFER_MIN, Math.floor(tcpMemory / (3 * Math.max(1, this.#all.size)))))
  }

  #begin(header: TcpHeader, ends: Ends, now: number): void {
    const { plan } = this.#link
    const isDns = ends.remoteAddress === plan.nameserver && ends.remotePort === DNS_PORT
    if (!this.#makeRoom()) {
      this.#refuse(ends, header, 0)
      return
    }
    const flow = this.#add(ends, new TcpConnection(this.#limits, this.#host.random32(), now, header))
    const hostname = this.#names.nameOf(ends.remoteAddress)
    const destination = { address: formatIpv4(ends.remoteAddress), port: ends.remotePort }
    const giveUp = this.#host.decide({
      protocol: "tcp",
      direction: "outgoing",
      source: { address: formatIpv4(ends.guestAddress), port: ends.guestPort },
      destination,
      ...(hostname === undefined ? {} : { hostname }),
      ...(isDns ? { service: "dns" as const } : {})
    }, (decision) => {
      flow.decided = true
      flow.giveUp = undefined
      if (!this.#all.has(flow) || flow.connection.isOver) return
      this.#decided(flow, this.#route(decision, destination, isDns), decision._tag === "drop")
    })
    if (!flow.decided) flow.giveUp = giveUp
    this.changed(flow)
  }

  /** Where a connection goes, or nowhere. */
  #route(decision: NetDecision, destination: HostEndpoint, isDns: boolean): HostEndpoint | undefined {
    if (decision._tag === "redirect") return decision.to
    if (decision._tag !== "allow") return undefined
    if (isDns) return this.#host.sockets.nameservers()[0]
    // An address of the virtual network is nobody else's, whatever it may be outside.
    return isInBlock(parse(destination), this.#link.plan.subnet) ? undefined : destination
  }

  #decided(flow: TcpFlow, to: HostEndpoint | undefined, silent: boolean): void {
    if (to === undefined) {
      flow.connection.abort()
      if (!silent) this.#sendReset(flow)
    } else {
      flow.socket = this.#host.sockets.connectTcp(to, flow)
      flow.connection.attach(peerOf(flow))
    }
    this.changed(flow)
    this.#notify()
  }

  /** A RST for a segment that belongs to nothing (RFC 9293, section 3.10.7.1). */
  #refuse(ends: Ends, header: TcpHeader, payloadLength: number): void {
    if ((header.flags & TCP_RST) !== 0) return
    if ((header.flags & TCP_ACK) !== 0) {
      this.#link.sendControl(ends, header.acknowledgment, 0, TCP_RST)
      return
    }
    const length = payloadLength + ((header.flags & TCP_SYN) === 0 ? 0 : 1) + ((header.flags & TCP_FIN) === 0 ? 0 : 1)
    this.#link.sendControl(ends, 0, sequenceAdd(header.sequence, length), TCP_RST | TCP_ACK)
  }

  #sendReset(flow: TcpFlow): void {
    const { connection } = flow
    this.#link.sendControl(flow, connection.resetSequence, connection.acknowledgment, TCP_RST | TCP_ACK)
  }

  /** "Host unreachable" about the SYN that a connection began with. */
  #unreachable(flow: TcpFlow): void {
    const packet = new Uint8Array(IPV4_HEADER + TCP_HEADER)
    encodeIpv4(packet, 0, {
      source: flow.guestAddress,
      destination: flow.remoteAddress,
      protocol: PROTOCOL_TCP,
      identification: 0,
      payloadLength: TCP_HEADER
    })
    putU16(packet, IPV4_HEADER, flow.guestPort)
    putU16(packet, IPV4_HEADER + 2, flow.remotePort)
    putU32(packet, IPV4_HEADER + 4, sequenceAdd(flow.connection.acknowledgment, -1))
    this.#link.sendUnreachable(
      flow.guestMac,
      this.#link.plan.gateway,
      UNREACHABLE_HOST,
      packet,
      0,
      IPV4_HEADER,
      packet.length
    )
  }

  /** Whether one more connection is allowed, perhaps after the oldest that is over has been forgotten. */
  #makeRoom(): boolean {
    if (this.#all.size < this.#link.plan.tcpConnections) return true
    for (const flow of this.#all) {
      if (flow.connection.state === TcpState.TIME_WAIT && flow.socket === undefined) {
        this.#remove(flow)
        return true
      }
    }
    return false
  }

  #add(ends: Ends, connection: TcpConnection): TcpFlow {
    const flow = new TcpFlow(this, ends, connection)
    this.#flows.add(flow)
    this.#all.add(flow)
    return flow
  }

  #incomingEnds(guestPort: number): Ends | undefined {
    const { plan, guestMac } = this.#link
    for (let tries = 0; tries < 16; tries++) {
      const remotePort = EPHEMERAL_FIRST + this.#host.random32() % (0x1_0000 - EPHEMERAL_FIRST)
      const ends = { guestMac, guestAddress: plan.guest, guestPort, remoteAddress: plan.gateway, remotePort }
      if (this.#flows.find(ends) === undefined) return ends
    }
    return undefined
  }

  /** A connection is over: it is forgotten, at the latest when its socket has passed on what it has. */
  #forget(flow: TcpFlow): void {
    if (!this.#all.has(flow)) return
    this.#flows.remove(flow)
    flow.giveUp?.()
    flow.giveUp = undefined
    if (flow.socket === undefined) {
      this.#remove(flow)
    } else if (flow.lingerUntil === Number.POSITIVE_INFINITY) {
      flow.lingerUntil = this.#host.now() + TCP_LINGER
      this.#host.wakeAt(flow.lingerUntil)
    }
  }

  #remove(flow: TcpFlow): void {
    this.#flows.remove(flow)
    this.#all.delete(flow)
  }

  #enqueue(flow: TcpFlow): void {
    const last = this.#lastReady
    if (last === undefined) {
      flow.nextReady = flow
    } else {
      flow.nextReady = last.nextReady
      last.nextReady = flow
    }
    this.#lastReady = flow
    this.#notify()
  }

  #unqueue(last: TcpFlow, first: TcpFlow): void {
    if (first === last) this.#lastReady = undefined
    else last.nextReady = first.nextReady
    first.nextReady = undefined
  }
}

const parse = (endpoint: HostEndpoint): number => parseIpv4(endpoint.address) ?? 0
