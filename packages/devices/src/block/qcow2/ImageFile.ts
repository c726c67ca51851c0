/** The file of a qcow2 image: reads and writes of its tables as effects, where it ends, and what is wrong with it. */
import {
  type BlockBackend,
  BlockBackendError,
  type BlockBytes,
  blockEffect,
  type BlockErrorKind,
  type BlockOperation
} from "@troupe/core/BlockBackend"
import * as Effect from "effect/Effect"

/** A file that grows is made longer by at least this much. */
const GROW_STEP = 2 ** 20

/** The file of an image. */
export class ImageFile {
  readonly backend: BlockBackend
  /** The number of bytes that there are. */
  end: number
  /** Why nothing may be written any more, once the tables turned out to make no sense. */
  corruption: BlockBackendError | undefined

  constructor(backend: BlockBackend) {
    this.backend = backend
    this.end = backend.capacity
  }

  /** Fills `bytes` from the file; what is beyond its end is zeros. */
  read(offset: number, bytes: BlockBytes): Effect.Effect<void, BlockBackendError> {
    const there = Math.max(0, Math.min(bytes.length, this.end - offset))
    bytes.fill(0, there)
    return there === 0
      ? Effect.void
      : blockEffect((done) => this.backend.read(offset, [bytes.subarray(0, there)], done))
  }

  /** Writes to what the file already has. */
  write(offset: number, buffers: ReadonlyArray<BlockBytes>): Effect.Effect<void, BlockBackendError> {
    return blockEffect((done) => this.backend.write(offset, buffers, done))
  }

  /** Makes durable what was written. */
  get sync(): Effect.Effect<void, BlockBackendError> {
    return blockEffect((done) => this.backend.flush(done))
  }

  /** Makes the file at least `end` bytes long. */
  growTo(end: number): Effect.Effect<void, BlockBackendError> {
    if (end <= this.end) return Effect.void
    const { grow } = this.backend
    if (grow === undefined) {
      return Effect.fail(this.error("grow", "no-space", "the image needs more room than what holds it has"))
    }
    const wanted = Math.ceil(end / GROW_STEP) * GROW_STEP
    return Effect.map(blockEffect((done) => grow(wanted, done)), () => {
      this.end = wanted
    })
  }

  /** An error of this image. */
  error(operation: BlockOperation, kind: BlockErrorKind, detail: string, hint?: string): BlockBackendError {
    return new BlockBackendError({
      name: this.backend.name,
      operation,
      kind,
      detail,
      ...(hint === undefined ? {} : { hint })
    })
  }

  /** The image's tables make no sense: nothing is written to it from now on. */
  corrupt(operation: BlockOperation, detail: string): BlockBackendError {
    const error = this.error(operation, "corrupt", detail, "Look at the image with `qemu-img check`")
    this.corruption ??= error
    return error
  }
}
