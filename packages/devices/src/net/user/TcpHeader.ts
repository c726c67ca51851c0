/**
 * TCP headers (RFC 9293), with the options that a proxy needs: maximum segment size and window scale (RFC 7323).
 */
import { getU16, getU32, putU16, putU32 } from "./Octets.ts"

/** Bytes of a header without options. */
export const TCP_HEADER = 20
/** Bytes of the options of a segment with SYN: MSS, and a window scale after a NOP. */
export const TCP_SYN_OPTIONS = 8
/** Where the checksum is in a header. */
export const TCP_CHECKSUM_OFFSET = 16

export const TCP_FIN = 0x01
export const TCP_SYN = 0x02
export const TCP_RST = 0x04
export const TCP_PSH = 0x08
export const TCP_ACK = 0x10

/** The MSS of a peer that does not say one (RFC 9293, section 3.7.1). */
export const TCP_DEFAULT_MSS = 536
/** The largest window scale (RFC 7323, section 2.3). */
export const TCP_WINDOW_SCALE_MAX = 14

const OPTION_END = 0
const OPTION_NOP = 1
const OPTION_MSS = 2
const OPTION_WINDOW_SCALE = 3

/** A header that was read. One object is used again and again. */
export class TcpHeader {
  sourcePort = 0
  destinationPort = 0
  sequence = 0
  acknowledgment = 0
  flags = 0
  window = 0
  /** The maximum segment size option, or 0. */
  mss = 0
  /** The window scale option, at most {@link TCP_WINDOW_SCALE_MAX}, or -1. */
  windowScale = -1
  /** Where the payload begins. */
  payload = 0
  /** Where it ends. */
  end = 0

  /** Reads and checks the header at `from` of a packet that ends at `to`. Options that make no sense are not there. */
  read(bytes: Uint8Array, from: number, to: number): boolean {
    if (to - from < TCP_HEADER) return false
    const headerLength = ((bytes[from + 12] ?? 0) >>> 4) * 4
    if (headerLength < TCP_HEADER || headerLength > to - from) return false
    this.sourcePort = getU16(bytes, from)
    this.destinationPort = getU16(bytes, from + 2)
    this.sequence = getU32(bytes, from + 4)
    this.acknowledgment = getU32(bytes, from + 8)
    this.flags = (bytes[from + 13] ?? 0) & 0x3f
    this.window = getU16(bytes, from + 14)
    this.payload = from + headerLength
    this.end = to
    this.mss = 0
    this.windowScale = -1
    if ((this.flags & TCP_SYN) !== 0) this.#readOptions(bytes, from + TCP_HEADER, this.payload)
    return true
  }

  #readOptions(bytes: Uint8Array, from: number, to: number): void {
    let at = from
    while (at < to) {
      const kind = bytes[at] ?? OPTION_END
      if (kind === OPTION_END) return
      if (kind === OPTION_NOP) {
        at++
        continue
      }
      const length = at + 1 < to ? bytes[at + 1] ?? 0 : 0
      if (length < 2 || at + length > to) return
      if (kind === OPTION_MSS && length === 4) this.mss = getU16(bytes, at + 2)
      if (kind === OPTION_WINDOW_SCALE && length === 3) {
        this.windowScale = Math.min(bytes[at + 2] ?? 0, TCP_WINDOW_SCALE_MAX)
      }
      at += length
    }
  }
}

/** Writes a header without options at `at`, its checksum field 0. Returns its end. */
export const encodeTcp = (
  bytes: Uint8Array,
  at: number,
  sourcePort: number,
  destinationPort: number,
  sequence: number,
  acknowledgment: number,
  flags: number,
  window: number
): number => {
  putU16(bytes, at, sourcePort)
  putU16(bytes, at + 2, destinationPort)
  putU32(bytes, at + 4, sequence)
  putU32(bytes, at + 8, acknowledgment)
  bytes[at + 12] = (TCP_HEADER / 4) << 4
  bytes[at + 13] = flags
  putU16(bytes, at + 14, window)
  putU32(bytes, at + TCP_CHECKSUM_OFFSET, 0)
  return at + TCP_HEADER
}

/** Writes the options of a segment with SYN behind the header at `at`. `windowScale` below 0 leaves that one out. */
export const encodeSynOptions = (bytes: Uint8Array, at: number, mss: number, windowScale: number): number => {
  const from = at + TCP_HEADER
  bytes[from] = OPTION_MSS
  bytes[from + 1] = 4
  putU16(bytes, from + 2, mss)
  bytes[from + 4] = OPTION_NOP
  bytes[from + 5] = windowScale < 0 ? OPTION_NOP : OPTION_WINDOW_SCALE
  bytes[from + 6] = windowScale < 0 ? OPTION_NOP : 3
  bytes[from + 7] = windowScale < 0 ? OPTION_NOP : windowScale
  bytes[at + 12] = ((TCP_HEADER + TCP_SYN_OPTIONS) / 4) << 4
  return from + TCP_SYN_OPTIONS
}

/** How far sequence number `a` is behind `b`: negative when it is before it. */
export const sequenceDistance = (a: number, b: number): number => (a - b) | 0

/** A sequence number moved on. */
export const sequenceAdd = (a: number, bytes: number): number => (a + bytes) >>> 0
