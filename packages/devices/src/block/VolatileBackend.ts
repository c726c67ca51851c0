/**
 * A disk whose changes are kept in memory and are gone with the machine (the mode `VOLATILE_WRITE`): copy-on-write over a back
 * end that is only read. The memory is bounded; a write beyond the bound fails with `no-space`.
 */
import {
  type BlockBackend,
  BlockBackendError,
  type BlockBytes,
  type BlockDone,
  type BlockOperation,
  SECTOR_SIZE
} from "@troupe/core/BlockBackend"
import { copyFromBuffers, copyToBuffers, sliceBuffers, totalLength, zeroBuffers } from "./Buffers.ts"

/** The unit in which memory is taken, in bytes: {@link CHUNK_SECTORS} sectors. */
export const VOLATILE_CHUNK = 4096
const CHUNK_SECTORS = VOLATILE_CHUNK / SECTOR_SIZE
const ALL_SECTORS = 2 ** CHUNK_SECTORS - 1
/** What a chunk costs besides its bytes; one that is all zeros costs only this. */
const CHUNK_COST = 128
/** The default bound of the memory of one disk in bytes. */
export const VOLATILE_LIMIT = 256 * 2 ** 20

/** A part of the disk that was written. */
interface Chunk {
  /** One bit a sector that was written. */
  sectors: number
  /** Its bytes, or nothing when they are zeros. */
  bytes: BlockBytes | undefined
}

/** Changes over `below`, which may be read-only, in at most `limit` bytes of memory. */
export const makeVolatileBackend = (below: BlockBackend, limit: number = VOLATILE_LIMIT): BlockBackend => {
  const chunks = new Map<number, Chunk>()
  let used = 0
  const { name } = below
  const capacity = Math.floor(below.capacity / SECTOR_SIZE) * SECTOR_SIZE

  const full = (operation: BlockOperation, offset: number, length: number): BlockBackendError =>
    new BlockBackendError({
      name,
      operation,
      kind: "no-space",
      detail: `the changes kept in memory would take more than ${limit} bytes`,
      offset,
      length,
      hint: "Raise volatileLimit of the disk, or give it the mode READ_WRITE"
    })

  /** Takes memory for a chunk. Returns `undefined`, having changed nothing, when there is none left. */
  const bytesOf = (index: number): { readonly chunk: Chunk; readonly bytes: BlockBytes } | undefined => {
    const chunk = chunks.get(index)
    if (chunk?.bytes !== undefined) return { chunk, bytes: chunk.bytes }
    const cost = VOLATILE_CHUNK + (chunk === undefined ? CHUNK_COST : 0)
    if (used + cost > limit) return undefined
    used += cost
    const bytes = new Uint8Array(VOLATILE_CHUNK)
    if (chunk !== undefined) {
      chunk.bytes = bytes
      return { chunk, bytes }
    }
    const made: Chunk = { sectors: 0, bytes }
    chunks.set(index, made)
    return { chunk: made, bytes }
  }

  const maskOf = (first: number, count: number): number => ((1 << count) - 1) << first

  /** Calls `piece` for each chunk that the range touches, until it returns `false`. */
  const eachChunk = (
    offset: number,
    length: number,
    piece: (index: number, inChunk: number, position: number, size: number) => boolean
  ): boolean => {
    for (let position = 0; position < length;) {
      const at = offset + position
      const index = Math.floor(at / VOLATILE_CHUNK)
      const inChunk = at - index * VOLATILE_CHUNK
      const size = Math.min(VOLATILE_CHUNK - inChunk, length - position)
      if (!piece(index, inChunk, position, size)) return false
      position += size
    }
    return true
  }

  const zero = (offset: number, length: number, onlyChanged: boolean): boolean =>
    eachChunk(offset, length, (index, inChunk, _, size) => {
      const chunk = chunks.get(index)
      if (chunk === undefined && onlyChanged) return true
      if (size === VOLATILE_CHUNK) {
        if (chunk === undefined) {
          if (used + CHUNK_COST > limit) return false
          used += CHUNK_COST
          chunks.set(index, { sectors: ALL_SECTORS, bytes: undefined })
        } else {
          if (chunk.bytes !== undefined) used -= VOLATILE_CHUNK
          chunk.bytes = undefined
          chunk.sectors = ALL_SECTORS
        }
        return true
      }
      const place = bytesOf(index)
      if (place === undefined) return false
      place.bytes.fill(0, inChunk, inChunk + size)
      place.chunk.sectors |= maskOf(inChunk / SECTOR_SIZE, size / SECTOR_SIZE)
      return true
    })

  const read = (offset: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone): void => {
    if (chunks.size === 0) return below.read(offset, buffers, done)
    const length = totalLength(buffers)
    // Each run of sectors below is read on its own; `begun` stays one ahead until all of them are on their way.
    let running = 1
    let failure: BlockBackendError | undefined
    const end: BlockDone = (error) => {
      failure ??= error
      if (--running === 0) done(failure)
    }
    let runStart = 0
    const readBelow = (until: number): void => {
      if (until === runStart) return
      running++
      below.read(offset + runStart, sliceBuffers(buffers, runStart, until - runStart), end)
    }
    eachChunk(offset, length, (index, inChunk, position, size) => {
      const chunk = chunks.get(index)
      if (chunk === undefined) return true
      for (let sector = 0; sector < size / SECTOR_SIZE; sector++) {
        const at = position + sector * SECTOR_SIZE
        const inBytes = inChunk + sector * SECTOR_SIZE
        if ((chunk.sectors & (1 << (inBytes / SECTOR_SIZE))) === 0) continue
        readBelow(at)
        const slices = sliceBuffers(buffers, at, SECTOR_SIZE)
        if (chunk.bytes === undefined) zeroBuffers(slices)
        else copyToBuffers(chunk.bytes.subarray(inBytes, inBytes + SECTOR_SIZE), slices)
        runStart = at + SECTOR_SIZE
      }
      return true
    })
    readBelow(length)
    end()
  }

  return {
    name,
    capacity,
    blockSize: SECTOR_SIZE,
    readOnly: false,
    read,
    write: (offset, buffers, done) => {
      const length = totalLength(buffers)
      const fits = eachChunk(offset, length, (index, inChunk, position, size) => {
        const place = bytesOf(index)
        if (place === undefined) return false
        copyFromBuffers(sliceBuffers(buffers, position, size), place.bytes.subarray(inChunk, inChunk + size))
        place.chunk.sectors |= maskOf(inChunk / SECTOR_SIZE, size / SECTOR_SIZE)
        return true
      })
      done(fits ? undefined : full("write", offset, length))
    },
    // Memory does not outlive the process, and nothing below was changed.
    flush: (done) => done(),
    discard: (offset, length, done) => {
      // What was not written costs nothing and stays as it is.
      done(zero(offset, length, true) ? undefined : full("discard", offset, length))
    },
    writeZeroes: (offset, length, _, done) => {
      done(zero(offset, length, false) ? undefined : full("writeZeroes", offset, length))
    }
  }
}
