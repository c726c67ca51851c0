/** A port of a network for tests: it keeps what a guest sends, and gives it what the test puts in. */
import type { NetPort, NetPortListener } from "@troupe/core/NetBackend"
import type { NetFrame } from "@troupe/core/NetFrame"
import { type FrameHeader, PLAIN_HEADER } from "@troupe/core/testing/drivers/NetDriver"

export interface FakeFrame {
  readonly bytes: Uint8Array
  readonly header: FrameHeader
}

export interface FakePortOptions {
  readonly mtu?: number
  readonly accepts?: number
  readonly delivers?: number
}

export class FakePort implements NetPort {
  readonly mtu: number
  readonly accepts: number
  readonly delivers: number
  linkUp = true
  allowed = 0
  /** How many more frames the guest may send. */
  room = Number.POSITIVE_INFINITY
  readonly sent: Array<FakeFrame> = []
  readonly waiting: Array<FakeFrame> = []
  discarded = 0
  flushes = 0
  #listener: NetPortListener | undefined
  #drained = false

  constructor(options: FakePortOptions = {}) {
    this.mtu = options.mtu ?? 1500
    this.accepts = options.accepts ?? 0
    this.delivers = options.delivers ?? 0
  }

  get listening(): boolean {
    return this.#listener !== undefined
  }

  listen(listener: NetPortListener | undefined): void {
    this.#listener = listener
  }

  allowOffloads(offloads: number): void {
    this.allowed = offloads
  }

  send(frame: NetFrame): boolean {
    if (this.room === 0) return false
    this.room--
    const bytes = new Uint8Array(frame.size)
    frame.read(0, bytes)
    const { checksumOffset, checksumStart, flags, gsoSize, gsoType, headerLength } = frame
    this.sent.push({ bytes, header: { flags, gsoType, headerLength, gsoSize, checksumStart, checksumOffset } })
    return true
  }

  receive(frame: NetFrame): number {
    const next = this.waiting[0]
    if (next === undefined) {
      this.#drained = true
      return 0
    }
    if (next.bytes.length > frame.size) return -next.bytes.length
    frame.write(0, next.bytes)
    Object.assign(frame, next.header)
    this.waiting.shift()
    return next.bytes.length
  }

  discard(): void {
    this.waiting.shift()
    this.discarded++
  }

  flush(): void {
    this.flushes++
  }

  /** Puts frames in for the guest. */
  put(bytes: Uint8Array, header: FrameHeader = PLAIN_HEADER): void {
    this.waiting.push({ bytes, header })
    if (!this.#drained) return
    this.#drained = false
    this.#listener?.readable()
  }

  /** Makes room for more frames of the guest. */
  makeRoom(frames: number): void {
    const full = this.room === 0
    this.room += frames
    if (full) this.#listener?.writable()
  }

  setLink(up: boolean): void {
    this.linkUp = up
    this.#listener?.linkChanged()
  }
}
