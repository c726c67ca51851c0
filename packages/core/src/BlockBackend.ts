/**
 * What serves a disk: reads, writes and flushes of bytes, in plain callbacks, because a request is too cheap for a fiber.
 *
 * A host that has effects instead of callbacks (an object store, a network, memory) makes a back end of them with
 * {@link makeBlockBackend}. Devices check a guest's requests before a back end sees them.
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FiberSet from "effect/FiberSet"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"

/** The unit of a disk's addresses and sizes in bytes, whatever its block size (virtio 1.3, section 5.2.4). */
export const SECTOR_SIZE = 512

/** What was asked of a back end. */
export type BlockOperation = "open" | "read" | "write" | "flush" | "discard" | "writeZeroes" | "grow"

/** Which way a back end failed. */
export type BlockErrorKind =
  /** There are fewer bytes than the disk should have. */
  | "short-read"
  /** The medium failed. */
  | "io"
  /** There is no room for what was written. */
  | "no-space"
  /** What backs the disk is gone, or has become smaller. */
  | "vanished"
  /** Nothing may be written. */
  | "read-only"
  /** The bytes are not in the disk, or not aligned as the back end needs them. */
  | "range"
  /** An image's own tables make no sense. */
  | "corrupt"
  /** The image, or the operation, is one that is not supported. */
  | "unsupported"
  /** The back end, or its scope, is closed. */
  | "closed"

/** A back end could not do what was asked. The guest sees an input/output error; the host sees this. */
export class BlockBackendError extends Schema.TaggedError<BlockBackendError>()("BlockBackendError", {
  /** What backs the disk, e.g. its path. */
  name: Schema.String,
  operation: Schema.Literals(["open", "read", "write", "flush", "discard", "writeZeroes", "grow"]),
  kind: Schema.Literals([
    "short-read",
    "io",
    "no-space",
    "vanished",
    "read-only",
    "range",
    "corrupt",
    "unsupported",
    "closed"
  ]),
  /** Why, in a sentence. */
  detail: Schema.String,
  /** First byte of the range in question. */
  offset: Schema.optionalKey(Schema.Finite),
  /** Length of the range in bytes. */
  length: Schema.optionalKey(Schema.Finite),
  /** What to do about it. */
  hint: Schema.optionalKey(Schema.String)
}) {
  override get message(): string {
    const range = this.offset === undefined ? "" : ` of ${this.length ?? 0} bytes at ${this.offset}`
    return `${this.name}: ${this.operation}${range}: ${this.detail}${this.hint === undefined ? "" : `. ${this.hint}`}`
  }
}

/** Takes the outcome of one operation, once: the error, or nothing. May be called before the operation's call returns. */
export type BlockDone = (error?: BlockBackendError) => void

/** Bytes that a back end reads or fills in place. They may be guest memory, which the guest changes at any moment. */
export type BlockBytes = Uint8Array<ArrayBuffer>

/**
 * A disk that is open. Offsets and lengths are bytes. Operations may run at the same time and end in any order; the buffers,
 * and the array that holds them, belong to the back end until it calls `done`, and it does not touch them afterwards.
 * No operation throws.
 */
export interface BlockBackend {
  /** What reports call it, e.g. its path. */
  readonly name: string
  /** Its size in bytes when it was opened. */
  readonly capacity: number
  /** The unit of efficient, aligned access in bytes: a power of two from {@link SECTOR_SIZE} to 65536. */
  readonly blockSize: number
  /** Whether nothing can be written. The operations that write fail with `read-only` then. */
  readonly readOnly: boolean
  /** Fills the buffers, one after the other, from `offset` on. */
  readonly read: (offset: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone) => void
  /** Writes the buffers, one after the other, from `offset` on. */
  readonly write: (offset: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone) => void
  /** Makes everything durable whose operation had ended before this one began. */
  readonly flush: (done: BlockDone) => void
  /** Tells that the bytes are not needed. They read as zeros or as before, until they are written. Absent: not supported. */
  readonly discard?: (offset: number, length: number, done: BlockDone) => void
  /** Makes the bytes zero. `unmap`: their room may be given up. Absent: not supported. */
  readonly writeZeroes?: (offset: number, length: number, unmap: boolean, done: BlockDone) => void
  /** Makes it at least `capacity` bytes long, the new ones zero. Images that grow need it. Absent: its size is fixed. */
  readonly grow?: (capacity: number, done: BlockDone) => void
}

/** A disk in effects: what {@link makeBlockBackend} makes a back end of. */
export interface BlockOperations {
  readonly name: string
  /** Its size in bytes, a multiple of {@link SECTOR_SIZE}. */
  readonly capacity: number
  /** See {@link BlockBackend.blockSize}. Default: {@link SECTOR_SIZE}. */
  readonly blockSize?: number
  /** Fills `target` with the bytes at `offset`. Interrupted when the disk's scope closes: it must not fill later on. */
  readonly read: (offset: number, target: BlockBytes) => Effect.Effect<void, BlockBackendError>
  /** Writes `source` at `offset`. Absent: the disk is read-only. */
  readonly write?: (offset: number, source: BlockBytes) => Effect.Effect<void, BlockBackendError>
  /** Makes durable what was written before. Absent: a write that has ended is durable. */
  readonly flush?: Effect.Effect<void, BlockBackendError>
  readonly discard?: (offset: number, length: number) => Effect.Effect<void, BlockBackendError>
  readonly writeZeroes?: (offset: number, length: number, unmap: boolean) => Effect.Effect<void, BlockBackendError>
}

const totalLength = (buffers: ReadonlyArray<BlockBytes>): number => {
  let length = 0
  for (const buffer of buffers) length += buffer.length
  return length
}

/** The buffers as one: the only one itself, or a copy of all of them. */
const gather = (buffers: ReadonlyArray<BlockBytes>): BlockBytes => {
  const [first] = buffers
  if (first !== undefined && buffers.length === 1) return first
  const whole = new Uint8Array(totalLength(buffers))
  let at = 0
  for (const buffer of buffers) {
    whole.set(buffer, at)
    at += buffer.length
  }
  return whole
}

/** Copies `whole` to the buffers, one after the other. */
const scatter = (whole: BlockBytes, buffers: ReadonlyArray<BlockBytes>): void => {
  let at = 0
  for (const buffer of buffers) {
    buffer.set(whole.subarray(at, at + buffer.length))
    at += buffer.length
  }
}

/** An error of the kind `read-only`. */
export const readOnlyError = (name: string, operation: BlockOperation): BlockBackendError =>
  new BlockBackendError({
    name,
    operation,
    kind: "read-only",
    detail: "the disk is read-only",
    hint: "Open it with the mode READ_WRITE, or VOLATILE_WRITE to keep changes in memory"
  })

/**
 * A back end that runs an effect for each operation. Their fibers belong to the scope: its end interrupts those that run, and
 * operations after it fail with `closed`. A defect of an effect is an `io` error of its operation.
 */
export const makeBlockBackend = Effect.fnUntraced(
  function*(operations: BlockOperations): Effect.fn.Return<BlockBackend, never, Scope.Scope> {
    const { capacity, discard, flush, name, read, write, writeZeroes } = operations
    const fibers = yield* FiberSet.make<void>()
    const fork = yield* FiberSet.runtime(fibers)()
    let closed = false
    // Registered after the fibers' set, so this comes first when the scope closes.
    yield* Effect.addFinalizer(() =>
      Effect.sync(() => {
        closed = true
      })
    )
    const run = (
      operation: BlockOperation,
      effect: () => Effect.Effect<void, BlockBackendError>,
      done: BlockDone
    ): void => {
      const fail = (kind: "io" | "closed", detail: string) =>
        done(new BlockBackendError({ name, operation, kind, detail }))
      if (closed) return fail("closed", "the disk is closed")
      const report = (exit: Exit.Exit<void, BlockBackendError>): void => {
        if (Exit.isSuccess(exit)) return done()
        const failure = exit.cause.reasons.find(Cause.isFailReason)
        if (failure !== undefined) return done(failure.error)
        if (Cause.hasInterruptsOnly(exit.cause)) return fail("closed", "the disk was closed meanwhile")
        const defect = Cause.squash(exit.cause)
        fail("io", defect instanceof Error ? defect.message : String(defect))
      }
      // Whatever becomes of the fiber, even before it has begun: the operation is reported, and once.
      const reported = Effect.interruptible(Effect.suspend(effect)).pipe(
        Effect.exit,
        Effect.map(report)
      )
      fork(reported, { uninterruptible: true })
    }
    return {
      name,
      capacity,
      blockSize: operations.blockSize ?? SECTOR_SIZE,
      readOnly: write === undefined,
      read: (offset, buffers, done) => {
        const [first] = buffers
        if (first !== undefined && buffers.length === 1) return run("read", () => read(offset, first), done)
        const whole = new Uint8Array(totalLength(buffers))
        run("read", () => Effect.map(read(offset, whole), () => scatter(whole, buffers)), done)
      },
      write: (offset, buffers, done) =>
        write === undefined
          ? done(readOnlyError(name, "write"))
          : run("write", () => write(offset, gather(buffers)), done),
      flush: (done) => flush === undefined ? done() : run("flush", () => flush, done),
      ...(discard === undefined ? {} : {
        discard: (offset: number, length: number, done: BlockDone) =>
          run("discard", () => discard(offset, length), done)
      }),
      ...(writeZeroes === undefined ? {} : {
        writeZeroes: (offset: number, length: number, unmap: boolean, done: BlockDone) =>
          run("writeZeroes", () => writeZeroes(offset, length, unmap), done)
      })
    }
  }
)

/** A back end on bytes in memory, which it changes in place; it grows by moving them. For tests and small disks. */
export const makeMemoryBackend = (
  name: string,
  bytes: BlockBytes,
  options: { readonly readOnly?: boolean; readonly blockSize?: number } = {}
): BlockBackend & { readonly bytes: () => BlockBytes } => {
  let store = bytes
  const readOnly = options.readOnly ?? false
  const outside = (operation: BlockOperation, offset: number, length: number): BlockBackendError | undefined =>
    offset >= 0 && length >= 0 && offset + length <= store.length
      ? undefined
      : new BlockBackendError({ name, operation, kind: "range", detail: "not in the disk", offset, length })
  const refuse = (operation: BlockOperation, offset: number, length: number) =>
    readOnly ? readOnlyError(name, operation) : outside(operation, offset, length)
  const zero = (operation: BlockOperation, offset: number, length: number, done: BlockDone): void => {
    const error = refuse(operation, offset, length)
    if (error === undefined) store.fill(0, offset, offset + length)
    done(error)
  }
  return {
    name,
    capacity: bytes.length,
    blockSize: options.blockSize ?? SECTOR_SIZE,
    readOnly,
    bytes: () => store,
    read: (offset, buffers, done) => {
      const error = outside("read", offset, totalLength(buffers))
      if (error !== undefined) return done(error)
      let at = offset
      for (const buffer of buffers) {
        buffer.set(store.subarray(at, at + buffer.length))
        at += buffer.length
      }
      done()
    },
    write: (offset, buffers, done) => {
      const error = refuse("write", offset, totalLength(buffers))
      if (error !== undefined) return done(error)
      let at = offset
      for (const buffer of buffers) {
        store.set(buffer, at)
        at += buffer.length
      }
      done()
    },
    flush: (done) => done(),
    discard: (offset, length, done) => zero("discard", offset, length, done),
    writeZeroes: (offset, length, _, done) => zero("writeZeroes", offset, length, done),
    grow: (capacity, done) => {
      if (readOnly) return done(readOnlyError(name, "grow"))
      if (capacity > store.length) {
        const larger = new Uint8Array(capacity)
        larger.set(store)
        store = larger
      }
      done()
    }
  }
}

/** An operation of a back end as an effect. It ends when the back end is done, interrupted or not: buffers are in use. */
export const blockEffect = (start: (done: BlockDone) => void): Effect.Effect<void, BlockBackendError> =>
  Effect.uninterruptible(Effect.callback<void, BlockBackendError>((resume) => {
    start((error) => resume(error === undefined ? Effect.void : Effect.fail(error)))
  }))
