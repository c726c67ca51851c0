/**
 * The guest's side of the wire, written apart from the network's own code: packets by hand, and a TCP that is as simple as a right
 * one can be.
 */
import { concat } from "./FakeSockets.ts"
import { GATEWAY, GUEST, GUEST_MAC } from "./NetworkUnderTest.ts"

export const u16 = (bytes: Uint8Array, at: number): number => bytes[at]! * 256 + bytes[at + 1]!
export const u32 = (bytes: Uint8Array, at: number): number => u16(bytes, at) * 65_536 + u16(bytes, at + 2)

const be16 = (value: number): Array<number> => [(value >>> 8) & 255, value & 255]
const be32 = (value: number): Array<number> => [...be16(value >>> 16), ...be16(value & 0xffff)]

/** The checksum of bytes as RFC 1071 says it, one 16-bit word after the other. */
export const checksum = (...pieces: ReadonlyArray<ArrayLike<number>>): number => {
  const bytes = concat(pieces.map((piece) => Uint8Array.from(piece)))
  let sum = 0
  for (let i = 0; i < bytes.length; i += 2) {
    sum += bytes[i]! * 256 + (bytes[i + 1] ?? 0)
    if (sum > 0xffff) sum -= 0xffff
  }
  return 0xffff - sum
}

export const GATEWAY_MAC = Uint8Array.of(0x52, 0x55, 10, 0, 2, 2)

export const ethernet = (type: number, payload: ArrayLike<number>, to: ArrayLike<number> = GATEWAY_MAC): Uint8Array =>
  concat([Uint8Array.from(to), GUEST_MAC, Uint8Array.from(be16(type)), Uint8Array.from(payload)])

export const ipv4 = (
  protocol: number,
  payload: Uint8Array,
  { source = GUEST, destination = GATEWAY, fragment = 0x4000, id = 1, to = GATEWAY_MAC } = {}
): Uint8Array => {
  const header = [
    0x45,
    0,
    ...be16(20 + payload.length),
    ...be16(id),
    ...be16(fragment),
    64,
    protocol,
    0,
    0,
    ...be32(source),
    ...be32(destination)
  ]
  header.splice(10, 2, ...be16(checksum(header)))
  return ethernet(0x0800, concat([Uint8Array.from(header), payload]), to)
}

const pseudo = (source: number, destination: number, protocol: number, length: number) => [
  ...be32(source),
  ...be32(destination),
  0,
  protocol,
  ...be16(length)
]

export const udp = (
  sourcePort: number,
  destinationPort: number,
  payload: Uint8Array,
  { source = GUEST, destination = GATEWAY, to = GATEWAY_MAC } = {}
): Uint8Array => {
  const length = 8 + payload.length
  const header = [...be16(sourcePort), ...be16(destinationPort), ...be16(length), 0, 0]
  const sum = checksum(pseudo(source, destination, 17, length), header, payload)
  header.splice(6, 2, ...be16(sum === 0 ? 0xffff : sum))
  return ipv4(17, concat([Uint8Array.from(header), payload]), { source, destination, to })
}

export const icmp = (type: number, code: number, rest: Uint8Array, destination = GATEWAY): Uint8Array => {
  const bytes = concat([Uint8Array.of(type, code, 0, 0), rest])
  bytes.set(be16(checksum(bytes)), 2)
  return ipv4(1, bytes, { destination })
}

export interface Packet {
  readonly source: number
  readonly destination: number
  readonly protocol: number
  readonly fragment: number
  readonly payload: Uint8Array
}

/** The IPv4 packet in a frame; throws when its header is not right. */
export const parseIp = (frame: Uint8Array): Packet => {
  if (u16(frame, 12) !== 0x0800) throw new Error(`ethertype ${u16(frame, 12)}`)
  const header = frame.slice(14, 34)
  if (header[0] !== 0x45 || checksum(header) !== 0) throw new Error("IPv4 header")
  const total = u16(header, 2)
  if (14 + total !== frame.length) throw new Error(`length ${total} in a frame of ${frame.length}`)
  return {
    source: u32(header, 12),
    destination: u32(header, 16),
    protocol: header[9]!,
    fragment: u16(header, 6),
    payload: frame.slice(34)
  }
}

export interface Datagram {
  readonly source: number
  readonly sourcePort: number
  readonly destinationPort: number
  readonly payload: Uint8Array
}

export const parseUdp = (frame: Uint8Array): Datagram => {
  const { destination, payload, protocol, source } = parseIp(frame)
  if (protocol !== 17 || u16(payload, 4) !== payload.length) throw new Error("not UDP")
  if (checksum(pseudo(source, destination, 17, payload.length), payload) !== 0) throw new Error("UDP checksum")
  return { source, sourcePort: u16(payload, 0), destinationPort: u16(payload, 2), payload: payload.slice(8) }
}

export interface Segment {
  readonly source: number
  readonly sourcePort: number
  readonly destinationPort: number
  readonly sequence: number
  readonly acknowledgment: number
  readonly flags: number
  readonly window: number
  readonly mss: number
  readonly scale: number
  readonly payload: Uint8Array
}

/** The TCP segment in a frame. With `partial` its checksum is that of the pseudo-header alone. */
export const parseTcp = (frame: Uint8Array, partial = false): Segment => {
  const { destination, payload, protocol, source } = parseIp(frame)
  if (protocol !== 6) throw new Error("not TCP")
  const fake = pseudo(source, destination, 6, payload.length)
  if (partial ? u16(payload, 16) !== 0xffff - checksum(fake) : checksum(fake, payload) !== 0) {
    throw new Error("TCP checksum")
  }
  const data = (payload[12]! >>> 4) * 4
  let mss = 0
  let scale = -1
  for (let at = 20; at < data;) {
    const kind = payload[at]!
    if (kind === 0) break
    if (kind === 1) {
      at++
      continue
    }
    if (kind === 2) mss = u16(payload, at + 2)
    if (kind === 3) scale = payload[at + 2]!
    at += payload[at + 1]!
  }
  return {
    source,
    sourcePort: u16(payload, 0),
    destinationPort: u16(payload, 2),
    sequence: u32(payload, 4),
    acknowledgment: u32(payload, 8),
    flags: payload[13]!,
    window: u16(payload, 14),
    mss,
    scale,
    payload: payload.slice(data)
  }
}

export const FIN = 1
export const SYN = 2
export const RST = 4
export const PSH = 8
export const ACK = 16

export interface SegmentFields {
  readonly sourcePort: number
  readonly destinationPort: number
  readonly destination: number
  readonly sequence: number
  readonly acknowledgment?: number
  readonly flags: number
  readonly window?: number
  readonly options?: ReadonlyArray<number>
  readonly payload?: Uint8Array
  /** Leaves the checksum as that of the pseudo-header. */
  readonly partial?: boolean
}

export const tcp = (fields: SegmentFields): Uint8Array => {
  const options = fields.options ?? []
  const payload = fields.payload ?? new Uint8Array(0)
  const length = 20 + options.length + payload.length
  const header = [
    ...be16(fields.sourcePort),
    ...be16(fields.destinationPort),
    ...be32(fields.sequence),
    ...be32(fields.acknowledgment ?? 0),
    ((20 + options.length) / 4) << 4,
    fields.flags,
    ...be16(fields.window ?? 0xffff),
    0,
    0,
    0,
    0,
    ...options
  ]
  const fake = pseudo(GUEST, fields.destination, 6, length)
  const sum = fields.partial === true ? 0xffff - checksum(fake) : checksum(fake, header, payload)
  header.splice(16, 2, ...be16(sum))
  return ipv4(6, concat([Uint8Array.from(header), payload]), { destination: fields.destination })
}

/** MSS and window scale as options of a SYN. */
export const synOptions = (mss: number, scale: number): ReadonlyArray<number> => [2, 4, ...be16(mss), 1, 3, 3, scale]

const text = (value: string): Uint8Array => new TextEncoder().encode(value)

export interface DhcpAnswer {
  readonly type: number
  readonly address: number
  readonly options: Map<number, Uint8Array>
}

export const dhcp = (
  type: number,
  { ciaddr = 0, options = [] as ReadonlyArray<number>, source = 0, destination = 0xffff_ffff } = {}
): Uint8Array => {
  const message = new Uint8Array(240)
  message.set([1, 1, 6, 0, ...be32(0xdead_beef)])
  message.set(be32(ciaddr), 12)
  message.set(GUEST_MAC, 28)
  message.set([0x63, 0x82, 0x53, 0x63], 236)
  const whole = concat([message, Uint8Array.from([53, 1, type, 12, 5, ...text("guest"), ...options, 255])])
  return udp(68, 67, whole, { source, destination, to: Uint8Array.of(255, 255, 255, 255, 255, 255) })
}

export const parseDhcp = (frame: Uint8Array): DhcpAnswer => {
  const { destinationPort, payload, sourcePort } = parseUdp(frame)
  if (sourcePort !== 67 || destinationPort !== 68) throw new Error("not DHCP")
  if (payload[0] !== 2 || u32(payload, 4) !== 0xdead_beef) throw new Error("not an answer")
  const options = new Map<number, Uint8Array>()
  for (let at = 240; payload[at] !== 255;) {
    const code = payload[at]!
    options.set(code, payload.slice(at + 2, at + 2 + payload[at + 1]!))
    at += 2 + payload[at + 1]!
  }
  return { type: options.get(53)![0]!, address: u32(payload, 16), options }
}
