/**
 * Files and block devices of the host as disks.
 *
 * Reads of what the kernel has in memory are done at once, on the event loop, because handing them to another thread costs ten
 * times what they cost (`preadv2` with `RWF_NOWAIT`, which never waits for a medium); so are writes to it where the file system
 * can promise the same (XFS does). Everything else is done by libuv's thread pool. Data goes between the kernel and guest memory
 * without a copy of it.
 */
import {
  type BlockBackend,
  BlockBackendError,
  type BlockBytes,
  type BlockDone,
  type BlockErrorKind,
  type BlockOperation,
  readOnlyError,
  SECTOR_SIZE
} from "@troupe/core/BlockBackend"
import { type BlockAccess, type BlockClient, makeBlockClient } from "@troupe/core/BlockClient"
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import { constants, fdatasync, ftruncate, readv, writev } from "node:fs"
import { type FileHandle, open } from "node:fs/promises"
import {
  ErrnoNumber,
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  FALLOC_FL_ZERO_RANGE,
  type ForeignFunctions,
  LOCK_EX,
  LOCK_NB,
  LOCK_SH,
  RWF_NOWAIT
} from "./internal/ForeignFunctions.ts"
import { loadForeignFunctions } from "./internal/loadForeignFunctions.ts"
import { Vectors, VECTORS_MAX } from "./internal/Vectors.ts"

/** What is more bytes than this goes to the thread pool even when the kernel has them in memory: copying them takes long. */
const AT_ONCE_MAX = 0x4_0000
/** Zeros are written out of a buffer of this size where the file system cannot make them. */
const ZEROS_SIZE = 0x10_0000
/**
 * Room is given up, made zeros, or written with zeros in pieces of this size, with other work in between: the file system lets go of the pages while
 * the event loop stands still, a millisecond or so for each piece, and longer where they must be written first.
 */
const ROOM_PIECE = 0x40_0000
/** `ioctl` of block devices: the logical block size, and the size in bytes. */
const BLKSSZGET = 0x1268
const BLKGETSIZE64 = 0x8008_1272

const kinds: { readonly [code: string]: BlockErrorKind } = {
  EACCES: "read-only",
  EPERM: "read-only",
  EROFS: "read-only",
  EDQUOT: "no-space",
  EFBIG: "no-space",
  ENOSPC: "no-space",
  EBADF: "closed",
  ENODEV: "vanished",
  ENOENT: "vanished",
  ENOMEDIUM: "vanished",
  ENXIO: "vanished",
  ESTALE: "vanished"
}

/** Whether the file system, or the medium, does not know such an operation at all. */
const isUnknown = (result: number): boolean => result === -ErrnoNumber.ENOTSUP || result === -ErrnoNumber.ENOSYS

const codeOf = (error: unknown): string | undefined =>
  typeof error === "object" && error !== null && "code" in error ? String(error.code) : undefined

const explain = (error: unknown): string => error instanceof Error ? error.message : String(error)

/** This thread's foreign functions, where there are any: a disk works without them, less quickly and without discard. */
const loadFunctions = (): ForeignFunctions | undefined => {
  for (const name of ["node:ffi", "koffi"] as const) {
    const functions = loadForeignFunctions(name, { quiet: true })
    if (typeof functions !== "string") return functions
  }
  return undefined
}

const lengthOf = (buffers: ReadonlyArray<BlockBytes>): number => {
  let length = 0
  for (let i = 0; i < buffers.length; i++) length += buffers[i]?.length ?? 0
  return length
}

/** Whether the buffers, together so long, are few enough bytes, and few enough pieces, for the event loop. */
const isQuick = (buffers: ReadonlyArray<BlockBytes>, length: number): boolean =>
  length > 0 && length <= AT_ONCE_MAX && buffers.length <= VECTORS_MAX

/** The buffers without their first bytes. */
const rest = (buffers: ReadonlyArray<BlockBytes>, done: number): Array<BlockBytes> => {
  let skip = done
  const left: Array<BlockBytes> = []
  for (const buffer of buffers) {
    if (skip >= buffer.length) {
      skip -= buffer.length
      continue
    }
    left.push(skip === 0 ? buffer : buffer.subarray(skip))
    skip = 0
  }
  return left
}

interface FileFacts {
  readonly name: string
  readonly capacity: number
  readonly blockSize: number
  readonly readOnly: boolean
  /** A regular file, which can become longer. */
  readonly regular: boolean
}

/** A file as a back end. */
class FileBackend implements BlockBackend {
  readonly name: string
  readonly capacity: number
  readonly blockSize: number
  readonly readOnly: boolean
  readonly discard?: NonNullable<BlockBackend["discard"]>
  readonly writeZeroes: NonNullable<BlockBackend["writeZeroes"]>
  readonly grow?: NonNullable<BlockBackend["grow"]>
  readonly #fd: number
  readonly #functions: ForeignFunctions | undefined
  readonly #vectors: Vectors | undefined
  /** Whether the file system, or the medium, can do such a thing: until it says that it cannot. */
  #canReadAtOnce: boolean
  #canWriteAtOnce: boolean
  #canPunch: boolean
  #canZeroRange: boolean
  #zeros: BlockBytes | undefined
  #pending = 0
  #closed = false
  #onIdle: (() => void) | undefined

  constructor(fd: number, facts: FileFacts, functions: ForeignFunctions | undefined) {
    this.#fd = fd
    this.name = facts.name
    this.capacity = facts.capacity
    this.blockSize = facts.blockSize
    this.readOnly = facts.readOnly
    this.#functions = functions
    this.#vectors = functions === undefined ? undefined : new Vectors(functions)
    this.#canReadAtOnce = functions !== undefined
    this.#canWriteAtOnce = functions !== undefined
    this.#canZeroRange = functions !== undefined
    this.#canPunch = functions !== undefined && !facts.readOnly && canPunch(functions, fd, facts)
    if (functions !== undefined && this.#canPunch) {
      this.discard = (offset, length, done) => this.#discard(functions, offset, length, done)
    }
    this.writeZeroes = (offset, length, unmap, done) => this.#writeZeroes(offset, length, unmap, done)
    if (facts.regular && !facts.readOnly) this.grow = (capacity, done) => this.#grow(capacity, done)
  }

  /** Returns when no operation uses a buffer any more; none begins after that. */
  readonly idle: Effect.Effect<void> = Effect.callback<void>((resume) => {
    this.#closed = true
    if (this.#pending === 0) return resume(Effect.void)
    this.#onIdle = () => resume(Effect.void)
  })

  readonly read = (offset: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone): void => {
    if (this.#closed) return done(this.#error("read", "closed", "the disk is closed"))
    const length = lengthOf(buffers)
    const read = this.#readAtOnce(offset, buffers, length)
    if (read === length) return done()
    this.#begin()
    this.#readRest(offset + read, read === 0 ? buffers : rest(buffers, read), length - read, done)
  }

  readonly write = (offset: number, buffers: ReadonlyArray<BlockBytes>, done: BlockDone): void => {
    if (this.#refused("write", done)) return
    const length = lengthOf(buffers)
    const written = this.#writeAtOnce(offset, buffers, length)
    if (written === length) return done()
    this.#begin()
    this.#writeRest("write", offset + written, written === 0 ? buffers : rest(buffers, written), length - written, done)
  }

  readonly flush = (done: BlockDone): void => {
    if (this.#closed) return done(this.#error("flush", "closed", "the disk is closed"))
    if (this.readOnly) return done()
    this.#begin()
    fdatasync(this.#fd, (error) => this.#end(done, error === null ? undefined : this.#failure("flush", error)))
  }

  /** Reads what the kernel has at hand. Returns the number of bytes at the beginning. */
  #readAtOnce(offset: number, buffers: ReadonlyArray<BlockBytes>, length: number): number {
    const vectors = this.#vectors
    if (vectors === undefined || this.#functions === undefined) return 0
    if (!this.#canReadAtOnce || !isQuick(buffers, length)) return 0
    vectors.set(buffers)
    const result = this.#functions.preadv2(this.#fd, vectors.address, buffers.length, offset, RWF_NOWAIT)
    if (result >= 0) return result
    // Whatever is wrong, the thread pool is told as well, and explains it.
    if (isUnknown(result)) this.#canReadAtOnce = false
    return 0
  }

  /** Writes what the kernel takes into memory without waiting. Returns the number of bytes at the beginning. */
  #writeAtOnce(offset: number, buffers: ReadonlyArray<BlockBytes>, length: number): number {
    const vectors = this.#vectors
    if (vectors === undefined || this.#functions === undefined) return 0
    if (!this.#canWriteAtOnce || !isQuick(buffers, length)) return 0
    vectors.set(buffers)
    const result = this.#functions.pwritev2(this.#fd, vectors.address, buffers.length, offset, RWF_NOWAIT)
    if (result >= 0) return result
    if (isUnknown(result)) this.#canWriteAtOnce = false
    return 0
  }

  #readRest(offset: number, buffers: ReadonlyArray<BlockBytes>, length: number, done: BlockDone): void {
    readv(this.#fd, buffers, offset, (error, read) => {
      if (error !== null) return this.#end(done, this.#failure("read", error, offset, length))
      if (read === length) return this.#end(done)
      if (read === 0) {
        return this.#end(
          done,
          this.#error("read", "vanished", "the file has become shorter than the disk", offset, length)
        )
      }
      this.#readRest(offset + read, rest(buffers, read), length - read, done)
    })
  }

  #writeRest(
    operation: BlockOperation,
    offset: number,
    buffers: ReadonlyArray<BlockBytes>,
    length: number,
    done: BlockDone
  ): void {
    writev(this.#fd, buffers, offset, (error, written) => {
      if (error !== null) return this.#end(done, this.#failure(operation, error, offset, length))
      if (written === length) return this.#end(done)
      // What stops a write half-way says why when it is asked for the rest.
      if (written === 0) {
        return this.#end(done, this.#error(operation, "no-space", "nothing more could be written", offset, length))
      }
      this.#writeRest(operation, offset + written, rest(buffers, written), length - written, done)
    })
  }

  #discard(functions: ForeignFunctions, offset: number, length: number, done: BlockDone): void {
    if (this.#refused("discard", done)) return
    // A device may keep what is discarded (section 5.2.6.2): one that cannot give it up has done its part.
    if (length === 0 || !this.#canPunch) return done()
    this.#begin()
    this.#changeRoom(functions, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length, (result) => {
      if (isUnknown(result)) this.#canPunch = false
      // Block devices have alignments of their own.
      const isKept = isUnknown(result) || result === -ErrnoNumber.EINVAL
      this.#end(
        done,
        result < 0 && !isKept
          ? this.#error("discard", "io", `fallocate: errno ${-result}`, offset, length)
          : undefined
      )
    })
  }

  #writeZeroes(offset: number, length: number, unmap: boolean, done: BlockDone): void {
    if (this.#refused("writeZeroes", done)) return
    if (length === 0) return done()
    this.#begin()
    this.#makeZeros(offset, length, unmap, done)
  }

  /** Has the file system make zeros, one way or the other, as far as it can, and writes what is left of them. */
  #makeZeros(offset: number, length: number, unmap: boolean, done: BlockDone): void {
    const functions = this.#functions
    const punch = unmap && this.#canPunch
    if (functions === undefined || (!punch && !this.#canZeroRange)) return this.#writeZeros(offset, length, done)
    const how = punch ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE
    this.#changeRoom(functions, how | FALLOC_FL_KEEP_SIZE, offset, length, (result, left) => {
      if (result >= 0) return this.#end(done)
      const at = offset + length - left
      if (!isUnknown(result)) return this.#writeZeros(at, left, done)
      if (punch) this.#canPunch = false
      else this.#canZeroRange = false
      this.#makeZeros(at, left, unmap, done)
    })
  }

  /** Ends with the result of the last `fallocate`, and how many bytes at the end of the range it leaves as they were. */
  #changeRoom(
    functions: ForeignFunctions,
    mode: number,
    offset: number,
    length: number,
    end: (result: number, left: number) => void
  ): void {
    const piece = Math.min(length, ROOM_PIECE)
    const result = functions.fallocate(this.#fd, mode, offset, piece)
    if (result < 0) return end(result, length)
    if (piece === length) return end(result, 0)
    setImmediate(() => this.#changeRoom(functions, mode, offset + piece, length - piece, end))
  }

  #writeZeros(offset: number, length: number, done: BlockDone): void {
    const zeros = this.#zeros ??= new Uint8Array(ZEROS_SIZE)
    const piece = Math.min(length, ROOM_PIECE)
    const buffers = Array.from(
      { length: Math.ceil(piece / ZEROS_SIZE) },
      (_, i) => zeros.subarray(0, Math.min(ZEROS_SIZE, piece - i * ZEROS_SIZE))
    )
    if (piece === length) return this.#writeRest("writeZeroes", offset, buffers, piece, done)
    this.#begin()
    this.#writeRest("writeZeroes", offset, buffers, piece, (error) => {
      if (error === undefined) this.#writeZeros(offset + piece, length - piece, done)
      else this.#end(done, error)
    })
  }

  #grow(capacity: number, done: BlockDone): void {
    if (this.#refused("grow", done)) return
    this.#begin()
    ftruncate(
      this.#fd,
      capacity,
      (error) => this.#end(done, error === null ? undefined : this.#failure("grow", error, capacity, 0))
    )
  }

  #refused(operation: BlockOperation, done: BlockDone): boolean {
    if (this.#closed) done(this.#error(operation, "closed", "the disk is closed"))
    else if (this.readOnly) done(readOnlyError(this.name, operation))
    else return false
    return true
  }

  #begin(): void {
    this.#pending++
  }

  #end(done: BlockDone, error?: BlockBackendError): void {
    this.#pending--
    if (error === undefined) done()
    else done(error)
    if (this.#pending === 0) this.#onIdle?.()
  }

  #failure(operation: BlockOperation, error: unknown, offset?: number, length?: number): BlockBackendError {
    return this.#error(operation, kinds[codeOf(error) ?? ""] ?? "io", explain(error), offset, length)
  }

  #error(
    operation: BlockOperation,
    kind: BlockErrorKind,
    detail: string,
    offset?: number,
    length?: number
  ): BlockBackendError {
    return new BlockBackendError({
      name: this.name,
      operation,
      kind,
      detail,
      ...(offset === undefined ? {} : { offset }),
      ...(length === undefined ? {} : { length })
    })
  }
}

/** Whether room can be given up: tried behind the end of a file, where there is nothing to lose. */
const canPunch = (functions: ForeignFunctions, fd: number, { capacity, regular }: FileFacts): boolean =>
  !regular ||
  functions.fallocate(
      fd,
      FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
      Math.ceil(capacity / 4096) * 4096 + 4096,
      4096
    ) ===
    0

const factsOf = (
  name: string,
  handle: FileHandle,
  access: BlockAccess,
  functions: ForeignFunctions | undefined
): Effect.Effect<FileFacts, BlockBackendError> =>
  Effect.gen(function*() {
    const wrong = (detail: string, hint?: string) =>
      new BlockBackendError({
        name,
        operation: "open",
        kind: "unsupported",
        detail,
        ...(hint === undefined ? {} : { hint })
      })
    const stats = yield* Effect.tryPromise({ try: () => handle.stat(), catch: (error) => wrong(explain(error)) })
    const readOnly = access === "read-only"
    if (stats.isFile()) return { name, capacity: stats.size, blockSize: SECTOR_SIZE, readOnly, regular: true }
    if (!stats.isBlockDevice()) return yield* wrong("it is neither a regular file nor a block device")
    if (functions === undefined) {
      return yield* wrong("the size of a block device cannot be asked for", "Use Node 26.1, or install koffi")
    }
    const answer = new DataView(new ArrayBuffer(8))
    if (functions.ioctlBuffer(handle.fd, BLKGETSIZE64, answer) < 0) return yield* wrong("it does not tell its size")
    const capacity = Number(answer.getBigUint64(0, true))
    const blockSize = functions.ioctlBuffer(handle.fd, BLKSSZGET, answer) < 0 ? SECTOR_SIZE : answer.getUint32(0, true)
    return { name, capacity, blockSize, readOnly, regular: false }
  })

const openError = (name: string, error: unknown, access: BlockAccess): BlockBackendError => {
  const code = codeOf(error)
  const hint = access === "read-write" && (code === "EACCES" || code === "EROFS" || code === "EPERM")
    ? "Give the disk the mode READ_ONLY or VOLATILE_WRITE, or this process the right to write"
    : undefined
  return new BlockBackendError({
    name,
    operation: "open",
    kind: kinds[code ?? ""] ?? "io",
    detail: code === "ENOENT"
      ? "there is no such file"
      : code === "EISDIR"
      ? "it is a directory"
      : code === "EACCES"
      ? "no permission"
      : explain(error),
    ...(hint === undefined ? {} : { hint })
  })
}

/** Keeps two machines from writing to one disk. File systems without locks are left alone. */
const lock = (
  name: string,
  fd: number,
  access: BlockAccess,
  functions: ForeignFunctions | undefined
): Effect.Effect<void, BlockBackendError> =>
  Effect.suspend(() => {
    const result = functions?.flock(fd, (access === "read-write" ? LOCK_EX : LOCK_SH) | LOCK_NB) ?? 0
    if (result !== -ErrnoNumber.EAGAIN) return Effect.void
    return Effect.fail(
      new BlockBackendError({
        name,
        operation: "open",
        kind: "unsupported",
        detail: access === "read-write" ? "it is in use" : "it is being written to",
        hint: "Stop the machine that has it, or give both of them the mode READ_ONLY or VOLATILE_WRITE"
      })
    )
  })

const openFile = (path: string) =>
  Effect.fnUntraced(function*(access: BlockAccess): Effect.fn.Return<BlockBackend, BlockBackendError, Scope.Scope> {
    const functions = loadFunctions()
    // A FIFO without a writer would hold a thread of the process, and with it its exit.
    const flags = (access === "read-write" ? constants.O_RDWR : constants.O_RDONLY) | constants.O_NONBLOCK
    const handle = yield* Effect.acquireRelease(
      Effect.tryPromise({ try: () => open(path, flags), catch: (error) => openError(path, error, access) }),
      (handle) => Effect.promise(() => handle.close())
    )
    const facts = yield* factsOf(path, handle, access, functions)
    yield* lock(path, handle.fd, access, functions)
    const backend = new FileBackend(handle.fd, facts, functions)
    yield* Effect.addFinalizer(() => backend.idle)
    return backend
  })

/**
 * The file or block device at `path` as a disk. It is open, and locked, while the machine exists: for itself when the guest may
 * write, together with other readers when not.
 */
export const fromPath = (path: string): BlockClient => makeBlockClient(path, openFile(path))
