/**
 * A qcow2 image, version 2 or 3, as a disk.
 *
 * Requests to clusters that the image has, and whose tables are at hand, go straight to the file, any number at a time. All
 * others take turns: they read tables, take clusters, or copy.
 *
 * What is on the file is consistent at every moment, whatever is lost: bytes are written before a table names them, reference
 * counts are durable before a table names their clusters, and a cluster is used again only when no durable table names it any
 * more. Tables are changed in memory and stored by a flush, so a loss of power takes only what was not flushed, and leaves at
 * most clusters that are counted and not used.
 */
import {
  type BlockBackend,
  type BlockBackendError,
  type BlockBytes,
  type BlockDone,
  blockEffect,
  type BlockOperation,
  readOnlyError
} from "@troupe/core/BlockBackend"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FiberSet from "effect/FiberSet"
import * as Result from "effect/Result"
import type * as Scope from "effect/Scope"
import * as Semaphore from "effect/Semaphore"
import { copyToBuffers, sliceBuffers, totalLength, zeroBuffers } from "../Buffers.ts"
import { Epochs } from "./Epochs.ts"
import { ImageFile } from "./ImageFile.ts"
import { inflateRaw } from "./Inflate.ts"
import { type Cluster, makeCluster, readEntry, writeEntry } from "./L2Entry.ts"
import { HeaderField, parseHeader, type Qcow2Header } from "./Qcow2Header.ts"
import { type ClusterRun, Refcounts } from "./Refcounts.ts"
import { type L2Table, Tables } from "./Tables.ts"

/**
 * The most bytes of clusters that were given up and wait for a flush. More are stored without being asked for: a guest that
 * writes and discards, and never flushes, must not make the image longer and longer.
 */
export const LEFT_BYTES_MAX = 0x400_0000

/** How an image is opened. */
export interface Qcow2Options {
  readonly readOnly: boolean
  /** What the image is the difference to. The name of a file in the image is never followed. */
  readonly backing?: BlockBackend
}

type Fails<A> = Effect.Effect<A, BlockBackendError>

/** An image at work. */
class Qcow2Image {
  readonly #file: ImageFile
  readonly #header: Qcow2Header
  readonly #backing: BlockBackend | undefined
  readonly #tables: Tables
  readonly #refcounts: Refcounts | undefined
  readonly #lock = Semaphore.makeUnsafe(1)
  readonly #epochs = new Epochs()
  /** Clusters that no table in memory names any more, and perhaps one in the file does. */
  #left: Array<ClusterRun> = []
  readonly #cluster: Cluster = makeCluster()
  readonly #clusterSize: number
  readonly #entries: number
  /** Runs an effect in the background; it is over when the image closes. */
  readonly #fork: (effect: Effect.Effect<void>) => void
  /** The last cluster that was inflated. */
  #inflated: { readonly offset: number; readonly length: number; readonly bytes: BlockBytes } | undefined

  constructor(
    file: ImageFile,
    header: Qcow2Header,
    tables: Tables,
    refcounts: Refcounts | undefined,
    backing: BlockBackend | undefined,
    fork: (effect: Effect.Effect<void>) => void
  ) {
    this.#file = file
    this.#header = header
    this.#tables = tables
    this.#refcounts = refcounts
    this.#backing = backing
    this.#fork = fork
    this.#clusterSize = header.clusterSize
    this.#entries = header.clusterSize / 8
  }

  // Reads

  readonly read = (offset: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone): void => {
    const length = totalLength(buffers)
    if (this.#refuse("read", offset, length, done)) return
    if (this.#isAtHand(offset, length)) return this.#readNow(offset, length, buffers, done)
    this.#run("read", this.#readSlowly(offset, length, buffers), done)
  }

  /** Whether the tables for a range are at hand, and nothing in it is compressed. */
  #isAtHand(offset: number, length: number): boolean {
    const end = Math.ceil((offset + length) / this.#clusterSize)
    for (let cluster = Math.floor(offset / this.#clusterSize); cluster < end; cluster++) {
      const index = Math.floor(cluster / this.#entries)
      if (this.#tables.isAbsent(index)) {
        cluster = (index + 1) * this.#entries - 1
        continue
      }
      const table = this.#tables.peek(index)
      if (table === undefined) return false
      readEntry(this.#header, table.view, cluster % this.#entries, this.#file.end, this.#cluster)
      if (this.#cluster.kind === "compressed") return false
    }
    return true
  }

  /**
   * Operations on the file that together are one: `done` hears the first failure, once `end` was called and each that was begun
   * has ended. No cluster is used again meanwhile.
   */
  #parts(done: BlockDone): {
    readonly begin: () => BlockDone
    readonly fail: (error: BlockBackendError) => void
    readonly end: () => void
  } {
    const epoch = this.#epochs.enter()
    // It stays one ahead until all are on their way.
    let running = 1
    let failure: BlockBackendError | undefined
    const end: BlockDone = (error) => {
      failure ??= error
      if (--running > 0) return
      this.#epochs.leave(epoch)
      done(failure)
    }
    return {
      begin: () => {
        running++
        return end
      },
      fail: (error) => {
        failure ??= error
      },
      end: () => end(undefined)
    }
  }

  /** Reads a range whose tables are at hand: one read of the file for each run of clusters that follow each other in it. */
  #readNow(offset: number, length: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone): void {
    const parts = this.#parts(done)
    for (let position = 0; position < length;) {
      const run = this.#runAt(offset + position, length - position)
      const pieces = run.length === length ? buffers : sliceBuffers(buffers, position, run.length)
      position += run.length
      switch (run.kind) {
        case "data":
          this.#readFile(run.offset, pieces, run.length, parts.begin())
          break
        case "absent":
          if (this.#backing === undefined) {
            zeroBuffers(pieces)
          } else {
            this.#readBacking(this.#backing, offset + position - run.length, pieces, run.length, parts.begin())
          }
          break
        case "zero":
          zeroBuffers(pieces)
          break
        default:
          parts.fail(this.#file.corrupt("read", `the entry for the cluster at ${offset + position - run.length}`))
      }
    }
    parts.end()
  }

  /** The run of clusters of one kind at `offset`, in the file one after the other. Its tables are at hand. */
  #runAt(
    offset: number,
    limit: number
  ): { readonly kind: Cluster["kind"]; readonly offset: number; readonly length: number } {
    const size = this.#clusterSize
    const inCluster = offset % size
    let cluster = Math.floor(offset / size)
    const first = this.#look(cluster)
    const { kind } = first
    const start = first.offset + inCluster
    let length = size - inCluster
    while (length < limit) {
      const next = this.#look(++cluster)
      if (next.kind !== kind || (kind === "data" && next.offset !== start + length)) break
      length += size
    }
    return { kind, offset: start, length: Math.min(length, limit) }
  }

  #look(cluster: number): Cluster {
    const index = Math.floor(cluster / this.#entries)
    const table = this.#tables.peek(index)
    if (table === undefined) {
      this.#cluster.kind = "absent"
      this.#cluster.offset = 0
      this.#cluster.owned = false
    } else {
      readEntry(this.#header, table.view, cluster % this.#entries, this.#file.end, this.#cluster)
    }
    return this.#cluster
  }

  /** Reads the file; a cluster that its end cuts off goes on with zeros. */
  #readFile(offset: number, buffers: ReadonlyArray<BlockBytes>, length: number, done: BlockDone): void {
    const there = this.#file.end - offset
    if (there >= length) return this.#file.backend.read(offset, buffers, done)
    zeroBuffers(sliceBuffers(buffers, there, length - there))
    this.#file.backend.read(offset, sliceBuffers(buffers, 0, there), done)
  }

  /** Reads what the image is the difference to; it may be shorter. */
  #readBacking(
    backing: BlockBackend,
    offset: number,
    buffers: ReadonlyArray<BlockBytes>,
    length: number,
    done: BlockDone
  ): void {
    const there = Math.max(0, Math.min(length, backing.capacity - offset))
    if (there < length) zeroBuffers(sliceBuffers(buffers, there, length - there))
    if (there === 0) return done()
    backing.read(offset, there === length ? buffers : sliceBuffers(buffers, 0, there), done)
  }

  /** Reads a range one table of level 2 after the other, and compressed clusters one by one. */
  readonly #readSlowly = Effect.fnUntraced(
    { self: this },
    function*(
      offset: number,
      length: number,
      buffers: ReadonlyArray<BlockBytes>
    ): Effect.fn.Return<void, BlockBackendError> {
      for (let position = 0; position < length;) {
        const at = offset + position
        const index = Math.floor(at / this.#clusterSize / this.#entries)
        const tableEnd = (index + 1) * this.#entries * this.#clusterSize
        if (!this.#tables.isAbsent(index) && this.#tables.peek(index) === undefined) {
          yield* this.#lock.withPermit(this.#load(index))
          // Somebody else may have pushed it out before this goes on.
          if (this.#tables.peek(index) === undefined) continue
        }
        const wanted = Math.min(length - position, tableEnd - at)
        const run = this.#runAt(at, wanted)
        if (run.kind !== "compressed") {
          const pieces = sliceBuffers(buffers, position, run.length)
          yield* blockEffect((done) => this.#readNow(at, run.length, pieces, done))
          position += run.length
          continue
        }
        const inCluster = at % this.#clusterSize
        const amount = Math.min(this.#clusterSize - inCluster, wanted)
        const { length: packed, offset: place } = this.#look(Math.floor(at / this.#clusterSize))
        const epoch = this.#epochs.enter()
        const bytes = yield* Effect.ensuring(
          this.#inflate("read", place, packed),
          Effect.sync(() => this.#epochs.leave(epoch))
        )
        copyToBuffers(bytes.subarray(inCluster, inCluster + amount), sliceBuffers(buffers, position, amount))
        position += amount
      }
    }
  )

  readonly #inflate = Effect.fnUntraced(
    { self: this },
    function*(operation: BlockOperation, offset: number, length: number) {
      const last = this.#inflated
      if (last !== undefined && last.offset === offset && last.length === length) return last.bytes
      const packed = new Uint8Array(length)
      yield* this.#file.read(offset, packed)
      const bytes = new Uint8Array(this.#clusterSize)
      if (!inflateRaw(packed, bytes)) {
        return yield* this.#file.corrupt(operation, `the compressed cluster at ${offset} of the file`)
      }
      this.#inflated = { offset, length, bytes }
      return bytes
    }
  )

  // Writes

  readonly write = (offset: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone): void => {
    const length = totalLength(buffers)
    if (this.#refuse("write", offset, length, done) || this.#refuseWrite("write", done)) return
    if (this.#isInPlace(offset, length)) return this.#writeNow(offset, length, buffers, done)
    this.#run("write", this.#lock.withPermit(this.#writeSlowly(offset, length, buffers)), done)
  }

  /** Whether a range is in clusters that are the image's own, and their tables are at hand. */
  #isInPlace(offset: number, length: number): boolean {
    const end = Math.ceil((offset + length) / this.#clusterSize)
    for (let cluster = Math.floor(offset / this.#clusterSize); cluster < end; cluster++) {
      const { kind, owned } = this.#look(cluster)
      if (kind !== "data" || !owned) return false
      if (this.#tables.peek(Math.floor(cluster / this.#entries))?.owned !== true) return false
    }
    return true
  }

  #writeNow(offset: number, length: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone): void {
    const parts = this.#parts(done)
    for (let position = 0; position < length;) {
      const run = this.#runAt(offset + position, length - position)
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
  readonly #writeSlowly = Effect.fnUntraced(
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
          yield* blockEffect((done) => this.#writeNow(at, amount, pieces, done))
          position += amount
          continue
        }
        const run = yield* this.#allocate(this.#count(cluster, most, false))
        const amount = Math.min((cluster + run.count) * this.#clusterSize - at, length - position)
        yield* this.#fill(cluster, run, at, sliceBuffers(buffers, position, amount), amount).pipe(
          Effect.onError(() => Effect.ignore(this.#refcountsOf.release(run.offset, run.count)))
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
      const { kind, owned } = this.#look(cluster + count)
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
    const head = yield* this.#before(start, at - start)
    const tail = yield* this.#before(at + length, end - at - length)
    // What was never used reads as zeros already.
    const skip = (bytes: BlockBytes | number): bytes is number => typeof bytes === "number" && run.fresh
    const pieces = [...(skip(head) ? [] : [asBytes(head)]), ...buffers, ...(skip(tail) ? [] : [asBytes(tail)])]
    const first = skip(head) ? run.offset + head : run.offset
    yield* this.#file.write(first, pieces)
  })

  /** The bytes of the disk as they are, at most one cluster; or their number, when they are zeros. */
  readonly #before = Effect.fnUntraced(
    { self: this },
    function*(offset: number, length: number): Effect.fn.Return<BlockBytes | number, BlockBackendError> {
      if (length === 0) return 0
      const cluster = Math.floor(offset / this.#clusterSize)
      const found = this.#look(cluster)
      if (found.kind === "zero" || (found.kind === "absent" && this.#backing === undefined)) return length
      if (found.kind === "corrupt") return yield* this.#file.corrupt("write", `the entry for the cluster at ${offset}`)
      if (found.kind === "compressed") {
        const bytes = yield* this.#inflate("write", found.offset, found.length)
        const inCluster = offset % this.#clusterSize
        return bytes.slice(inCluster, inCluster + length)
      }
      const bytes = new Uint8Array(length)
      yield* blockEffect((done) => this.#readNow(offset, length, [bytes], done))
      return bytes
    }
  )

  /** The table for a part of the disk, its own: made, or copied, where there is none. */
  readonly #own = Effect.fnUntraced({ self: this }, function*(index: number) {
    const table = this.#tables.isAbsent(index) ? undefined : yield* this.#load(index)
    if (table?.owned === true) return table
    if (this.#tables.full) yield* this.#store()
    const { offset } = yield* this.#allocate(1)
    this.#refcountsOf.reserve(offset)
    const view = new DataView(table === undefined ? new ArrayBuffer(this.#clusterSize) : table.view.buffer.slice(0))
    if (table !== undefined) this.#left.push({ offset: table.offset, count: 1, fresh: false })
    return this.#tables.place(index, offset, view)
  })

  /** The table for a part of the disk that has one. */
  readonly #load = Effect.fnUntraced(
    { self: this },
    function*(index: number): Effect.fn.Return<L2Table, BlockBackendError> {
      if (this.#tables.peek(index) === undefined && this.#tables.full) yield* this.#store()
      return yield* this.#tables.load(index)
    }
  )

  get #refcountsOf(): Refcounts {
    if (this.#refcounts === undefined) throw new Error("an image that is read only has no reference counts")
    return this.#refcounts
  }

  readonly #allocate = (most: number): Fails<ClusterRun> => this.#refcountsOf.allocate(most)

  /** The table will name another place for a cluster: what it names now is free once that is durable. */
  #leave(cluster: number): void {
    const { kind, length, offset } = this.#look(cluster)
    if (offset === 0 || kind === "absent" || kind === "corrupt") return
    if (kind === "compressed") {
      const first = Math.floor(offset / this.#clusterSize)
      const last = Math.floor((offset + length - 1) / this.#clusterSize)
      this.#left.push({ offset: first * this.#clusterSize, count: last - first + 1, fresh: false })
    } else {
      this.#left.push({ offset, count: 1, fresh: false })
    }
  }

  // Zeros

  readonly discard = (offset: number, length: number, done: BlockDone): void => {
    if (this.#refuse("discard", offset, length, done) || this.#refuseWrite("discard", done)) return
    this.#run("discard", this.#lock.withPermit(this.#clear(offset, length)), done)
  }

  /** Clusters stay the image's own unless `unmap` allows to give them up. */
  readonly writeZeroes = (offset: number, length: number, unmap: boolean, done: BlockDone): void => {
    if (this.#refuse("writeZeroes", offset, length, done) || this.#refuseWrite("writeZeroes", done)) return
    const size = this.#clusterSize
    const first = Math.ceil(offset / size) * size
    const last = Math.floor((offset + length) / size) * size
    const pieces = unmap && this.#canClear && first < last
      ? Effect.andThen(this.#zero(offset, first - offset), this.#clear(first, last - first)).pipe(
        Effect.andThen(this.#zero(last, offset + length - last))
      )
      : this.#zero(offset, length)
    this.#run("writeZeroes", this.#lock.withPermit(pieces), done)
  }

  /** Whether clusters can be made zeros without writing them: version 2 has no word for them, beside there being nothing. */
  get #canClear(): boolean {
    return this.#header.version === 3 || this.#backing === undefined
  }

  /** Writes zeros, where there are not only zeros already. */
  readonly #zero = Effect.fnUntraced(
    { self: this },
    function*(offset: number, length: number): Effect.fn.Return<void, BlockBackendError> {
      const size = this.#clusterSize
      for (let at = offset; at < offset + length;) {
        const amount = Math.min(size - at % size, offset + length - at)
        const index = Math.floor(at / size / this.#entries)
        if (!this.#tables.isAbsent(index)) yield* this.#load(index)
        const { kind } = this.#look(Math.floor(at / size))
        if (kind !== "zero" && (kind !== "absent" || this.#backing !== undefined)) {
          yield* this.#writeSlowly(at, amount, [new Uint8Array(amount)])
        }
        at += amount
      }
    }
  )

  /** Gives up whole clusters; they read as zeros. What is not a whole cluster stays as it is. */
  readonly #clear = Effect.fnUntraced(
    { self: this },
    function*(offset: number, length: number): Effect.fn.Return<void, BlockBackendError> {
      if (!this.#canClear) return
      const size = this.#clusterSize
      const end = Math.floor((offset + length) / size)
      for (let cluster = Math.ceil(offset / size); cluster < end;) {
        const index = Math.floor(cluster / this.#entries)
        const stop = Math.min(end, (index + 1) * this.#entries)
        if (this.#tables.isAbsent(index) && this.#backing === undefined) {
          cluster = stop
          continue
        }
        if (this.#left.length * size >= LEFT_BYTES_MAX) yield* this.#store()
        const table = yield* this.#own(index)
        const first = cluster
        for (; cluster < stop; cluster++) {
          this.#leave(cluster)
          writeEntry(table.view, cluster % this.#entries, 0, { copied: false, zero: this.#backing !== undefined })
        }
        this.#tables.touch(table, first % this.#entries, stop - first)
      }
    }
  )

  // Durability

  readonly flush = (done: BlockDone): void => {
    if (this.#refcounts === undefined) return done()
    // Whoever waits for a turn was not answered yet, and is none of this flush's business.
    if (!this.#isDirty) return this.#file.backend.flush(done)
    this.#run("flush", this.#lock.withPermit(this.#store()), done)
  }

  get #isDirty(): boolean {
    return this.#left.length > 0 || this.#tables.dirty || (this.#refcounts?.dirty ?? false)
  }

  /** Stores everything, in an order in which every part can be lost from some moment on. */
  readonly #store = Effect.fnUntraced({ self: this }, function*(): Effect.fn.Return<void, BlockBackendError> {
    const refcounts = this.#refcountsOf
    const left = this.#left
    this.#left = []
    const oldTables = yield* Effect.onError(refcounts.store(), () => Effect.sync(() => this.#left.push(...left)))
    // Both the counts of the clusters that the tables name, and what was written to them.
    yield* this.#file.sync.pipe(
      Effect.andThen(this.#tables.store()),
      Effect.andThen(this.#file.sync),
      Effect.onError(() => Effect.sync(() => this.#left.push(...left, ...oldTables)))
    )
    left.push(...oldTables)
    if (left.length === 0) return
    // Requests that were on their way may still use the clusters.
    yield* this.#epochs.pass
    for (const run of left) yield* refcounts.release(run.offset, run.count)
  })

  /** Stores everything at the end. */
  readonly close: Fails<void> = Effect.suspend(() =>
    this.#isDirty && this.#file.corruption === undefined ? this.#lock.withPermit(this.#storeAll()) : Effect.void
  )

  /** The second time stores the counts of what was given up. */
  readonly #storeAll = Effect.fnUntraced({ self: this }, function*(): Effect.fn.Return<void, BlockBackendError> {
    yield* this.#store()
    if (this.#isDirty) yield* this.#store()
  })

  // Beginnings and ends

  #run(operation: BlockOperation, effect: Fails<void>, done: BlockDone): void {
    this.#fork(Effect.map(Effect.exit(effect), (exit) => {
      if (Exit.isSuccess(exit)) return done()
      const failure = exit.cause.reasons.find(Cause.isFailReason)
      if (failure !== undefined) return done(failure.error)
      const defect = Cause.squash(exit.cause)
      done(this.#file.error(operation, "io", defect instanceof Error ? defect.message : String(defect)))
    }))
  }

  #refuse(operation: BlockOperation, offset: number, length: number, done: BlockDone): boolean {
    if (offset >= 0 && length >= 0 && offset + length <= this.#header.size) return false
    done(this.#file.error(operation, "range", `${length} bytes at ${offset} are not in the disk`))
    return true
  }

  #refuseWrite(operation: BlockOperation, done: BlockDone): boolean {
    if (this.#refcounts === undefined) done(readOnlyError(this.#file.backend.name, operation))
    else if (this.#file.corruption !== undefined) done(this.#file.corruption)
    else return false
    return true
  }
}

const asBytes = (bytes: BlockBytes | number): BlockBytes => typeof bytes === "number" ? new Uint8Array(bytes) : bytes

/**
 * Opens a qcow2 image on `below`. Its tables are stored when the scope closes. Read-only images are not changed in any way.
 *
 * Refused are: encryption, data in another file, subclusters, compression other than deflate, features that are not known; a
 * backing file that is not given in the options; for writing, images with snapshots or that were not closed or are corrupt.
 */
export const openQcow2 = Effect.fnUntraced(
  function*(
    below: BlockBackend,
    options: Qcow2Options
  ): Effect.fn.Return<BlockBackend, BlockBackendError, Scope.Scope> {
    const file = new ImageFile(below)
    const first = new Uint8Array(Math.min(file.end, 2 ** 21))
    yield* file.read(0, first)
    const parsed = parseHeader(first, file.end)
    if (Result.isFailure(parsed)) {
      const { detail, hint, kind } = parsed.failure
      return yield* file.error("open", kind, detail, hint)
    }
    const header = parsed.success
    const refuse = refusal(header, options)
    if (refuse !== undefined) return yield* file.error("open", "unsupported", refuse[0], refuse[1])
    const tables = yield* Tables.open(file, header)
    const refcounts = options.readOnly ? undefined : yield* openForWriting(file, header, tables)

    // The last thing is to store the tables; before it, the requests that run come to an end.
    let image: Qcow2Image | undefined
    yield* Effect.addFinalizer(() =>
      image === undefined ? Effect.void : Effect.catchCause(
        image.close,
        (cause) => Effect.logError(`${below.name}: the image's tables could not be stored`, cause)
      )
    )
    const fibers = yield* FiberSet.make<void>()
    const fork = yield* FiberSet.runtime(fibers)()
    image = new Qcow2Image(file, header, tables, refcounts, options.backing, (effect) => {
      fork(effect, { uninterruptible: true })
    })
    return {
      name: below.name,
      capacity: header.size,
      blockSize: below.blockSize,
      readOnly: options.readOnly,
      read: image.read,
      write: image.write,
      flush: image.flush,
      ...(options.readOnly ? {} : { discard: image.discard, writeZeroes: image.writeZeroes })
    }
  }
)

/** Why an image is not opened as the options ask, and what to do. */
const refusal = (header: Qcow2Header, options: Qcow2Options): readonly [string, string] | undefined => {
  if (header.backingName !== undefined && options.backing === undefined) {
    return [
      `the image is the difference to another file, which it calls ${JSON.stringify(header.backingName)}`,
      "Name that file in `backing` of the disk if you trust the image; it is never opened because an image says so"
    ]
  }
  if (header.backingName === undefined && options.backing !== undefined) {
    return ["the image has no backing file", "Leave `backing` out of the disk"]
  }
  if (options.readOnly) return undefined
  if (header.corrupt) return ["the image is marked as corrupt", "Repair it with `qemu-img check -r all`"]
  if (header.dirty) {
    return [
      "the image was not closed, and its reference counts are out of date",
      "Repair it with `qemu-img check -r all`"
    ]
  }
  if (header.snapshots > 0) {
    return [
      `the image has ${header.snapshots} internal snapshots`,
      "Delete them with `qemu-img snapshot -d`, or give the disk the mode READ_ONLY or VOLATILE_WRITE"
    ]
  }
  return undefined
}

const openForWriting = Effect.fnUntraced(function*(file: ImageFile, header: Qcow2Header, tables: Tables) {
  const reserved = new Set<number>([0])
  for (let at = 0; at < header.l1Entries * 8; at += header.clusterSize) {
    reserved.add((header.l1Offset + at) / header.clusterSize)
  }
  for (const offset of tables.offsets) reserved.add(offset / header.clusterSize)
  const refcounts = yield* Refcounts.open(file, header, reserved)
  if (header.autoclear && header.version === 3) {
    // Whoever does not keep what such a feature says removes it, before anything else changes.
    yield* file.write(HeaderField.autoclearFeatures, [new Uint8Array(8)])
    yield* file.sync
  }
  return refcounts
})
