/**
 * What a qcow2 image holds: where the bytes of the disk are, and how they are read. What is in clusters of the file whose tables are
 * at hand is read at once, any number of ranges at a time.
 */
import {
  type BlockBackend,
  type BlockBackendError,
  type BlockBytes,
  type BlockDone,
  blockEffect,
  type BlockOperation
} from "@troupe/core/BlockBackend"
import * as Effect from "effect/Effect"
import { copyToBuffers, sliceBuffers, zeroBuffers } from "../Buffers.ts"
import { Epochs } from "./Epochs.ts"
import type { ImageFile } from "./ImageFile.ts"
import { inflateRaw } from "./Inflate.ts"
import { type Cluster, makeCluster, readEntry } from "./L2Entry.ts"
import type { Qcow2Header } from "./Qcow2Header.ts"
import type { Tables } from "./Tables.ts"

/** An image as far as it is read. */
export class ImageReader {
  readonly file: ImageFile
  readonly header: Qcow2Header
  readonly tables: Tables
  /** What the image is the difference to. */
  readonly backing: BlockBackend | undefined
  /** The operations on clusters of the file that are on their way. */
  readonly epochs = new Epochs()
  readonly #cluster: Cluster = makeCluster()
  readonly #clusterSize: number
  readonly #entries: number
  /** The last cluster that was inflated. */
  #inflated: { readonly offset: number; readonly length: number; readonly bytes: BlockBytes } | undefined

  constructor(file: ImageFile, header: Qcow2Header, tables: Tables, backing: BlockBackend | undefined) {
    this.file = file
    this.header = header
    this.tables = tables
    this.backing = backing
    this.#clusterSize = header.clusterSize
    this.#entries = header.clusterSize / 8
  }

  /** Whether the tables for a range are at hand, and nothing in it is compressed. */
  isAtHand(offset: number, length: number): boolean {
    const end = Math.ceil((offset + length) / this.#clusterSize)
    for (let cluster = Math.floor(offset / this.#clusterSize); cluster < end; cluster++) {
      const index = Math.floor(cluster / this.#entries)
      if (this.tables.isAbsent(index)) {
        cluster = (index + 1) * this.#entries - 1
        continue
      }
      const table = this.tables.peek(index)
      if (table === undefined) return false
      readEntry(this.header, table.view, cluster % this.#entries, this.file.end, this.#cluster)
      if (this.#cluster.kind === "compressed") return false
    }
    return true
  }

  /**
   * Operations on the file that together are one: `done` hears the first failure, once `end` was called and each that was begun
   * has ended. No cluster is used again meanwhile.
   */
  parts(done: BlockDone): {
    readonly begin: () => BlockDone
    readonly fail: (error: BlockBackendError) => void
    readonly end: () => void
  } {
    const epoch = this.epochs.enter()
    // It stays one ahead until all are on their way.
    let running = 1
    let failure: BlockBackendError | undefined
    const end: BlockDone = (error) => {
      failure ??= error
      if (--running > 0) return
      this.epochs.leave(epoch)
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
  readNow(offset: number, length: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone): void {
    const parts = this.parts(done)
    for (let position = 0; position < length;) {
      const run = this.runAt(offset + position, length - position)
      const pieces = run.length === length ? buffers : sliceBuffers(buffers, position, run.length)
      position += run.length
      switch (run.kind) {
        case "data":
          this.#readFile(run.offset, pieces, run.length, parts.begin())
          break
        case "absent":
          if (this.backing === undefined) {
            zeroBuffers(pieces)
          } else {
            this.#readBacking(this.backing, offset + position - run.length, pieces, run.length, parts.begin())
          }
          break
        case "zero":
          zeroBuffers(pieces)
          break
        default:
          parts.fail(this.file.corrupt("read", `the entry for the cluster at ${offset + position - run.length}`))
      }
    }
    parts.end()
  }

  /** The run of clusters of one kind at `offset`, in the file one after the other. Its tables are at hand. */
  runAt(
    offset: number,
    limit: number
  ): { readonly kind: Cluster["kind"]; readonly offset: number; readonly length: number } {
    const size = this.#clusterSize
    const inCluster = offset % size
    let cluster = Math.floor(offset / size)
    const first = this.look(cluster)
    const { kind } = first
    const start = first.offset + inCluster
    let length = size - inCluster
    while (length < limit) {
      const next = this.look(++cluster)
      if (next.kind !== kind || (kind === "data" && next.offset !== start + length)) break
      length += size
    }
    return { kind, offset: start, length: Math.min(length, limit) }
  }

  /** What the table at hand says about a cluster of the disk: the same object each time. */
  look(cluster: number): Cluster {
    const index = Math.floor(cluster / this.#entries)
    const table = this.tables.peek(index)
    if (table === undefined) {
      this.#cluster.kind = "absent"
      this.#cluster.offset = 0
      this.#cluster.owned = false
    } else {
      readEntry(this.header, table.view, cluster % this.#entries, this.file.end, this.#cluster)
    }
    return this.#cluster
  }

  /** Reads the file; a cluster that its end cuts off goes on with zeros. */
  #readFile(offset: number, buffers: ReadonlyArray<BlockBytes>, length: number, done: BlockDone): void {
    const there = this.file.end - offset
    if (there >= length) return this.file.backend.read(offset, buffers, done)
    zeroBuffers(sliceBuffers(buffers, there, length - there))
    this.file.backend.read(offset, sliceBuffers(buffers, 0, there), done)
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

  /**
   * Reads a range one table of level 2 after the other, and compressed clusters one by one. `load` brings the table for a part of the
   * disk to hand.
   */
  readonly readSlowly = Effect.fnUntraced(
    { self: this },
    function*(
      offset: number,
      length: number,
      buffers: ReadonlyArray<BlockBytes>,
      load: (index: number) => Effect.Effect<unknown, BlockBackendError>
    ): Effect.fn.Return<void, BlockBackendError> {
      for (let position = 0; position < length;) {
        const at = offset + position
        const index = Math.floor(at / this.#clusterSize / this.#entries)
        const tableEnd = (index + 1) * this.#entries * this.#clusterSize
        if (!this.tables.isAbsent(index) && this.tables.peek(index) === undefined) {
          yield* load(index)
          // Somebody else may have pushed it out before this goes on.
          if (this.tables.peek(index) === undefined) continue
        }
        const wanted = Math.min(length - position, tableEnd - at)
        const run = this.runAt(at, wanted)
        if (run.kind !== "compressed") {
          const pieces = sliceBuffers(buffers, position, run.length)
          yield* blockEffect((done) => this.readNow(at, run.length, pieces, done))
          position += run.length
          continue
        }
        const inCluster = at % this.#clusterSize
        const amount = Math.min(this.#clusterSize - inCluster, wanted)
        const { length: packed, offset: place } = this.look(Math.floor(at / this.#clusterSize))
        const epoch = this.epochs.enter()
        const bytes = yield* Effect.ensuring(
          this.inflate("read", place, packed),
          Effect.sync(() => this.epochs.leave(epoch))
        )
        copyToBuffers(bytes.subarray(inCluster, inCluster + amount), sliceBuffers(buffers, position, amount))
        position += amount
      }
    }
  )

  /** The bytes of a compressed cluster, which are at this place of the file. */
  readonly inflate = Effect.fnUntraced(
    { self: this },
    function*(operation: BlockOperation, offset: number, length: number) {
      const last = this.#inflated
      if (last !== undefined && last.offset === offset && last.length === length) return last.bytes
      const packed = new Uint8Array(length)
      yield* this.file.read(offset, packed)
      const bytes = new Uint8Array(this.#clusterSize)
      if (!inflateRaw(packed, bytes)) {
        return yield* this.file.corrupt(operation, `the compressed cluster at ${offset} of the file`)
      }
      this.#inflated = { offset, length, bytes }
      return bytes
    }
  )

  /** The bytes of the disk as they are, at most one cluster; or their number, when they are zeros. */
  readonly before = Effect.fnUntraced(
    { self: this },
    function*(offset: number, length: number): Effect.fn.Return<BlockBytes | number, BlockBackendError> {
      if (length === 0) return 0
      const cluster = Math.floor(offset / this.#clusterSize)
      const found = this.look(cluster)
      if (found.kind === "zero" || (found.kind === "absent" && this.backing === undefined)) return length
      if (found.kind === "corrupt") return yield* this.file.corrupt("write", `the entry for the cluster at ${offset}`)
      if (found.kind === "compressed") {
        const bytes = yield* this.inflate("write", found.offset, found.length)
        const inCluster = offset % this.#clusterSize
        return bytes.slice(inCluster, inCluster + length)
      }
      const bytes = new Uint8Array(length)
      yield* blockEffect((done) => this.readNow(offset, length, [bytes], done))
      return bytes
    }
  )
}
