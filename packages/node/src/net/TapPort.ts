/**
 * Frames between a guest's memory and a TAP interface, without a copy on the way: `writev` and `readv` on the guest's own buffers,
 * with the header of virtio-net in front (`IFF_VNET_HDR`), so that the kernel takes and gives offloads.
 */
import { type NetPort, type NetPortListener, Offload } from "@troupe/core/NetBackend"
import { FRAME_SIZE_MAX, type NetFrame } from "@troupe/core/NetFrame"
import {
  ErrnoNumber,
  type ForeignFunctions,
  POLL_READABLE,
  POLL_WRITABLE,
  type PollHandle
} from "../internal/ForeignFunctions.ts"
import { IOVEC_MAX, IOVEC_SIZE, NetIoctl, NetValue } from "./TunIoctl.ts"

/** Size of the header in front of each frame: that of virtio 1.0 and later. */
export const VNET_HEADER_SIZE = 12
/** The most pieces of a frame that are read or written in place: those of the header and of the staged rest come on top. */
const PIECES_MAX = IOVEC_MAX - 2
const WORDS = IOVEC_SIZE / 4
/** Places of addresses in `#scratch`. */
const LAST = 0
const NEXT = 1

/** Offsets in the header. */
const Header = { FLAGS: 0, GSO_TYPE: 1, HDR_LEN: 2, GSO_SIZE: 4, CSUM_START: 6, CSUM_OFFSET: 8 } as const

/** The kernel's bits for offloads. */
export const tunOffloads = (offloads: number): number => {
  if ((offloads & Offload.CHECKSUM) === 0) return 0
  let bits: number = NetValue.TUN_F_CSUM
  if ((offloads & Offload.TSO4) !== 0) bits |= NetValue.TUN_F_TSO4
  if ((offloads & Offload.TSO6) !== 0) bits |= NetValue.TUN_F_TSO6
  if ((offloads & Offload.USO) !== 0) bits |= NetValue.TUN_F_USO4 | NetValue.TUN_F_USO6
  return bits
}

/** What a port of a TAP interface is made of. */
export interface TapPortOptions {
  readonly functions: ForeignFunctions
  /** The descriptor of the interface's queue. It does not block. */
  readonly fd: number
  readonly mtu: number
  /** What the kernel can take and give, bits of `Offload`. */
  readonly offloads: number
}

/** A TAP interface as a port. Its owner watches the descriptor and calls {@link onReady}. */
export class TapPort implements NetPort {
  readonly mtu: number
  readonly accepts: number
  readonly delivers: number
  /** Frames that the kernel refused. */
  refused = 0
  readonly #functions: ForeignFunctions
  readonly #fd: number
  /** One `struct iovec` for the header, for each piece, and for what has no room in the pieces. */
  readonly #vectors = new Uint32Array(new ArrayBuffer(IOVEC_MAX * IOVEC_SIZE))
  readonly #vectorsAddress: bigint
  readonly #header = new DataView(new ArrayBuffer(VNET_HEADER_SIZE))
  #headerIsPlain = false
  /** A frame that had no room, and the end of one that is being received. */
  readonly #stage = new Uint8Array(new ArrayBuffer(FRAME_SIZE_MAX + 1))
  readonly #stageAddress: number
  /** Length of the frame in the stage; its header is in {@link #header}'s place. 0 when there is none. */
  #staged = 0
  readonly #stagedHeader = new DataView(new ArrayBuffer(VNET_HEADER_SIZE))
  readonly #addresses = new WeakMap<Uint8Array, number>()
  #lastArray: Uint8Array | undefined
  /** Addresses, in an array: passed on, each would be an object of its own. That of {@link #lastArray}, and of the next vector. */
  readonly #scratch = new Float64Array(2)
  #listener: NetPortListener | undefined
  #poll: PollHandle | undefined
  #watched = 0
  #wanted = 0
  #open = true

  constructor(options: TapPortOptions) {
    this.#functions = options.functions
    this.#fd = options.fd
    this.mtu = options.mtu
    this.accepts = options.offloads
    this.delivers = options.offloads
    this.#vectorsAddress = options.functions.addressOf(new Uint8Array(this.#vectors.buffer))
    this.#stageAddress = Number(options.functions.addressOf(this.#stage))
    this.#scratch[NEXT] = Number(options.functions.addressOf(this.#header))
    this.#setVector(0, VNET_HEADER_SIZE)
  }

  /** The interface exists. */
  get linkUp(): boolean {
    return this.#open
  }

  listen(listener: NetPortListener | undefined): void {
    this.#listener = listener
    this.#want(0)
  }

  allowOffloads(offloads: number): void {
    if (!this.#open) return
    this.#functions.ioctlNumber(this.#fd, NetIoctl.TUNSETOFFLOAD.request, BigInt(tunOffloads(offloads & this.delivers)))
  }

  /** The descriptor is watched from now on, for `events` at first. */
  watchedBy(poll: PollHandle, events: number): void {
    this.#poll = poll
    this.#watched = events
  }

  /** The descriptor is about to be closed. */
  close(): void {
    this.#open = false
    this.#poll = undefined
    this.#listener = undefined
  }

  /** Called on the event loop while the descriptor is ready. */
  readonly onReady = (status: number, events: number): void => {
    if (status < 0) {
      // The interface has been deleted.
      const listener = this.#listener
      this.#poll?.watch(0)
      this.close()
      listener?.linkChanged()
      return
    }
    const ready = events & this.#wanted
    this.#wanted &= ~ready
    if ((ready & POLL_READABLE) !== 0) this.#listener?.readable()
    if ((ready & POLL_WRITABLE) !== 0) this.#listener?.writable()
    // Who is still busy, or has no buffers, is not to be called again and again. Others want the next event already.
    if ((events & ~ready) !== 0 && this.#watched !== this.#wanted) this.#watch(this.#wanted)
  }

  send(frame: NetFrame): boolean {
    if (!this.#open) return true
    this.#setHeader(frame)
    let count = Math.min(frame.count, PIECES_MAX)
    for (let i = 0; i < count; i++) this.#setPiece(i + 1, frame, i)
    if (count < frame.count) {
      // More pieces than one call takes: the last ones are gathered here.
      const rest = this.#gather(frame, count)
      this.#setStage(++count, 0, rest)
    }
    for (;;) {
      const result = this.#functions.writev(this.#fd, this.#vectorsAddress, count + 1)
      if (result >= 0) return true
      if (result === -ErrnoNumber.EINTR) continue
      if (result === -ErrnoNumber.EAGAIN) {
        this.#want(POLL_WRITABLE)
        return false
      }
      this.refused++
      return true
    }
  }

  receive(frame: NetFrame): number {
    if (this.#staged > 0) return this.#unstage(frame)
    if (!this.#open) return 0
    const count = Math.min(frame.count, PIECES_MAX)
    let room = 0
    let vectors = 1
    for (let i = 0; i < count && room < FRAME_SIZE_MAX; i++) {
      this.#setPiece(vectors++, frame, i)
      room += frame.lengths[i] ?? 0
    }
    if (room < FRAME_SIZE_MAX) this.#setStage(vectors++, room, this.#stage.length - room)
    this.#headerIsPlain = false
    for (;;) {
      const result = this.#functions.readv(this.#fd, this.#vectorsAddress, vectors)
      if (result === -ErrnoNumber.EINTR) continue
      if (result < 0) {
        this.#want(POLL_READABLE)
        return 0
      }
      const length = result - VNET_HEADER_SIZE
      if (length <= 0) continue
      if (length <= room) {
        setOffloads(frame, this.#header)
        return length
      }
      // The beginning lies in the pieces, the rest behind its place in the stage.
      frame.read(0, this.#stage, 0, room)
      for (let i = 0; i < VNET_HEADER_SIZE; i++) this.#stagedHeader.setUint8(i, this.#header.getUint8(i))
      this.#staged = length
      return -length
    }
  }

  discard(): void {
    this.#staged = 0
  }

  /** Makes the header of a frame that is to be sent; most frames have the same one, which says nothing. */
  #setHeader(frame: NetFrame): void {
    const plain = frame.flags === 0 && frame.gsoType === 0
    if (plain && this.#headerIsPlain) return
    this.#headerIsPlain = plain
    const header = this.#header
    header.setUint8(Header.FLAGS, frame.flags)
    header.setUint8(Header.GSO_TYPE, frame.gsoType)
    header.setUint16(Header.HDR_LEN, frame.headerLength, true)
    header.setUint16(Header.GSO_SIZE, frame.gsoSize, true)
    header.setUint16(Header.CSUM_START, frame.checksumStart, true)
    header.setUint16(Header.CSUM_OFFSET, frame.checksumOffset, true)
  }

  #unstage(frame: NetFrame): number {
    const length = this.#staged
    if (length > frame.size) return -length
    frame.write(0, this.#stage, 0, length)
    setOffloads(frame, this.#stagedHeader)
    this.#staged = 0
    return length
  }

  #want(events: number): void {
    this.#wanted = events === 0 ? 0 : this.#wanted | events
    if ((this.#wanted & ~this.#watched) !== 0) this.#watch(this.#wanted)
  }

  #watch(events: number): void {
    this.#watched = events
    this.#poll?.watch(events)
  }

  /** Copies the pieces from `first` on to the stage. Returns how many bytes. */
  #gather(frame: NetFrame, first: number): number {
    let skipped = 0
    for (let i = 0; i < first; i++) skipped += frame.lengths[i] ?? 0
    return frame.read(skipped, this.#stage)
  }

  #setPiece(vector: number, frame: NetFrame, piece: number): void {
    const array = frame.arrays[piece]
    if (array === undefined) return
    if (array !== this.#lastArray) this.#locate(array)
    this.#scratch[NEXT] = (this.#scratch[LAST] ?? 0) + (frame.offsets[piece] ?? 0)
    this.#setVector(vector, frame.lengths[piece] ?? 0)
  }

  #setStage(vector: number, from: number, length: number): void {
    this.#scratch[NEXT] = this.#stageAddress + from
    this.#setVector(vector, length)
  }

  /** Addresses of user space have 47 bits (56 with five levels of page tables, of which no allocator uses the upper ones). */
  #setVector(vector: number, length: number): void {
    const at = vector * WORDS
    const vectors = this.#vectors
    const address = this.#scratch[NEXT] ?? 0
    vectors[at] = address >>> 0
    vectors[at + 1] = Math.floor(address / 0x1_0000_0000)
    vectors[at + 2] = length
    vectors[at + 3] = 0
  }

  #locate(array: Uint8Array<ArrayBuffer>): void {
    let address = this.#addresses.get(array)
    if (address === undefined) {
      // A small array has its bytes in the collected heap, where they move, until somebody asks for its buffer.
      if (array.buffer.byteLength === 0) address = 0
      else {
        address = Number(this.#functions.addressOf(array))
        this.#addresses.set(array, address)
      }
    }
    this.#lastArray = array
    this.#scratch[LAST] = address
  }
}

const setOffloads = (frame: NetFrame, header: DataView): void => {
  frame.flags = header.getUint8(Header.FLAGS)
  frame.gsoType = header.getUint8(Header.GSO_TYPE)
  frame.headerLength = header.getUint16(Header.HDR_LEN, true)
  frame.gsoSize = header.getUint16(Header.GSO_SIZE, true)
  frame.checksumStart = header.getUint16(Header.CSUM_START, true)
  frame.checksumOffset = header.getUint16(Header.CSUM_OFFSET, true)
}
