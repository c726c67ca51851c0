/**
 * Ethernet II frames: addresses and the type of what a frame carries.
 */
import { getU16, putU16 } from "./Octets.ts"

/** Bytes of the header. */
export const ETHERNET_HEADER = 14
/** Bytes of an address. */
export const MAC_LENGTH = 6

export const ETHERTYPE_IPV4 = 0x0800
export const ETHERTYPE_ARP = 0x0806
export const ETHERTYPE_IPV6 = 0x86dd

/** A MAC address: six bytes. */
export type MacAddress = Uint8Array

/** The address of every station. */
export const MAC_BROADCAST: MacAddress = Uint8Array.of(0xff, 0xff, 0xff, 0xff, 0xff, 0xff)

/** The type of a frame that is at least {@link ETHERNET_HEADER} long. */
export const etherType = (frame: Uint8Array): number => getU16(frame, 12)

/** Whether an address, here at `at` in a frame, names one station. */
export const isUnicast = (bytes: Uint8Array, at: number): boolean => {
  if (((bytes[at] ?? 1) & 1) !== 0) return false
  for (let i = 0; i < MAC_LENGTH; i++) if (bytes[at + i] !== 0) return true
  return false
}

/** Whether a frame is addressed to `mac`, or to a group. */
export const isAddressedTo = (frame: Uint8Array, mac: MacAddress): boolean => {
  if (((frame[0] ?? 0) & 1) !== 0) return true
  for (let i = 0; i < MAC_LENGTH; i++) if (frame[i] !== mac[i]) return false
  return true
}

/** Writes a header at the beginning of a frame. */
export const writeEthernet = (frame: Uint8Array, to: MacAddress, from: MacAddress, type: number): void => {
  frame.set(to, 0)
  frame.set(from, MAC_LENGTH)
  putU16(frame, 12, type)
}

/** `02:00:00:00:00:01` as bytes; `undefined` when it is not an address. */
export const parseMac = (text: string): MacAddress | undefined => {
  if (!/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i.test(text)) return undefined
  return Uint8Array.from(text.split(":"), (byte) => Number.parseInt(byte, 16))
}
