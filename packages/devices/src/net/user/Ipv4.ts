/**
 * IPv4 headers (RFC 791) and addresses, which are 32-bit numbers.
 */
import { foldSum } from "../InternetChecksum.ts"
import { addToSum, checksumOf, isWhole } from "./Checksum.ts"
import { getU16, getU32, putU16, putU32 } from "./Octets.ts"

/** Bytes of a header without options. */
export const IPV4_HEADER = 20
/** The most bytes of a packet. */
export const IPV4_PACKET_MAX = 0xffff
/** Time to live of what is sent. */
export const IPV4_TTL = 64

export const PROTOCOL_ICMP = 1
export const PROTOCOL_TCP = 6
export const PROTOCOL_UDP = 17

/** Bits of the flags and fragment offset field. */
export const IPV4_DONT_FRAGMENT = 0x4000
export const IPV4_MORE_FRAGMENTS = 0x2000
export const IPV4_FRAGMENT_OFFSET = 0x1fff

/** A header that was read. One object is used again and again. */
export class Ipv4Header {
  source = 0
  destination = 0
  protocol = 0
  ttl = 0
  identification = 0
  /** Flags and fragment offset as they are in the header. */
  fragment = 0
  /** Where the payload begins. */
  payload = 0
  /** Where the packet ends. */
  end = 0

  /**
   * Reads and checks the header at `from`, of which `bytes` may have only the beginning: those before `to`. The whole frame ends at
   * `end`. Returns whether there is a whole packet. Bytes behind the packet, such as the padding of short frames, are allowed.
   */
  read(bytes: Uint8Array, from: number, to: number, end = to): boolean {
    if (to - from < IPV4_HEADER) return false
    const first = bytes[from] ?? 0
    const headerLength = (first & 0xf) * 4
    const total = getU16(bytes, from + 2)
    if (first >>> 4 !== 4 || headerLength < IPV4_HEADER || headerLength > to - from) return false
    if (total < headerLength || total > end - from) return false
    if (!isWhole(0, bytes, from, from + headerLength)) return false
    this.identification = getU16(bytes, from + 4)
    this.fragment = getU16(bytes, from + 6)
    this.ttl = bytes[from + 8] ?? 0
    this.protocol = bytes[from + 9] ?? 0
    this.source = getU32(bytes, from + 12)
    this.destination = getU32(bytes, from + 16)
    this.payload = from + headerLength
    this.end = from + total
    return true
  }

  /** Whether this is a piece of a larger packet. */
  get isFragment(): boolean {
    return (this.fragment & (IPV4_MORE_FRAGMENTS | IPV4_FRAGMENT_OFFSET)) !== 0
  }
}

/** What a header is written from. */
export interface Ipv4Fields {
  readonly source: number
  readonly destination: number
  readonly protocol: number
  readonly identification: number
  /** Bytes behind the header. */
  readonly payloadLength: number
  /** Flags and fragment offset. Default: don't fragment. */
  readonly fragment?: number
}

/** Writes a header at `at`, with its checksum. Returns its end. */
export const encodeIpv4 = (bytes: Uint8Array, at: number, fields: Ipv4Fields): number => {
  bytes[at] = 0x45
  bytes[at + 1] = 0
  putU16(bytes, at + 2, IPV4_HEADER + fields.payloadLength)
  putU16(bytes, at + 4, fields.identification)
  putU16(bytes, at + 6, fields.fragment ?? IPV4_DONT_FRAGMENT)
  bytes[at + 8] = IPV4_TTL
  bytes[at + 9] = fields.protocol
  putU16(bytes, at + 10, 0)
  putU32(bytes, at + 12, fields.source)
  putU32(bytes, at + 16, fields.destination)
  putU16(bytes, at + 10, checksumOf(addToSum(0, bytes, at, at + IPV4_HEADER)))
  return at + IPV4_HEADER
}

/** The sum of the pseudo-header that TCP and UDP count in, for `length` bytes of them. */
export const pseudoSum = (source: number, destination: number, protocol: number, length: number): number =>
  foldSum(
    (source >>> 16) + (source & 0xffff) + (destination >>> 16) + (destination & 0xffff) + protocol + (length & 0xffff) +
      (length >>> 16)
  )

/** `10.0.2.15`. */
export const formatIpv4 = (address: number): string =>
  `${address >>> 24}.${(address >>> 16) & 0xff}.${(address >>> 8) & 0xff}.${address & 0xff}`

/** Four decimal numbers with dots as an address; `undefined` when it is none. */
export const parseIpv4 = (text: string): number | undefined => {
  const parts = text.split(".")
  if (parts.length !== 4) return undefined
  let address = 0
  for (const part of parts) {
    if (!/^(0|[1-9]\d{0,2})$/.test(part) || Number(part) > 255) return undefined
    address = address * 256 + Number(part)
  }
  return address
}

/** A block of addresses, such as `10.0.2.0/24`. */
export interface Ipv4Block {
  readonly base: number
  /** Bits of the prefix, 0 to 32. */
  readonly prefix: number
}

/** The mask of a prefix of 0 to 32 bits. */
export const ipv4Mask = (prefix: number): number => prefix === 0 ? 0 : (-1 << (32 - prefix)) >>> 0

/** `10.0.2.0/24` as a block; `undefined` when it is none or has bits behind its prefix. */
export const parseIpv4Block = (text: string): Ipv4Block | undefined => {
  const match = /^([\d.]+)\/(\d|[12]\d|3[0-2])$/.exec(text)
  if (match === null) return undefined
  const base = parseIpv4(match[1] ?? "")
  const prefix = Number(match[2])
  return base === undefined || (base & ~ipv4Mask(prefix)) !== 0 ? undefined : { base, prefix }
}

/** Whether an address is in a block. */
export const isInBlock = (address: number, block: Ipv4Block): boolean =>
  (address & ipv4Mask(block.prefix)) >>> 0 === block.base
