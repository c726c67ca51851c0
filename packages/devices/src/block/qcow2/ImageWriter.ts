/**
 * How a qcow2 image is written to: clusters are taken, filled and named, given up, and stored in an order in which every part can be
 * lost. What writes in place may run any number at a time; all else is for one caller at a time.
 */
import { type BlockBackendError, type BlockBytes, type BlockDone, blockEffect } from "@troupe/core/BlockBackend"
import * as Effect from "effect/Effect"
import { sliceBuffers } from "../Buffers.ts"
import type { ImageFile } from "./ImageFile.ts"
import type { ImageReader } from "./ImageReader.ts"
import { writeEntry } from "./L2Entry.ts"
import type { Qcow2Header } from "./Qcow2Header.ts"
import type { ClusterRun, Refcounts } from "./Refcounts.ts"
import type { L2Table, Tables } from "./Tables.ts"

/**
 * The most bytes of clusters that were given up and wait for a flush. More are stored without being asked for: a guest that
 * writes and discards, and never flushes, must not make the image longer and longer.
 */
export const LEFT_BYTES_MAX = 0x400_0000

/** An image as far as it is written. */
export class ImageWriter {
  readonly #reader: ImageReader
  readonly #file: ImageFile
  readonly #header: Qcow2Header
  readonly #tables: Tables
  readonly #refcounts: Refcounts
  /** Clusters that no table in memory names any more, and perhaps one in the file does. */
  #left: Array<ClusterRun> = []
  readonly #clusterSize: number
  readonly #entries: number

  constructor(reader: ImageReader, refcounts: Refcounts) {
    this.#reader = reader
    this.#file = reader.file
    this.#header = reader.header
    this.#tables = reader.tables
    this.#refcounts = refcounts
    this.#clusterSize = reader.header.clusterSize
    this.#entries = reader.header.clusterSize / 8
  }

  /** Whether a range is in clusters that are the image's own, and their tables are at hand. */
  isInPlace(offset: number, length: number): boolean {
    const end = Math.ceil((offset + length) / this.#clusterSize)
    for (let cluster = Math.floor(offset / this.#clusterSize); cluster < end; cluster++) {
      const { kind, owned } = this.#reader.look(cluster)
      if (kind !== "data" || !owned) return false
      if (this.#tables.peek(Math.floor(cluster / this.#entries))?.owned !== true) return false
    }
    return true
  }

  /** Writes such a range. */
  writeNow(offset: number, length: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone): void {
    const parts = this.#reader.parts(done)
    for (let position = 0; position < length;) {
      const run = this.#reader.runAt(offset + position, length - position)
      const pieces = run.length === length ? buffers : sliceBuffers(buffers, position, run.length)
      position += run.length
      if (this.#file.end < run.offset + run.length || this.#isReserved(run.offset, run.length)) {
        parts.fail(this.#file.corrupt("write", `bytes of the disk are said to be at ${run.offset} of the file`))
        continue
      }
      this.#file.backend.write(run.offset, pieces, parts.begin())
    }
    parts.end()
  }

  /** Whether a range of the file is the header, or one of the tables that are in one piece. */
  #isReserved(offset: number, length: number): boolean {
    const { l1Entries, l1Offset } = this.#header
    return offset < this.#clusterSize || (offset < l1Offset + l1Entries * 8 && offset + length > l1Offset)
  }

  /** Writes a range, taking clusters where there are none to write to. */
  readonly writeSlowly = Effect.fnUntraced(
    { self: this },
    function*(
      offset: number,
      length: number,
      buffers: ReadonlyArray<BlockBytes>
    ): Effect.fn.Return<void, BlockBackendError> {
      for (let position = 0; position < length;) {
        const at = offset + position
        const cluster = Math.floor(at / this.#clusterSize)
        const table = yield* this.#own(Math.floor(cluster / this.#entries))
        const clusters = Math.ceil((at + length - position) / this.#clusterSize) - cluster
        const most = Math.min(clusters, this.#entries - cluster % this.#entries)
        const inPlace = this.#count(cluster, most, true)
        if (inPlace > 0) {
          const amount = Math.min((cluster + inPlace) * this.#clusterSize - at, length - position)
          const pieces = sliceBuffers(buffers, position, amount)
          yield* blockEffect((done) => this.writeNow(at, amount, pieces, done))
          position += amount
          continue
        }
        const run = yield* this.#refcounts.allocate(this.#count(cluster, most, false))
        const amount = Math.min((cluster + run.count) * this.#clusterSize - at, length - position)
        yield* this.#fill(cluster, run, at, sliceBuffers(buffers, position, amount), amount).pipe(
          Effect.onError(() => Effect.ignore(this.#refcounts.release(run.offset, run.count)))
        )
        for (let i = 0; i < run.count; i++) {
          this.#leave(cluster + i)
          writeEntry(table.view, (cluster + i) % this.#entries, run.offset + i * this.#clusterSize, {
            copied: true,
            zero: false
          })
        }
        this.#tables.touch(table, cluster % this.#entries, run.count)
        position += amount
      }
    }
  )

  /** How many clusters from `cluster` on, at most `most`, can be written in place, or cannot. */
  #count(cluster: number, most: number, inPlace: boolean): number {
    for (let count = 0; count < most; count++) {
      const { kind, owned } = this.#reader.look(cluster + count)
      if ((kind === "data" && owned) !== inPlace) return count
    }
    return most
  }

  /** Fills clusters that were taken for those of the disk from `cluster` on: new bytes, and around them what was there before. */
  readonly #fill = Effect.fnUntraced({ self: this }, function*(
    cluster: number,
    run: ClusterRun,
    at: number,
    buffers: ReadonlyArray<BlockBytes>,
    length: number
  ): Effect.fn.Return<void, BlockBackendError> {
    const start = cluster * this.#clusterSize
    const end = start + run.count * this.#clusterSize
    const head = yield* this.#reader.before(start, at - start)
    const tail = yield* this.#reader.before(at + length, end - at - length)
    // What was never used reads as zeros already.
    const skip = (bytes: BlockBytes | number): bytes is number => typeof bytes === "number" && run.fresh
    const pieces = [...(skip(head) ? [] : [asBytes(head)]), ...buffers, ...(skip(tail) ? [] : [asBytes(tail)])]
    const first = skip(head) ? run.offset + head : run.offset
    yield* this.#file.write(first, pieces)
  })

  /** The table for a part of the disk, its own: made, or copied, where there is none. */
  readonly #own = Effect.fnUntraced({ self: this }, function*(index: number) {
    const table = this.#tables.isAbsent(index) ? undefined : yield* this.load(index)
    if (table?.owned === true) return table
    if (this.#tables.full) yield* this.store()
    const { offset } = yield* this.#refcounts.allocate(1)
    this.#refcounts.reserve(offset)
    const view = new DataView(table === undefined ? new ArrayBuffer(this.#clusterSize) : table.view.buffer.slice(0))
    if (table !== undefined) this.#left.push({ offset: table.offset, count: 1, fresh: false })
    return this.#tables.place(index, offset, view)
  })

  /** The table for a part of the disk that has one. */
  readonly load = Effect.fnUntraced(
    { self: this },
    function*(index: number): Effect.fn.Return<L2Table, BlockBackendError> {
      if (this.#tables.peek(index) === undefined && this.#tables.full) yield* this.store()
      return yield* this.#tables.load(index)
    }
  )

  /** The table will name another place for a cluster: what it names now is free once that is durable. */
  #leave(cluster: number): void {
    const { kind, length, offset } = this.#reader.look(cluster)
    if (offset === 0 || kind === "absent" || kind === "corrupt") return
    if (kind === "compressed") {
      const first = Math.floor(offset / this.#clusterSize)
      const last = Math.floor((offset + length - 1) / this.#clusterSize)
      this.#left.push({ offset: first * this.#clusterSize, count: last - first + 1, fresh: false })
    } else {
      this.#left.push({ offset, count: 1, fresh: false })
    }
  }

  /** Whether clusters can be made zeros without writing them: version 2 has no word for them, beside there being nothing. */
  get canClear(): boolean {
    return this.#header.version === 3 || this.#reader.backing === undefined
  }

  /** Writes zeros, where there are not only zeros already. */
  readonly zero = Effect.fnUntraced(
    { self: this },
    function*(offset: number, length: number): Effect.fn.Return<void, BlockBackendError> {
      const size = this.#clusterSize
      for (let at = offset; at < offset + length;) {
        const amount = Math.min(size - at % size, offset + length - at)
        const index = Math.floor(at / size / this.#entries)
        if (!this.#tables.isAbsent(index)) yield* this.load(index)
        const { kind } = this.#reader.look(Math.floor(at / size))
        if (kind !== "zero" && (kind !== "absent" || this.#reader.backing !== undefined)) {
          yield* this.writeSlowly(at, amount, [new Uint8Array(amount)])
        }
        at += amount
      }
    }
  )

  /** Gives up whole clusters; they read as zeros. What is not a whole cluster stays as it is. */
  readonly clear = Effect.fnUntraced(
    { self: this },
    function*(offset: number, length: number): Effect.fn.Return<void, BlockBackendError> {
      if (!this.canClear) return
      const size = this.#clusterSize
      const end = Math.floor((offset + length) / size)
      for (let cluster = Math.ceil(offset / size); cluster < end;) {
        const index = Math.floor(cluster / this.#entries)
        const stop = Math.min(end, (index + 1) * this.#entries)
        if (this.#tables.isAbsent(index) && this.#reader.backing === undefined) {
          cluster = stop
          continue
        }
        if (this.#left.length * size >= LEFT_BYTES_MAX) yield* this.store()
        const table = yield* this.#own(index)
        const first = cluster
        for (; cluster < stop; cluster++) {
          this.#leave(cluster)
          writeEntry(table.view, cluster % this.#entries, 0, {
            copied: false,
            zero: this.#reader.backing !== undefined
          })
        }
        this.#tables.touch(table, first % this.#entries, stop - first)
      }
    }
  )

  /** Whether something waits to be stored. */
  get isDirty(): boolean {
    return this.#left.length > 0 || this.#tables.dirty || this.#refcounts.dirty
  }

  /** Stores everything, in an order in which every part can be lost from some moment on. */
  readonly store = Effect.fnUntraced({ self: this }, function*(): Effect.fn.Return<void, BlockBackendError> {
    const left = this.#left
    this.#left = []
    const oldTables = yield* Effect.onError(this.#refcounts.store(), () => Effect.sync(() => this.#left.push(...left)))
    // Both the counts of the clusters that the tables name, and what was written to them.
    yield* this.#file.sync.pipe(
      Effect.andThen(this.#tables.store()),
      Effect.andThen(this.#file.sync),
      Effect.onError(() => Effect.sync(() => this.#left.push(...left, ...oldTables)))
    )
    left.push(...oldTables)
    if (left.length === 0) return
    // Requests that were on their way may still use the clusters.
    yield* this.#reader.epochs.pass
    for (const run of left) yield* this.#refcounts.release(run.offset, run.count)
  })

  /** The same at the end: the second time stores the counts of what was given up. */
  readonly storeAll = Effect.fnUntraced({ self: this }, function*(): Effect.fn.Return<void, BlockBackendError> {
    yield* this.store()
    if (this.isDirty) yield* this.store()
  })
}

const asBytes = (bytes: BlockBytes | number): BlockBytes => typeof bytes === "number" ? new Uint8Array(bytes) : bytes
