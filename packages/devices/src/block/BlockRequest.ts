/**
 * One request of a guest to its disk, from the chain that holds it to the status that ends it: everything that is checked before
 * a back end sees the request.
 *
 * Objects are used again and again. The header and the ranges are copied out of guest memory once; data stays where it is.
 */
import { type BlockBackend, type BlockBackendError, type BlockBytes, SECTOR_SIZE } from "@troupe/core/BlockBackend"
import { DescriptorChain } from "../virtio/DescriptorChain.ts"
import type { Virtqueue } from "../virtio/Virtqueue.ts"
import {
  BLOCK_QUEUE_SIZE,
  BLOCK_RANGE_SECTORS_MAX,
  BLOCK_RANGES_MAX,
  BLOCK_REQUEST_BYTES_MAX,
  HEADER_SIZE,
  ID_SIZE,
  RANGE_SIZE,
  RANGE_UNMAP,
  VirtioBlkStatus,
  VirtioBlkType
} from "./VirtioBlkLayout.ts"

const { IOERR, OK, UNSUPP } = VirtioBlkStatus

/** What the driver may ask for, and what serves it. */
export interface RequestPorts {
  readonly backend: BlockBackend
  /** What GET_ID answers: {@link ID_SIZE} bytes. */
  readonly id: Uint8Array
  /** The size of the disk in bytes. */
  readonly capacity: number
  /** What was negotiated. */
  discard: boolean
  writeZeroes: boolean
  /** The driver did not negotiate a flush: a write is durable when it is answered. */
  writeThrough: boolean
  /** A back end is done with a request. */
  readonly onDone: (request: BlockRequest) => void
}

/** The operations by which failures are reported. */
type Operation = "read" | "write" | "flush" | "discard" | "writeZeroes"

const { IN: READ, OUT: WRITE, FLUSH, DISCARD, WRITE_ZEROES } = VirtioBlkType

/** A place for one request at a time. */
export class BlockRequest {
  readonly chain = new DescriptorChain(BLOCK_QUEUE_SIZE)
  /** The queue that the chain came from. */
  queue: Virtqueue | undefined
  /** The status to answer. */
  status: number = OK
  /** What the back end did wrong, if it did. */
  error: BlockBackendError | undefined
  /** The type that the guest wrote. */
  type = -1
  /** What was asked of the back end. */
  operation: Operation = "read"
  /** First byte on the disk, and the number of bytes. */
  offset = 0
  length = 0
  /** A back end has the request. */
  pending = false
  /** The number of bytes at the beginning of the writable buffers that were written. */
  #written = 0
  readonly #ports: RequestPorts
  readonly #header = new Uint8Array(HEADER_SIZE)
  readonly #headerView = new DataView(this.#header.buffer)
  readonly #statusByte = new Uint8Array(1)
  #ranges: DataView<ArrayBuffer> | undefined
  #range = 0
  #rangeCount = 0
  #unmap = false
  readonly #buffers: Array<BlockBytes> = []

  constructor(ports: RequestPorts) {
    this.#ports = ports
  }

  /** Begins the request in {@link chain}, which has room for a status. It ends with a call of `onDone`, perhaps at once. */
  begin(queue: Virtqueue): void {
    this.queue = queue
    this.type = -1
    this.status = OK
    this.error = undefined
    this.#written = 0
    this.offset = 0
    this.length = 0
    const { chain } = this
    if (chain.read(0, this.#header) < HEADER_SIZE) return this.#refuse(IOERR)
    const type = this.type = this.#headerView.getUint32(0, true)
    // A sector beyond 2^53 bytes is beyond every disk, and so is what it is rounded to.
    const sector = this.#headerView.getUint32(8, true) + this.#headerView.getUint32(12, true) * 2 ** 32
    switch (type) {
      case READ:
        return this.#beginRead(sector)
      case WRITE:
        return this.#beginWrite(sector)
      case FLUSH:
        return this.#beginFlush(sector)
      case VirtioBlkType.GET_ID:
        return this.#beginGetId()
      case DISCARD:
        return this.#ports.discard ? this.#beginRanges("discard") : this.#refuse(UNSUPP)
      case WRITE_ZEROES:
        return this.#ports.writeZeroes ? this.#beginRanges("writeZeroes") : this.#refuse(UNSUPP)
      default:
        return this.#refuse(UNSUPP)
    }
  }

  /** Writes the status. Returns the number of bytes at the beginning of the writable buffers that were written. */
  end(): number {
    const { chain } = this
    if (this.status !== OK) this.#blank()
    this.#statusByte[0] = this.status
    chain.write(chain.writableBytes - 1, this.#statusByte)
    return this.#written === chain.writableBytes - 1 ? chain.writableBytes : this.#written
  }

  /** Forgets everything. */
  release(): void {
    this.chain.clear()
    this.queue = undefined
    this.error = undefined
    this.#buffers.length = 0
  }

  readonly #done = (error?: BlockBackendError): void => {
    if (!this.pending) throw new Error("a back end has ended an operation twice")
    this.pending = false
    if (error !== undefined) {
      this.status = IOERR
      this.error = error
      return this.#ports.onDone(this)
    }
    if (this.#range < this.#rangeCount) return this.#nextRange()
    if (this.#ports.writeThrough && this.operation !== "read" && this.operation !== "flush") {
      // Reported as part of the write: the guest did not ask for a flush.
      this.operation = "flush"
      return this.#start(FLUSH)
    }
    if (this.operation === "read") this.#written = this.length
    this.#ports.onDone(this)
  }

  /** Hands the request to the back end. */
  #start(step: number): void {
    const { backend } = this.#ports
    this.pending = true
    try {
      switch (step) {
        case READ:
          return backend.read(this.offset, this.#buffers, this.#done)
        case WRITE:
          return backend.write(this.offset, this.#buffers, this.#done)
        case FLUSH:
          return backend.flush(this.#done)
        case DISCARD:
          return backend.discard?.(this.offset, this.length, this.#done)
        case WRITE_ZEROES:
          return backend.writeZeroes?.(this.offset, this.length, this.#unmap, this.#done)
      }
    } catch (error) {
      // A back end that throws is a defect of the device, and nobody is going to report the end of this operation.
      this.pending = false
      throw error
    }
  }

  /** Ends the request without the back end. */
  #refuse(status: number): void {
    this.status = status
    this.operation = "read"
    this.#rangeCount = 0
    this.#ports.onDone(this)
  }

  /** Whether the range is whole sectors of the disk. */
  #place(sector: number, bytes: number): boolean {
    const offset = sector * SECTOR_SIZE
    if (bytes % SECTOR_SIZE !== 0 || offset + bytes > this.#ports.capacity) return false
    this.offset = offset
    this.length = bytes
    return true
  }

  #beginRead(sector: number): void {
    const { chain } = this
    const bytes = chain.writableBytes - 1
    if (chain.readableBytes !== HEADER_SIZE || bytes > BLOCK_REQUEST_BYTES_MAX || !this.#place(sector, bytes)) {
      return this.#refuse(IOERR)
    }
    if (bytes === 0) return this.#refuse(OK)
    this.operation = "read"
    this.#rangeCount = this.#range = 0
    this.#collect(chain.readableCount, chain.count, 0, bytes)
    this.#start(READ)
  }

  #beginWrite(sector: number): void {
    const { chain } = this
    const bytes = chain.readableBytes - HEADER_SIZE
    if (this.#ports.backend.readOnly || bytes > BLOCK_REQUEST_BYTES_MAX || !this.#place(sector, bytes)) {
      return this.#refuse(IOERR)
    }
    if (bytes === 0) return this.#refuse(OK)
    this.operation = "write"
    this.#rangeCount = this.#range = 0
    this.#collect(0, chain.readableCount, HEADER_SIZE, bytes)
    this.#start(WRITE)
  }

  #beginFlush(sector: number): void {
    if (sector !== 0) return this.#refuse(IOERR)
    this.operation = "flush"
    this.#rangeCount = this.#range = 0
    this.#start(FLUSH)
  }

  #beginGetId(): void {
    if (this.chain.writableBytes - 1 !== ID_SIZE) return this.#refuse(IOERR)
    this.#written = this.chain.write(0, this.#ports.id)
    this.operation = "read"
    this.#rangeCount = 0
    this.#ports.onDone(this)
  }

  /** All ranges are checked before the first one is touched. */
  #beginRanges(operation: "discard" | "writeZeroes"): void {
    const { chain } = this
    const bytes = chain.readableBytes - HEADER_SIZE
    if (bytes === 0 || bytes % RANGE_SIZE !== 0 || bytes > BLOCK_RANGES_MAX * RANGE_SIZE) return this.#refuse(IOERR)
    if (this.#ports.backend.readOnly) return this.#refuse(IOERR)
    const ranges = this.#ranges ??= new DataView(new ArrayBuffer(BLOCK_RANGES_MAX * RANGE_SIZE))
    chain.read(HEADER_SIZE, new Uint8Array(ranges.buffer, 0, bytes))
    const known = operation === "writeZeroes" ? RANGE_UNMAP : 0
    for (let at = 0; at < bytes; at += RANGE_SIZE) {
      const flags = ranges.getUint32(at + 12, true)
      if ((flags & ~known) !== 0) return this.#refuse(UNSUPP)
      const sectors = ranges.getUint32(at + 8, true)
      const sector = ranges.getUint32(at, true) + ranges.getUint32(at + 4, true) * 2 ** 32
      if (sectors > BLOCK_RANGE_SECTORS_MAX || !this.#place(sector, sectors * SECTOR_SIZE)) return this.#refuse(IOERR)
    }
    this.operation = operation
    this.#range = 0
    this.#rangeCount = bytes / RANGE_SIZE
    this.#nextRange()
  }

  #nextRange(): void {
    const ranges = this.#ranges
    if (ranges === undefined) return
    const at = this.#range++ * RANGE_SIZE
    const sector = ranges.getUint32(at, true) + ranges.getUint32(at + 4, true) * 2 ** 32
    this.#place(sector, ranges.getUint32(at + 8, true) * SECTOR_SIZE)
    this.#unmap = (ranges.getUint32(at + 12, true) & RANGE_UNMAP) !== 0
    this.#start(this.operation === "discard" ? DISCARD : WRITE_ZEROES)
  }

  /** The bytes of the buffers `first` to `end`, without the first `skip`, at most `length`, in place. */
  #collect(first: number, end: number, skip: number, length: number): void {
    const { chain } = this
    const buffers = this.#buffers
    buffers.length = 0
    let left = length
    for (let i = first; i < end && left > 0; i++) {
      const size = chain.length(i)
      if (skip >= size) {
        skip -= size
        continue
      }
      const view = chain.view(i, skip + left)
      const piece = skip === 0 ? view : view.subarray(skip)
      skip = 0
      left -= piece.length
      buffers.push(piece)
    }
  }

  /** A request that failed shows the guest zeros, and not what happens to be there. One that is too large shows nothing. */
  #blank(): void {
    const { chain } = this
    const bytes = chain.writableBytes - 1
    this.#written = 0
    if (bytes > BLOCK_REQUEST_BYTES_MAX) return
    this.#collect(chain.readableCount, chain.count, 0, bytes)
    for (const buffer of this.#buffers) buffer.fill(0)
    this.#written = bytes
  }
}
