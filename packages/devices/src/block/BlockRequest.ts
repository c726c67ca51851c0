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

const { IN: READ, OUT: WRITE, FLUSH, GET_ID, DISCARD, WRITE_ZEROES } = VirtioBlkType
/** No step: the answer is known. */
const NOTHING = -1

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
  /** What counts for a rate limit and a turn's budget: the bytes of all ranges together. */
  cost = 0
  /** A back end has the request. */
  pending = false
  /** The number of bytes at the beginning of the writable buffers that were written. */
  #written = 0
  readonly #ports: RequestPorts
  readonly #header = new Uint8Array(HEADER_SIZE)
  readonly #headerView = new DataView(this.#header.buffer)
  readonly #statusByte = new Uint8Array(1)
  #ranges: DataView<ArrayBuffer> | undefined
  #step = NOTHING
  #range = 0
  #rangeCount = 0
  #unmap = false
  readonly #buffers: Array<BlockBytes> = []

  constructor(ports: RequestPorts) {
    this.#ports = ports
  }

  /**
   * Reads the request in {@link chain}, which has room for a status. Returns whether it is one for the back end, with its
   * {@link cost}: {@link begin} is next. Otherwise {@link status} is its answer already.
   */
  read(queue: Virtqueue): boolean {
    this.queue = queue
    this.type = -1
    this.error = undefined
    this.operation = "read"
    this.offset = this.length = this.cost = 0
    this.#step = NOTHING
    this.#written = 0
    this.#range = this.#rangeCount = 0
    this.status = this.#read()
    return this.#step !== NOTHING
  }

  /** The bytes that are read or written, for which a back end may need memory. */
  get moved(): number {
    return this.type === READ || this.type === WRITE ? this.length : 0
  }

  /**
   * Hands what was read to the back end. It ends with a call of `onDone`, perhaps at once. A back end that throws is a defect of
   * the device; if the request is {@link pending} then, nobody is going to report its end.
   */
  begin(): void {
    if (this.#rangeCount > 0) this.#nextRange()
    else this.#start(this.#step)
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

  /** Reads the request. Returns the status that is its answer, unless a step is to be done. */
  #read(): number {
    const { chain } = this
    if (chain.read(0, this.#header) < HEADER_SIZE) return IOERR
    const type = this.type = this.#headerView.getUint32(0, true)
    // A sector beyond 2^53 bytes is beyond every disk, and so is what it is rounded to.
    const sector = this.#headerView.getUint32(8, true) + this.#headerView.getUint32(12, true) * 2 ** 32
    switch (type) {
      case READ:
        return this.#readRead(sector)
      case WRITE:
        return this.#readWrite(sector)
      case FLUSH:
        if (sector !== 0) return IOERR
        this.operation = "flush"
        this.#step = FLUSH
        return OK
      case GET_ID:
        if (chain.writableBytes - 1 !== ID_SIZE) return IOERR
        this.#written = chain.write(0, this.#ports.id)
        return OK
      case DISCARD:
        return this.#ports.discard ? this.#readRanges("discard", DISCARD) : UNSUPP
      case WRITE_ZEROES:
        return this.#ports.writeZeroes ? this.#readRanges("writeZeroes", WRITE_ZEROES) : UNSUPP
      default:
        return UNSUPP
    }
  }

  #readRead(sector: number): number {
    const { chain } = this
    const bytes = chain.writableBytes - 1
    if (chain.readableBytes !== HEADER_SIZE || bytes > BLOCK_REQUEST_BYTES_MAX || !this.#place(sector, bytes)) {
      return IOERR
    }
    if (bytes === 0) return OK
    this.operation = "read"
    this.#collect(chain.readableCount, chain.count, 0, bytes)
    this.cost = bytes
    this.#step = READ
    return OK
  }

  #readWrite(sector: number): number {
    const { chain } = this
    const bytes = chain.readableBytes - HEADER_SIZE
    if (this.#ports.backend.readOnly || bytes > BLOCK_REQUEST_BYTES_MAX || !this.#place(sector, bytes)) return IOERR
    if (bytes === 0) return OK
    this.operation = "write"
    this.#collect(0, chain.readableCount, HEADER_SIZE, bytes)
    this.cost = bytes
    this.#step = WRITE
    return OK
  }

  /** All ranges are checked before the first one is touched. */
  #readRanges(operation: "discard" | "writeZeroes", step: number): number {
    const { chain } = this
    const bytes = chain.readableBytes - HEADER_SIZE
    if (bytes === 0 || bytes % RANGE_SIZE !== 0 || bytes > BLOCK_RANGES_MAX * RANGE_SIZE) return IOERR
    if (this.#ports.backend.readOnly) return IOERR
    const ranges = this.#ranges ??= new DataView(new ArrayBuffer(BLOCK_RANGES_MAX * RANGE_SIZE))
    chain.read(HEADER_SIZE, new Uint8Array(ranges.buffer, 0, bytes))
    const known = operation === "writeZeroes" ? RANGE_UNMAP : 0
    for (let at = 0; at < bytes; at += RANGE_SIZE) {
      if ((ranges.getUint32(at + 12, true) & ~known) !== 0) return UNSUPP
      if (ranges.getUint32(at + 8, true) > BLOCK_RANGE_SECTORS_MAX || !this.#placeRange(ranges, at)) return IOERR
      this.cost += this.length
    }
    this.operation = operation
    this.#rangeCount = bytes / RANGE_SIZE
    this.#step = step
    return OK
  }

  /** Whether the range is whole sectors of the disk. */
  #place(sector: number, bytes: number): boolean {
    const offset = sector * SECTOR_SIZE
    if (bytes % SECTOR_SIZE !== 0 || offset + bytes > this.#ports.capacity) return false
    this.offset = offset
    this.length = bytes
    return true
  }

  #placeRange(ranges: DataView, at: number): boolean {
    const sector = ranges.getUint32(at, true) + ranges.getUint32(at + 4, true) * 2 ** 32
    return this.#place(sector, ranges.getUint32(at + 8, true) * SECTOR_SIZE)
  }

  #nextRange(): void {
    const ranges = this.#ranges
    if (ranges === undefined) return
    const at = this.#range++ * RANGE_SIZE
    this.#placeRange(ranges, at)
    this.#unmap = (ranges.getUint32(at + 12, true) & RANGE_UNMAP) !== 0
    this.#start(this.#step)
  }

  /** Hands a step to the back end. */
  #start(step: number): void {
    const { backend } = this.#ports
    this.pending = true
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
