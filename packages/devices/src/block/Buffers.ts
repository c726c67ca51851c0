/** Lists of buffers as one run of bytes. */
import type { BlockBytes } from "@troupe/core/BlockBackend"

/** The number of bytes of all buffers together. */
export const totalLength = (buffers: ReadonlyArray<BlockBytes>): number => {
  let length = 0
  for (let i = 0; i < buffers.length; i++) length += buffers[i]?.length ?? 0
  return length
}

/** The bytes `position` to `position + length` of the buffers, in place. */
export const sliceBuffers = (
  buffers: ReadonlyArray<BlockBytes>,
  position: number,
  length: number
): ReadonlyArray<BlockBytes> => {
  const slices: Array<BlockBytes> = []
  let skip = position
  let left = length
  for (let i = 0; i < buffers.length && left > 0; i++) {
    const buffer = buffers[i]
    if (buffer === undefined) continue
    if (skip >= buffer.length) {
      skip -= buffer.length
      continue
    }
    const slice = skip === 0 && left >= buffer.length ? buffer : buffer.subarray(skip, skip + left)
    skip = 0
    left -= slice.length
    slices.push(slice)
  }
  return slices
}

/** Fills the buffers from `source`. */
export const copyToBuffers = (source: Uint8Array, buffers: ReadonlyArray<BlockBytes>): void => {
  let at = 0
  for (const buffer of buffers) {
    buffer.set(source.subarray(at, at + buffer.length))
    at += buffer.length
  }
}

/** Copies the buffers to `target`, one after the other. */
export const copyFromBuffers = (buffers: ReadonlyArray<BlockBytes>, target: Uint8Array): void => {
  let at = 0
  for (const buffer of buffers) {
    target.set(buffer, at)
    at += buffer.length
  }
}

/** Zeros all buffers. */
export const zeroBuffers = (buffers: ReadonlyArray<BlockBytes>): void => {
  for (const buffer of buffers) buffer.fill(0)
}
