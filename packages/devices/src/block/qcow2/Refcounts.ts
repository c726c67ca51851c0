/**
 * The reference counts of a qcow2 image: which clusters of the file are in use. They are changed in memory and reach the file
 * by {@link Refcounts.store}, before anything that refers to the clusters does. The caller sees to it that one effect runs at
 * a time.
 */
import type { BlockBackendError } from "@troupe/core/BlockBackend"
import * as Effect from "effect/Effect"
import type { ImageFile } from "./ImageFile.ts"
import { HeaderField, type Qcow2Header, REFCOUNT_TABLE_BYTES_MAX, setUint64, uint64 } from "./Qcow2Header.ts"

/** The most bytes of blocks that are kept, but for those that wait to be stored. */
const CACHE_BYTES = 2 ** 21
/** The fewest blocks that are kept. */
const CACHE_MIN = 4
/** The most counts that are looked at in one go; a block may have 2^24. */
export const SCAN_MAX = 0x1_0000

interface RefcountBlock {
  readonly bytes: Uint8Array<ArrayBuffer>
  readonly view: DataView<ArrayBuffer>
  readonly offset: number
  dirty: boolean
}

/** Clusters of the file, one after the other. */
export interface ClusterRun {
  /** Offset of the first one in the file. */
  readonly offset: number
  readonly count: number
  /** They were never used: they read as zeros. */
  readonly fresh: boolean
}

/** The reference counts of an image that is being written. */
export class Refcounts {
  readonly #file: ImageFile
  readonly #header: Qcow2Header
  readonly #entriesPerBlock: number
  /** Clusters that hold tables: they are never given out, whatever the counts say. */
  readonly #reserved: Set<number>
  /** The table, as the file has it or will have it. */
  #table: DataView<ArrayBuffer>
  #tableOffset: number
  /** Entries of the table that are not stored yet; all of them when it has moved. */
  readonly #newEntries = new Set<number>()
  #moved = false
  /** The least recently used comes first. */
  readonly #blocks = new Map<number, RefcountBlock>()
  readonly #blocksMax: number
  /** No cluster below this one is free. */
  #hint = 0
  /** Clusters from here on were never used since the image was opened, and did not exist before. */
  #freshFrom: number

  /** Places of earlier tables, which the file still refers to. */
  readonly #oldTables: Array<ClusterRun> = []

  private constructor(file: ImageFile, header: Qcow2Header, table: DataView<ArrayBuffer>, reserved: Set<number>) {
    this.#file = file
    this.#header = header
    this.#table = table
    this.#tableOffset = header.refcountTableOffset
    this.#reserved = reserved
    this.#entriesPerBlock = header.clusterSize * 8 / header.refcountBits
    this.#blocksMax = Math.max(CACHE_MIN, Math.floor(CACHE_BYTES / header.clusterSize))
    this.#freshFrom = Math.ceil(file.end / header.clusterSize)
  }

  /** Reads the table. `reserved` are the clusters of header and tables of level 1 and 2. */
  static readonly open = Effect.fnUntraced(
    function*(
      file: ImageFile,
      header: Qcow2Header,
      reserved: Set<number>
    ): Effect.fn.Return<Refcounts, BlockBackendError> {
      const bytes = new Uint8Array(header.refcountTableClusters * header.clusterSize)
      yield* file.read(header.refcountTableOffset, bytes)
      const table = new DataView(bytes.buffer)
      for (let cluster = 0; cluster < header.refcountTableClusters; cluster++) {
        reserved.add(header.refcountTableOffset / header.clusterSize + cluster)
      }
      for (let at = 0; at < bytes.length; at += 8) {
        const offset = uint64(table, at)
        if (offset === 0) continue
        if (offset % header.clusterSize !== 0 || offset >= file.end) {
          return yield* file.corrupt("open", `a block of reference counts at ${offset}`)
        }
        reserved.add(offset / header.clusterSize)
      }
      return new Refcounts(file, header, table, reserved)
    }
  )

  /** Whether something waits to be stored. */
  get dirty(): boolean {
    if (this.#newEntries.size > 0 || this.#moved) return true
    for (const block of this.#blocks.values()) if (block.dirty) return true
    return false
  }

  /** Marks a cluster as one that holds a table. */
  reserve(offset: number): void {
    this.#reserved.add(offset / this.#header.clusterSize)
  }

  /** Takes 1 to `most` free clusters that follow each other. The file is long enough for them. */
  readonly allocate = Effect.fnUntraced({ self: this }, function*(most: number) {
    const { clusterSize } = this.#header
    let first = -1
    let count = 0
    let cluster = this.#hint
    let looked = 0
    // A run does not cross into another block, which may have to be made in its place.
    while (count === 0) {
      const index = Math.floor(cluster / this.#entriesPerBlock)
      const known = index * 8 < this.#table.byteLength && uint64(this.#table, index * 8) !== 0
      const block = known ? yield* this.#load(index) : yield* this.#make(index, cluster)
      for (const end = (index + 1) * this.#entriesPerBlock; cluster < end && count < most; cluster++) {
        if (this.#get(block, cluster) !== 0) {
          if (count > 0) break
          if (++looked % SCAN_MAX === 0) yield* Effect.yieldNow
          continue
        }
        if (this.#reserved.has(cluster)) {
          return yield* this.#file.corrupt("write", `the table in cluster ${cluster} is said to be free`)
        }
        if (count === 0) first = cluster
        count++
        this.#set(block, cluster, 1)
      }
    }
    this.#hint = first
    const fresh = first >= this.#freshFrom
    const end = first + count
    yield* Effect.onError(this.#file.growTo(end * clusterSize), () =>
      Effect.sync(() => {
        // Nothing refers to them: they are free again at once.
        for (let cluster = first; cluster < end; cluster++) this.#forget(cluster)
      }))
    this.#hint = end
    this.#freshFrom = Math.max(this.#freshFrom, end)
    return { offset: first * clusterSize, count, fresh } satisfies ClusterRun
  })

  /** Gives clusters back that nothing in the file refers to. */
  readonly release = Effect.fnUntraced({ self: this }, function*(offset: number, count: number) {
    const first = Math.floor(offset / this.#header.clusterSize)
    for (let cluster = first; cluster < first + count; cluster++) {
      const index = Math.floor(cluster / this.#entriesPerBlock)
      if (index * 8 >= this.#table.byteLength || uint64(this.#table, index * 8) === 0) {
        return yield* this.#file.corrupt("write", `cluster ${cluster} is in use and has no reference count`)
      }
      const block = yield* this.#load(index)
      const before = this.#get(block, cluster)
      if (before === 0) {
        return yield* this.#file.corrupt("write", `cluster ${cluster} is in use and its reference count is 0`)
      }
      if (!Number.isSafeInteger(before)) {
        return yield* this.#file.corrupt("write", `cluster ${cluster} has a reference count beyond 2^53`)
      }
      this.#set(block, cluster, before - 1)
      if (before === 1) {
        this.#reserved.delete(cluster)
        this.#hint = Math.min(this.#hint, cluster)
      }
    }
  })

  /** Writes to the file what was changed, durable but for the last writes. Returns the clusters that are not needed any more. */
  readonly store = Effect.fnUntraced({ self: this }, function*() {
    const { clusterSize } = this.#header
    for (const block of this.#blocks.values()) {
      if (!block.dirty) continue
      yield* this.#file.write(block.offset, [block.bytes])
      block.dirty = false
    }
    const left: Array<ClusterRun> = []
    if (!this.#moved && this.#newEntries.size === 0) return left
    // The table names only blocks that are there.
    yield* this.#file.sync
    if (this.#moved) {
      yield* this.#file.write(this.#tableOffset, [new Uint8Array(this.#table.buffer)])
      yield* this.#file.sync
      const fields = new DataView(new ArrayBuffer(12))
      setUint64(fields, 0, this.#tableOffset)
      fields.setUint32(8, this.#table.byteLength / clusterSize)
      yield* this.#file.write(HeaderField.refcountTableOffset, [new Uint8Array(fields.buffer)])
      left.push(...this.#oldTables.splice(0))
      this.#moved = false
    } else {
      for (const index of this.#newEntries) {
        yield* this.#file.write(this.#tableOffset + index * 8, [new Uint8Array(this.#table.buffer, index * 8, 8)])
      }
    }
    this.#newEntries.clear()
    return left
  })

  /** The cluster is free again, without reading anything: its block is there. */
  #forget(cluster: number): void {
    const block = this.#blocks.get(Math.floor(cluster / this.#entriesPerBlock))
    if (block !== undefined) this.#set(block, cluster, 0)
  }

  readonly #load = Effect.fnUntraced({ self: this }, function*(index: number) {
    const cached = this.#blocks.get(index)
    if (cached !== undefined) {
      this.#blocks.delete(index)
      this.#blocks.set(index, cached)
      return cached
    }
    yield* this.#shrink()
    const offset = uint64(this.#table, index * 8)
    const bytes = new Uint8Array(this.#header.clusterSize)
    yield* this.#file.read(offset, bytes)
    const block: RefcountBlock = { bytes, view: new DataView(bytes.buffer), offset, dirty: false }
    this.#blocks.set(index, block)
    return block
  })

  /** Makes room for another block. Counts that are stored early do no harm: nothing refers to the clusters yet. */
  readonly #shrink = Effect.fnUntraced({ self: this }, function*() {
    while (this.#blocks.size >= this.#blocksMax) {
      const oldest = this.#blocks.entries().next().value
      if (oldest === undefined) return
      const [index, block] = oldest
      if (block.dirty) yield* this.#file.write(block.offset, [block.bytes])
      this.#blocks.delete(index)
    }
  })

  /** Makes the block of counts for clusters that have none, at `cluster`, which is one of them. */
  readonly #make = Effect.fnUntraced({ self: this }, function*(index: number, cluster: number) {
    const { clusterSize } = this.#header
    yield* this.#shrink()
    let tableClusters = 0
    if (index * 8 >= this.#table.byteLength) {
      const size = Math.max(this.#table.byteLength * 2, Math.ceil((index + 1) * 8 / clusterSize) * clusterSize)
      tableClusters = size / clusterSize
      // The new table follows the block, and both are counted by it.
      if (
        size > Math.max(REFCOUNT_TABLE_BYTES_MAX, clusterSize) ||
        (cluster % this.#entriesPerBlock) + 1 + tableClusters >= this.#entriesPerBlock
      ) {
        return yield* this.#file.error(
          "write",
          "no-space",
          "the image's table of reference counts cannot become longer"
        )
      }
    }
    for (let used = cluster; used <= cluster + tableClusters; used++) {
      if (this.#reserved.has(used)) {
        return yield* this.#file.corrupt("write", `the table in cluster ${used} has no reference count`)
      }
    }
    yield* this.#file.growTo((cluster + 1 + tableClusters) * clusterSize)
    const bytes = new Uint8Array(clusterSize)
    const block: RefcountBlock = {
      bytes,
      view: new DataView(bytes.buffer),
      offset: cluster * clusterSize,
      dirty: true
    }
    for (let used = 0; used <= tableClusters; used++) {
      this.#set(block, cluster + used, 1)
      this.#reserved.add(cluster + used)
    }
    if (tableClusters > 0) {
      const table = new Uint8Array(tableClusters * clusterSize)
      table.set(new Uint8Array(this.#table.buffer))
      this.#oldTables.push({
        offset: this.#tableOffset,
        count: this.#table.byteLength / clusterSize,
        fresh: false
      })
      this.#table = new DataView(table.buffer)
      this.#tableOffset = (cluster + 1) * clusterSize
      this.#moved = true
    }
    setUint64(this.#table, index * 8, block.offset)
    this.#newEntries.add(index)
    this.#blocks.set(index, block)
    this.#freshFrom = Math.max(this.#freshFrom, cluster + 1 + tableClusters)
    return block
  })

  /** The count of a cluster; one of more than 32 bits that is not 0 is said to be at least 1. */
  #get({ bytes, view }: RefcountBlock, cluster: number): number {
    const index = cluster % this.#entriesPerBlock
    switch (this.#header.refcountBits) {
      case 64:
        return uint64(view, index * 8)
      case 32:
        return view.getUint32(index * 4)
      case 16:
        return view.getUint16(index * 2)
      case 8:
        return bytes[index] ?? 0
      default: {
        const bits = this.#header.refcountBits
        const bit = index * bits
        return ((bytes[bit >> 3] ?? 0) >> (bit & 7)) & (2 ** bits - 1)
      }
    }
  }

  #set(block: RefcountBlock, cluster: number, count: number): void {
    const index = cluster % this.#entriesPerBlock
    const { bytes, view } = block
    block.dirty = true
    switch (this.#header.refcountBits) {
      case 64:
        return setUint64(view, index * 8, count)
      case 32:
        return view.setUint32(index * 4, count)
      case 16:
        return view.setUint16(index * 2, count)
      case 8:
        return view.setUint8(index, count)
      default: {
        const bits = this.#header.refcountBits
        const bit = index * bits
        const shift = bit & 7
        const mask = (2 ** bits - 1) << shift
        bytes[bit >> 3] = ((bytes[bit >> 3] ?? 0) & ~mask) | (count << shift)
      }
    }
  }
}
