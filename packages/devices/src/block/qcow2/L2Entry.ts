/** Entries of a qcow2 image's table of level 2: where the bytes of one cluster of the disk are. */
import type { Qcow2Header } from "./Qcow2Header.ts"
import { uint64 } from "./Qcow2Header.ts"

/** The cluster that an entry names belongs to it alone. In the high half of an entry. */
export const COPIED = 0x8000_0000
/** The entry describes compressed bytes. In the high half of an entry. */
const COMPRESSED = 0x4000_0000
/** The cluster reads as zeros. In the low half of an entry. */
export const ZERO = 1
/** Bits of the high half of an ordinary entry that must be 0. */
const RESERVED_HIGH = 0x3f00_0000
/** Bits of the low half of an ordinary entry that must be 0, in version 3. */
const RESERVED_LOW = 0x1fe

/** What a cluster of the disk is. */
export type ClusterKind =
  /** Nothing is stored: the backing file's bytes, or zeros. */
  | "absent"
  /** Zeros. It may have a cluster of the file all the same: {@link Cluster.offset} is not 0 then. */
  | "zero"
  /** Bytes in the file. */
  | "data"
  /** Deflated bytes in the file. */
  | "compressed"
  /** The entry makes no sense. */
  | "corrupt"

/** An entry, read. Objects are used again and again. */
export interface Cluster {
  kind: ClusterKind
  /** First byte in the file. */
  offset: number
  /** The cluster of the file may be written in place. */
  owned: boolean
  /** The number of bytes that hold the compressed ones. */
  length: number
}

/** An object for {@link readEntry}. */
export const makeCluster = (): Cluster => ({ kind: "absent", offset: 0, owned: false, length: 0 })

/** Reads an entry of a table. `fileEnd` is where the file ends. */
export const readEntry = (
  header: Qcow2Header,
  table: DataView,
  index: number,
  fileEnd: number,
  into: Cluster
): void => {
  const high = table.getUint32(index * 8)
  const low = table.getUint32(index * 8 + 4)
  into.length = 0
  into.owned = false
  if ((high & COMPRESSED) !== 0) return readCompressed(header, high, low, fileEnd, into)
  const zero = header.version === 3 && (low & ZERO) !== 0
  into.owned = (high & COPIED) !== 0
  into.offset = (high & 0x00ff_ffff) * 2 ** 32 + (low - low % 512)
  if (
    (high & RESERVED_HIGH) !== 0 || (low & RESERVED_LOW) !== 0 || (header.version === 2 && (low & ZERO) !== 0) ||
    into.offset % header.clusterSize !== 0 || (into.offset !== 0 && into.offset >= fileEnd)
  ) {
    into.kind = "corrupt"
    return
  }
  into.kind = zero ? "zero" : into.offset === 0 ? "absent" : "data"
}

const readCompressed = (header: Qcow2Header, high: number, low: number, fileEnd: number, into: Cluster): void => {
  // The offset has as many bits as 62 leave beside the number of further sectors.
  const sectorBits = header.clusterBits - 8
  const offsetBitsHigh = 62 - sectorBits - 32
  const mask = 2 ** offsetBitsHigh - 1
  into.offset = (high & mask) * 2 ** 32 + (low >>> 0)
  const sectors = ((high & 0x3fff_ffff) >>> offsetBitsHigh) + 1
  into.length = sectors * 512 - (into.offset % 512)
  into.kind = (high & COPIED) !== 0 || into.offset >= fileEnd ? "corrupt" : "compressed"
}

/** Writes an ordinary entry. */
export const writeEntry = (
  table: DataView,
  index: number,
  offset: number,
  flags: { readonly copied: boolean; readonly zero: boolean }
): void => {
  table.setUint32(index * 8, Math.floor(offset / 2 ** 32) + (flags.copied ? COPIED : 0))
  table.setUint32(index * 8 + 4, (offset % 2 ** 32) + (flags.zero ? ZERO : 0))
}

/** The offset in an entry of the table of level 1, and whether the table that it names belongs to it alone. */
export const readL1Entry = (
  table: DataView,
  index: number
): { readonly offset: number; readonly owned: boolean; readonly reserved: boolean } => {
  const high = table.getUint32(index * 8)
  const low = table.getUint32(index * 8 + 4)
  return {
    offset: (high & 0x00ff_ffff) * 2 ** 32 + (low - low % 512),
    owned: (high & COPIED) !== 0,
    reserved: (high & 0x7f00_0000) !== 0 || low % 512 !== 0
  }
}

/** The offset in an entry of the table of reference counts. */
export const readRefcountEntry = (table: DataView, index: number): number => uint64(table, index * 8)
