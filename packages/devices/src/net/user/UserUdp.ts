/**
 * The UDP conversations of a user-mode network: one socket of the host for each pair of ports that talk, until they fall silent.
 */
import type { DnsNames } from "./DnsNames.ts"
import type { HostEndpoint, HostSocketFailure, HostUdp, HostUdpEvents } from "./HostSockets.ts"
import { UNREACHABLE_HOST, UNREACHABLE_PORT } from "./Icmp.ts"
import { encodeIpv4, formatIpv4, IPV4_HEADER, isInBlock, PROTOCOL_UDP } from "./Ipv4.ts"
import type { NetDecision } from "./NetPolicy.ts"
import { encodeUdp, UDP_HEADER } from "./Udp.ts"
import type { Ends, UserLink } from "./UserLink.ts"
import type { UserNetHost } from "./UserNetHost.ts"
import { DNS_PORT } from "./UserTcp.ts"

/** How long a conversation may be silent, in milliseconds (RFC 4787, section 4.3). */
export const UDP_IDLE = 120_000
/** The same for queries to the name server. */
export const UDP_IDLE_DNS = 20_000
/** How long a refusal is remembered, in milliseconds. */
export const UDP_REFUSED = 5000
/** The most datagrams of one conversation that wait for a decision. */
export const UDP_WAITING_MAX = 16
/** The most bytes of them. */
export const UDP_WAITING_BYTES = 0x1_0000
/** How long a name server may take before a new query goes to the next one, in milliseconds. */
export const DNS_PATIENCE = 2000

/** Two ports that talk. */
class UdpFlow implements Ends, HostUdpEvents {
  readonly guestMac: Uint8Array
  readonly guestAddress: number
  readonly guestPort: number
  readonly remoteAddress: number
  readonly remotePort: number
  readonly isDns: boolean
  socket: HostUdp | undefined
  /** Datagrams that wait for the decision. */
  waiting: Array<Uint8Array> = []
  waitingBytes = 0
  decided = false
  /** The decision, once it was a refusal. */
  refused: "reset" | "drop" | undefined
  giveUp: (() => void) | undefined
  expires = 0
  /** Which of the host's name servers is asked. */
  server = 0
  /** When the query was sent that has not been answered, or -1. */
  asked = -1
  /** The last query. */
  query: Uint8Array | undefined
  readonly #table: UserUdp

  constructor(table: UserUdp, ends: Ends, isDns: boolean) {
    this.#table = table
    this.guestMac = ends.guestMac
    this.guestAddress = ends.guestAddress
    this.guestPort = ends.guestPort
    this.remoteAddress = ends.remoteAddress
    this.remotePort = ends.remotePort
    this.isDns = isDns
  }

  /** Keeps a datagram until the decision, or loses it. */
  wait(bytes: Uint8Array): void {
    if (this.waiting.length >= UDP_WAITING_MAX || this.waitingBytes + bytes.length > UDP_WAITING_BYTES) return
    this.waiting.push(bytes)
    this.waitingBytes += bytes.length
  }

  readonly message = (bytes: Uint8Array): void => this.#table.message(this, bytes)
  readonly failed = (failure: HostSocketFailure): void => this.#table.failed(this, failure)
}

const keyOf = (ends: Ends): string => `${ends.guestAddress}:${ends.guestPort}:${ends.remoteAddress}:${ends.remotePort}`

/** The conversations of one network. */
export class UserUdp {
  readonly #link: UserLink
  readonly #host: UserNetHost
  readonly #names: DnsNames
  readonly #notify: () => void
  readonly #flows = new Map<string, UdpFlow>()
  #closed = false

  constructor(link: UserLink, host: UserNetHost, names: DnsNames, notify: () => void) {
    this.#link = link
    this.#host = host
    this.#names = names
    this.#notify = notify
  }

  /** Conversations that are there. */
  get count(): number {
    return this.#flows.size
  }

  /** Takes a datagram of the guest: a copy of its payload. */
  receive(ends: Ends, payload: Uint8Array): void {
    const now = this.#host.now()
    const found = this.#flows.get(keyOf(ends))
    const flow = found ?? this.#begin(ends, now)
    if (flow.refused !== undefined) {
      if (flow.refused === "reset") this.#unreachable(flow, UNREACHABLE_PORT)
    } else if (!flow.decided) {
      flow.wait(payload)
    } else {
      this.#send(flow, payload, now)
    }
  }

  /** A datagram has come to a port of the host that is forwarded. `reply` sends back to `from`. */
  accept(bytes: Uint8Array, from: HostEndpoint, guestPort: number, clients: UdpClients, reply: HostUdp): void {
    if (this.#closed) return
    const key = `${from.address} ${from.port}`
    const now = this.#host.now()
    let flow = clients.get(key)
    if (flow === undefined || this.#flows.get(keyOf(flow)) !== flow) {
      clients.delete(key)
      flow = this.#beginIncoming(from, guestPort, {
        send: reply.send,
        close: () => {
          clients.delete(key)
        }
      }, now)
      if (flow === undefined) return
      clients.set(key, flow)
    }
    flow.expires = now + UDP_IDLE
    if (flow.refused !== undefined) return
    if (flow.decided) flow.message(bytes)
    else flow.wait(bytes)
  }

  /** A datagram for the guest. */
  message(flow: UdpFlow, bytes: Uint8Array): void {
    if (this.#flows.get(keyOf(flow)) !== flow) return
    flow.expires = this.#host.now() + (flow.isDns ? UDP_IDLE_DNS : UDP_IDLE)
    if (flow.isDns) {
      flow.asked = -1
      flow.query = undefined
      this.#names.learn(bytes)
    }
    this.#link.sendDatagram(flow, bytes)
    this.#notify()
  }

  /** The host's socket has failed. */
  failed(flow: UdpFlow, failure: HostSocketFailure): void {
    if (this.#flows.get(keyOf(flow)) !== flow) return
    if (flow.isDns && this.#askNext(flow)) return
    this.#unreachable(flow, failure === "refused" || flow.isDns ? UNREACHABLE_PORT : UNREACHABLE_HOST)
    this.#notify()
  }

  /** Ends conversations that have fallen silent. Returns when to look again. */
  tick(now: number): number {
    let next = Number.POSITIVE_INFINITY
    for (const [key, flow] of this.#flows) {
      if (now >= flow.expires) this.#end(key, flow)
      else next = Math.min(next, flow.expires)
    }
    return next
  }

  /** Ends all conversations. */
  close(): void {
    this.#closed = true
    for (const [key, flow] of this.#flows) this.#end(key, flow)
  }

  #begin(ends: Ends, now: number): UdpFlow {
    const { plan } = this.#link
    const isDns = ends.remoteAddress === plan.nameserver && ends.remotePort === DNS_PORT
    const flow = this.#add(new UdpFlow(this, ends, isDns), now)
    const destination = { address: formatIpv4(ends.remoteAddress), port: ends.remotePort }
    const hostname = this.#names.nameOf(ends.remoteAddress)
    const giveUp = this.#host.decide({
      protocol: "udp",
      direction: "outgoing",
      source: { address: formatIpv4(ends.guestAddress), port: ends.guestPort },
      destination,
      ...(hostname === undefined ? {} : { hostname }),
      ...(isDns ? { service: "dns" as const } : {})
    }, (decision) => {
      if (this.#flows.get(keyOf(flow)) !== flow) return
      this.#decided(flow, decision, destination)
    })
    if (!flow.decided) flow.giveUp = giveUp
    return flow
  }

  #decided(flow: UdpFlow, decision: NetDecision, destination: HostEndpoint): void {
    const now = this.#host.now()
    flow.decided = true
    flow.giveUp = undefined
    const waiting = flow.waiting
    flow.waiting = []
    const to = this.#route(flow, decision, destination)
    if (to === undefined) {
      flow.refused = decision._tag === "drop" ? "drop" : "reset"
      flow.expires = now + UDP_REFUSED
      if (flow.refused === "reset") { for (const _ of waiting) this.#unreachable(flow, UNREACHABLE_PORT) }
    } else {
      flow.socket = this.#host.sockets.connectUdp(to, flow)
      for (const payload of waiting) this.#send(flow, payload, now)
    }
    this.#host.wakeAt(flow.expires)
    this.#notify()
  }

  #route(flow: UdpFlow, decision: NetDecision, destination: HostEndpoint): HostEndpoint | undefined {
    if (decision._tag === "redirect") return decision.to
    if (decision._tag !== "allow") return undefined
    if (flow.isDns) return this.#host.sockets.nameservers()[0]
    // An address of the virtual network is nobody else's, whatever it may be outside.
    return isInBlock(flow.remoteAddress, this.#link.plan.subnet) ? undefined : destination
  }

  #send(flow: UdpFlow, payload: Uint8Array, now: number): void {
    flow.expires = now + (flow.isDns ? UDP_IDLE_DNS : UDP_IDLE)
    if (flow.isDns) {
      if (flow.asked >= 0 && now - flow.asked >= DNS_PATIENCE) this.#nextServer(flow)
      if (flow.asked < 0) flow.asked = now
      flow.query = payload
    }
    flow.socket?.send(payload)
  }

  /** Moves a conversation on to the next name server of the host. Returns whether there is another one. */
  #nextServer(flow: UdpFlow): boolean {
    const servers = this.#host.sockets.nameservers()
    if (servers.length < 2) return false
    flow.server = (flow.server + 1) % servers.length
    const to = servers[flow.server]
    if (to === undefined) return false
    flow.socket?.close()
    flow.socket = this.#host.sockets.connectUdp(to, flow)
    flow.asked = -1
    return true
  }

  /** Asks the next name server what the one that failed was asked, once around. */
  #askNext(flow: UdpFlow): boolean {
    const { query } = flow
    if (query === undefined || !this.#nextServer(flow) || flow.server === 0) return false
    flow.asked = this.#host.now()
    flow.socket?.send(query)
    return true
  }

  #beginIncoming(from: HostEndpoint, guestPort: number, reply: HostUdp, now: number): UdpFlow | undefined {
    const { plan, guestMac } = this.#link
    let ends: Ends | undefined
    for (let tries = 0; tries < 16 && ends === undefined; tries++) {
      const remotePort = 0x8000 + this.#host.random32() % 0x8000
      const candidate = { guestMac, guestAddress: plan.guest, guestPort, remoteAddress: plan.gateway, remotePort }
      if (!this.#flows.has(keyOf(candidate))) ends = candidate
    }
    if (ends === undefined) return undefined
    const flow = this.#add(new UdpFlow(this, ends, false), now)
    flow.socket = reply
    const giveUp = this.#host.decide({
      protocol: "udp",
      direction: "incoming",
      source: from,
      destination: { address: formatIpv4(ends.guestAddress), port: guestPort }
    }, (decision) => {
      flow.decided = true
      flow.giveUp = undefined
      const waiting = flow.waiting
      flow.waiting = []
      if (decision._tag !== "allow") flow.refused = "drop"
      else for (const bytes of waiting) flow.message(bytes)
    })
    if (!flow.decided) flow.giveUp = giveUp
    return flow
  }

  #add(flow: UdpFlow, now: number): UdpFlow {
    if (this.#flows.size >= this.#link.plan.udpFlows) this.#endOldest()
    flow.expires = now + UDP_IDLE
    this.#flows.set(keyOf(flow), flow)
    this.#host.wakeAt(flow.expires)
    return flow
  }

  /** Ends the conversation that is the nearest to its end. */
  #endOldest(): void {
    let oldest: UdpFlow | undefined
    for (const flow of this.#flows.values()) {
      if (oldest === undefined || flow.expires < oldest.expires) oldest = flow
    }
    if (oldest !== undefined) this.#end(keyOf(oldest), oldest)
  }

  #end(key: string, flow: UdpFlow): void {
    this.#flows.delete(key)
    flow.giveUp?.()
    flow.socket?.close()
    flow.socket = undefined
    flow.waiting = []
  }

  /** "Unreachable" about a datagram of this conversation. */
  #unreachable(flow: UdpFlow, code: number): void {
    const packet = new Uint8Array(IPV4_HEADER + UDP_HEADER)
    encodeIpv4(packet, 0, {
      source: flow.guestAddress,
      destination: flow.remoteAddress,
      protocol: PROTOCOL_UDP,
      identification: 0,
      payloadLength: UDP_HEADER
    })
    encodeUdp(packet, IPV4_HEADER, flow.guestPort, flow.remotePort, 0)
    // "Port unreachable" is the other side's own word; everything else is the gateway's.
    const source = code === UNREACHABLE_PORT ? flow.remoteAddress : this.#link.plan.gateway
    this.#link.sendUnreachable(flow.guestMac, source, code, packet, 0, IPV4_HEADER, packet.length)
  }
}

/** The conversations of one forwarded port, by who has come. */
export type UdpClients = Map<string, UdpFlow>
