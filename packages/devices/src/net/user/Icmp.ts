/**
 * ICMP for IPv4 (RFC 792): echo, and the errors that say that something cannot be reached.
 */
import { addToSum, checksumOf } from "./Checksum.ts"
import { IPV4_HEADER } from "./Ipv4.ts"
import { putU16, putU32 } from "./Octets.ts"

/** Bytes of a header. */
export const ICMP_HEADER = 8
export const ICMP_ECHO_REPLY = 0
export const ICMP_UNREACHABLE = 3
export const ICMP_ECHO_REQUEST = 8

/** Codes of {@link ICMP_UNREACHABLE}. */
export const UNREACHABLE_NET = 0
export const UNREACHABLE_HOST = 1
export const UNREACHABLE_PROTOCOL = 2
export const UNREACHABLE_PORT = 3
export const UNREACHABLE_PROHIBITED = 13

/** Bytes of the packet in question that an error carries behind its IP header: RFC 792's eight. */
export const ICMP_QUOTED_PAYLOAD = 8
/** The most bytes of an error: its header, a header with options, and the quoted payload. */
export const ICMP_ERROR_MAX = ICMP_HEADER + 60 + ICMP_QUOTED_PAYLOAD

const seal = (bytes: Uint8Array, from: number, to: number): number => {
  putU16(bytes, from + 2, 0)
  putU16(bytes, from + 2, checksumOf(addToSum(0, bytes, from, to)))
  return to
}

/** Writes the reply to the echo request that is `packet` from `from` to `to`. Returns the end of the reply. */
export const encodeEchoReply = (
  bytes: Uint8Array,
  at: number,
  packet: Uint8Array,
  from: number,
  to: number
): number => {
  bytes.set(packet.subarray(from, to), at)
  bytes[at] = ICMP_ECHO_REPLY
  bytes[at + 1] = 0
  return seal(bytes, at, at + to - from)
}

/** Writes "destination unreachable" about the IPv4 packet that begins at `from`, has its payload at `payload`, ends at `to`. */
export const encodeUnreachable = (
  bytes: Uint8Array,
  at: number,
  code: number,
  packet: Uint8Array,
  from: number,
  payload: number,
  to: number
): number => {
  const end = Math.min(to, Math.max(payload, from + IPV4_HEADER) + ICMP_QUOTED_PAYLOAD)
  bytes[at] = ICMP_UNREACHABLE
  bytes[at + 1] = code
  putU32(bytes, at + 4, 0)
  bytes.set(packet.subarray(from, end), at + ICMP_HEADER)
  return seal(bytes, at, at + ICMP_HEADER + end - from)
}
