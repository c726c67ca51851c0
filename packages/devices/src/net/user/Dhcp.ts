/**
 * DHCP messages (RFC 2131, options of RFC 2132): what a server reads of them, and what it answers with.
 */
import { getU32, putU16, putU32 } from "./Octets.ts"

export const DHCP_SERVER_PORT = 67
export const DHCP_CLIENT_PORT = 68

export const DHCP_DISCOVER = 1
export const DHCP_OFFER = 2
export const DHCP_REQUEST = 3
export const DHCP_DECLINE = 4
export const DHCP_ACK = 5
export const DHCP_NAK = 6
export const DHCP_RELEASE = 7
export const DHCP_INFORM = 8

/** Options by their names in RFC 2132. */
export const DhcpOption = {
  SUBNET_MASK: 1,
  ROUTER: 3,
  DOMAIN_NAME_SERVER: 6,
  HOST_NAME: 12,
  DOMAIN_NAME: 15,
  INTERFACE_MTU: 26,
  BROADCAST_ADDRESS: 28,
  REQUESTED_ADDRESS: 50,
  LEASE_TIME: 51,
  MESSAGE_TYPE: 53,
  SERVER_IDENTIFIER: 54,
  MESSAGE: 56
} as const

const BOOT_REQUEST = 1
const BOOT_REPLY = 2
/** Bytes of the fixed part, with the cookie. */
const FIXED = 240
const COOKIE = 0x6382_5363
const COOKIE_AT = 236
const PAD = 0
const END = 255
/** The least length of a message: some clients want that of BOOTP. */
const LENGTH_MIN = 300

/** What a client has sent. Addresses are 0 when they are not there. */
export interface DhcpRequest {
  readonly messageType: number
  readonly transaction: number
  readonly clientAddress: number
  readonly hardwareAddress: Uint8Array
  readonly requestedAddress: number
  readonly serverIdentifier: number
}

/** The request from `from` to `to`; `undefined` when it is none that a server answers. */
export const decodeDhcpRequest = (bytes: Uint8Array, from: number, to: number): DhcpRequest | undefined => {
  if (to - from < FIXED || to > bytes.length) return undefined
  if (bytes[from] !== BOOT_REQUEST || bytes[from + 1] !== 1 || bytes[from + 2] !== 6) return undefined
  if (getU32(bytes, from + COOKIE_AT) !== COOKIE) return undefined
  let messageType = 0
  let requestedAddress = 0
  let serverIdentifier = 0
  let at = from + FIXED
  while (at < to) {
    const code = bytes[at] ?? END
    if (code === END) break
    if (code === PAD) {
      at++
      continue
    }
    if (at + 1 >= to) break
    const length = bytes[at + 1] ?? 0
    if (at + 2 + length > to) break
    if (code === DhcpOption.MESSAGE_TYPE && length === 1) messageType = bytes[at + 2] ?? 0
    if (code === DhcpOption.REQUESTED_ADDRESS && length === 4) requestedAddress = getU32(bytes, at + 2)
    if (code === DhcpOption.SERVER_IDENTIFIER && length === 4) serverIdentifier = getU32(bytes, at + 2)
    at += 2 + length
  }
  if (messageType === 0) return undefined
  return {
    messageType,
    transaction: getU32(bytes, from + 4),
    clientAddress: getU32(bytes, from + 12),
    hardwareAddress: bytes.slice(from + 28, from + 34),
    requestedAddress,
    serverIdentifier
  }
}

/** What a server answers. */
export interface DhcpReply {
  readonly messageType: number
  readonly transaction: number
  readonly clientAddress: number
  /** The address that the client gets, or 0. */
  readonly yourAddress: number
  readonly serverAddress: number
  readonly hardwareAddress: Uint8Array
  /** More options, in order: numbers of 32 bits, or bytes. */
  readonly options: ReadonlyArray<readonly [code: number, value: number | Uint8Array]>
}

/** A reply as bytes. */
export const encodeDhcpReply = (reply: DhcpReply): Uint8Array => {
  const options = [
    [DhcpOption.MESSAGE_TYPE, Uint8Array.of(reply.messageType)] as const,
    [DhcpOption.SERVER_IDENTIFIER, reply.serverAddress] as const,
    ...reply.options
  ]
  const length = options.reduce((sum, [, value]) => sum + 2 + (typeof value === "number" ? 4 : value.length), FIXED + 1)
  const bytes = new Uint8Array(Math.max(LENGTH_MIN, length))
  bytes[0] = BOOT_REPLY
  bytes[1] = 1
  bytes[2] = 6
  putU32(bytes, 4, reply.transaction)
  putU32(bytes, 12, reply.clientAddress)
  putU32(bytes, 16, reply.yourAddress)
  putU32(bytes, 20, reply.messageType === DHCP_NAK ? 0 : reply.serverAddress)
  bytes.set(reply.hardwareAddress, 28)
  putU32(bytes, COOKIE_AT, COOKIE)
  let at = FIXED
  for (const [code, value] of options) {
    bytes[at] = code
    if (typeof value === "number") {
      bytes[at + 1] = 4
      putU32(bytes, at + 2, value)
      at += 6
    } else {
      bytes[at + 1] = value.length
      bytes.set(value, at + 2)
      at += 2 + value.length
    }
  }
  bytes[at] = END
  return bytes
}

/** A 16-bit number as the value of an option. */
export const dhcpU16 = (value: number): Uint8Array => {
  const bytes = new Uint8Array(2)
  putU16(bytes, 0, value)
  return bytes
}
