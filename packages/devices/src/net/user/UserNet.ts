/**
 * A network of one guest, in plain code: a gateway that answers ARP, DHCP and ICMP echo by itself and takes TCP and UDP to the host's
 * sockets. It is the port of the guest's network device.
 *
 * Nothing here knows a clock, a socket or a fiber: those come through `UserNetHost`. Every entry is one step that ends; frames for
 * the guest are made when it has room for them.
 */
import { type NetPort, type NetPortListener, Offload } from "@troupe/core/NetBackend"
import { FRAME_NEEDS_CHECKSUM, GSO_UDP_L4, type NetFrame } from "@troupe/core/NetFrame"
import { ARP_LENGTH, ARP_REPLY, ARP_REQUEST, decodeArp, encodeArp } from "./Arp.ts"
import { addToSum, isWhole } from "./Checksum.ts"
import { decodeDhcpRequest, DHCP_CLIENT_PORT, DHCP_SERVER_PORT, encodeDhcpReply } from "./Dhcp.ts"
import { answerDhcp } from "./DhcpServer.ts"
import { DnsNames } from "./DnsNames.ts"
import {
  ETHERNET_HEADER,
  etherType,
  ETHERTYPE_ARP,
  ETHERTYPE_IPV4,
  isAddressedTo,
  isUnicast,
  MAC_BROADCAST,
  type MacAddress,
  writeEthernet
} from "./Ethernet.ts"
import type { HostEndpoint, HostTcp, HostTcpEvents, HostUdp } from "./HostSockets.ts"
import {
  encodeEchoReply,
  ICMP_ECHO_REQUEST,
  ICMP_HEADER,
  UNREACHABLE_PROHIBITED,
  UNREACHABLE_PROTOCOL
} from "./Icmp.ts"
import { IPV4_HEADER, Ipv4Header, isInBlock, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, pseudoSum } from "./Ipv4.ts"
import { Reassembly } from "./Reassembly.ts"
import { TcpHeader } from "./TcpHeader.ts"
import { UdpHeader } from "./Udp.ts"
import { type Ends, UserLink } from "./UserLink.ts"
import type { UserNetHost } from "./UserNetHost.ts"
import type { UserNetPlan } from "./UserNetPlan.ts"
import { UserTcp } from "./UserTcp.ts"
import { type UdpClients, UserUdp } from "./UserUdp.ts"

/** The offloads that a network takes and gives. */
export const USER_NET_OFFLOADS = Offload.CHECKSUM | Offload.TSO4
/** Headers are read out of the first bytes of a frame: Ethernet, and IPv4 and TCP with all options. */
const PEEK = ETHERNET_HEADER + 60 + 60
/** The most datagrams in one frame of several. */
const DATAGRAMS_MAX = 128

/** A network of one guest. */
export class UserNet implements NetPort {
  readonly mtu: number
  readonly accepts = USER_NET_OFFLOADS | Offload.USO
  readonly delivers = USER_NET_OFFLOADS
  readonly linkUp = true

  readonly #link: UserLink
  readonly #host: UserNetHost
  readonly #tcp: UserTcp
  readonly #udp: UserUdp
  readonly #reassembly = new Reassembly()
  readonly #ip = new Ipv4Header()
  readonly #tcpHeader = new TcpHeader()
  readonly #udpHeader = new UdpHeader()
  readonly #peek = new Uint8Array(PEEK)
  #listener: NetPortListener | undefined
  /** Whether the listener is to be told when there is something. */
  #armed = false
  /** Whether a frame of the guest is being looked at: then nobody is told anything yet. */
  #inside = false
  #closed = false
  #tcpTurn = false
  /** Where the last frame came from. */
  #fromTcp = false

  constructor(plan: UserNetPlan, guestMac: MacAddress, host: UserNetHost) {
    this.mtu = plan.mtu
    this.#link = new UserLink(plan, guestMac)
    this.#host = host
    const names = new DnsNames()
    this.#tcp = new UserTcp(this.#link, host, names, this.#notify)
    this.#udp = new UserUdp(this.#link, host, names, this.#notify)
  }

  /** What the network holds now. */
  get usage(): { readonly tcp: number; readonly udp: number; readonly tcpBytes: number; readonly lost: number } {
    return {
      tcp: this.#tcp.count,
      udp: this.#udp.count,
      tcpBytes: this.#tcp.buffered,
      lost: this.#link.outbox.lost
    }
  }

  readonly listen = (listener: NetPortListener | undefined): void => {
    this.#listener = listener
    this.#armed = listener !== undefined
    this.#notify()
  }

  readonly allowOffloads = (offloads: number): void => {
    this.#link.offloads = offloads & this.delivers
    this.#tcp.forgetRoom()
  }

  readonly send = (frame: NetFrame): boolean => {
    if (this.#closed) return true
    this.#inside = true
    try {
      this.#receiveFrame(frame)
    } finally {
      // The network outlives the device: a defect is the end of one frame here.
      this.#inside = false
    }
    return true
  }

  readonly flush = (): void => this.#notify()

  readonly receive = (frame: NetFrame): number => {
    this.#inside = true
    try {
      const length = this.#takeNext(frame)
      if (length === 0) this.#armed = true
      return length
    } finally {
      this.#inside = false
    }
  }

  readonly discard = (): void => {
    if (this.#fromTcp) this.#tcp.discard()
    else this.#link.outbox.drop()
  }

  /** A connection has come to a forwarded port. */
  acceptTcp(socket: HostTcp, from: HostEndpoint, guestPort: number): HostTcpEvents | undefined {
    return this.#closed ? undefined : this.#tcp.accept(socket, from, guestPort)
  }

  /** A datagram has come to a forwarded port. `clients` belongs to that port. */
  acceptUdp(bytes: Uint8Array, from: HostEndpoint, guestPort: number, clients: UdpClients, reply: HostUdp): void {
    if (!this.#closed) this.#udp.accept(bytes, from, guestPort, clients, reply)
  }

  /** Time has passed. Returns when to come again, in milliseconds of the host's clock, or Infinity. */
  tick(now: number): number {
    if (this.#closed) return Number.POSITIVE_INFINITY
    const next = Math.min(this.#tcp.tick(now), this.#udp.tick(now))
    this.#notify()
    return next
  }

  /** Ends everything. */
  close(): void {
    this.#closed = true
    this.#listener = undefined
    this.#tcp.close()
    this.#udp.close()
    this.#link.outbox.clear()
  }

  /** Connections and whole frames take turns, so that neither can hold the other up. What did not fit keeps its turn. */
  #takeNext(frame: NetFrame): number {
    const { outbox } = this.#link
    if (this.#tcpTurn || outbox.isEmpty) {
      const length = this.#tcp.take(frame)
      if (length !== 0) {
        this.#fromTcp = true
        this.#tcpTurn = length < 0
        return length
      }
    }
    this.#fromTcp = false
    const length = outbox.take(frame)
    this.#tcpTurn = length > 0
    return length
  }

  readonly #notify = (): void => {
    if (!this.#armed || this.#inside || (this.#link.outbox.isEmpty && !this.#tcp.wants)) return
    this.#armed = false
    this.#listener?.readable()
  }

  #receiveFrame(frame: NetFrame): void {
    const length = frame.read(0, this.#peek)
    const bytes = length < PEEK ? this.#peek.subarray(0, length) : this.#peek
    if (length < ETHERNET_HEADER || !isUnicast(bytes, 6) || !isAddressedTo(bytes, this.#link.mac)) return
    const type = etherType(bytes)
    if (type === ETHERTYPE_ARP) this.#receiveArp(bytes)
    else if (type === ETHERTYPE_IPV4) this.#receiveIpv4(frame)
  }

  #learn(bytes: Uint8Array): MacAddress {
    const known = this.#link.guestMac
    for (let i = 0; i < known.length; i++) {
      if (known[i] !== bytes[6 + i]) {
        this.#link.guestMac = bytes.slice(6, 12)
        break
      }
    }
    return this.#link.guestMac
  }

  #receiveArp(bytes: Uint8Array): void {
    const packet = decodeArp(bytes, ETHERNET_HEADER)
    const { plan } = this.#link
    if (packet === undefined || packet.operation !== ARP_REQUEST) return
    const guestMac = this.#learn(bytes)
    if (packet.targetAddress !== plan.gateway && packet.targetAddress !== plan.nameserver) return
    const reply = new Uint8Array(ETHERNET_HEADER + ARP_LENGTH)
    writeEthernet(reply, guestMac, this.#link.mac, ETHERTYPE_ARP)
    encodeArp(reply, ETHERNET_HEADER, {
      operation: ARP_REPLY,
      senderMac: this.#link.mac,
      senderAddress: packet.targetAddress,
      targetMac: packet.senderMac,
      targetAddress: packet.senderAddress
    })
    this.#link.outbox.push(reply)
  }

  #receiveIpv4(frame: NetFrame): void {
    const ip = this.#ip
    if (!ip.read(this.#peek, ETHERNET_HEADER, Math.min(this.#peek.length, frame.size), frame.size)) return
    const { plan } = this.#link
    const isGroup = ip.destination === 0xffff_ffff || ip.destination === plan.broadcast || ip.destination >>> 28 >= 14
    const isGuest = isInBlock(ip.source, plan.subnet) && ip.source !== plan.gateway && ip.source !== plan.nameserver &&
      ip.source !== plan.broadcast && ip.source !== plan.subnet.base
    if (ip.source !== 0 && !isGuest) return
    const guestMac = this.#learn(this.#peek)
    if (ip.isFragment) {
      this.#receivePiece(frame, guestMac, isGroup)
      return
    }
    const checked = (frame.flags & FRAME_NEEDS_CHECKSUM) !== 0
    if (ip.protocol === PROTOCOL_TCP) {
      if (isGuest && !isGroup) this.#receiveTcp(frame, guestMac, checked)
      return
    }
    const packet = new Uint8Array(ip.end)
    frame.read(0, packet)
    // What was checked stays as it was checked, whatever the guest does to its memory meanwhile.
    packet.set(this.#peek.subarray(0, ip.payload))
    if (ip.protocol === PROTOCOL_UDP) {
      const several = frame.gsoType === GSO_UDP_L4 ? frame.gsoSize : 0
      this.#receiveUdp(packet, guestMac, ip.payload, ip.end, isGroup, checked, several)
    } else if (isGuest && !isGroup) {
      this.#receiveOther(packet, guestMac)
    }
  }

  #receivePiece(frame: NetFrame, guestMac: MacAddress, isGroup: boolean): void {
    const ip = this.#ip
    if (ip.protocol !== PROTOCOL_UDP || ip.source === 0) return
    const bytes = new Uint8Array(ip.end)
    frame.read(0, bytes)
    const whole = this.#reassembly.add(ip, bytes, this.#host.now())
    if (whole !== undefined) this.#receiveUdp(whole, guestMac, 0, whole.length, isGroup, false, 0)
  }

  #endsOf(guestMac: MacAddress, guestPort: number, remotePort: number): Ends {
    return { guestMac, guestAddress: this.#ip.source, guestPort, remoteAddress: this.#ip.destination, remotePort }
  }

  #receiveTcp(frame: NetFrame, guestMac: MacAddress, checked: boolean): void {
    const ip = this.#ip
    const header = this.#tcpHeader
    if (!header.read(this.#peek, ip.payload, ip.end)) return
    const length = ip.end - header.payload
    const payload = length === 0 ? NO_BYTES : new Uint8Array(length)
    if (length > 0 && frame.read(header.payload, payload) !== length) return
    if (!checked) {
      const sum = addToSum(
        pseudoSum(ip.source, ip.destination, PROTOCOL_TCP, ip.end - ip.payload),
        this.#peek,
        ip.payload,
        header.payload
      )
      if (!isWhole(sum, payload, 0, length)) return
    }
    this.#tcp.receive(header, this.#endsOf(guestMac, header.sourcePort, header.destinationPort), payload)
  }

  #receiveUdp(
    packet: Uint8Array,
    guestMac: MacAddress,
    from: number,
    to: number,
    isGroup: boolean,
    checked: boolean,
    several: number
  ): void {
    const ip = this.#ip
    const header = this.#udpHeader
    if (!header.read(packet, from, to)) return
    if (!checked && header.checksum !== 0) {
      const sum = pseudoSum(ip.source, ip.destination, PROTOCOL_UDP, header.end - from)
      if (!isWhole(sum, packet, from, header.end)) return
    }
    if (header.destinationPort === DHCP_SERVER_PORT && (isGroup || ip.destination === this.#link.plan.gateway)) {
      this.#receiveDhcp(packet, guestMac)
      return
    }
    if (isGroup || ip.source === 0) return
    const ends = this.#endsOf(guestMac, header.sourcePort, header.destinationPort)
    const step = several > 0 ? several : Math.max(1, header.end - header.payload)
    let at = header.payload
    for (let count = 0; count < DATAGRAMS_MAX; count++) {
      const stop = Math.min(header.end, at + step)
      this.#udp.receive(ends, packet.slice(at, stop))
      at = stop
      if (at >= header.end) return
    }
  }

  #receiveDhcp(packet: Uint8Array, guestMac: MacAddress): void {
    const { plan } = this.#link
    const request = decodeDhcpRequest(packet, this.#udpHeader.payload, this.#udpHeader.end)
    const reply = request === undefined ? undefined : answerDhcp(request, plan)
    if (reply === undefined) return
    // Who has no address yet is reached by broadcast only when it says so or is refused; others are reached as they are.
    const isNew = reply.clientAddress === 0
    this.#link.sendDatagram({
      guestMac: isNew && reply.yourAddress === 0 ? MAC_BROADCAST : guestMac,
      guestAddress: isNew ? 0xffff_ffff : reply.clientAddress,
      guestPort: DHCP_CLIENT_PORT,
      remoteAddress: plan.gateway,
      remotePort: DHCP_SERVER_PORT
    }, encodeDhcpReply(reply))
  }

  /** ICMP, and protocols that do not exist here. */
  #receiveOther(packet: Uint8Array, guestMac: MacAddress): void {
    const ip = this.#ip
    const { plan } = this.#link
    const isHere = ip.destination === plan.gateway || ip.destination === plan.nameserver
    if (ip.protocol !== PROTOCOL_ICMP) {
      const code = UNREACHABLE_PROTOCOL
      this.#link.sendUnreachable(guestMac, plan.gateway, code, packet, ETHERNET_HEADER, ip.payload, ip.end)
      return
    }
    // Errors are not answered, and neither is what is not whole.
    if (ip.end - ip.payload < ICMP_HEADER || packet[ip.payload] !== ICMP_ECHO_REQUEST) return
    if (!isWhole(0, packet, ip.payload, ip.end)) return
    if (!isHere) {
      const code = UNREACHABLE_PROHIBITED
      this.#link.sendUnreachable(guestMac, plan.gateway, code, packet, ETHERNET_HEADER, ip.payload, ip.end)
      return
    }
    const at = ETHERNET_HEADER + IPV4_HEADER
    const reply = new Uint8Array(at + ip.end - ip.payload)
    const end = encodeEchoReply(reply, at, packet, ip.payload, ip.end)
    this.#link.sendIcmp(guestMac, ip.destination, packet, ETHERNET_HEADER, reply, end)
  }
}

const NO_BYTES = new Uint8Array(0)
