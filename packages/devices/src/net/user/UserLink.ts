/**
 * The wire between a guest and its user-mode network: who is at its ends, and the frames that wait for the guest.
 */
import { Offload } from "@troupe/core/NetBackend"
import { FRAME_NEEDS_CHECKSUM, GSO_TCPV4, type NetFrame } from "@troupe/core/NetFrame"
import { foldSum } from "../InternetChecksum.ts"
import { addToSum, checksumOf } from "./Checksum.ts"
import { ETHERNET_HEADER, ETHERTYPE_IPV4, type MacAddress, writeEthernet } from "./Ethernet.ts"
import { encodeUnreachable, ICMP_ERROR_MAX } from "./Icmp.ts"
import {
  encodeIpv4,
  IPV4_DONT_FRAGMENT,
  IPV4_HEADER,
  IPV4_MORE_FRAGMENTS,
  PROTOCOL_ICMP,
  PROTOCOL_TCP,
  PROTOCOL_UDP,
  pseudoSum
} from "./Ipv4.ts"
import { getU32, putU16 } from "./Octets.ts"
import { Outbox } from "./Outbox.ts"
import type { TcpConnection } from "./TcpConnection.ts"
import { encodeSynOptions, encodeTcp, TCP_CHECKSUM_OFFSET, TCP_HEADER, TCP_SYN, TCP_SYN_OPTIONS } from "./TcpHeader.ts"
import type { TcpPlan } from "./TcpState.ts"
import { encodeUdp, UDP_CHECKSUM_OFFSET, UDP_HEADER } from "./Udp.ts"
import type { UserNetPlan } from "./UserNetPlan.ts"

/** Where the packet of TCP, UDP or ICMP begins in a frame that is sent. */
const TRANSPORT = ETHERNET_HEADER + IPV4_HEADER
/** Bytes of all headers of a segment with payload. */
export const TCP_HEADERS = TRANSPORT + TCP_HEADER
/** Bytes of all headers of a segment with options. */
export const TCP_HEADERS_MAX = TRANSPORT + TCP_HEADER + TCP_SYN_OPTIONS

/** The two ends of a conversation as the guest sees it. */
export interface Ends {
  readonly guestMac: MacAddress
  readonly guestAddress: number
  readonly guestPort: number
  readonly remoteAddress: number
  readonly remotePort: number
}

/** The wire. */
export class UserLink {
  readonly plan: UserNetPlan
  /** The address of the gateway and of everything behind it. */
  readonly mac: MacAddress
  /** The guest's address: that of its interface, or of the last frame. */
  guestMac: MacAddress
  readonly outbox = new Outbox()
  /** The offloads that frames may come with. */
  offloads = 0
  #identification = 0
  readonly #headers = new Uint8Array(TCP_HEADERS_MAX)

  constructor(plan: UserNetPlan, guestMac: MacAddress) {
    this.plan = plan
    this.guestMac = guestMac
    // Locally administered, and different for different networks.
    this.mac = Uint8Array.of(0x52, 0x55, plan.gateway >>> 24, plan.gateway >>> 16, plan.gateway >>> 8, plan.gateway)
  }

  /** The most bytes of payload in a TCP segment of a connection. */
  payloadMax(connection: TcpConnection): number {
    return (this.offloads & Offload.TSO4) === 0 ? connection.mss : 0xffff - IPV4_HEADER - TCP_HEADER
  }

  /** Writes the segment of a plan into buffers, at least {@link TCP_HEADERS_MAX} bytes and its payload. Returns its length. */
  writeSegment(frame: NetFrame, ends: Ends, connection: TcpConnection, plan: TcpPlan): number {
    const headers = this.#headers
    let end = encodeTcp(
      headers,
      TRANSPORT,
      ends.remotePort,
      ends.guestPort,
      plan.sequence,
      plan.acknowledgment,
      plan.flags,
      plan.window
    )
    if ((plan.flags & TCP_SYN) !== 0) {
      end = encodeSynOptions(headers, TRANSPORT, this.plan.mtu - IPV4_HEADER - TCP_HEADER, plan.windowScale)
    }
    const length = end - TRANSPORT + plan.length
    this.#writeIp(headers, ends, PROTOCOL_TCP, length)
    frame.clearOffloads()
    const pseudo = pseudoSum(ends.remoteAddress, ends.guestAddress, PROTOCOL_TCP, length)
    if ((this.offloads & Offload.CHECKSUM) === 0) {
      const sum = addToSum(pseudo, headers, TRANSPORT, end) + connection.queue.addToSum(0, plan.offset, plan.length)
      putU16(headers, TRANSPORT + TCP_CHECKSUM_OFFSET, checksumOf(sum))
    } else {
      putU16(headers, TRANSPORT + TCP_CHECKSUM_OFFSET, foldSum(pseudo))
      frame.flags = FRAME_NEEDS_CHECKSUM
      frame.checksumStart = TRANSPORT
      frame.checksumOffset = TCP_CHECKSUM_OFFSET
      if (plan.length > connection.mss) {
        frame.gsoType = GSO_TCPV4
        frame.gsoSize = connection.mss
        frame.headerLength = end
      }
    }
    frame.write(0, headers, 0, end)
    connection.queue.copyTo(frame, end, plan.offset, plan.length)
    return end + plan.length
  }

  /** Sends a segment without payload that no connection waits for. */
  sendControl(ends: Ends, sequence: number, acknowledgment: number, flags: number): void {
    const bytes = new Uint8Array(TRANSPORT + TCP_HEADER)
    this.#writeIp(bytes, ends, PROTOCOL_TCP, TCP_HEADER)
    const end = encodeTcp(bytes, TRANSPORT, ends.remotePort, ends.guestPort, sequence, acknowledgment, flags, 0)
    const pseudo = pseudoSum(ends.remoteAddress, ends.guestAddress, PROTOCOL_TCP, TCP_HEADER)
    putU16(bytes, TRANSPORT + TCP_CHECKSUM_OFFSET, checksumOf(addToSum(pseudo, bytes, TRANSPORT, end)))
    this.outbox.push(bytes)
  }

  /** Sends a datagram, in pieces when it is larger than the MTU. */
  sendDatagram(ends: Ends, payload: Uint8Array): void {
    const length = UDP_HEADER + payload.length
    if (length > 0xffff - IPV4_HEADER) return
    const bytes = new Uint8Array(TRANSPORT + length)
    const at = encodeUdp(bytes, TRANSPORT, ends.remotePort, ends.guestPort, payload.length)
    bytes.set(payload, at)
    const pseudo = pseudoSum(ends.remoteAddress, ends.guestAddress, PROTOCOL_UDP, length)
    const checksum = checksumOf(addToSum(pseudo, bytes, TRANSPORT, bytes.length))
    // 0 would say that there is none.
    putU16(bytes, TRANSPORT + UDP_CHECKSUM_OFFSET, checksum === 0 ? 0xffff : checksum)
    if (length + IPV4_HEADER <= this.plan.mtu) {
      this.#writeIp(bytes, ends, PROTOCOL_UDP, length)
      this.outbox.push(bytes)
      return
    }
    const step = (this.plan.mtu - IPV4_HEADER) & ~7
    const identification = this.#nextIdentification()
    for (let from = 0; from < length; from += step) {
      const size = Math.min(step, length - from)
      const piece = new Uint8Array(TRANSPORT + size)
      this.#writeIp(
        piece,
        ends,
        PROTOCOL_UDP,
        size,
        identification,
        (from >>> 3) | (from + size < length ? IPV4_MORE_FRAGMENTS : 0)
      )
      piece.set(bytes.subarray(TRANSPORT + from, TRANSPORT + from + size), TRANSPORT)
      // A datagram of which a piece is lost is lost.
      if (!this.outbox.push(piece)) return
    }
  }

  /** Sends ICMP's "unreachable" about a packet of the guest. */
  sendUnreachable(
    guestMac: MacAddress,
    source: number,
    code: number,
    packet: Uint8Array,
    from: number,
    payload: number,
    to: number
  ): void {
    const bytes = new Uint8Array(TRANSPORT + ICMP_ERROR_MAX)
    const end = encodeUnreachable(bytes, TRANSPORT, code, packet, from, payload, to)
    this.sendIcmp(guestMac, source, packet, from, bytes, end)
  }

  /** Sends the ICMP message in `bytes`, from where the transport begins to `end`, to whom the packet at `from` came from. */
  sendIcmp(
    guestMac: MacAddress,
    source: number,
    packet: Uint8Array,
    from: number,
    bytes: Uint8Array,
    end: number
  ): void {
    const guestAddress = getU32(packet, from + 12)
    this.#writeIp(
      bytes,
      { guestMac, guestAddress, guestPort: 0, remoteAddress: source, remotePort: 0 },
      PROTOCOL_ICMP,
      end - TRANSPORT
    )
    this.outbox.push(bytes.length === end ? bytes : bytes.slice(0, end))
  }

  #writeIp(
    bytes: Uint8Array,
    ends: Ends,
    protocol: number,
    payloadLength: number,
    identification = this.#nextIdentification(),
    fragment = IPV4_DONT_FRAGMENT
  ): void {
    writeEthernet(bytes, ends.guestMac, this.mac, ETHERTYPE_IPV4)
    encodeIpv4(bytes, ETHERNET_HEADER, {
      source: ends.remoteAddress,
      destination: ends.guestAddress,
      protocol,
      identification,
      payloadLength,
      fragment
    })
  }

  #nextIdentification(): number {
    this.#identification = (this.#identification + 1) & 0xffff
    return this.#identification
  }
}
