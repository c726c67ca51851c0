/**
 * ARP for IPv4 over Ethernet (RFC 826).
 */
import { ETHERTYPE_IPV4, type MacAddress } from "./Ethernet.ts"
import { getU16, getU32, putU16, putU32 } from "./Octets.ts"

/** Bytes of a packet. */
export const ARP_LENGTH = 28
export const ARP_REQUEST = 1
export const ARP_REPLY = 2

const HARDWARE_ETHERNET = 1

/** An ARP packet. IPv4 addresses are 32-bit numbers. */
export interface ArpPacket {
  readonly operation: number
  readonly senderMac: MacAddress
  readonly senderAddress: number
  readonly targetMac: MacAddress
  readonly targetAddress: number
}

/** The packet at `from`; `undefined` when it is none for IPv4 over Ethernet. */
export const decodeArp = (bytes: Uint8Array, from: number): ArpPacket | undefined => {
  if (bytes.length - from < ARP_LENGTH) return undefined
  if (getU16(bytes, from) !== HARDWARE_ETHERNET || getU16(bytes, from + 2) !== ETHERTYPE_IPV4) return undefined
  if (bytes[from + 4] !== 6 || bytes[from + 5] !== 4) return undefined
  return {
    operation: getU16(bytes, from + 6),
    senderMac: bytes.slice(from + 8, from + 14),
    senderAddress: getU32(bytes, from + 14),
    targetMac: bytes.slice(from + 18, from + 24),
    targetAddress: getU32(bytes, from + 24)
  }
}

/** Writes a packet at `at`. Returns its end. */
export const encodeArp = (bytes: Uint8Array, at: number, packet: ArpPacket): number => {
  putU16(bytes, at, HARDWARE_ETHERNET)
  putU16(bytes, at + 2, ETHERTYPE_IPV4)
  bytes[at + 4] = 6
  bytes[at + 5] = 4
  putU16(bytes, at + 6, packet.operation)
  bytes.set(packet.senderMac, at + 8)
  putU32(bytes, at + 14, packet.senderAddress)
  bytes.set(packet.targetMac, at + 18)
  putU32(bytes, at + 24, packet.targetAddress)
  return at + ARP_LENGTH
}
