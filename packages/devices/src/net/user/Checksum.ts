/**
 * The checksum of the internet protocols (RFC 1071): sums are made piece by piece and folded once.
 */

import { foldSum } from "../InternetChecksum.ts"

/** The most bytes that are summed before the sum is folded, so that it stays a small integer. */
const FOLD_EVERY = 0x2000

/** Adds `bytes` from `from` up to `to` to a sum. The piece begins at an even place of what is summed. */
export const addToSum = (sum: number, bytes: Uint8Array, from: number, to: number): number => {
  let total = foldSum(sum)
  let at = from
  while (at < to) {
    const stop = Math.min(to, at + FOLD_EVERY)
    const pairs = at + ((stop - at) & ~1)
    for (; at < pairs; at += 2) total += ((bytes[at] ?? 0) << 8) | (bytes[at + 1] ?? 0)
    if (at < stop) total += (bytes[at++] ?? 0) << 8
    total = foldSum(total)
  }
  return total
}

/** What goes into a checksum field for a sum. */
export const checksumOf = (sum: number): number => ~foldSum(sum) & 0xffff

/** Whether bytes that contain their own checksum are whole. `sum` is that of a pseudo-header, or 0. */
export const isWhole = (sum: number, bytes: Uint8Array, from: number, to: number): boolean =>
  addToSum(sum, bytes, from, to) === 0xffff
