/**
 * Does the work that guests leave to the network on behalf of a port that does not: partial checksums, and frames of TCP or UDP that
 * are to be sent as several.
 *
 * A frame is copied once, because its guest could change it between a check and a use, and segments are sent as pieces of that copy.
 */
import { type NetPort, type NetPortListener, OFFLOADS_ALL } from "@troupe/core/NetBackend"
import {
  ETHERNET_HEADER_SIZE,
  FRAME_SIZE_MAX,
  GSO_NONE,
  GSO_TCPV4,
  GSO_TCPV6,
  NetFrame,
  VLAN_TAG_SIZE
} from "@troupe/core/NetFrame"
import { foldSum, sumBytes } from "./InternetChecksum.ts"
import { offloadsOf } from "./Offloads.ts"

/** The most segments of a frame. A guest that asks for smaller ones loses the frame: they would cost the host too much. */
export const SEGMENTS_MAX = 1024

const ETHERTYPE_IPV4 = 0x0800
const ETHERTYPE_IPV6 = 0x86dd
const ETHERTYPE_VLAN = 0x8100
const ETHERTYPE_QINQ = 0x88a8
const VLAN_TAGS_MAX = 2
const IPPROTO_TCP = 6
const IPPROTO_UDP = 17
const IPV4_HEADER_MIN = 20
const IPV6_HEADER_SIZE = 40
const TCP_HEADER_MIN = 20
const UDP_HEADER_SIZE = 8
/** Offsets in the headers. */
const Ipv4 = { TOTAL_LENGTH: 2, ID: 4, CHECKSUM: 10, PROTOCOL: 9, SOURCE: 12 } as const
const Ipv6 = { PAYLOAD_LENGTH: 4, SOURCE: 8 } as const
const Tcp = { SEQUENCE: 4, DATA_OFFSET: 12, FLAGS: 13, CHECKSUM: 16 } as const
const Udp = { LENGTH: 4, CHECKSUM: 6 } as const
/** Flags of TCP that only the last segment has: FIN and PSH. */
const TCP_LAST_FLAGS = 0x09
/** Flags of TCP that only the first segment has: CWR. */
const TCP_FIRST_FLAGS = 0x80
/** Longest headers of a frame that is segmented: two VLAN tags, IP with options or extensions, TCP with options. */
const HEADERS_MAX = 512

/** Where things are in a frame that is being segmented. */
interface Plan {
  version: number
  l3: number
  l4: number
  headers: number
  tcp: boolean
  size: number
  segment: number
}

/** A port that takes all offloads. */
class SoftwareOffloads implements NetPort {
  readonly #port: NetPort
  readonly #accepts: number
  readonly #bytes: Uint8Array<ArrayBuffer>
  readonly #words: Uint16Array<ArrayBuffer>
  readonly #view: DataView<ArrayBuffer>
  readonly #out = new NetFrame()
  /** Headers of the next segment, made of those of the frame. */
  readonly #headers = new Uint8Array(HEADERS_MAX)
  readonly #headerWords = new Uint16Array(this.#headers.buffer)
  readonly #headerView = new DataView(this.#headers.buffer)
  readonly #plan: Plan = { version: 0, l3: 0, l4: 0, headers: 0, tcp: false, size: 0, segment: 0 }
  /** Payload bytes that were sent, and whether segments are still to be sent. */
  #position = 0
  #index = 0
  #sending = false
  #listener: NetPortListener | undefined

  constructor(port: NetPort) {
    this.#port = port
    this.#accepts = port.accepts
    const buffer = new ArrayBuffer(FRAME_SIZE_MAX + 1)
    this.#bytes = new Uint8Array(buffer)
    this.#words = new Uint16Array(buffer)
    this.#view = new DataView(buffer)
  }

  get mtu(): number {
    return this.#port.mtu
  }

  readonly accepts = OFFLOADS_ALL

  get delivers(): number {
    return this.#port.delivers
  }

  get linkUp(): boolean {
    return this.#port.linkUp
  }

  listen(listener: NetPortListener | undefined): void {
    this.#listener = listener
    this.#sending = false
    this.#port.listen(
      listener === undefined ? undefined : {
        readable: () => listener.readable(),
        linkChanged: () => listener.linkChanged(),
        writable: () => {
          if (this.#sendSegments()) this.#listener?.writable()
        }
      }
    )
  }

  allowOffloads(offloads: number): void {
    this.#port.allowOffloads(offloads)
  }

  receive(frame: NetFrame): number {
    return this.#port.receive(frame)
  }

  discard(): void {
    this.#port.discard()
  }

  flush(): void {
    this.#port.flush?.()
  }

  send(frame: NetFrame): boolean {
    if (!this.#sendSegments()) return false
    if (frame.gsoType === GSO_NONE && frame.flags === 0) return this.#port.send(frame)
    const needed = offloadsOf(frame)
    if ((needed & this.#accepts) === needed) return this.#port.send(frame)
    const size = frame.read(0, this.#bytes)
    if (frame.gsoType === GSO_NONE) return this.#sendWhole(frame, size)
    if (!this.#planSegments(frame, size)) return true
    this.#sending = true
    this.#position = 0
    this.#index = 0
    this.#sendSegments()
    return true
  }

  #sendWhole(frame: NetFrame, size: number): boolean {
    const start = frame.checksumStart
    const at = start + frame.checksumOffset
    const sum = sumBytes(this.#bytes, this.#words, start, size - start)
    this.#view.setUint16(at, complement(sum))
    this.#out.clear()
    this.#out.add(this.#bytes, 0, size)
    return this.#port.send(this.#out)
  }

  /** Finds the headers of a frame that is to be segmented. Returns whether they are what the frame says that they are. */
  #planSegments(frame: NetFrame, size: number): boolean {
    const view = this.#view
    const plan = this.#plan
    let l3 = ETHERNET_HEADER_SIZE
    let type = view.getUint16(l3 - 2)
    for (let tags = 0; (type === ETHERTYPE_VLAN || type === ETHERTYPE_QINQ) && tags < VLAN_TAGS_MAX; tags++) {
      l3 += VLAN_TAG_SIZE
      if (l3 > size) return false
      type = view.getUint16(l3 - 2)
    }
    const l4 = frame.checksumStart
    const tcp = frame.gsoType === GSO_TCPV4 || frame.gsoType === GSO_TCPV6
    if (type === ETHERTYPE_IPV4 && frame.gsoType !== GSO_TCPV6) {
      if (l4 < l3 + IPV4_HEADER_MIN || l4 >= size) return false
      if (l4 !== l3 + (view.getUint8(l3) & 0x0f) * 4) return false
      if (view.getUint8(l3 + Ipv4.PROTOCOL) !== (tcp ? IPPROTO_TCP : IPPROTO_UDP)) return false
      plan.version = 4
    } else if (type === ETHERTYPE_IPV6 && frame.gsoType !== GSO_TCPV4) {
      if (l4 < l3 + IPV6_HEADER_SIZE || l4 >= size) return false
      plan.version = 6
    } else {
      return false
    }
    const headerSize = tcp ? TCP_HEADER_MIN : UDP_HEADER_SIZE
    if (l4 + headerSize > size) return false
    const headers = l4 + (tcp ? (view.getUint8(l4 + Tcp.DATA_OFFSET) >>> 4) * 4 : UDP_HEADER_SIZE)
    if (headers < l4 + headerSize || headers > size || headers > HEADERS_MAX) return false
    if (frame.checksumOffset !== (tcp ? Tcp.CHECKSUM : Udp.CHECKSUM)) return false
    const payload = size - headers
    if (payload > frame.gsoSize * SEGMENTS_MAX) return false
    if (headers - l3 + Math.min(payload, frame.gsoSize) > this.#port.mtu) return false
    plan.l3 = l3
    plan.l4 = l4
    plan.headers = headers
    plan.tcp = tcp
    plan.size = size
    plan.segment = frame.gsoSize
    return true
  }

  /** Sends what segments there are still to be sent. Returns `false` when the port has no room for one. */
  #sendSegments(): boolean {
    const plan = this.#plan
    const payload = plan.size - plan.headers
    while (this.#sending) {
      const length = Math.min(plan.segment, payload - this.#position)
      this.#makeHeaders(length, this.#position + length === payload)
      const out = this.#out
      out.clear()
      out.add(this.#headers, 0, plan.headers)
      out.add(this.#bytes, plan.headers + this.#position, length)
      if (!this.#port.send(out)) return false
      this.#position += length
      this.#index++
      this.#sending = this.#position < payload
    }
    return true
  }

  /** Makes the headers of the segment at the present position, with `length` bytes of payload. */
  #makeHeaders(length: number, last: boolean): void {
    const { headers, l3, l4, tcp, version } = this.#plan
    const target = this.#headers
    const view = this.#headerView
    for (let i = 0; i < headers; i++) target[i] = this.#bytes[i] ?? 0
    const l4Length = headers - l4 + length
    if (version === 4) {
      view.setUint16(l3 + Ipv4.TOTAL_LENGTH, headers - l3 + length)
      view.setUint16(l3 + Ipv4.ID, (view.getUint16(l3 + Ipv4.ID) + this.#index) & 0xffff)
      view.setUint16(l3 + Ipv4.CHECKSUM, 0)
      view.setUint16(l3 + Ipv4.CHECKSUM, complement(sumBytes(target, this.#headerWords, l3, l4 - l3)))
    } else {
      view.setUint16(l3 + Ipv6.PAYLOAD_LENGTH, headers - l3 - IPV6_HEADER_SIZE + length)
    }
    const checksumAt = l4 + (tcp ? Tcp.CHECKSUM : Udp.CHECKSUM)
    if (tcp) {
      view.setUint32(l4 + Tcp.SEQUENCE, (view.getUint32(l4 + Tcp.SEQUENCE) + this.#position) >>> 0)
      let flags = view.getUint8(l4 + Tcp.FLAGS)
      if (!last) flags &= ~TCP_LAST_FLAGS
      if (this.#index > 0) flags &= ~TCP_FIRST_FLAGS
      view.setUint8(l4 + Tcp.FLAGS, flags)
    } else {
      view.setUint16(l4 + Udp.LENGTH, l4Length)
    }
    // The pseudo header: both addresses, the protocol, the length (RFC 9293, RFC 8200).
    view.setUint16(checksumAt, 0)
    const addresses = version === 4 ? l3 + Ipv4.SOURCE : l3 + Ipv6.SOURCE
    let sum = sumBytes(target, this.#headerWords, addresses, version === 4 ? 8 : 32)
    sum += (tcp ? IPPROTO_TCP : IPPROTO_UDP) + l4Length
    sum += sumBytes(target, this.#headerWords, l4, headers - l4)
    const from = headers + this.#position
    const payload = sumBytes(this.#bytes, this.#words, from, length)
    // Headers are whole 16-bit words, so payload words are words of the whole.
    const checksum = complement(foldSum(sum + payload))
    view.setUint16(checksumAt, checksum === 0 && !tcp ? 0xffff : checksum)
  }
}

const complement = (sum: number): number => ~sum & 0xffff

/** The port itself when it takes all offloads, otherwise one that does what it does not. */
export const withSoftwareOffloads = (port: NetPort): NetPort =>
  (port.accepts & OFFLOADS_ALL) === OFFLOADS_ALL ? port : new SoftwareOffloads(port)
