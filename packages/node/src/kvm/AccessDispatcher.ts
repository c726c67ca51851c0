/**
 * The host side of a machine's accesses: takes posted writes off the ring and calls off the vCPUs' control blocks, in an order
 * that keeps every vCPU's own, and gives them to the bus handlers.
 *
 * It is woken by the machine's eventfd. A burst of posted writes costs one wake-up: after a drain the host looks again by a
 * timer before it arms the wake-up. Calls always wake it. Every turn is bounded; what is left over waits for the next turn of
 * the event loop.
 */
import type { BusHandlers, CallReply } from "@troupe/core/Bus"
import { clearTimeout, setImmediate, setTimeout } from "node:timers"
import { type PostedRing, RING_HOST_STATE, RING_WAITERS } from "./thread/PostedRing.ts"
import {
  CALL_ANSWERED,
  CALL_MADE,
  CALL_TAKEN,
  CONTROL_CALL,
  CONTROL_CALL_IS_WRITE,
  CONTROL_CALL_OFFSET,
  CONTROL_CALL_RANGE,
  CONTROL_CALL_SIZE,
  CONTROL_CALL_TAIL,
  CONTROL_CALL_VALUE,
  HOST_ASLEEP,
  HOST_AWAKE,
  HOST_LAZY,
  openGate
} from "./thread/VcpuControl.ts"

/** Posted writes delivered without a look at the calls, at most. */
const DRAIN_LIMIT = 512
/** Rounds of drain and calls in one turn at most: a vCPU whose calls are answered at once can make the next within the turn. */
const ROUND_LIMIT = 8
/**
 * How long after a drain the host looks for more posted writes by itself, in milliseconds: doubled up to the limit while a guest
 * writes without pause, for each look costs the guest's core a share of its speed. A full half of the ring wakes the host before.
 */
const LAZY_DELAY_MS = 1
const LAZY_DELAY_LIMIT_MS = 8
/** A look that finds more than this belongs to a guest that waits for nothing. One that waits for an interrupt after each FIFO of 16 bytes does not. */
const STEADY_WRITES = 48
/** How long the host waits before it offers a refused posted write again, in milliseconds: doubled up to the limit. */
const RETRY_DELAY_MS = 1
const RETRY_DELAY_LIMIT_MS = 16

/** One vCPU as the dispatcher sees it. Its reply object is made once. */
class CallPort implements CallReply {
  readonly control: Int32Array<SharedArrayBuffer>

  constructor(control: Int32Array<SharedArrayBuffer>) {
    this.control = control
  }

  complete(value: number): void {
    const control = this.control
    if (Atomics.load(control, CONTROL_CALL) !== CALL_TAKEN) return
    control[CONTROL_CALL_VALUE] = value | 0
    Atomics.store(control, CONTROL_CALL, CALL_ANSWERED)
    openGate(control)
  }
}

/** What a handler threw, for {@link AccessDispatcher}'s owner. */
export type DefectHandler = (defect: unknown) => void

/** Delivers the accesses of one machine. */
export class AccessDispatcher {
  readonly #ring: PostedRing
  readonly #handlers: BusHandlers
  readonly #onDefect: DefectHandler
  readonly #ports: Array<CallPort> = []
  readonly #waiters = new Set<{ readonly tail: number; readonly callback: () => void }>()
  #timer: NodeJS.Timeout | undefined
  #immediate = false
  #refused = 0
  #lazyDelay = LAZY_DELAY_MS
  #closed = false

  constructor(ring: PostedRing, handlers: BusHandlers, onDefect: DefectHandler) {
    this.#ring = ring
    this.#handlers = handlers
    this.#onDefect = onDefect
  }

  /** Serves the vCPU with this control block from now on. */
  add(control: Int32Array<SharedArrayBuffer>): void {
    this.#ports.push(new CallPort(control))
  }

  /** Serves it no more. */
  remove(control: Int32Array<SharedArrayBuffer>): void {
    const index = this.#ports.findIndex((port) => port.control === control)
    if (index >= 0) this.#ports.splice(index, 1)
  }

  /** Delivers nothing any more and leaves no timer. */
  close(): void {
    this.#closed = true
    this.#clearTimer()
    this.#notifyReached()
  }

  /**
   * Calls back, once, when every write posted so far has been delivered (or never will be). Returns what takes the request
   * back.
   */
  whenDelivered(callback: () => void): () => void {
    const waiter = { tail: this.#ring.tail, callback }
    this.#waiters.add(waiter)
    this.turn()
    return () => this.#waiters.delete(waiter)
  }

  #notifyReached(): void {
    for (const waiter of this.#waiters) {
      if (!this.#closed && !this.#ring.reached(waiter.tail)) continue
      this.#waiters.delete(waiter)
      waiter.callback()
    }
  }

  /** Delivers what there is. Called when the machine's eventfd was written. */
  readonly turn = (): void => {
    if (this.#closed) return this.#notifyReached()
    try {
      this.#turn()
      if (this.#waiters.size > 0) this.#notifyReached()
    } catch (defect) {
      this.close()
      this.#onDefect(defect)
    }
  }

  /** Delivers a doorbell, after the writes that were posted before it, unless their device has no room for them. */
  doorbell(range: number, index: number): void {
    if (this.#closed) return
    try {
      // What is in the ring now is bounded by its size; what comes meanwhile is not waited for.
      const tail = this.#ring.tail
      while (!this.#ring.reached(tail) && this.#drain() > 0);
      this.#handlers.doorbell(range, index)
    } catch (defect) {
      this.close()
      this.#onDefect(defect)
    }
  }

  #turn(): void {
    const words = this.#ring.words
    this.#clearTimer()
    Atomics.store(words, RING_HOST_STATE, HOST_AWAKE)
    let posted = 0
    for (let round = 0;; round++) {
      const drained = this.#drain()
      const called = this.#takeCalls()
      posted += drained
      if (drained === 0 && !called) break
      if (round === ROUND_LIMIT) return this.#again()
    }
    const lazy = posted > 0 || this.#refused > 0
    this.#lazyDelay = posted > STEADY_WRITES ? Math.min(this.#lazyDelay * 2, LAZY_DELAY_LIMIT_MS) : LAZY_DELAY_MS
    Atomics.store(words, RING_HOST_STATE, lazy ? HOST_LAZY : HOST_ASLEEP)
    // Whoever published something before this store relied on the host being awake.
    if (this.#hasCall() || (!lazy && this.#ring.used > 0)) return this.#again()
    if (lazy) this.#later()
  }

  /** Another turn after the event loop has seen to everything else. */
  #again(): void {
    Atomics.store(this.#ring.words, RING_HOST_STATE, HOST_AWAKE)
    if (this.#immediate) return
    this.#immediate = true
    setImmediate(() => {
      this.#immediate = false
      this.turn()
    })
  }

  #later(): void {
    const delay = this.#refused === 0
      ? this.#lazyDelay
      : Math.min(RETRY_DELAY_MS * 2 ** (this.#refused - 1), RETRY_DELAY_LIMIT_MS)
    this.#timer = setTimeout(this.turn, delay)
  }

  #clearTimer(): void {
    if (this.#timer === undefined) return
    clearTimeout(this.#timer)
    this.#timer = undefined
  }

  /** Delivers posted writes, oldest first, until there are none, one is refused or the turn's bound is reached; how many. */
  #drain(): number {
    const ring = this.#ring
    let delivered = 0
    while (delivered < DRAIN_LIMIT && ring.peek()) {
      if (!this.#handlers.posted(ring.range, ring.offset, ring.size, ring.value)) {
        this.#refused = Math.min(this.#refused + 1, 32)
        break
      }
      this.#refused = 0
      ring.advance()
      delivered++
    }
    if (delivered > 0 && Atomics.load(ring.words, RING_WAITERS) > 0) {
      for (const port of this.#ports) openGate(port.control)
    }
    return delivered
  }

  /** Whether a vCPU has made a call that can be delivered now. */
  #hasCall(): boolean {
    for (const port of this.#ports) {
      if (this.#isReady(port)) return true
    }
    return false
  }

  #isReady(port: CallPort): boolean {
    return Atomics.load(port.control, CONTROL_CALL) === CALL_MADE &&
      this.#ring.reached(port.control[CONTROL_CALL_TAIL] ?? 0)
  }

  #takeCalls(): boolean {
    let taken = false
    for (const port of this.#ports) {
      if (!this.#isReady(port)) continue
      const control = port.control
      taken = true
      Atomics.store(control, CONTROL_CALL, CALL_TAKEN)
      this.#handlers.call(
        control[CONTROL_CALL_RANGE] ?? 0,
        (control[CONTROL_CALL_OFFSET] ?? 0) >>> 0,
        control[CONTROL_CALL_SIZE] ?? 0,
        control[CONTROL_CALL_IS_WRITE] === 1,
        (control[CONTROL_CALL_VALUE] ?? 0) >>> 0,
        port
      )
    }
    return taken
  }
}
