/**
 * The receive queue (virtio 1.3, sections 5.1.6.3 and 5.1.6.4): frames of the port go into the guest's buffers where they lie.
 *
 * How large the next frame is, only the port knows. So the device holds chains in advance, as many as the frames of late have
 * needed, and keeps those that a frame leaves. A frame that needs more buffers than the guest has given waits in the port.
 */
import { Offload } from "@troupe/core/NetBackend"
import { ETHERNET_HEADER_SIZE, FRAME_SIZE_MAX, GSO_NONE, NetFrame, VLAN_TAG_SIZE } from "@troupe/core/NetFrame"
import { DescriptorChain } from "../virtio/DescriptorChain.ts"
import type { Virtqueue } from "../virtio/Virtqueue.ts"
import { NET_HEADER_SIZE, NetHeader } from "./NetLayout.ts"
import { Drop, type NetLine } from "./NetLine.ts"
import { NET_BYTES_PER_TURN, NET_FRAMES_PER_TURN } from "./NetTransmit.ts"
import { offloadsOf } from "./Offloads.ts"
import type { ReceiveFilter } from "./ReceiveFilter.ts"

/** The most buffers of one receive chain. Linux uses 19 for a frame of 64 KiB. */
export const RECEIVE_BUFFERS_MAX = 256
/** So many small frames in a row make the device offer room for small frames only. */
const SMALL_FRAMES = 64

/** The device's side of the receive queue. */
export class NetReceive {
  readonly #line: NetLine
  readonly #filter: ReceiveFilter
  readonly #frame = new NetFrame()
  readonly #nothing = new NetFrame()
  readonly #header = new Uint8Array(NET_HEADER_SIZE)
  readonly #headerView = new DataView(this.#header.buffer)
  readonly #destination = new Uint8Array(ETHERNET_HEADER_SIZE)
  /** The offloads that the driver takes now, bits of `Offload`. */
  offloads = 0
  #queue: Virtqueue | undefined
  #mergeable = false
  /** The largest frame without segments: that of the MTU, for a driver that knows of it. */
  #sizeMax = FRAME_SIZE_MAX
  /** The chains that are held, in the order of the queue: a ring that grows to the size of the queue at most. */
  #chains: Array<DescriptorChain> = []
  #first = 0
  #count = 0
  /** Bytes of frames that the held chains have room for. */
  #room = 0
  /** Length of a frame in the held chains that the rate limit has not admitted yet; 0 when there is none. */
  #pending = 0
  /** How many small frames in a row will do until only {@link #smallRoom} is offered. */
  #large = 0

  /** Room that is offered while no frame is larger: the largest without segments, for which drivers' buffers are made. */
  readonly #smallRoom: number

  constructor(line: NetLine, filter: ReceiveFilter) {
    this.#line = line
    this.#smallRoom = line.port.mtu + ETHERNET_HEADER_SIZE + VLAN_TAG_SIZE
    this.#filter = filter
  }

  /** A driver is ready. */
  start(queue: Virtqueue | undefined, mergeable: boolean, offloads: number, mtu: number | undefined): void {
    this.stop()
    this.#sizeMax = mtu === undefined ? FRAME_SIZE_MAX : mtu + ETHERNET_HEADER_SIZE + VLAN_TAG_SIZE
    this.offloads = offloads
    this.#queue = queue
    this.#mergeable = mergeable
    const capacity = Math.min(queue?.size ?? 0, RECEIVE_BUFFERS_MAX)
    if (this.#chains.length > 0 && this.#chains[0]?.capacity !== capacity) this.#chains = []
  }

  /** The driver has gone. */
  stop(): void {
    this.#queue = undefined
    for (const chain of this.#chains) chain.clear()
    this.#first = 0
    this.#count = 0
    this.#room = 0
    this.#large = 0
    this.#pending = 0
    this.#line.receiveThrottle.reset()
    this.#frame.clear()
  }

  /** Receives what waits, within the budget of a turn. Returns `true` when there may be more. */
  turn(): boolean {
    const queue = this.#queue
    if (queue === undefined) return false
    const line = this.#line
    if (!line.linkUp) return this.#lose()
    queue.suppressNotifications()
    const frames = line.receivedFrames
    const more = this.#work(queue)
    if (line.receivedFrames !== frames) line.batches++
    return more
  }

  #work(queue: Virtqueue): boolean {
    const line = this.#line
    const frame = this.#frame
    let bytes = NET_BYTES_PER_TURN
    for (let frames = NET_FRAMES_PER_TURN; frames > 0 && bytes > 0; frames--) {
      this.#fill(queue, this.#large > 0 ? FRAME_SIZE_MAX : this.#smallRoom)
      if (this.#count === 0) return queue.resumeNotifications()
      const length = this.#next()
      if (length === 0) return false
      if (length < 0) {
        this.#large = SMALL_FRAMES
        if (this.#fill(queue, -length)) continue
        if (this.#mergeable && this.#count < queue.size && queue.fault === undefined) {
          // The guest may give more buffers.
          return queue.resumeNotifications()
        }
        line.port.discard()
        line.drop(Drop.NO_ROOM)
        continue
      }
      if (length > this.#smallRoom) this.#large = SMALL_FRAMES
      else if (this.#large > 0) this.#large--
      bytes -= length
      if (!line.receiveThrottle.admit(length)) {
        this.#pending = length
        return false
      }
      if (length < ETHERNET_HEADER_SIZE || (frame.gsoType === GSO_NONE && length > this.#sizeMax)) {
        line.drop(Drop.BAD_SIZE)
      } else if ((offloadsOf(frame) & ~this.offloads) !== 0) {
        // On its way before the driver said that it does not want such frames.
        line.drop(Drop.BAD_HEADER)
      } else if (!this.#wanted()) {
        line.drop(Drop.FILTERED)
      } else {
        this.#deliver(queue, length)
        line.receivedFrames++
        line.receivedBytes += length
      }
    }
    return true
  }

  /** The length of the next frame, which is in the held chains, as the port's `receive` says it. */
  #next(): number {
    const pending = this.#pending
    this.#pending = 0
    if (pending > 0) return pending
    this.#offer()
    return this.#line.port.receive(this.#frame)
  }

  /** The link is down: what comes is lost. */
  #lose(): boolean {
    const { port } = this.#line
    this.#pending = 0
    for (let frames = NET_FRAMES_PER_TURN; frames > 0; frames--) {
      if (port.receive(this.#nothing) === 0) return false
      port.discard()
      this.#line.drop(Drop.LINK_DOWN)
    }
    return true
  }

  #chain(index: number): DescriptorChain | undefined {
    return this.#chains[(this.#first + index) % this.#chains.length]
  }

  /**
   * Holds chains for a frame of `wanted` bytes, as far as there are any: with mergeable buffers one after the other, otherwise
   * one. Returns whether they have the room.
   */
  #fill(queue: Virtqueue, wanted: number): boolean {
    if (!this.#mergeable && this.#count > 0) return this.#room >= wanted
    // Each step takes a chain, and a queue has no more chains than entries until some are completed, or they are useless.
    for (let steps = queue.size; steps > 0 && this.#room < wanted; steps--) {
      const chain = this.#free(queue)
      if (chain === undefined || !queue.take(chain)) break
      if (chain.readableCount > 0 || chain.writableBytes < NET_HEADER_SIZE) {
        // Too small even for the header: given back unused.
        queue.complete(chain, 0)
        continue
      }
      this.#room += chain.writableBytes - (this.#count === 0 ? NET_HEADER_SIZE : 0)
      this.#count++
      if (!this.#mergeable) break
    }
    return this.#room >= wanted
  }

  /** A chain behind those that are held, or `undefined` when there are as many as the queue has entries. */
  #free(queue: Virtqueue): DescriptorChain | undefined {
    if (this.#count < this.#chains.length) return this.#chain(this.#count)
    if (this.#count >= queue.size) return undefined
    // The ring grows: its oldest chain comes to the front.
    const chain = new DescriptorChain(Math.min(queue.size, RECEIVE_BUFFERS_MAX))
    this.#chains = [...this.#chains.slice(this.#first), ...this.#chains.slice(0, this.#first), chain]
    this.#first = 0
    return chain
  }

  /** Makes the frame out of the held chains, without the room for the header. */
  #offer(): void {
    const frame = this.#frame
    frame.clear()
    let skip = NET_HEADER_SIZE
    for (let held = 0; held < this.#count; held++) {
      const chain = this.#chain(held)
      if (chain === undefined) break
      for (let i = 0; i < chain.count; i++) {
        const length = chain.length(i)
        const skipped = Math.min(skip, length)
        skip -= skipped
        frame.add(chain.array(i), chain.offset(i) + skipped, length - skipped)
      }
    }
  }

  /** Whether the driver wants the frame, by its destination. */
  #wanted(): boolean {
    if (this.#filter.takesAll) return true
    this.#frame.read(0, this.#destination)
    return this.#filter.takes(this.#destination)
  }

  /** Writes the header and gives back the chains that hold a frame of `length` bytes. */
  #deliver(queue: Virtqueue, length: number): void {
    let buffers = 0
    for (let left = length + NET_HEADER_SIZE; left > 0; buffers++) left -= this.#chain(buffers)?.writableBytes ?? left
    const frame = this.#frame
    const header = this.#headerView
    // A driver that does not know of checksums is told nothing about them.
    header.setUint8(NetHeader.FLAGS, (this.offloads & Offload.CHECKSUM) === 0 ? 0 : frame.flags)
    header.setUint8(NetHeader.GSO_TYPE, frame.gsoType)
    header.setUint16(NetHeader.HDR_LEN, frame.headerLength, true)
    header.setUint16(NetHeader.GSO_SIZE, frame.gsoSize, true)
    header.setUint16(NetHeader.CSUM_START, frame.checksumStart, true)
    header.setUint16(NetHeader.CSUM_OFFSET, frame.checksumOffset, true)
    header.setUint16(NetHeader.NUM_BUFFERS, buffers, true)
    this.#writeHeader()
    let left = length + NET_HEADER_SIZE
    for (; buffers > 0; buffers--) {
      const chain = this.#chain(0)
      if (chain === undefined) break
      const written = Math.min(left, chain.writableBytes)
      this.#room -= chain.writableBytes
      left -= written
      this.#count--
      this.#first = (this.#first + 1) % this.#chains.length
      queue.complete(chain, written)
    }
    // The header's room is no frame's: it was subtracted of the chain that has gone, and is of the one that is the first now.
    this.#room += this.#count === 0 ? NET_HEADER_SIZE : 0
  }

  #writeHeader(): void {
    const chain = this.#chain(0)
    if (chain === undefined) return
    const header = this.#header
    let done = 0
    for (let i = 0; done < NET_HEADER_SIZE && i < chain.count; i++) {
      const array = chain.array(i)
      const offset = chain.offset(i)
      const length = chain.length(i)
      for (let at = 0; done < NET_HEADER_SIZE && at < length; at++) array[offset + at] = header[done++] ?? 0
    }
  }
}
