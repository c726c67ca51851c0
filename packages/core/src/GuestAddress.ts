/**
 * Guest physical addresses as safe integers, and the checked arithmetic on them.
 *
 * x86-64 and arm64 physical addresses have at most 52 bits, so a JavaScript number holds every legal one exactly. What a
 * guest writes as a 64-bit value arrives as two 32-bit halves; a value that cannot be an address becomes
 * {@link INVALID_ADDRESS}, which lies in no memory region and in no bus range. Nothing wraps, and nothing allocates.
 */

/** The first value that is not a physical address: 2^52 (Intel SDM volume 3, section 4.1.4; Arm ARM D8.1.6). */
export const ADDRESS_LIMIT = 2 ** 52

/** What {@link addressFromHalves} and {@link addressEnd} return for a value that is not an address. */
export const INVALID_ADDRESS = -1

const HIGH_HALF_LIMIT = ADDRESS_LIMIT / 2 ** 32

/** The address whose low and high 32 bits are given (each taken as unsigned), or {@link INVALID_ADDRESS}. */
export const addressFromHalves = (low: number, high: number): number => {
  const unsignedHigh = high >>> 0
  return unsignedHigh < HIGH_HALF_LIMIT ? unsignedHigh * 2 ** 32 + (low >>> 0) : INVALID_ADDRESS
}

/**
 * The address one past `[address, address + length)`, or {@link INVALID_ADDRESS} when either number is not a
 * non-negative safe integer or the range leaves the address space.
 */
export const addressEnd = (address: number, length: number): number => {
  if (!Number.isSafeInteger(address) || !Number.isSafeInteger(length) || address < 0 || length < 0) {
    return INVALID_ADDRESS
  }
  const end = address + length
  return end <= ADDRESS_LIMIT ? end : INVALID_ADDRESS
}

/** An address as people read it: `0xd0000000`. */
export const formatAddress = (address: number): string => `0x${address.toString(16)}`
