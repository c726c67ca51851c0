/** Packets of the socket device: `struct virtio_vsock_hdr` and its values (virtio 1.3, section 5.10.6). */

/** Size of the header in bytes. */
export const HEADER_SIZE = 44

/** `type`: bytes in order. */
export const VIRTIO_VSOCK_TYPE_STREAM = 1
/** `type`: messages with boundaries. */
export const VIRTIO_VSOCK_TYPE_SEQPACKET = 2

/** `op`. */
export const Op = {
  /** Asks for a connection. */
  REQUEST: 1,
  /** Accepts it. */
  RESPONSE: 2,
  /** Ends it at once, or refuses it. */
  RST: 3,
  /** Ends one direction or both. */
  SHUTDOWN: 4,
  /** Carries data. */
  RW: 5,
  /** Tells the sender's credit. */
  CREDIT_UPDATE: 6,
  /** Asks for a CREDIT_UPDATE. */
  CREDIT_REQUEST: 7
} as const

/** The highest `op` that is defined. */
export const OP_MAX = Op.CREDIT_REQUEST

/** `flags` of SHUTDOWN: the sender receives no more. */
export const VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE = 1
/** `flags` of SHUTDOWN: the sender sends no more. */
export const VIRTIO_VSOCK_SHUTDOWN_F_SEND = 2
/** Both directions. */
export const SHUTDOWN_BOTH = VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE | VIRTIO_VSOCK_SHUTDOWN_F_SEND

/** `flags` of RW of a seqpacket: the last bytes of a message. */
export const VIRTIO_VSOCK_SEQ_EOM = 1
/** `flags` of RW of a seqpacket: the last bytes of a record. */
export const VIRTIO_VSOCK_SEQ_EOR = 2

/** A header outside guest memory: read once, or about to be written. All numbers are unsigned. */
export class VsockHeader {
  /** The header's bytes. */
  readonly bytes = new Uint8Array(HEADER_SIZE)
  readonly #view = new DataView(this.bytes.buffer)

  /** Low half of `src_cid`. */
  get srcCid(): number {
    return this.#view.getUint32(0, true)
  }
  /** Low half of `dst_cid`. */
  get dstCid(): number {
    return this.#view.getUint32(8, true)
  }
  /** Whether both context IDs have 32 bits, as all that exist have. */
  get hasShortCids(): boolean {
    return this.#view.getUint32(4, true) === 0 && this.#view.getUint32(12, true) === 0
  }
  get srcPort(): number {
    return this.#view.getUint32(16, true)
  }
  get dstPort(): number {
    return this.#view.getUint32(20, true)
  }
  /** Bytes of data after the header. */
  get len(): number {
    return this.#view.getUint32(24, true)
  }
  set len(value: number) {
    this.#view.setUint32(24, value, true)
  }
  get type(): number {
    return this.#view.getUint16(28, true)
  }
  get op(): number {
    return this.#view.getUint16(30, true)
  }
  get flags(): number {
    return this.#view.getUint32(32, true)
  }
  get bufAlloc(): number {
    return this.#view.getUint32(36, true)
  }
  get fwdCnt(): number {
    return this.#view.getUint32(40, true)
  }

  /** Sets everything but the credit, which becomes 0, as does `len`. */
  set(
    srcCid: number,
    srcPort: number,
    dstCid: number,
    dstPort: number,
    type: number,
    op: number,
    flags: number
  ): void {
    const view = this.#view
    view.setUint32(0, srcCid, true)
    view.setUint32(4, 0, true)
    view.setUint32(8, dstCid, true)
    view.setUint32(12, 0, true)
    view.setUint32(16, srcPort, true)
    view.setUint32(20, dstPort, true)
    view.setUint32(24, 0, true)
    view.setUint16(28, type, true)
    view.setUint16(30, op, true)
    view.setUint32(32, flags, true)
    this.setCredit(0, 0)
  }

  /** Sets `buf_alloc` and `fwd_cnt`. */
  setCredit(bufAlloc: number, fwdCnt: number): void {
    this.#view.setUint32(36, bufAlloc, true)
    this.#view.setUint32(40, fwdCnt, true)
  }
}
