/**
 * IPv4 packets that come in pieces (RFC 791, section 3.2): put together again within bounds, or lost.
 */
import { IPV4_FRAGMENT_OFFSET, IPV4_MORE_FRAGMENTS, type Ipv4Header } from "./Ipv4.ts"

/** The most packets that are put together at once. */
export const REASSEMBLY_PACKETS_MAX = 16
/** The most pieces of one packet. */
export const REASSEMBLY_PIECES_MAX = 128
/** How long the pieces of a packet may take to come, in milliseconds. */
export const REASSEMBLY_TIME = 15_000
/** The most bytes of a packet behind its header. */
const PAYLOAD_MAX = 0xffff - 20

interface Packet {
  readonly pieces: Array<{ readonly from: number; readonly bytes: Uint8Array }>
  readonly expires: number
  /** Bytes behind the header, or -1 as long as the last piece is not there. */
  length: number
}

/** The pieces that wait for others. */
export class Reassembly {
  readonly #packets = new Map<string, Packet>()

  /** Packets that are not whole. */
  get count(): number {
    return this.#packets.size
  }

  /** Takes a piece. Returns the payload of its packet when it is whole now. */
  add(header: Ipv4Header, frame: Uint8Array, now: number): Uint8Array | undefined {
    const key = `${header.source} ${header.destination} ${header.protocol} ${header.identification}`
    const from = (header.fragment & IPV4_FRAGMENT_OFFSET) * 8
    const isLast = (header.fragment & IPV4_MORE_FRAGMENTS) === 0
    const to = from + header.end - header.payload
    for (const [other, packet] of this.#packets) if (packet.expires <= now) this.#packets.delete(other)
    const packet = this.#packets.get(key) ?? this.#open(key, now)
    // Pieces that overlap or do not fit together are an attack or an error: the packet is lost (RFC 5722 says it for IPv6).
    const fits = to <= PAYLOAD_MAX && to > from && (isLast || (to - from) % 8 === 0) &&
      packet.pieces.length < REASSEMBLY_PIECES_MAX && (packet.length < 0 || (!isLast && to <= packet.length)) &&
      packet.pieces.every((piece) => to <= piece.from || from >= piece.from + piece.bytes.length)
    if (!fits) {
      this.#packets.delete(key)
      return undefined
    }
    packet.pieces.push({ from, bytes: frame.slice(header.payload, header.end) })
    if (isLast) packet.length = to
    const have = packet.pieces.reduce((sum, piece) => sum + piece.bytes.length, 0)
    if (packet.length < 0 || have < packet.length) return undefined
    this.#packets.delete(key)
    const whole = new Uint8Array(packet.length)
    for (const piece of packet.pieces) {
      if (piece.from + piece.bytes.length > whole.length) return undefined
      whole.set(piece.bytes, piece.from)
    }
    return whole
  }

  #open(key: string, now: number): Packet {
    if (this.#packets.size >= REASSEMBLY_PACKETS_MAX) {
      for (const oldest of this.#packets.keys()) {
        this.#packets.delete(oldest)
        break
      }
    }
    const packet: Packet = { pieces: [], expires: now + REASSEMBLY_TIME, length: -1 }
    this.#packets.set(key, packet)
    return packet
  }
}
