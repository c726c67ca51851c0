/** Ethernet addresses as text and as bytes. */

/** Length of an Ethernet address in bytes. */
export const MAC_ADDRESS_SIZE = 6
/** Text of an Ethernet address: six pairs of hexadecimal digits with colons. */
export const MAC_ADDRESS_PATTERN = /^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i

/** The bytes of an address whose text matches {@link MAC_ADDRESS_PATTERN}. */
export const macAddressBytes = (text: string): Uint8Array<ArrayBuffer> =>
  Uint8Array.from(text.split(":"), (pair) => Number.parseInt(pair, 16))

/** The text of an address: six pairs of lower-case digits. */
export const formatMacAddress = (bytes: ArrayLike<number>): string =>
  Array.from({ length: MAC_ADDRESS_SIZE }, (_, i) => (bytes[i] ?? 0).toString(16).padStart(2, "0")).join(":")

/** Whether the address means a group of stations (IEEE 802.3: the lowest bit of the first byte), as broadcast does. */
export const isGroupAddress = (bytes: ArrayLike<number>): boolean => ((bytes[0] ?? 0) & 1) !== 0

/** Whether the address can be that of one interface: no group, and not all zeros. */
export const isStationAddress = (bytes: ArrayLike<number>): boolean => {
  if (isGroupAddress(bytes)) return false
  for (let i = 0; i < MAC_ADDRESS_SIZE; i++) if (bytes[i] !== 0) return true
  return false
}
