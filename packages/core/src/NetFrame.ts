/**
 * One Ethernet frame on its way between a guest and a network: where its bytes are, and what is left to do to it.
 *
 * A frame is made once and used again and again. Its bytes lie in one or more pieces of other arrays, usually guest memory, so
 * that a back end which can scatter and gather copies nothing; who would rather have bytes in a row calls {@link NetFrame.read}.
 * The guest can change its memory at any moment: what is checked must be copied out first.
 *
 * What is left to do (offloads) is what the header of virtio-net says (virtio 1.3, section 5.1.6): a checksum that covers
 * the bytes from `checksumStart` to the end and belongs at `checksumStart + checksumOffset`, and a segment size for a frame that
 * is larger than the MTU. Positions count from the first byte of the Ethernet header.
 */

/** The frame's checksum is partial: `checksumStart` and `checksumOffset` say what is to be done. */
export const FRAME_NEEDS_CHECKSUM = 1
/** The checksums of the frame have been verified, or need not be. */
export const FRAME_DATA_VALID = 2

/** An ordinary frame. */
export const GSO_NONE = 0
/** A frame of TCP over IPv4 that is larger than the MTU. */
export const GSO_TCPV4 = 1
/** A datagram of UDP over IPv4 that is larger than the MTU, to be fragmented. */
export const GSO_UDP = 3
/** A frame of TCP over IPv6 that is larger than the MTU. */
export const GSO_TCPV6 = 4
/** Several datagrams of UDP, over IPv4 or IPv6, under one header. */
export const GSO_UDP_L4 = 5

/** Length of an Ethernet header without a VLAN tag in bytes. */
export const ETHERNET_HEADER_SIZE = 14
/** Length of a VLAN tag in bytes. */
export const VLAN_TAG_SIZE = 4
/** The most bytes of a frame: an IP packet of 65535 bytes, an Ethernet header and a VLAN tag. */
export const FRAME_SIZE_MAX = 65535 + ETHERNET_HEADER_SIZE + VLAN_TAG_SIZE

/** A frame, or the buffers for one. */
export class NetFrame {
  /** The number of pieces. */
  count = 0
  /** The number of bytes in all pieces together: the length of a frame to send, the room for one to receive. */
  size = 0
  /** {@link FRAME_NEEDS_CHECKSUM}, {@link FRAME_DATA_VALID}, or 0. */
  flags = 0
  /** One of the `GSO_` constants. */
  gsoType = GSO_NONE
  /** With a `gsoType`: length of all headers, Ethernet's to TCP's or UDP's. A hint: 0 when it is not known. */
  headerLength = 0
  /** With a `gsoType`: the most payload bytes of a segment. */
  gsoSize = 0
  /** With {@link FRAME_NEEDS_CHECKSUM}: where the bytes that are summed begin. */
  checksumStart = 0
  /** With {@link FRAME_NEEDS_CHECKSUM}: where the sum is stored, counted from `checksumStart`. */
  checksumOffset = 0

  /** The arrays that hold the pieces. Entries at and above {@link count} mean nothing. */
  readonly arrays: Array<Uint8Array<ArrayBuffer>> = []
  /** Where in its array each piece begins. */
  readonly offsets: Array<number> = []
  /** Length of each piece in bytes, at least 1. */
  readonly lengths: Array<number> = []

  /** Forgets all pieces, and that anything is left to do. */
  clear(): void {
    this.count = 0
    this.size = 0
    this.clearOffloads()
  }

  /** Says that nothing is left to do to the frame. */
  clearOffloads(): void {
    this.flags = 0
    this.gsoType = GSO_NONE
    this.headerLength = 0
    this.gsoSize = 0
    this.checksumStart = 0
    this.checksumOffset = 0
  }

  /** Adds `length` bytes of `array` at `offset`, which the caller knows to be there, as the next piece. */
  add(array: Uint8Array<ArrayBuffer>, offset: number, length: number): void {
    if (length === 0) return
    const index = this.count++
    this.arrays[index] = array
    this.offsets[index] = offset
    this.lengths[index] = length
    this.size += length
  }

  /**
   * Copies `length` bytes of the frame from `position` to `target` at `at`. Returns how many there were, fewer when the frame
   * ends before.
   */
  read(position: number, target: Uint8Array, at = 0, length = target.length - at): number {
    let skip = position
    let done = 0
    for (let i = 0; i < this.count && done < length; i++) {
      const size = this.lengths[i] ?? 0
      if (skip >= size) {
        skip -= size
        continue
      }
      const array = this.arrays[i]
      if (array === undefined) break
      const from = (this.offsets[i] ?? 0) + skip
      const amount = Math.min(size - skip, length - done)
      copyBytes(array, from, target, at + done, amount)
      done += amount
      skip = 0
    }
    return done
  }

  /**
   * Copies `length` bytes of `source` from `from` into the frame's pieces at `position`. Returns how many fitted.
   */
  write(position: number, source: Uint8Array, from = 0, length = source.length - from): number {
    let skip = position
    let done = 0
    for (let i = 0; i < this.count && done < length; i++) {
      const size = this.lengths[i] ?? 0
      if (skip >= size) {
        skip -= size
        continue
      }
      const array = this.arrays[i]
      if (array === undefined) break
      const to = (this.offsets[i] ?? 0) + skip
      const amount = Math.min(size - skip, length - done)
      copyBytes(source, from + done, array, to, amount)
      done += amount
      skip = 0
    }
    return done
  }
}

/** Below this many bytes a loop costs less than a view. */
const COPY_LOOP_MAX = 32

/** Copies `length` bytes, which are there in both arrays. */
export const copyBytes = (
  source: Uint8Array,
  from: number,
  target: Uint8Array,
  to: number,
  length: number
): void => {
  if (length > COPY_LOOP_MAX) {
    target.set(source.subarray(from, from + length), to)
    return
  }
  for (let i = 0; i < length; i++) target[to + i] = source[from + i] ?? 0
}
