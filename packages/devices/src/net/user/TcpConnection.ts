/**
 * One TCP connection of the guest that ends here (RFC 9293): its state, as plain data, and what each event makes of it.
 *
 * Nothing is sent by itself: {@link TcpConnection.take} says what the next segment is when there is room for one, so what waits is
 * bounded by windows and not by a queue of frames. Time comes in as a number of milliseconds.
 */
import { ByteQueue } from "./ByteQueue.ts"
import { Congestion, DUPLICATES_MAX } from "./Congestion.ts"
import { RetransmitTimer } from "./RetransmitTimer.ts"
import { SegmentHold } from "./SegmentHold.ts"
import {
  sequenceAdd,
  sequenceDistance,
  TCP_ACK,
  TCP_DEFAULT_MSS,
  TCP_FIN,
  TCP_PSH,
  TCP_RST,
  TCP_SYN,
  type TcpHeader
} from "./TcpHeader.ts"
import {
  TCP_KEEPALIVE,
  TCP_MSS_MIN,
  TCP_OPENING_MAX,
  TCP_RETRIES_MAX,
  TCP_SYN_RETRIES_MAX,
  TCP_TIME_WAIT,
  TCP_WINDOW_SCALE,
  type TcpLimits,
  type TcpPeer,
  type TcpPlan,
  TcpState
} from "./TcpState.ts"

const NOTHING: TcpPeer = {
  write: () => {},
  end: () => {},
  reset: () => {},
  pause: () => {},
  resume: () => {}
}

/** A connection between the guest and a peer on the host. */
export class TcpConnection {
  state: number
  /** When {@link tick} is to be called, or Infinity. */
  deadline = Number.POSITIVE_INFINITY

  readonly #limits: TcpLimits
  #peer: TcpPeer = NOTHING
  readonly #queue = new ByteQueue()
  readonly #hold = new SegmentHold()
  readonly #timer = new RetransmitTimer()

  /** First sequence number of this side. */
  readonly #initial: number
  /** Sequence number of the first byte in the queue. */
  #dataStart: number
  #unacknowledged: number
  #next: number
  #highest: number
  #sendWindow = 0
  #windowSequence = 0
  #windowAcknowledgment = 0
  #mss = TCP_DEFAULT_MSS
  #peerScale = 0
  #scale: number
  readonly #congestion: Congestion
  /** The segment at {@link #unacknowledged} is to be sent again, out of turn. */
  #repeat = false
  /** One byte more than the window allows is to be sent. */
  #force = false
  /** The host has no more bytes. */
  #finQueued = false
  #finAcknowledged = false
  /** Whether this side's end was told after that of the guest: its acknowledgment of the one is that of the other. */
  #endedLast = false

  #receiveNext = 0
  /** What has been promised to the guest: it may send up to here. */
  #receiveEdge = 0
  #finReceived = false
  /** Bytes given to the peer that it has not passed on. */
  #pending = 0
  #acknowledge = false
  /** Repetitions of the last acknowledgment that are owed for segments that came before their turn. */
  #duplicates = 0
  #paused = false
  #keepalive = false
  #heard = 0
  /** Whether {@link deadline} is that of a repetition. */
  #timing = false

  /** A connection that the guest asks for, when `syn` is given, or that the host asks for. */
  constructor(limits: TcpLimits, initial: number, now: number, syn?: TcpHeader) {
    this.#limits = limits
    this.#initial = initial
    this.#dataStart = sequenceAdd(initial, 1)
    this.#unacknowledged = initial
    this.#next = initial
    this.#highest = initial
    this.#congestion = new Congestion(limits.buffer)
    this.#scale = TCP_WINDOW_SCALE
    this.#heard = now
    if (syn === undefined) {
      this.state = TcpState.SYN_SENT
    } else {
      this.state = TcpState.OPENING
      this.#takeSyn(syn)
      this.deadline = now + TCP_OPENING_MAX
    }
  }

  /** The queue that {@link TcpPlan.offset} refers to. */
  get queue(): ByteQueue {
    return this.#queue
  }

  /** The segment size towards the guest. */
  get mss(): number {
    return this.#mss
  }

  /** Bytes that wait for the guest, for the host, and for their turn. */
  get buffered(): number {
    return this.#queue.length + this.#pending + this.#hold.length
  }

  /** Whether this connection is over for the host: nothing has to be told to the peer any more. */
  get isOver(): boolean {
    return this.state >= TcpState.TIME_WAIT
  }

  /** The peer of a connection, before anything is known of it. */
  attach(peer: TcpPeer): void {
    this.#peer = peer
  }

  /** The host has connected: the guest is told. */
  opened(now: number): void {
    if (this.state !== TcpState.OPENING) return
    this.state = TcpState.SYN_RECEIVED
    this.#heard = now
    this.deadline = Number.POSITIVE_INFINITY
  }

  /** Bytes have come from the host. */
  hostData(bytes: Uint8Array, now: number): void {
    if (this.isOver || this.#finQueued) return
    this.#queue.push(bytes)
    if (this.state === TcpState.OPEN) this.#setDeadline(now, false)
    if (!this.#paused && this.#queue.length >= this.#limits.buffer) {
      this.#paused = true
      this.#peer.pause()
    }
  }

  /** The host will send no more. */
  hostEnd(): void {
    if (!this.isOver) this.#finQueued = true
  }

  /** The host has passed on `bytes` of what was written to it. */
  hostWritten(bytes: number): void {
    this.#pending = Math.max(0, this.#pending - bytes)
    if (this.state !== TcpState.OPEN || this.#finReceived) return
    const gain = sequenceDistance(this.#windowEdge(), this.#receiveEdge)
    const open = sequenceDistance(this.#receiveEdge, this.#receiveNext)
    if (gain >= this.#limits.buffer / 2 || (open < this.#mss && gain >= this.#mss)) this.#acknowledge = true
  }

  /** Ends a connection at once. The peer is told; what the guest is told is the caller's. */
  abort(): void {
    if (this.isOver) return
    this.#close()
    this.#peer.reset()
  }

  /** The sequence number for a RST that the guest accepts. */
  get resetSequence(): number {
    return this.#next
  }

  /** What the guest is told with a RST or an ACK: the next byte that is expected of it. */
  get acknowledgment(): number {
    return this.#receiveNext
  }

  /** Whether a SYN may begin a new connection in the place of this one (RFC 9293, section 3.10.7.4). */
  canBeReplacedBy(header: TcpHeader): boolean {
    return this.state === TcpState.CLOSED ||
      (this.state === TcpState.TIME_WAIT && sequenceDistance(header.sequence, this.#receiveNext) > 0)
  }

  /**
   * Takes a segment of the guest. `payload` is a copy of its own, or empty. Returns whether the guest is to be answered with a
   * RST for it.
   */
  receive(header: TcpHeader, payload: Uint8Array, now: number): boolean {
    if (this.state === TcpState.CLOSED) return true
    if (this.state === TcpState.OPENING) {
      if ((header.flags & TCP_RST) !== 0 && header.sequence === this.#receiveNext) this.abort()
      return false
    }
    if (this.state === TcpState.SYN_SENT) return this.#receiveFirst(header, now)
    this.#heard = now
    if (this.state === TcpState.SYN_RECEIVED && (header.flags & (TCP_SYN | TCP_ACK | TCP_RST)) === TCP_SYN) {
      // The guest repeats its question: the answer was lost.
      this.#next = this.#initial
      return false
    }
    const fin = (header.flags & TCP_FIN) !== 0
    if (!this.#isAcceptable(header.sequence, payload.length + (fin ? 1 : 0))) {
      if ((header.flags & TCP_RST) === 0) this.#acknowledge = true
      // An acknowledgment counts even when the window has no room for what came with it.
      if ((header.flags & (TCP_RST | TCP_SYN | TCP_ACK)) === TCP_ACK && header.sequence === this.#receiveNext) {
        this.#receiveAcknowledgment(header, true, now)
      }
      return false
    }
    if ((header.flags & TCP_RST) !== 0) {
      // RFC 5961, section 3.2: only the exact number ends a connection.
      if (header.sequence === this.#receiveNext) this.abort()
      else this.#acknowledge = true
      return false
    }
    if ((header.flags & TCP_SYN) !== 0) {
      this.#acknowledge = true
      return false
    }
    if ((header.flags & TCP_ACK) === 0) return false
    if (this.state === TcpState.SYN_RECEIVED) {
      if (!this.#isOfMine(header.acknowledgment)) return true
      this.state = TcpState.OPEN
      this.#takeWindow(header)
    }
    this.#receiveAcknowledgment(header, payload.length > 0 || fin, now)
    if (this.state === TcpState.TIME_WAIT) {
      if (fin) this.deadline = now + TCP_TIME_WAIT
    } else if (this.state === TcpState.OPEN && !this.#finReceived) {
      this.#receivePayload(header.sequence, payload, fin)
    }
    if (this.state === TcpState.OPEN && this.#finReceived && this.#finAcknowledged) this.#finish(now)
    return false
  }

  /** Whether there is something to send now. */
  get wants(): boolean {
    if (this.#acknowledge || this.#keepalive) return true
    if (this.state === TcpState.SYN_RECEIVED || this.state === TcpState.SYN_SENT) return this.#next === this.#initial
    return this.state === TcpState.OPEN &&
      (this.#duplicates > 0 || this.#repeat || this.#force || this.#sendable(1) > 0 || this.#finIsNext)
  }

  /** Bytes of payload of the next segment when `payloadMax` are allowed, which may be many segments. */
  next(payloadMax: number): number {
    if (this.state !== TcpState.OPEN || this.#duplicateIsNext) return 0
    if (this.#repeat) return Math.min(payloadMax, this.#repeatable)
    let length = this.#sendable(1)
    if (this.#force) length = Math.max(length, Math.min(1, this.#sendable(0)))
    if (length > payloadMax) length = payloadMax
    if (length > this.#mss && length < this.#sendable(0)) length -= length % this.#mss
    return length
  }

  /**
   * Says what to send next, at most `payloadMax` bytes of payload, and counts it as sent. `payloadMax` may be many segments: then
   * the payload is whole ones or all there is. Returns whether there is something.
   */
  take(plan: TcpPlan, payloadMax: number, now: number): boolean {
    if (!this.wants) return false
    plan.windowScale = -1
    plan.offset = 0
    plan.length = 0
    plan.flags = TCP_ACK
    plan.sequence = this.#next
    if (this.#duplicateIsNext) {
      this.#takeDuplicate(plan)
      return true
    }
    if (this.state === TcpState.SYN_RECEIVED || this.state === TcpState.SYN_SENT) this.#takeSynSegment(plan, now)
    else if (this.state === TcpState.OPEN) this.#takeSegment(plan, payloadMax, now)
    this.#acknowledge = false
    this.#keepalive = false
    plan.acknowledgment = (plan.flags & TCP_ACK) === 0 ? 0 : this.#receiveNext
    plan.window = this.#promiseWindow((plan.flags & TCP_SYN) !== 0)
    this.#setDeadline(now, false)
    return true
  }

  /** A deadline has come. Returns whether the guest is to be told that the connection was given up. */
  tick(now: number): boolean {
    if (now < this.deadline) return false
    if (this.state === TcpState.TIME_WAIT || this.state === TcpState.CLOSED) {
      this.#close()
      return false
    }
    if (this.state === TcpState.OPENING) {
      this.abort()
      return true
    }
    this.#timing = false
    if (this.wants) {
      // The guest has not taken what there is for it: that is not silence.
      this.#setDeadline(now, true)
      return false
    }
    const limit = this.state === TcpState.OPEN ? TCP_RETRIES_MAX : TCP_SYN_RETRIES_MAX
    if (this.#timer.unanswered >= limit) {
      this.abort()
      return true
    }
    this.#timer.backOff()
    if (this.state !== TcpState.OPEN) {
      this.#next = this.#initial
    } else if (this.#highest !== this.#unacknowledged || this.#sendable(0) > 0) {
      const flight = sequenceDistance(this.#highest, this.#unacknowledged)
      if (this.#sendWindow > 0) this.#congestion.timeout(flight, this.#mss)
      else this.#congestion.forget()
      this.#next = this.#unacknowledged
      this.#repeat = false
      this.#force = true
    } else {
      this.#keepalive = true
    }
    this.deadline = Number.POSITIVE_INFINITY
    return false
  }

  #takeSyn(syn: TcpHeader): void {
    this.#receiveNext = sequenceAdd(syn.sequence, 1)
    this.#receiveEdge = this.#receiveNext
    this.#mss = Math.min(this.#limits.mss, Math.max(TCP_MSS_MIN, syn.mss === 0 ? TCP_DEFAULT_MSS : syn.mss))
    if (syn.windowScale < 0) this.#scale = 0
    else this.#peerScale = syn.windowScale
    this.#sendWindow = syn.window
    this.#windowSequence = syn.sequence
  }

  /** What comes while the guest has not answered yet to a connection that the host asks for. */
  #receiveFirst(header: TcpHeader, now: number): boolean {
    const isAcknowledgment = (header.flags & TCP_ACK) !== 0
    if (isAcknowledgment && !this.#isOfMine(header.acknowledgment)) return (header.flags & TCP_RST) === 0
    if ((header.flags & TCP_RST) !== 0) {
      if (isAcknowledgment) this.abort()
      return false
    }
    // Both opening at once cannot happen: this side's port was chosen for this connection.
    if ((header.flags & TCP_SYN) === 0 || !isAcknowledgment) return false
    this.#heard = now
    this.#takeSyn(header)
    this.state = TcpState.OPEN
    this.#advance(header.acknowledgment, now)
    this.#takeWindow(header)
    this.#sendWindow = header.window
    this.#acknowledge = true
    this.#setDeadline(now, true)
    return false
  }

  /** Whether an acknowledgment is of something that was sent and not acknowledged yet. */
  #isOfMine(acknowledgment: number): boolean {
    return sequenceDistance(acknowledgment, this.#unacknowledged) > 0 &&
      sequenceDistance(acknowledgment, this.#highest) <= 0
  }

  #isAcceptable(sequence: number, length: number): boolean {
    const from = sequenceDistance(sequence, this.#receiveNext)
    const window = sequenceDistance(this.#receiveEdge, this.#receiveNext)
    if (length === 0) return from === 0 || (from > 0 && from < window)
    return window > 0 && from < window && from + length > 0
  }

  #takeWindow(header: TcpHeader): void {
    const window = header.window * 2 ** this.#peerScale
    // What was sent into a closed window was not taken.
    if (this.#sendWindow === 0 && window > 0) this.#next = this.#unacknowledged
    this.#sendWindow = window
    this.#windowSequence = header.sequence
    this.#windowAcknowledgment = header.acknowledgment
  }

  #receiveAcknowledgment(header: TcpHeader, carries: boolean, now: number): void {
    const acknowledged = header.acknowledgment
    if (sequenceDistance(acknowledged, this.#highest) > 0) {
      this.#acknowledge = true
      return
    }
    const progress = sequenceDistance(acknowledged, this.#unacknowledged)
    if (progress < 0) return
    this.#timer.heard()
    const window = header.window * 2 ** this.#peerScale
    if (progress > 0) {
      this.#advance(acknowledged, now)
    } else if (!carries && window === this.#sendWindow && this.#highest !== this.#unacknowledged && window > 0) {
      const flight = sequenceDistance(this.#highest, this.#unacknowledged)
      if (this.#congestion.duplicate(flight, this.#highest, this.#mss)) {
        this.#repeat = true
        this.#timer.forgetSample()
      }
    }
    const newer = sequenceDistance(header.sequence, this.#windowSequence)
    if (newer > 0 || (newer === 0 && sequenceDistance(acknowledged, this.#windowAcknowledgment) >= 0)) {
      this.#takeWindow(header)
    }
    this.#setDeadline(now, progress > 0)
  }

  /** Something was acknowledged that had not been before. */
  #advance(acknowledged: number, now: number): void {
    this.#timer.acknowledged(acknowledged, now)
    this.#unacknowledged = acknowledged
    if (sequenceDistance(acknowledged, this.#next) > 0) this.#next = acknowledged
    this.#force = false
    const bytes = Math.min(Math.max(0, sequenceDistance(acknowledged, this.#dataStart)), this.#queue.length)
    this.#queue.drop(bytes)
    if (this.#finQueued && sequenceDistance(acknowledged, this.#dataStart) > bytes) this.#finAcknowledged = true
    this.#dataStart = sequenceAdd(this.#dataStart, bytes)
    this.#repeat = this.#congestion.advance(acknowledged, bytes, this.#mss, this.#limits.buffer)
    if (this.#paused && this.#queue.length <= this.#limits.buffer / 2) {
      this.#paused = false
      this.#peer.resume()
    }
  }

  #receivePayload(sequence: number, payload: Uint8Array, fin: boolean): void {
    if (payload.length === 0 && !fin) return
    const ahead = sequenceDistance(sequence, this.#receiveNext)
    const window = sequenceDistance(this.#receiveEdge, this.#receiveNext)
    const from = Math.max(0, -ahead)
    const to = Math.min(payload.length, window - ahead)
    const whole = to === payload.length
    if (ahead > 0) {
      // One for each (RFC 5681, section 4.2), as far as the guest counts them.
      const segments = Math.max(1, Math.ceil(payload.length / this.#limits.mss))
      this.#duplicates = Math.min(DUPLICATES_MAX, this.#duplicates + segments)
      this.#hold.keep(sequence, payload.subarray(0, to), fin && whole, this.#receiveNext, this.#limits.buffer)
      return
    }
    this.#acknowledge = true
    this.#duplicates = 0
    this.#deliver(payload.subarray(from, to))
    let end = fin && whole
    while (!end && this.#hold.take(this.#receiveNext)) {
      this.#deliver(this.#hold.bytes)
      end = this.#hold.fin
    }
    if (!end) return
    this.#hold.clear()
    this.#finReceived = true
    this.#receiveNext = sequenceAdd(this.#receiveNext, 1)
    if (sequenceDistance(this.#receiveEdge, this.#receiveNext) < 0) this.#receiveEdge = this.#receiveNext
    this.#peer.end()
  }

  #deliver(bytes: Uint8Array): void {
    if (bytes.length === 0) return
    this.#receiveNext = sequenceAdd(this.#receiveNext, bytes.length)
    this.#pending += bytes.length
    this.#peer.write(bytes)
  }

  /** Both directions are over. Who did not end last remembers the connection for a while, so that it can acknowledge again. */
  #finish(now: number): void {
    if (this.#endedLast) {
      this.#close()
      return
    }
    this.state = TcpState.TIME_WAIT
    this.#queue.clear()
    this.#hold.clear()
    this.deadline = now + TCP_TIME_WAIT
  }

  #close(): void {
    this.state = TcpState.CLOSED
    this.#queue.clear()
    this.#hold.clear()
    this.#acknowledge = false
    this.#duplicates = 0
    this.#keepalive = false
    this.deadline = Number.POSITIVE_INFINITY
  }

  /** Bytes of the queue that the windows allow to be sent now. A small piece waits, if it is not the last, for `least`. */
  #sendable(least: number): number {
    const sent = sequenceDistance(this.#next, this.#dataStart)
    const left = this.#queue.length - sent
    if (left <= 0) return 0
    if (least === 0) return left
    const flight = sequenceDistance(this.#next, this.#unacknowledged)
    const usable = Math.min(this.#sendWindow, this.#congestion.window) - flight
    if (usable <= 0) return 0
    // Silly windows (RFC 9293, section 3.8.6.2.1): a piece smaller than a segment waits while others are on their way.
    return usable < left && usable < this.#mss && flight > 0 ? 0 : Math.min(usable, left)
  }

  get #finIsNext(): boolean {
    return this.#finQueued && !this.#finAcknowledged &&
      sequenceDistance(this.#next, this.#dataStart) === this.#queue.length
  }

  #takeSynSegment(plan: TcpPlan, now: number): void {
    const isFirst = this.#next === this.#initial
    if (this.state === TcpState.SYN_SENT) plan.flags = TCP_SYN
    else if (isFirst) plan.flags = TCP_SYN | TCP_ACK
    if (!isFirst) return
    plan.sequence = this.#initial
    plan.windowScale = this.state === TcpState.SYN_SENT ? TCP_WINDOW_SCALE : this.#scale === 0 ? -1 : this.#scale
    this.#sent(sequenceAdd(this.#initial, 1), now)
  }

  #takeSegment(plan: TcpPlan, payloadMax: number, now: number): void {
    if (this.#repeat) {
      this.#repeat = false
      this.#takeRepeated(plan, payloadMax)
      return
    }
    const length = this.next(payloadMax)
    this.#force = false
    if (length > 0) {
      plan.offset = sequenceDistance(this.#next, this.#dataStart)
      plan.length = length
      if (plan.offset + length === this.#queue.length) plan.flags |= TCP_PSH
      this.#sent(sequenceAdd(this.#next, length), now)
    }
    if (this.#finIsNext) {
      plan.flags |= TCP_FIN
      const end = sequenceAdd(this.#next, 1)
      if (sequenceDistance(end, this.#highest) > 0) this.#endedLast = this.#finReceived
      this.#sent(end, now)
      return
    }
    // A probe is old by one byte, so that it has to be answered (RFC 9293, section 3.8.4).
    if (this.#keepalive && length === 0) plan.sequence = sequenceAdd(this.#unacknowledged, -1)
  }

  /** Whether the next segment is no more than a repetition of the last acknowledgment, which goes before all repetitions of it. */
  get #duplicateIsNext(): boolean {
    return this.state === TcpState.OPEN && this.#duplicates > 0 && !this.#acknowledge
  }

  /** Repeats the last acknowledgment to the letter: with another window the guest would not count it. */
  #takeDuplicate(plan: TcpPlan): void {
    this.#duplicates--
    plan.sequence = this.#highest
    plan.acknowledgment = this.#receiveNext
    plan.window = this.#openWindow
  }

  /** Sends the first segment that is not acknowledged again. */
  #takeRepeated(plan: TcpPlan, payloadMax: number): void {
    const flight = sequenceDistance(this.#highest, this.#unacknowledged)
    const length = Math.min(payloadMax, this.#repeatable)
    plan.sequence = this.#unacknowledged
    plan.length = length
    if (this.#finQueued && length === this.#queue.length && flight > length) plan.flags |= TCP_FIN
    this.#timer.forgetSample()
  }

  get #repeatable(): number {
    return Math.min(this.#mss, this.#queue.length, sequenceDistance(this.#highest, this.#unacknowledged))
  }

  #sent(next: number, now: number): void {
    this.#next = next
    if (sequenceDistance(next, this.#highest) <= 0) {
      this.#timer.forgetSample()
      return
    }
    this.#timer.sent(next, now)
    this.#highest = next
  }

  /** Up to where the guest may send. */
  #windowEdge(): number {
    const room = Math.max(0, this.#limits.buffer - this.#pending)
    const limit = this.#scale === 0 ? Math.min(0xffff, room) : room - room % 2 ** this.#scale
    return sequenceAdd(this.#receiveNext, limit)
  }

  /** The window to say, which never takes back what was promised before. */
  #promiseWindow(isSyn: boolean): number {
    if (isSyn) {
      const window = Math.min(0xffff, this.#limits.buffer)
      if (this.state === TcpState.SYN_RECEIVED) this.#receiveEdge = sequenceAdd(this.#receiveNext, window)
      return window
    }
    const edge = this.#windowEdge()
    if (sequenceDistance(edge, this.#receiveEdge) > 0) this.#receiveEdge = edge
    return this.#openWindow
  }

  /** The window that was promised last, as a segment says it. */
  get #openWindow(): number {
    return Math.min(0xffff, Math.max(0, sequenceDistance(this.#receiveEdge, this.#receiveNext)) >>> this.#scale)
  }

  /** Starts the timer of repetitions when it has to run, anew with `restart`, or that of the question whether the guest is there. */
  #setDeadline(now: number, restart: boolean): void {
    if (this.state === TcpState.TIME_WAIT || this.state === TcpState.CLOSED || this.state === TcpState.OPENING) return
    if (this.#highest !== this.#unacknowledged || (this.state === TcpState.OPEN && this.#sendable(0) > 0)) {
      if (this.#timing && !restart) return
      this.#timing = true
      this.deadline = now + this.#timer.timeout
      return
    }
    this.#timing = false
    this.deadline = this.#timer.unanswered > 0 ? now + this.#timer.timeout : this.#heard + TCP_KEEPALIVE
  }
}
