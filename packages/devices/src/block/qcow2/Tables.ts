/**
 * The tables of levels 1 and 2 of a qcow2 image: level 1 whole, the least recently used tables of level 2 left out. They are
 * changed in memory and reach the file by {@link Tables.store}.
 */
import type { BlockBackendError } from "@troupe/core/BlockBackend"
import * as Effect from "effect/Effect"
import type { ImageFile } from "./ImageFile.ts"
import { COPIED, readL1Entry } from "./L2Entry.ts"
import type { Qcow2Header } from "./Qcow2Header.ts"
import { setUint64, uint64 } from "./Qcow2Header.ts"

/** The most bytes of tables of level 2 that are kept: enough for a working set of 32 GiB in clusters of 64 KiB. */
const CACHE_BYTES = 4 * 2 ** 20
/** The fewest tables that are kept. */
const CACHE_MIN = 4
/** Changes are written in whole units of this size. */
const WRITE_UNIT = 512

/** A table of level 2. */
export interface L2Table {
  readonly view: DataView<ArrayBuffer>
  /** Where it is in the file. */
  offset: number
  /** It may be changed in place: nothing else refers to it. */
  owned: boolean
  /** The bytes that wait to be stored. */
  dirtyFrom: number
  dirtyTo: number
}

/** The tables of an image. */
export class Tables {
  readonly #file: ImageFile
  readonly #header: Qcow2Header
  readonly #l1: DataView<ArrayBuffer>
  readonly #dirtyL1 = new Set<number>()
  readonly #cache = new Map<number, L2Table>()
  readonly #cacheMax: number

  private constructor(file: ImageFile, header: Qcow2Header, l1: DataView<ArrayBuffer>) {
    this.#file = file
    this.#header = header
    this.#l1 = l1
    this.#cacheMax = Math.max(CACHE_MIN, Math.floor(CACHE_BYTES / header.clusterSize))
  }

  static readonly open = Effect.fnUntraced(
    function*(file: ImageFile, header: Qcow2Header): Effect.fn.Return<Tables, BlockBackendError> {
      const l1 = new Uint8Array(header.l1Entries * 8)
      yield* file.read(header.l1Offset, l1)
      return new Tables(file, header, new DataView(l1.buffer))
    }
  )

  /** Offsets of all tables of level 2. */
  get offsets(): ReadonlyArray<number> {
    return Array.from({ length: this.#header.l1Entries }, (_, index) => readL1Entry(this.#l1, index).offset)
      .filter((offset) => offset !== 0)
  }

  /** The table that a part of the disk has, when it is at hand. */
  peek(index: number): L2Table | undefined {
    return this.#cache.get(index)
  }

  /** Whether a part of the disk has no table: all of it is absent. */
  isAbsent(index: number): boolean {
    return uint64(this.#l1, index * 8) === 0
  }

  /** Whether something waits to be stored. */
  get dirty(): boolean {
    if (this.#dirtyL1.size > 0) return true
    for (const table of this.#cache.values()) if (table.dirtyTo > table.dirtyFrom) return true
    return false
  }

  /** Whether a further table would be one too many, and those that are there all wait to be stored. */
  get full(): boolean {
    if (this.#cache.size < this.#cacheMax) return false
    for (const table of this.#cache.values()) if (table.dirtyTo <= table.dirtyFrom) return false
    return true
  }

  /** The table of a part of the disk that is not absent. The caller sees to it that the cache is not {@link full}. */
  readonly load = Effect.fnUntraced({ self: this }, function*(index: number) {
    const cached = this.#cache.get(index)
    if (cached !== undefined) {
      this.#cache.delete(index)
      this.#cache.set(index, cached)
      return cached
    }
    const { offset, owned, reserved } = readL1Entry(this.#l1, index)
    if (reserved || offset % this.#header.clusterSize !== 0 || offset >= this.#file.end) {
      return yield* this.#file.corrupt("read", `a table of level 2 at ${offset}`)
    }
    this.#shrink()
    const bytes = new Uint8Array(this.#header.clusterSize)
    yield* this.#file.read(offset, bytes)
    const table: L2Table = { view: new DataView(bytes.buffer), offset, owned, dirtyFrom: 0, dirtyTo: 0 }
    this.#cache.set(index, table)
    return table
  })

  /** Gives a part of the disk the table `view`, in a cluster of its own. */
  place(index: number, offset: number, view: DataView<ArrayBuffer>): L2Table {
    this.#cache.delete(index)
    this.#shrink()
    const table: L2Table = { view, offset, owned: true, dirtyFrom: 0, dirtyTo: view.byteLength }
    this.#cache.set(index, table)
    setUint64(this.#l1, index * 8, offset)
    this.#l1.setUint32(index * 8, this.#l1.getUint32(index * 8) + COPIED)
    this.#dirtyL1.add(index)
    return table
  }

  /** Tells that entries of a table were changed. */
  touch(table: L2Table, first: number, count: number): void {
    const from = Math.floor(first * 8 / WRITE_UNIT) * WRITE_UNIT
    const to = Math.ceil((first + count) * 8 / WRITE_UNIT) * WRITE_UNIT
    if (table.dirtyTo <= table.dirtyFrom) {
      table.dirtyFrom = from
      table.dirtyTo = to
      return
    }
    table.dirtyFrom = Math.min(table.dirtyFrom, from)
    table.dirtyTo = Math.max(table.dirtyTo, to)
  }

  /** Writes to the file what was changed: level 2, and when that is durable, level 1. */
  readonly store = Effect.fnUntraced({ self: this }, function*() {
    for (const table of this.#cache.values()) {
      const { dirtyFrom, dirtyTo } = table
      if (dirtyTo <= dirtyFrom) continue
      yield* this.#file.write(table.offset + dirtyFrom, [
        new Uint8Array(table.view.buffer, dirtyFrom, dirtyTo - dirtyFrom)
      ])
      table.dirtyFrom = table.dirtyTo = 0
    }
    if (this.#dirtyL1.size === 0) return
    yield* this.#file.sync
    for (const index of this.#dirtyL1) {
      yield* this.#file.write(this.#header.l1Offset + index * 8, [new Uint8Array(this.#l1.buffer, index * 8, 8)])
      this.#dirtyL1.delete(index)
    }
  })

  /** Makes room for a table by leaving out one that does not wait to be stored. */
  #shrink(): void {
    if (this.#cache.size < this.#cacheMax) return
    for (const [index, table] of this.#cache) {
      if (table.dirtyTo > table.dirtyFrom) continue
      this.#cache.delete(index)
      return
    }
  }
}
