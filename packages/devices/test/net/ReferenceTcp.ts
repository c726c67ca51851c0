/**
 * A TCP of the guest for tests: go-back-N, nothing kept out of order, a receive buffer that is read at the test's pace. Slow and
 * right, and it shares no code with what is tested.
 */
import { ACK, FIN, RST, type Segment, type SegmentFields, SYN, synOptions } from "./ReferenceGuest.ts"

const TIMEOUT = 400
const RETRIES_MAX = 40

const minus = (a: number, b: number): number => (a - b) | 0
const plus = (a: number, b: number): number => (a + b) >>> 0

export interface ReferenceOptions {
  readonly port: number
  readonly remote: number
  readonly remotePort: number
  readonly initial: number
  readonly mss: number
  /** -1 offers no window scale. */
  readonly scale: number
  /** Bytes that the receiver has room for. */
  readonly room: number
  /** Payload bytes of a segment that is sent; more than the MSS is what segmentation offload makes. */
  readonly segment: number
  readonly data: Uint8Array
  /** Waits for the other side to ask. */
  readonly passive?: boolean
}

export class ReferenceTcp {
  state: "listening" | "asking" | "answering" | "open" | "reset" | "closed" = "asking"
  readonly received: Array<number> = []
  /** Bytes received that nobody has read. */
  unread = 0
  /** The other side has ended. */
  ended = false
  deadline = Number.POSITIVE_INFINITY
  readonly #options: ReferenceOptions
  #unacknowledged: number
  #next: number
  #highest: number
  #window = 0
  #scaled = false
  #peerScale = 0
  #peerMss = 536
  #expected = 0
  #acknowledge = false
  #retries = 0
  /** Whether the end of the data may be told. */
  mayEnd = true

  constructor(options: ReferenceOptions) {
    this.#options = options
    this.#unacknowledged = options.initial
    this.#next = options.initial
    this.#highest = options.initial
    if (options.passive === true) this.state = "listening"
  }

  /** Everything that was to be sent was acknowledged, the end as well. */
  get done(): boolean {
    return minus(this.#unacknowledged, plus(this.#options.initial, 1 + this.#options.data.length)) >= 1
  }

  get #room(): number {
    return this.#options.room - this.unread
  }

  /** The application reads. */
  read(count: number): void {
    const before = this.#room
    this.unread -= Math.min(count, this.unread)
    if (!this.ended && this.#room > before && before < this.#options.mss) this.#acknowledge = true
  }

  abort(): SegmentFields {
    this.state = "reset"
    this.deadline = Number.POSITIVE_INFINITY
    return this.#segment(RST | ACK, this.#next)
  }

  receive(segment: Segment, now: number): void {
    const flags = segment.flags
    if (this.state === "reset" || this.state === "closed") return
    if ((flags & RST) !== 0) {
      const fits = this.state === "asking" ? segment.acknowledgment === this.#next : segment.sequence === this.#expected
      if (fits) {
        this.state = "reset"
        this.deadline = Number.POSITIVE_INFINITY
      }
      return
    }
    if (this.state === "listening") {
      if ((flags & (SYN | ACK)) !== SYN) return
      this.#takeSyn(segment)
      this.state = "answering"
      return
    }
    if (this.state === "asking") {
      if ((flags & (SYN | ACK)) !== (SYN | ACK) || minus(segment.acknowledgment, this.#next) !== 0) return
      this.#takeSyn(segment)
      this.state = "open"
      this.#advance(segment, now)
      this.#window = segment.window
      this.#acknowledge = true
      return
    }
    if ((flags & SYN) !== 0) {
      this.#acknowledge = true
      if (this.state === "answering") this.#next = this.#options.initial
      return
    }
    if ((flags & ACK) === 0) return
    if (minus(segment.acknowledgment, this.#highest) > 0) throw new Error("acknowledges what was not sent")
    if (this.state === "answering" && minus(segment.acknowledgment, this.#unacknowledged) > 0) this.state = "open"
    this.#advance(segment, now)
    this.#window = segment.window * (this.#scaled ? 2 ** this.#peerScale : 1)
    const fin = (flags & FIN) !== 0
    if (segment.payload.length === 0 && !fin) {
      // A probe is old by one byte.
      if (minus(segment.sequence, this.#expected) < 0) this.#acknowledge = true
      return
    }
    this.#acknowledge = true
    const old = minus(this.#expected, segment.sequence)
    if (old < 0 || old > segment.payload.length || this.ended) return
    const fresh = segment.payload.slice(old, old + this.#room)
    for (const byte of fresh) this.received.push(byte)
    this.unread += fresh.length
    this.#expected = plus(this.#expected, fresh.length)
    if (fin && old + fresh.length === segment.payload.length) {
      this.#expected = plus(this.#expected, 1)
      this.ended = true
    }
  }

  /** What is to be sent now. */
  poll(now: number): Array<SegmentFields> {
    const segments: Array<SegmentFields> = []
    if (this.state === "reset" || this.state === "closed" || this.state === "listening") return segments
    if (now >= this.deadline) {
      if (++this.#retries > RETRIES_MAX) throw new Error("the guest gives up")
      this.#next = this.#unacknowledged
      this.deadline = Number.POSITIVE_INFINITY
      if (this.#window === 0 && this.state === "open") this.#window = 1
    }
    const { data, initial, mss, scale, segment } = this.#options
    const options = synOptions(mss, scale).slice(0, scale < 0 ? 4 : 8)
    if (this.state === "asking" || this.state === "answering") {
      if (this.#next === initial) {
        const flags = this.state === "asking" ? SYN : SYN | ACK
        const withScale = this.state === "asking" || this.#scaled ? options : options.slice(0, 4)
        segments.push({ ...this.#segment(flags, initial), options: withScale })
        this.#sent(plus(initial, 1), now)
        this.#acknowledge = false
      }
    } else {
      for (;;) {
        const offset = minus(this.#next, initial) - 1
        const flight = minus(this.#next, this.#unacknowledged)
        const length = Math.min(data.length - offset, segment, this.#window - flight)
        const last = offset + Math.max(0, length) === data.length && this.mayEnd
        if (length <= 0 && !(last && offset === data.length)) break
        const size = Math.max(0, length)
        segments.push({
          ...this.#segment(ACK | (last ? FIN : 0), this.#next),
          payload: data.slice(offset, offset + size)
        })
        this.#acknowledge = false
        this.#sent(plus(this.#next, size + (last ? 1 : 0)), now)
        if (last) break
      }
    }
    if (this.#acknowledge) {
      segments.push(this.#segment(ACK, this.#next))
      this.#acknowledge = false
    }
    const left = this.state === "open" && !this.done && (this.mayEnd || minus(this.#next, initial) - 1 < data.length)
    const waits = this.#highest !== this.#unacknowledged || left
    if (!waits) this.deadline = Number.POSITIVE_INFINITY
    else if (this.deadline === Number.POSITIVE_INFINITY) this.deadline = now + TIMEOUT
    return segments
  }

  get peerMss(): number {
    return this.#peerMss
  }

  #takeSyn(segment: Segment): void {
    this.#expected = plus(segment.sequence, 1)
    this.#peerMss = segment.mss
    this.#scaled = segment.scale >= 0 && this.#options.scale >= 0
    this.#peerScale = segment.scale
    if (segment.scale >= 0 && this.#options.passive !== true && this.#options.scale < 0) {
      throw new Error("a window scale that was not offered")
    }
    this.#window = segment.window
  }

  #advance(segment: Segment, now: number): void {
    if (minus(segment.acknowledgment, this.#unacknowledged) <= 0) return
    this.#unacknowledged = segment.acknowledgment
    if (minus(this.#next, this.#unacknowledged) < 0) this.#next = this.#unacknowledged
    this.#retries = 0
    this.deadline = now + TIMEOUT
  }

  #sent(next: number, now: number): void {
    this.#next = next
    if (minus(next, this.#highest) > 0) this.#highest = next
    if (this.deadline === Number.POSITIVE_INFINITY) this.deadline = now + TIMEOUT
  }

  #segment(flags: number, sequence: number): SegmentFields {
    const { port, remote, remotePort, scale } = this.#options
    const shift = this.#scaled && (flags & SYN) === 0 ? scale : 0
    return {
      sourcePort: port,
      destination: remote,
      destinationPort: remotePort,
      sequence,
      acknowledgment: (flags & ACK) === 0 ? 0 : this.#expected,
      flags,
      window: Math.min(0xffff, this.#room >>> shift)
    }
  }
}
