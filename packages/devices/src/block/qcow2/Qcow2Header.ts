/**
 * The header of a qcow2 image, version 2 or 3: read, checked, and refused where the image needs what is not supported.
 *
 * The image is hostile: a guest may have written all of it. So every field has a bound, and a name of a file in it is text for a
 * report, never something to open.
 */
import { type BlockBackendError, SECTOR_SIZE } from "@troupe/core/BlockBackend"
import * as Result from "effect/Result"

/** "QFI\xfb", big-endian. */
export const QCOW2_MAGIC = 0x5146_49fb
/** Length of the header of version 2. */
export const HEADER_LENGTH_V2 = 72
/** The least length of the header of version 3. */
export const HEADER_LENGTH_V3 = 104
/** The most bytes of the table of level 1. */
export const L1_BYTES_MAX = 4 * 2 ** 20
/** The most bytes of the table of reference counts. */
export const REFCOUNT_TABLE_BYTES_MAX = 2 ** 20
/** The most bytes of a backing file's name. */
const BACKING_NAME_MAX = 1023

/** Offsets of the fields that are written back. */
export const HeaderField = {
  refcountTableOffset: 48,
  refcountTableClusters: 56,
  incompatibleFeatures: 72,
  autoclearFeatures: 88
} as const

/** Incompatible features: bits of the low half. */
export const Incompatible = { DIRTY: 1, CORRUPT: 2, EXTERNAL_DATA: 4, COMPRESSION_TYPE: 8, EXTENDED_L2: 16 } as const

/** A header that makes sense. Offsets and lengths are bytes. */
export interface Qcow2Header {
  readonly version: 2 | 3
  readonly clusterBits: number
  readonly clusterSize: number
  /** The size of the disk, a multiple of 512. */
  readonly size: number
  /** The number of entries of the table of level 1 that the disk needs. */
  readonly l1Entries: number
  readonly l1Offset: number
  readonly refcountTableOffset: number
  readonly refcountTableClusters: number
  /** Width of a reference count: 1 to 64. */
  readonly refcountBits: number
  readonly snapshots: number
  readonly dirty: boolean
  readonly corrupt: boolean
  /** There are features that an image loses when somebody who does not know them writes to it. */
  readonly autoclear: boolean
  /** The name of the backing file in the image, printable. */
  readonly backingName: string | undefined
}

/** Why an image is refused. */
export type HeaderFailure = Pick<BlockBackendError, "kind" | "detail"> & { readonly hint?: string }

const corrupt = (detail: string): Result.Result<never, HeaderFailure> => Result.fail({ kind: "corrupt", detail })
const unsupported = (detail: string, hint?: string): Result.Result<never, HeaderFailure> =>
  Result.fail({ kind: "unsupported", detail, ...(hint === undefined ? {} : { hint }) })

/** A 64-bit number; beyond 2^53 it is rounded, and beyond every bound here. */
export const uint64 = (view: DataView, at: number): number => view.getUint32(at) * 2 ** 32 + view.getUint32(at + 4)

/** Writes a number below 2^53 as 64 bits. */
export const setUint64 = (view: DataView, at: number, value: number): void => {
  view.setUint32(at, Math.floor(value / 2 ** 32))
  view.setUint32(at + 4, value % 2 ** 32)
}

/** Reads a header from the first bytes of a file: as many as there are, at most its first cluster. */
export const parseHeader = (
  bytes: Uint8Array<ArrayBuffer>,
  fileSize: number
): Result.Result<Qcow2Header, HeaderFailure> => {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
  if (bytes.length < HEADER_LENGTH_V2 || view.getUint32(0) !== QCOW2_MAGIC) {
    return unsupported("it is not a qcow2 image", "Use the format FILE for a raw disk")
  }
  const version = view.getUint32(4)
  if (version !== 2 && version !== 3) return unsupported(`qcow2 of version ${version}`)
  if (version === 3 && bytes.length < HEADER_LENGTH_V3) return corrupt("the header is cut off")
  const clusterBits = view.getUint32(20)
  if (clusterBits < 9 || clusterBits > 21) {
    return unsupported(`clusters of 2^${clusterBits} bytes (9 to 21 are possible)`)
  }
  const clusterSize = 2 ** clusterBits
  if (view.getUint32(32) !== 0) return unsupported("the image is encrypted")
  const low = version === 3 ? view.getUint32(HeaderField.incompatibleFeatures + 4) : 0
  const high = version === 3 ? view.getUint32(HeaderField.incompatibleFeatures) : 0
  const known = Incompatible.DIRTY | Incompatible.CORRUPT
  if ((low & Incompatible.EXTERNAL_DATA) !== 0) return unsupported("the image has its data in another file")
  if ((low & Incompatible.COMPRESSION_TYPE) !== 0) {
    return unsupported("the image is compressed otherwise than by deflate")
  }
  if ((low & Incompatible.EXTENDED_L2) !== 0) return unsupported("the image has subclusters (extended L2 entries)")
  if ((low & ~known) !== 0 || high !== 0) return unsupported("the image has features that are not known")
  const refcountOrder = version === 3 ? view.getUint32(96) : 4
  if (refcountOrder > 6) return corrupt(`reference counts of 2^${refcountOrder} bits`)
  if (version === 3) {
    const length = view.getUint32(100)
    if (length < HEADER_LENGTH_V3 || length > clusterSize || length % 8 !== 0) {
      return corrupt(`a header of ${length} bytes`)
    }
  }

  const size = uint64(view, 24)
  if (size % SECTOR_SIZE !== 0) return unsupported(`a disk of ${size} bytes, which are not whole sectors of 512`)
  const aligned = (offset: number, length: number) =>
    offset > 0 && offset % clusterSize === 0 && offset + length <= fileSize
  const l1Needed = Math.ceil(size / (clusterSize * (clusterSize / 8)))
  const l1Size = view.getUint32(36)
  if (l1Needed * 8 > L1_BYTES_MAX) return unsupported(`a disk of ${size} bytes in clusters of ${clusterSize}`)
  if (l1Size < l1Needed) return corrupt(`a table of level 1 with ${l1Size} entries where ${l1Needed} are needed`)
  const l1Offset = uint64(view, 40)
  if (l1Needed > 0 && !aligned(l1Offset, l1Needed * 8)) return corrupt(`a table of level 1 at ${l1Offset}`)
  const refcountTableOffset = uint64(view, HeaderField.refcountTableOffset)
  const refcountTableClusters = view.getUint32(HeaderField.refcountTableClusters)
  if (refcountTableClusters * clusterSize > Math.max(REFCOUNT_TABLE_BYTES_MAX, clusterSize)) {
    return unsupported(`a table of reference counts of ${refcountTableClusters} clusters`)
  }
  if (
    refcountTableClusters === 0 || !aligned(refcountTableOffset, refcountTableClusters * clusterSize)
  ) {
    return corrupt(`a table of reference counts at ${refcountTableOffset}`)
  }

  const backingOffset = uint64(view, 8)
  const backingLength = view.getUint32(16)
  if (backingOffset !== 0 && (backingLength > BACKING_NAME_MAX || backingOffset + backingLength > clusterSize)) {
    return corrupt("the name of the backing file is not in the first cluster")
  }
  const backingName = backingOffset === 0
    ? undefined
    : printable(bytes.subarray(backingOffset, backingOffset + backingLength))
  return Result.succeed({
    version,
    clusterBits,
    clusterSize,
    size,
    l1Entries: l1Needed,
    l1Offset,
    refcountTableOffset,
    refcountTableClusters,
    refcountBits: 2 ** refcountOrder,
    snapshots: view.getUint32(60),
    dirty: (low & Incompatible.DIRTY) !== 0,
    corrupt: (low & Incompatible.CORRUPT) !== 0,
    autoclear: version === 3 &&
      (view.getUint32(HeaderField.autoclearFeatures) !== 0 || view.getUint32(HeaderField.autoclearFeatures + 4) !== 0),
    backingName
  })
}

/** Bytes as text that can be shown on a terminal. */
const printable = (bytes: Uint8Array): string =>
  Array.from(bytes, (byte) => byte >= 0x20 && byte < 0x7f ? String.fromCharCode(byte) : "?").join("")
