/**
 * The host's end of one port of a console: bytes in both directions, bounded, in order and each once.
 *
 * Output waits in a ring, and what does not fit stays in the guest's buffers, so a host that does not read costs a ring. Input
 * is not stored at all: it goes from the writer's array to the guest's buffers, so a guest that does not read costs nothing.
 */
import type { ConsolePort } from "@troupe/core/Console"
import * as Cause from "effect/Cause"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as PubSub from "effect/PubSub"
import * as Semaphore from "effect/Semaphore"
import * as Sink from "effect/Sink"
import * as Stream from "effect/Stream"
import type { DescriptorChain } from "../virtio/DescriptorChain.ts"

/** The most output that waits for a reader, in bytes. */
export const CONSOLE_OUTPUT_SIZE = 0x1_0000
/** Bytes of a new ring of output. */
const FIRST_OUTPUT_SIZE = 256
/** Changes that a reader of `guestOpenChanges` may be behind. */
const CHANGES_KEPT = 16

/** What a writer has not sent yet. */
interface Pending {
  readonly bytes: Uint8Array
  sent: number
  readonly done: Deferred.Deferred<void>
}

/** The host's end of one port. It outlives restarts of the device. */
export class ConsoleLine {
  readonly id: number
  readonly name: string
  /** The port as clients of the guest see it. */
  readonly port: ConsolePort

  /** The ring of output, which grows to {@link CONSOLE_OUTPUT_SIZE}: most ports say little. */
  #output = new Uint8Array(0)
  #first = 0
  #count = 0
  /** The device holds a buffer back until there is room. */
  #full = false
  #reader: Deferred.Deferred<void> | undefined

  #pending: Pending | undefined
  /** The writer whose bytes the guest has. */
  #written: Deferred.Deferred<void> | undefined
  readonly #writers = Semaphore.makeUnsafe(1)

  readonly #opens: PubSub.PubSub<boolean>
  #guestOpen = false
  #hostOpen = true
  #closed = false
  #attention: (() => void) | undefined
  #hostOpenChanged: (() => void) | undefined

  private constructor(id: number, name: string, opens: PubSub.PubSub<boolean>) {
    this.id = id
    this.name = name
    this.#opens = opens
    PubSub.publishUnsafe(opens, false)
    const write = (bytes: Uint8Array) => this.#writers.withPermit(this.#write(bytes))
    this.port = {
      id,
      name,
      output: this.#outputStream,
      write,
      input: Sink.forEach(write),
      guestOpen: () => this.#guestOpen,
      guestOpenChanges: Stream.fromPubSub(opens),
      setOpen: (open) =>
        Effect.sync(() => {
          if (open === this.#hostOpen || id === 0) return
          this.#hostOpen = open
          this.#hostOpenChanged?.()
        })
    }
  }

  /** A line; it is gone when the scope closes. */
  static readonly make = (id: number, name: string) =>
    Effect.acquireRelease(
      Effect.map(
        PubSub.sliding<boolean>({ capacity: CHANGES_KEPT, replay: 1 }),
        (opens) => new ConsoleLine(id, name, opens)
      ),
      (line) => Effect.andThen(Effect.sync(() => line.#close()), PubSub.shutdown(line.#opens))
    )

  /** Connects a device: `attention` asks it to move bytes soon, `hostOpenChanged` to tell the driver of the host's end. */
  attach(attention: () => void, hostOpenChanged: () => void): void {
    this.#attention = attention
    this.#hostOpenChanged = hostOpenChanged
    if (this.#pending !== undefined) attention()
  }

  /** Disconnects the device; nobody in the guest has the port open now. */
  detach(): void {
    this.#attention = undefined
    this.#hostOpenChanged = undefined
    this.guestOpen = false
  }

  /** Whether the host's end is open. */
  get hostOpen(): boolean {
    return this.#hostOpen
  }

  /** Whether the guest's end is open. */
  get guestOpen(): boolean {
    return this.#guestOpen
  }

  set guestOpen(open: boolean) {
    if (open === this.#guestOpen) return
    this.#guestOpen = open
    PubSub.publishUnsafe(this.#opens, open)
  }

  /** Whether a writer waits for the guest. */
  get hasInput(): boolean {
    return this.#pending !== undefined
  }

  /**
   * Takes output from a chain, from `position` in its readable buffers on. Returns how many bytes had room; when it is not all of
   * them, the device is asked for attention once there is more.
   */
  transmit(chain: DescriptorChain, position: number): number {
    const wanted = chain.readableBytes - position
    const amount = Math.min(wanted, CONSOLE_OUTPUT_SIZE - this.#count)
    this.#full = amount < wanted
    if (amount === 0) return 0
    this.#reserve(amount)
    const size = this.#output.length
    const start = (this.#first + this.#count) % size
    const beforeEnd = Math.min(amount, size - start)
    chain.read(position, this.#output.subarray(start, start + beforeEnd))
    if (beforeEnd < amount) chain.read(position + beforeEnd, this.#output.subarray(0, amount - beforeEnd))
    this.#count += amount
    return amount
  }

  /** Takes a byte of output without a buffer that could be held back. Returns whether there was room. */
  transmitByte(byte: number): boolean {
    if (this.#count === CONSOLE_OUTPUT_SIZE) return false
    this.#reserve(1)
    this.#output[(this.#first + this.#count) % this.#output.length] = byte
    this.#count++
    return true
  }

  /** Moves input into the writable buffers of a chain. Returns how many bytes, at least 1 if the chain has room for it. */
  receive(chain: DescriptorChain): number {
    const pending = this.#pending
    if (pending === undefined) return 0
    const written = chain.write(0, pending.bytes.subarray(pending.sent))
    pending.sent += written
    if (pending.sent === pending.bytes.length) {
      this.#pending = undefined
      this.#written = pending.done
    }
    return written
  }

  /**
   * Wakes the readers that wait for output which has come, and the writer whose bytes have gone. They may run at once, and do
   * anything to the console: the device calls this when it is in the middle of nothing.
   */
  wake(): void {
    const written = this.#written
    this.#written = undefined
    if (written !== undefined) Deferred.doneUnsafe(written, Effect.void)
    const reader = this.#count > 0 || this.#closed ? this.#reader : undefined
    if (reader === undefined) return
    this.#reader = undefined
    Deferred.doneUnsafe(reader, Effect.void)
  }

  /** The port is gone: readers end after what is there, and writers return. */
  #close(): void {
    this.#closed = true
    this.detach()
    this.#written ??= this.#pending?.done
    this.#pending = undefined
    this.wake()
  }

  /** Makes the ring large enough for so many bytes more. */
  #reserve(amount: number): void {
    const needed = this.#count + amount
    if (needed <= this.#output.length) return
    let size = Math.max(FIRST_OUTPUT_SIZE, this.#output.length)
    while (size < needed) size *= 2
    const larger = new Uint8Array(Math.min(size, CONSOLE_OUTPUT_SIZE))
    larger.set(this.#bytes())
    this.#output = larger
    this.#first = 0
  }

  /** A copy of the output that waits. */
  #bytes(): Uint8Array<ArrayBuffer> {
    const bytes = new Uint8Array(this.#count)
    const beforeEnd = Math.min(this.#count, this.#output.length - this.#first)
    bytes.set(this.#output.subarray(this.#first, this.#first + beforeEnd))
    bytes.set(this.#output.subarray(0, this.#count - beforeEnd), beforeEnd)
    return bytes
  }

  get #outputStream(): Stream.Stream<Uint8Array> {
    const pull: Effect.Effect<readonly [Uint8Array], Cause.Done> = Effect.suspend(() => {
      if (this.#count > 0) {
        const bytes = this.#bytes()
        this.#first = 0
        this.#count = 0
        if (this.#full) this.#attention?.()
        return Effect.succeed([bytes] as const)
      }
      if (this.#closed) return Cause.done()
      this.#reader ??= Deferred.makeUnsafe()
      return Effect.andThen(Deferred.await(this.#reader), pull)
    })
    return Stream.fromPull(Effect.succeed(pull))
  }

  #write(bytes: Uint8Array): Effect.Effect<void> {
    return Effect.suspend(() => {
      if (this.#closed || bytes.length === 0) return Effect.void
      const pending: Pending = { bytes, sent: 0, done: Deferred.makeUnsafe() }
      this.#pending = pending
      this.#attention?.()
      const forget = Effect.sync(() => {
        if (this.#pending === pending) this.#pending = undefined
      })
      return Effect.onInterrupt(Deferred.await(pending.done), () => forget)
    })
  }
}
