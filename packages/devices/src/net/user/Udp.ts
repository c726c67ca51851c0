/**
 * UDP headers (RFC 768).
 */
import { getU16, putU16 } from "./Octets.ts"

/** Bytes of a header. */
export const UDP_HEADER = 8
/** Where the checksum is in a header. */
export const UDP_CHECKSUM_OFFSET = 6

/** A header that was read. One object is used again and again. */
export class UdpHeader {
  sourcePort = 0
  destinationPort = 0
  /** 0 when the sender made none. */
  checksum = 0
  /** Where the payload begins. */
  payload = 0
  /** Where it ends. */
  end = 0

  /** Reads and checks the header at `from` of a packet that ends at `to`. */
  read(bytes: Uint8Array, from: number, to: number): boolean {
    if (to - from < UDP_HEADER) return false
    const length = getU16(bytes, from + 4)
    if (length < UDP_HEADER || length > to - from) return false
    this.sourcePort = getU16(bytes, from)
    this.destinationPort = getU16(bytes, from + 2)
    this.checksum = getU16(bytes, from + UDP_CHECKSUM_OFFSET)
    this.payload = from + UDP_HEADER
    this.end = from + length
    return true
  }
}

/** Writes a header at `at`, its checksum field 0. Returns its end. */
export const encodeUdp = (
  bytes: Uint8Array,
  at: number,
  sourcePort: number,
  destinationPort: number,
  payloadLength: number
): number => {
  putU16(bytes, at, sourcePort)
  putU16(bytes, at + 2, destinationPort)
  putU16(bytes, at + 4, UDP_HEADER + payloadLength)
  putU16(bytes, at + UDP_CHECKSUM_OFFSET, 0)
  return at + UDP_HEADER
}
