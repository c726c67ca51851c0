/**
 * One connection: its state, its credit in both directions, what waits to be read and what waits to be sent.
 *
 * Plain data that belongs to one session (`VsockSession.ts`), on whose turns packets come and go. The host's operations change
 * it between turns and ask for one. Nobody who waits is woken in the middle of a packet, but at the end of the turn.
 *
 * All counters of credit have 32 bits and wrap (virtio 1.3, section 5.10.6.3).
 */
import type { VsockAddress, VsockConnectionRequest, VsockType } from "@troupe/core/HostVsockEndpoint"
import { VsockError, type VsockStatus } from "@troupe/core/HostVsockEndpoint"
import * as Exit from "effect/Exit"
import { afterOp, type ConnectionState } from "./ConnectionState.ts"
import { Deque } from "./Deque.ts"
import { Inbox } from "./Inbox.ts"
import {
  Op,
  SHUTDOWN_BOTH,
  VIRTIO_VSOCK_SEQ_EOM,
  VIRTIO_VSOCK_SEQ_EOR,
  VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
  VIRTIO_VSOCK_SHUTDOWN_F_SEND,
  VIRTIO_VSOCK_TYPE_SEQPACKET,
  VIRTIO_VSOCK_TYPE_STREAM,
  type VsockHeader
} from "./VsockPacket.ts"

/** Bytes that a guest may send before its host reads them. It grows while the host keeps up. */
export const BUFFER_SIZE = 0x4_0000
/** The most that it grows to. */
export const BUFFER_SIZE_MAX = 0x40_0000
/** How long after the host has shut down receiving a guest may not have heard of it, in milliseconds. */
export const SHUTDOWN_LEEWAY_MILLIS = 1000
/** Messages of no bytes, which cost no credit, that may wait to be read beyond one for each byte that waits. */
export const EMPTY_MESSAGES_MAX = 1024
/** The most bytes of data in a packet: what Linux accepts in one. */
export const PACKET_DATA_MAX = 0x1_0000

/** What a connection needs of its session. */
export interface ConnectionOwner {
  /** The time in milliseconds. */
  readonly now: () => number
  /** The connection has something to send: a control packet, which goes before any data, or data. */
  readonly attention: (connection: VsockConnection, urgent: boolean) => void
  /** Runs a task at the end of the turn, or soon. */
  readonly later: (task: () => void) => void
  /** Whether another connection may have that many more bytes of credit. */
  readonly grow: (bytes: number) => boolean
  /** The connection is over; `reset` when the guest is to be told by a RST. */
  readonly over: (connection: VsockConnection, clean: boolean, reset: boolean) => void
  /** The connection waits for the guest's RST. */
  readonly closing: (connection: VsockConnection) => void
}

/** Somebody who waits. */
export type Waiter<A> = (exit: Exit.Exit<A, VsockError>) => void

/** Bytes that the host wants to send. */
export interface PendingWrite {
  readonly bytes: Uint8Array
  readonly done: Waiter<void>
  /** How many of them the guest has. */
  sent: number
}

/** Which control packets a connection has to send. */
const Control = { REQUEST: 1, RESPONSE: 2, CREDIT_UPDATE: 4, CREDIT_REQUEST: 8, SHUTDOWN: 16 } as const

const NOBODY: Array<() => void> = []

const unsigned = (value: number): number => value >>> 0

/** One connection between a guest and its host, or another guest. */
export class VsockConnection {
  readonly type: VsockType
  readonly local: VsockAddress
  readonly peer: VsockAddress
  readonly #owner: ConnectionOwner
  #state: ConnectionState
  /** Why it is over: the guest's data ends, or is cut off. */
  #isReset = false

  /** Control packets to send. */
  #control = 0
  /** Flags of all SHUTDOWNs: what the guest has said, what the host wants to say, and has said. */
  #guestShut = 0
  #hostShut = 0
  #hostShutSent = 0
  /** Until when data may still come although the host receives no more. */
  #leeway = Number.NEGATIVE_INFINITY

  readonly #inbox = new Inbox()
  /** Credit of the guest: what it was told, what it has sent and what of that was read. */
  bufAlloc = BUFFER_SIZE
  #received = 0
  #consumed = 0
  #reportedConsumed = 0
  #reportedBufAlloc = BUFFER_SIZE
  /** What was received when the buffer grew last. */
  #receivedAtGrowth = 0

  readonly #outbox = new Deque<PendingWrite>()
  /** Credit of the host: what the guest says, and what was sent. */
  #peerBufAlloc = 0
  #peerFwdCnt = 0
  #sent = 0
  /** The guest was asked for credit, and has not answered. */
  #creditAsked = false

  #readers: Array<() => void> = NOBODY
  #decided: Waiter<void> | undefined
  #overWaiters: Array<() => void> = NOBODY
  /** Whether the session has it in its queue of connections with control packets, or with data. */
  isUrgent = false
  isReady = false

  constructor(
    owner: ConnectionOwner,
    type: VsockType,
    local: VsockAddress,
    peer: VsockAddress,
    state: "GuestInitiated" | "ClientInitiated"
  ) {
    this.#owner = owner
    this.type = type
    this.local = local
    this.peer = peer
    this.#state = state
  }

  get state(): ConnectionState {
    return this.#state
  }

  get isOver(): boolean {
    return this.#state === "ShutdownClean" || this.#state === "ShutdownForced"
  }

  /** Bytes that have come, modulo 2^32. */
  get receivedBytes(): number {
    return this.#received
  }

  /** How much of its credit is beyond the first. */
  get grown(): number {
    return this.bufAlloc - BUFFER_SIZE
  }

  /** Bytes that were not read yet. */
  get unread(): number {
    return this.#inbox.length
  }

  /** The size of the memory that holds what was not read yet, in bytes. */
  get memory(): number {
    return this.#inbox.memory
  }

  /** What an acceptor is asked. */
  get request(): VsockConnectionRequest {
    return { srcCid: this.peer.cid, srcPort: this.peer.port, port: this.local.port, type: this.type }
  }

  // --- The guest's side: packets ---------------------------------------------------------------------------------------------

  /** Takes a packet of the guest; `data` fills a place with the packet's bytes. */
  receive(header: VsockHeader, length: number, data: (place: Uint8Array) => void): void {
    if (this.isOver) return
    const { op } = header
    const isStreamFlags = this.type === "stream" || op === Op.SHUTDOWN
    const flags = header.flags
    if ((flags & ~(isStreamFlags ? SHUTDOWN_BOTH : VIRTIO_VSOCK_SEQ_EOM | VIRTIO_VSOCK_SEQ_EOR)) !== 0) {
      return this.#force(true)
    }
    if (header.len !== length || (length > 0 && op !== Op.RW)) return this.#force(true)
    const before = this.#state
    const after = afterOp(before, op)
    if (after === "ShutdownForced") return this.#force(op !== Op.RST)
    if (after === "ShutdownClean") return this.#end("ShutdownClean", true, false)
    if (before === "ClientInitiatedShutdown") return
    if (before === "ClientInitiated" && op === Op.RESPONSE && (this.#control & Control.REQUEST) !== 0) {
      // An answer to a question that was not asked yet.
      return this.#force(true)
    }
    if (!this.#takeCredit(header.bufAlloc, header.fwdCnt)) return this.#force(true)
    this.#state = after
    if (op === Op.RESPONSE) {
      this.#decide(true)
      this.#wakeReader()
    }
    const wasShut = (this.#guestShut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) !== 0
    if (isStreamFlags && flags !== 0) this.#guestShuts(flags)
    if (after === "GuestInitiatedShutdown" || (op === Op.SHUTDOWN && this.#guestShut === SHUTDOWN_BOTH)) {
      this.#state = "GuestInitiatedShutdown"
      return this.#end("ShutdownClean", true, true)
    }
    if (op === Op.RW) {
      // Data on a packet that itself shuts down sending is the last; after that there is none.
      if (wasShut) return this.#force(true)
      return this.#receiveData(header, length, data)
    }
    if (op === Op.CREDIT_REQUEST) this.#want(Control.CREDIT_UPDATE)
  }

  #receiveData(header: VsockHeader, length: number, data: (place: Uint8Array) => void): void {
    if ((this.#hostShut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) !== 0) {
      if (this.#owner.now() > this.#leeway) return this.#force(true)
      this.#received = unsigned(this.#received + length)
      return this.#consume(length)
    }
    if (this.#inbox.length + length > this.bufAlloc) return this.#force(true)
    if (length === 0 && this.#inbox.messages >= this.#inbox.length + EMPTY_MESSAGES_MAX) return this.#force(true)
    if (length > 0) data(this.#inbox.append(length))
    this.#received = unsigned(this.#received + length)
    if (this.type === "seqpacket" && (header.flags & VIRTIO_VSOCK_SEQ_EOM) !== 0) this.#inbox.endMessage()
    this.#wakeReader()
  }

  /** What the guest says about its buffer. Returns `false` when it claims to have read what was never sent. */
  #takeCredit(bufAlloc: number, fwdCnt: number): boolean {
    const inFlight = unsigned(this.#sent - this.#peerFwdCnt)
    if (unsigned(fwdCnt - this.#peerFwdCnt) > inFlight) return false
    this.#peerFwdCnt = fwdCnt
    this.#peerBufAlloc = bufAlloc
    // Asked again while it has no room, a guest whose program does not read would be asked for ever.
    if (this.#room > 0) this.#creditAsked = false
    if (this.#outbox.length > 0) this.#owner.attention(this, false)
    return true
  }

  /** Initial credit of the guest that asks for the connection. */
  openCredit(header: VsockHeader): void {
    this.#peerBufAlloc = header.bufAlloc
    this.#peerFwdCnt = header.fwdCnt
    // Whatever the guest begins to count with, nothing was sent.
    this.#sent = header.fwdCnt
  }

  #guestShuts(flags: number): void {
    const news = flags & ~this.#guestShut
    this.#guestShut |= flags
    if ((news & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) !== 0) {
      this.#failWrites("BAD_STATE", "the guest receives no more")
      this.#wantShutdown()
    }
    if ((news & VIRTIO_VSOCK_SHUTDOWN_F_SEND) !== 0) this.#wakeReader()
  }

  /** How many bytes the guest has room for. */
  get #room(): number {
    return Math.max(0, this.#peerBufAlloc - unsigned(this.#sent - this.#peerFwdCnt))
  }

  /**
   * Writes the header of the next packet to send, whose data has room for `capacity` bytes. Returns the number of bytes of data,
   * which {@link nextData} gives, or -1 when there is nothing to send now.
   */
  next(header: VsockHeader, capacity: number): number {
    if (this.isOver) return -1
    const control = this.#nextControl()
    if (control !== 0) {
      const op = control === Control.REQUEST
        ? Op.REQUEST
        : control === Control.RESPONSE
        ? Op.RESPONSE
        : control === Control.CREDIT_UPDATE
        ? Op.CREDIT_UPDATE
        : control === Control.CREDIT_REQUEST
        ? Op.CREDIT_REQUEST
        : Op.SHUTDOWN
      this.#control &= ~control
      if (op === Op.SHUTDOWN) this.#hostShutSent = this.#sendableShut
      this.#setHeader(header, op, op === Op.SHUTDOWN ? this.#hostShutSent : 0)
      if (this.#hostShutSent === SHUTDOWN_BOTH && this.#state === "ReadWrite") {
        this.#state = "ClientInitiatedShutdown"
        this.#owner.closing(this)
      }
      return 0
    }
    const write = this.#outbox.peek()
    if (write === undefined || this.#state !== "ReadWrite") return -1
    const rest = write.bytes.length - write.sent
    const length = Math.min(rest, this.#room, capacity, PACKET_DATA_MAX)
    if (length === 0 && rest > 0) {
      if (this.#room > 0 || this.#creditAsked) return -1
      this.#creditAsked = true
      this.#setHeader(header, Op.CREDIT_REQUEST, 0)
      return 0
    }
    const isEnd = this.type === "seqpacket" && length === rest
    this.#setHeader(header, Op.RW, isEnd ? VIRTIO_VSOCK_SEQ_EOM : 0)
    header.len = length
    // It carries the credit too.
    this.#control &= ~Control.CREDIT_UPDATE
    return length
  }

  /** The data of the packet whose header {@link next} wrote last; `length` bytes of it were given to the guest. */
  nextData(length: number): Uint8Array | undefined {
    const write = this.#outbox.peek()
    return write?.bytes.subarray(write.sent, write.sent + length)
  }

  /** The packet of which {@link next} wrote the header, a RW with `length` bytes, has been sent. */
  sentData(length: number): void {
    const write = this.#outbox.peek()
    if (write === undefined) return
    write.sent += length
    this.#sent = unsigned(this.#sent + length)
    if (write.sent < write.bytes.length) return
    this.#outbox.shift()
    this.#owner.later(() => write.done(Exit.void))
    if (this.#outbox.length === 0) this.#wantShutdown()
  }

  /** Whether a control packet, or data that the guest has room for, waits to be sent. */
  get wants(): "control" | "data" | undefined {
    if (this.isOver) return undefined
    if (this.#nextControl() !== 0) return "control"
    const write = this.#outbox.peek()
    if (write === undefined || this.#state !== "ReadWrite") return undefined
    return write.sent === write.bytes.length || this.#room > 0 || !this.#creditAsked ? "data" : undefined
  }

  #nextControl(): number {
    const control = this.#control
    return control & -control
  }

  #want(control: number): void {
    this.#control |= control
    this.#owner.attention(this, true)
  }

  #setHeader(header: VsockHeader, op: number, flags: number): void {
    const type = this.type === "stream" ? VIRTIO_VSOCK_TYPE_STREAM : VIRTIO_VSOCK_TYPE_SEQPACKET
    header.set(this.local.cid, this.local.port, this.peer.cid, this.peer.port, type, op, flags)
    header.setCredit(this.bufAlloc, this.#consumed)
    this.#reportedConsumed = this.#consumed
    this.#reportedBufAlloc = this.bufAlloc
  }

  // --- The host's side -----------------------------------------------------------------------------------------------------

  /** Asks the guest for the connection. `decided` hears once what becomes of it; at once when its driver has gone meanwhile. */
  ask(decided: Waiter<void>): void {
    if (this.isOver) {
      return decided(Exit.fail(this.error("connect2", "CONNECTION_REFUSED", "the guest's driver is gone")))
    }
    this.#decided = decided
    this.#want(Control.REQUEST)
  }

  /** Accepts the guest's connection. Returns `false` when it is over already. */
  accept(): boolean {
    if (this.#state !== "GuestInitiated") return false
    this.#state = "ReadWrite"
    this.#want(Control.RESPONSE)
    return true
  }

  /** Takes what has come: a chunk of a stream, or a message. `undefined` when there is nothing, see {@link end}. */
  take(): Uint8Array | undefined {
    const bytes = this.type === "stream" ? this.#inbox.take() : this.#inbox.takeMessage()
    if (bytes !== undefined) this.#consume(bytes.length)
    return bytes
  }

  /** When there is nothing to {@link take}: whether more can come, and what else a reader is to be told. */
  get end(): "open" | "ended" | "reset" {
    if (this.#isReset) return "reset"
    const isShut = (this.#guestShut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) !== 0 ||
      (this.#hostShut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) !== 0
    return isShut || this.isOver ? "ended" : "open"
  }

  /**
   * Calls `wake` once when there may be something to take, or an end: at once when it has come since the caller looked. Returns
   * what takes the wish back.
   */
  awaitInput(wake: () => void): () => void {
    const hasInput = this.type === "stream" ? this.#inbox.length > 0 : this.#inbox.messages > 0
    if (hasInput || this.end !== "open") {
      wake()
      return () => {}
    }
    this.#readers = [...this.#readers, wake]
    return () => {
      this.#readers = this.#readers.filter((reader) => reader !== wake)
    }
  }

  /** Why nothing can be written now. */
  get #writeProblem(): VsockError | undefined {
    if (this.#isReset) return this.error("write", "PEER_CLOSED", "the connection was reset")
    if ((this.#hostShut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) !== 0) {
      return this.error("write", "BAD_STATE", "this end has shut down sending")
    }
    if ((this.#guestShut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) !== 0 || this.#state !== "ReadWrite") {
      return this.error("write", "BAD_STATE", "the guest receives no more")
    }
    return undefined
  }

  /** Sends bytes after all that wait already. Returns what takes them back as far as they were not sent. */
  write(bytes: Uint8Array, done: Waiter<void>): () => void {
    const problem = this.#writeProblem ?? this.#tooLong(bytes)
    if (problem !== undefined || (bytes.length === 0 && this.type === "stream")) {
      done(problem === undefined ? Exit.void : Exit.fail(problem))
      return () => {}
    }
    const write: PendingWrite = { bytes, done, sent: 0 }
    this.#outbox.push(write)
    this.#owner.attention(this, false)
    return () => {
      if (!this.#outbox.remove(write)) return
      // A guest that has the beginning of a message would take the next one for the rest of it.
      if (this.type === "seqpacket" && write.sent > 0) return this.#force(true)
      if (this.#outbox.length === 0) this.#wantShutdown()
    }
  }

  #tooLong(bytes: Uint8Array): VsockError | undefined {
    return this.type === "seqpacket" && bytes.length > this.#peerBufAlloc
      ? this.error(
        "write",
        "INVALID_ARGS",
        `a message of ${bytes.length} bytes does not fit the guest's buffer of ${this.#peerBufAlloc}`
      )
      : undefined
  }

  /** Shuts one direction down. What waits to be sent is sent first. */
  shutdown(direction: "send" | "receive"): void {
    if (this.#state !== "ReadWrite") return
    const flag = direction === "send" ? VIRTIO_VSOCK_SHUTDOWN_F_SEND : VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE
    if ((this.#hostShut & flag) !== 0) return
    this.#hostShut |= flag
    if (direction === "receive") {
      this.#leeway = this.#owner.now() + SHUTDOWN_LEEWAY_MILLIS
      this.#consume(this.#inbox.length)
      this.#inbox.clear()
      this.#wakeReader()
    }
    this.#wantShutdown()
  }

  /** Ends the connection in good order: the guest is told, and given time to answer. */
  close(): void {
    switch (this.#state) {
      case "ReadWrite":
        this.#hostShut = SHUTDOWN_BOTH
        this.#failWrites("BAD_STATE", "the connection was closed")
        this.#inbox.clear()
        this.#state = "ClientInitiatedShutdown"
        this.#want(Control.SHUTDOWN)
        this.#owner.closing(this)
        this.#wakeReader()
        return
      case "GuestInitiated":
      case "ClientInitiated":
        return this.#force(true)
      default:
        this.#inbox.clear()
        return
    }
  }

  /** Ends the connection at once. The guest is told by a RST. */
  reset(): void {
    if (!this.isOver) this.#force(true)
  }

  /** The guest's driver is gone: nobody is there to be told anything. */
  lose(): void {
    if (!this.isOver) this.#end("ShutdownForced", true, false)
  }

  /** Calls `wake` once when the connection is over. */
  awaitOver(wake: () => void): () => void {
    if (this.isOver) {
      wake()
      return () => {}
    }
    this.#overWaiters = [...this.#overWaiters, wake]
    return () => {
      this.#overWaiters = this.#overWaiters.filter((waiter) => waiter !== wake)
    }
  }

  /** An error about this connection. */
  error(operation: string, status: VsockStatus, detail: string): VsockError {
    return new VsockError({ operation, status, detail, hostPort: this.local.port, guestPort: this.peer.port })
  }

  /**
   * Bytes were read, or need not be. Tells the guest of the room when that is half of what it may have in flight or more: its
   * credit, but Linux keeps below the size of its own buffer as well.
   */
  #consume(length: number): void {
    if (this.isOver || length === 0) return
    this.#consumed = unsigned(this.#consumed + length)
    if (this.#inbox.length === 0) this.#growBuffer()
    const window = Math.min(this.#reportedBufAlloc, this.#peerBufAlloc)
    if (unsigned(this.#consumed - this.#reportedConsumed) * 2 >= window) this.#want(Control.CREDIT_UPDATE)
  }

  /** A host that has read everything, of a guest that has sent as much as it may at a time, can have more in flight. */
  #growBuffer(): void {
    if (this.bufAlloc === BUFFER_SIZE_MAX || unsigned(this.#received - this.#receivedAtGrowth) < this.bufAlloc) return
    if (!this.#owner.grow(this.bufAlloc)) return
    this.bufAlloc *= 2
    this.#receivedAtGrowth = this.#received
  }

  /** The flags that can be sent now: sending is over when everything was sent. */
  get #sendableShut(): number {
    return this.#outbox.length === 0 ? this.#hostShut : this.#hostShut & ~VIRTIO_VSOCK_SHUTDOWN_F_SEND
  }

  #wantShutdown(): void {
    if (this.#sendableShut !== this.#hostShutSent) this.#want(Control.SHUTDOWN)
  }

  #failWrites(status: VsockStatus, detail: string): void {
    for (let write = this.#outbox.shift(); write !== undefined; write = this.#outbox.shift()) {
      const { done } = write
      this.#owner.later(() => done(Exit.fail(this.error("write", status, detail))))
    }
  }

  #wakeReader(): void {
    const readers = this.#readers
    if (readers.length === 0) return
    this.#readers = NOBODY
    for (const reader of readers) this.#owner.later(reader)
  }

  #decide(isConnected: boolean): void {
    const decided = this.#decided
    if (decided === undefined) return
    this.#decided = undefined
    const exit = isConnected
      ? Exit.void
      : Exit.fail(this.error("connect2", "CONNECTION_REFUSED", "the guest refused the connection"))
    this.#owner.later(() => decided(exit))
  }

  /** `reset` tells the guest by a RST, unless it has never heard of the connection. */
  #force(reset: boolean): void {
    const isUnheardOf = (this.#control & Control.REQUEST) !== 0
    this.#end("ShutdownForced", isUnheardOf, reset && !isUnheardOf)
  }

  #end(state: "ShutdownClean" | "ShutdownForced", clean: boolean, reset: boolean): void {
    this.#state = state
    this.#isReset = state === "ShutdownForced"
    if (this.#isReset && this.#hostShut === SHUTDOWN_BOTH) this.#inbox.clear()
    this.#decide(false)
    this.#failWrites(
      this.#isReset ? "PEER_CLOSED" : "BAD_STATE",
      this.#isReset ? "the connection was reset" : "the guest receives no more"
    )
    this.#wakeReader()
    this.#owner.over(this, clean, reset)
    const waiters = this.#overWaiters
    this.#overWaiters = NOBODY
    for (const wake of waiters) this.#owner.later(wake)
  }
}
