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
import { totalLength } from "../Buffers.ts"
import { ImageFile } from "./ImageFile.ts"
import { ImageReader } from "./ImageReader.ts"
import { ImageWriter } from "./ImageWriter.ts"
import { HeaderField, parseHeader, type Qcow2Header } from "./Qcow2Header.ts"
import { Refcounts } from "./Refcounts.ts"
import { Tables } from "./Tables.ts"

/** How an image is opened. */
export interface Qcow2Options {
  readonly readOnly: boolean
  /** What the image is the difference to. The name of a file in the image is never followed. */
  readonly backing?: BlockBackend
}

type Fails<A> = Effect.Effect<A, BlockBackendError>

/** An image at work: what of a request can be done at once, and what has to take turns. */
class Qcow2Image {
  readonly #reader: ImageReader
  /** Absent: nothing may be written. */
  readonly #writer: ImageWriter | undefined
  readonly #lock = Semaphore.makeUnsafe(1)
  /** Runs an effect in the background; it is over when the image closes. */
  readonly #fork: (effect: Effect.Effect<void>) => void

  constructor(reader: ImageReader, writer: ImageWriter | undefined, fork: (effect: Effect.Effect<void>) => void) {
    this.#reader = reader
    this.#writer = writer
    this.#fork = fork
  }

  readonly read = (offset: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone): void => {
    const length = totalLength(buffers)
    if (this.#refuse("read", offset, length, done)) return
    const reader = this.#reader
    if (reader.isAtHand(offset, length)) return reader.readNow(offset, length, buffers, done)
    this.#run("read", reader.readSlowly(offset, length, buffers, this.#load), done)
  }

  readonly #load = (index: number): Fails<unknown> =>
    this.#lock.withPermit(this.#writer === undefined ? this.#reader.tables.load(index) : this.#writer.load(index))

  readonly write = (offset: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone): void => {
    const length = totalLength(buffers)
    if (this.#refuse("write", offset, length, done)) return
    const writer = this.#writerFor("write", done)
    if (writer === undefined) return
    if (writer.isInPlace(offset, length)) return writer.writeNow(offset, length, buffers, done)
    this.#run("write", this.#lock.withPermit(writer.writeSlowly(offset, length, buffers)), done)
  }

  readonly discard = (offset: number, length: number, done: BlockDone): void => {
    if (this.#refuse("discard", offset, length, done)) return
    const writer = this.#writerFor("discard", done)
    if (writer !== undefined) this.#run("discard", this.#lock.withPermit(writer.clear(offset, length)), done)
  }

  /** Clusters stay the image's own unless `unmap` allows to give them up. */
  readonly writeZeroes = (offset: number, length: number, unmap: boolean, done: BlockDone): void => {
    if (this.#refuse("writeZeroes", offset, length, done)) return
    const writer = this.#writerFor("writeZeroes", done)
    if (writer === undefined) return
    const size = this.#reader.header.clusterSize
    const first = Math.ceil(offset / size) * size
    const last = Math.floor((offset + length) / size) * size
    const pieces = unmap && writer.canClear && first < last
      ? Effect.andThen(writer.zero(offset, first - offset), writer.clear(first, last - first)).pipe(
        Effect.andThen(writer.zero(last, offset + length - last))
      )
      : writer.zero(offset, length)
    this.#run("writeZeroes", this.#lock.withPermit(pieces), done)
  }

  readonly flush = (done: BlockDone): void => {
    const writer = this.#writer
    if (writer === undefined) return done()
    // Whoever waits for a turn was not answered yet, and is none of this flush's business.
    if (!writer.isDirty) return this.#reader.file.backend.flush(done)
    this.#run("flush", this.#lock.withPermit(writer.store()), done)
  }

  /** Stores everything at the end. */
  readonly close: Fails<void> = Effect.suspend(() =>
    this.#writer?.isDirty === true && this.#reader.file.corruption === undefined
      ? this.#lock.withPermit(this.#writer.storeAll())
      : Effect.void
  )

  #run(operation: BlockOperation, effect: Fails<void>, done: BlockDone): void {
    this.#fork(Effect.map(Effect.exit(effect), (exit) => {
      if (Exit.isSuccess(exit)) return done()
      const failure = exit.cause.reasons.find(Cause.isFailReason)
      if (failure !== undefined) return done(failure.error)
      const defect = Cause.squash(exit.cause)
      done(this.#reader.file.error(operation, "io", defect instanceof Error ? defect.message : String(defect)))
    }))
  }

  #refuse(operation: BlockOperation, offset: number, length: number, done: BlockDone): boolean {
    if (offset >= 0 && length >= 0 && offset + length <= this.#reader.header.size) return false
    done(this.#reader.file.error(operation, "range", `${length} bytes at ${offset} are not in the disk`))
    return true
  }

  /** Who writes, if anybody may. */
  #writerFor(operation: BlockOperation, done: BlockDone): ImageWriter | undefined {
    const { backend, corruption } = this.#reader.file
    if (this.#writer === undefined) done(readOnlyError(backend.name, operation))
    else if (corruption === undefined) return this.#writer
    else done(corruption)
    return undefined
  }
}

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
    const reader = new ImageReader(file, header, tables, options.backing)
    const writer = refcounts === undefined ? undefined : new ImageWriter(reader, refcounts)
    image = new Qcow2Image(reader, writer, (effect) => {
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
