/**
 * The transmit queue (virtio 1.3, section 5.1.6.2): chains of a header and a frame, which go to the port where they lie.
 *
 * The header is copied, checked, and then used. A frame that breaks a rule is lost and counted, and the queue goes on. When the
 * port has no room, or the rate limit no tokens, the frame waits in its chain until they have.
 */
import { Offload } from "@troupe/core/NetBackend"
import {
  ETHERNET_HEADER_SIZE,
  FRAME_NEEDS_CHECKSUM,
  FRAME_SIZE_MAX,
  GSO_NONE,
  NetFrame,
  VLAN_TAG_SIZE
} from "@troupe/core/NetFrame"
import { DescriptorChain } from "../virtio/DescriptorChain.ts"
import type { Virtqueue } from "../virtio/Virtqueue.ts"
import { NET_HEADER_SIZE, NetHeader } from "./NetLayout.ts"
import { Drop, type NetLine } from "./NetLine.ts"
import { segmentationOf } from "./Offloads.ts"

/** The most frames sent, or received, in one turn. */
export const NET_FRAMES_PER_TURN = 128
/** The most bytes sent, or received, in one turn; the frame that reaches it is finished. */
export const NET_BYTES_PER_TURN = 0x10_0000

/** What a segment of a frame costs of a turn's bytes at least, whoever makes it. */
const SEGMENT_COST = 1024
/** Bytes of a checksum. */
const CHECKSUM_SIZE = 2
/** The frame is all right. */
const FINE = -1

/** The device's side of the transmit queue. */
export class NetTransmit {
  readonly #line: NetLine
  readonly #chain: DescriptorChain
  readonly #frame = new NetFrame()
  readonly #header = new Uint8Array(NET_HEADER_SIZE)
  readonly #headerView = new DataView(this.#header.buffer)
  #queue: Virtqueue | undefined
  /** The offloads that were negotiated, bits of `Offload`. */
  #offloads = 0
  /** The chain holds a frame that is not sent yet: the rate limit has not admitted it, or the port had no room for it. */
  #waiting = false
  #admitted = false

  constructor(line: NetLine, queueSize: number) {
    this.#line = line
    this.#chain = new DescriptorChain(queueSize)
  }

  /** A driver is ready. */
  start(queue: Virtqueue | undefined, offloads: number): void {
    this.#queue = queue
    this.#offloads = offloads
    this.#waiting = false
  }

  /** The driver has gone; a frame that waits is lost. */
  stop(): void {
    this.#queue = undefined
    this.#waiting = false
    this.#admitted = false
    this.#line.sendThrottle.reset()
    this.#chain.clear()
    this.#frame.clear()
  }

  /** Sends what waits, within the budget of a turn. Returns `true` when there is more. */
  turn(): boolean {
    const queue = this.#queue
    if (queue === undefined) return false
    queue.suppressNotifications()
    const more = this.#work(queue)
    this.#line.port.flush?.()
    return more
  }

  #work(queue: Virtqueue): boolean {
    const line = this.#line
    const chain = this.#chain
    const frame = this.#frame
    const up = line.linkUp
    let bytes = NET_BYTES_PER_TURN
    let completed = false
    for (let frames = NET_FRAMES_PER_TURN; frames > 0 && bytes > 0; frames--) {
      if (this.#waiting && !up) {
        // Nobody is going to say that there is room again.
        this.#waiting = false
        this.#admitted = false
        line.sendThrottle.reset()
        line.drop(Drop.LINK_DOWN)
        queue.complete(chain, 0)
        completed = true
        continue
      }
      if (!this.#waiting) {
        if (!queue.take(chain)) {
          if (completed) line.batches++
          return queue.resumeNotifications()
        }
        const problem = up ? this.#parse() : Drop.LINK_DOWN
        if (problem !== FINE) {
          line.drop(problem)
          queue.complete(chain, 0)
          completed = true
          continue
        }
      }
      const size = frame.size
      this.#waiting = true
      this.#admitted ||= line.sendThrottle.admit(size)
      if (!this.#admitted || !line.port.send(frame)) {
        if (completed) line.batches++
        return false
      }
      this.#waiting = false
      this.#admitted = false
      line.sentFrames++
      line.sentBytes += size
      bytes -= frame.gsoType === GSO_NONE ? size : Math.max(size, Math.ceil(size / frame.gsoSize) * SEGMENT_COST)
      queue.complete(chain, 0)
      completed = true
    }
    if (completed) line.batches++
    return true
  }

  /** Makes the frame of the chain. Returns {@link FINE}, or why it cannot be sent. */
  #parse(): number {
    const chain = this.#chain
    const frame = this.#frame
    frame.clear()
    const size = chain.readableBytes - NET_HEADER_SIZE
    if (size < ETHERNET_HEADER_SIZE || size > FRAME_SIZE_MAX) return Drop.BAD_SIZE
    this.#split()
    const header = this.#headerView
    const gsoType = header.getUint8(NetHeader.GSO_TYPE)
    if ((header.getUint8(NetHeader.FLAGS) & FRAME_NEEDS_CHECKSUM) !== 0) {
      const start = header.getUint16(NetHeader.CSUM_START, true)
      const offset = header.getUint16(NetHeader.CSUM_OFFSET, true)
      if ((this.#offloads & Offload.CHECKSUM) === 0) return Drop.BAD_HEADER
      if (start < ETHERNET_HEADER_SIZE || start + offset + CHECKSUM_SIZE > size) return Drop.BAD_HEADER
      frame.flags = FRAME_NEEDS_CHECKSUM
      frame.checksumStart = start
      frame.checksumOffset = offset
    }
    if (gsoType === GSO_NONE) {
      return size > this.#line.port.mtu + ETHERNET_HEADER_SIZE + VLAN_TAG_SIZE ? Drop.BAD_SIZE : FINE
    }
    // A driver that leaves the segments to the device leaves their checksums to it too (section 5.1.6.2.1).
    const gsoSize = header.getUint16(NetHeader.GSO_SIZE, true)
    if ((segmentationOf(gsoType) & this.#offloads) === 0 || frame.flags === 0 || gsoSize === 0) return Drop.BAD_HEADER
    const headerLength = header.getUint16(NetHeader.HDR_LEN, true)
    frame.gsoType = gsoType
    frame.gsoSize = gsoSize
    frame.headerLength = headerLength <= size ? headerLength : 0
    return FINE
  }

  /** Copies the header, and adds what follows it to the frame. */
  #split(): void {
    const chain = this.#chain
    const header = this.#header
    let done = 0
    for (let i = 0; i < chain.readableCount; i++) {
      const array = chain.array(i)
      const offset = chain.offset(i)
      const length = chain.length(i)
      let skip = 0
      for (; done < NET_HEADER_SIZE && skip < length; skip++) header[done++] = array[offset + skip] ?? 0
      if (skip < length) this.#frame.add(array, offset + skip, length - skip)
    }
  }
}
