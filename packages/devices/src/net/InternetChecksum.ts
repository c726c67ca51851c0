/** The checksum of IP, TCP and UDP (RFC 1071): the complement of the one's complement sum of big-endian 16-bit words. */

const swap16 = (value: number): number => ((value & 0xff) << 8) | (value >>> 8)

/** Folds a sum of 16-bit words to 16 bits. */
export const foldSum = (sum: number): number => {
  let folded = sum
  while (folded > 0xffff) folded = (folded % 0x1_0000) + Math.floor(folded / 0x1_0000)
  return folded
}

/**
 * The sum of `length` bytes of `bytes` from `from` on, as 16-bit words of which the last is filled up with a zero byte; not
 * complemented, 16 bits. `words` is the same memory as `bytes`, for sums that begin at an even offset.
 */
export const sumBytes = (bytes: Uint8Array, words: Uint16Array, from: number, length: number): number => {
  let sum = 0
  const end = from + length
  if ((from & 1) !== 0) {
    // Words at odd offsets have their bytes the other way round in memory order.
    for (let i = from; i + 1 < end; i += 2) sum += ((bytes[i] ?? 0) << 8) | (bytes[i + 1] ?? 0)
    if ((length & 1) !== 0) sum += (bytes[end - 1] ?? 0) << 8
    return foldSum(sum)
  }
  const first = from >>> 1
  const last = first + (length >>> 1)
  for (let i = first; i < last; i++) sum += words[i] ?? 0
  // The host is little-endian, as every host of this hypervisor: the sum of swapped words is the swapped sum.
  let folded = swap16(foldSum(sum))
  if ((length & 1) !== 0) folded = foldSum(folded + ((bytes[end - 1] ?? 0) << 8))
  return folded
}
