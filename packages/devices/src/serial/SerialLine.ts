/**
 * The host's end of a serial line: bounded history of the output with any number of readers, bounded input with backpressure.
 *
 * There is one ring of output bytes and each reader has a position in it, so a reader costs nothing to the guest and
 * nothing in memory. A position that the ring has overwritten moves on to the oldest byte, and the bytes in between are
 * counted as dropped.
 */
import type { SerialPort } from "@troupe/core/SerialPort"
import * as Cause from "effect/Cause"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Semaphore from "effect/Semaphore"
import * as Sink from "effect/Sink"
import * as Stream from "effect/Stream"
import { lastLines } from "./SerialLog.ts"

/** Output bytes that are kept: what a new reader gets first, and what a slow reader may be behind. */
export const OUTPUT_HISTORY_SIZE = 0x1_0000
/** Input bytes that wait for the guest. */
export const INPUT_BUFFER_SIZE = 0x1000
/** The most lines of {@link SerialLine.log}. */
export const LOG_LINES = 50
/** The most output bytes that {@link SerialLine.log} looks back. */
export const LOG_BYTES = 0x4000

/** Bytes of a new output ring. */
const FIRST_HISTORY_SIZE = 256
/** Room in the input ring that is kept free for bytes that the receiver gives back. */
const GIVE_BACK_ROOM = 16

/** A serial line of one machine. It outlives restarts of the device. */
export class SerialLine {
  /** The ring of output, which grows to {@link OUTPUT_HISTORY_SIZE}: most guests say little. */
  #history = new Uint8Array(FIRST_HISTORY_SIZE)
  /** Bytes ever sent by the guest; the position of the next one. */
  #sent = 0
  #dropped = 0

  /** Empty until somebody writes. */
  #input = new Uint8Array(0)
  #inputFirst = 0
  #inputCount = 0

  #outputWaiter: Deferred.Deferred<void> | undefined
  #inputWaiter: Deferred.Deferred<void> | undefined
  #wanted = false
  #closed = false
  #attention: (() => void) | undefined
  readonly #writers = Semaphore.makeUnsafe(1)

  /** The service that this line is to clients of the guest. */
  readonly port: SerialPort["Service"]

  constructor() {
    const write = (bytes: Uint8Array) => this.#writers.withPermit(this.#write(bytes))
    this.port = {
      output: this.#output,
      write,
      input: Sink.forEach(write),
      log: () => lastLines(this.#bytesFrom(Math.max(this.#oldest, this.#sent - LOG_BYTES)), LOG_LINES),
      dropped: () => this.#dropped
    }
  }

  /**
   * Connects a device: `attention` asks it to call {@link wake} and to take input in, soon. Readers and writers are never
   * woken inside a handler of the device, but once a turn.
   */
  attach(attention: () => void): void {
    this.#attention = attention
    if (this.#inputCount > 0 || this.#wanted) attention()
  }

  /** Disconnects the device. */
  detach(): void {
    this.#attention = undefined
  }

  /** Wakes readers that wait for output and the writer that waits for room. */
  wake(): void {
    this.#wanted = false
    const reader = this.#outputWaiter
    this.#outputWaiter = undefined
    if (reader !== undefined) Deferred.doneUnsafe(reader, Effect.void)
    const writer = this.#inputWaiter
    if (writer !== undefined && (this.#closed || this.#room > 0)) {
      this.#inputWaiter = undefined
      Deferred.doneUnsafe(writer, Effect.void)
    }
  }

  /** The machine is gone: readers end after what is there, writers return, and what they write goes nowhere. */
  close(): void {
    this.#closed = true
    this.#attention = undefined
    this.wake()
  }

  /** Takes a byte of output. */
  readonly transmit = (byte: number): void => {
    if (this.#sent === this.#history.length && this.#sent < OUTPUT_HISTORY_SIZE) this.#growHistory()
    this.#history[this.#sent % OUTPUT_HISTORY_SIZE] = byte
    this.#sent++
    if (this.#outputWaiter !== undefined) this.#want()
  }

  /** The next input byte, or -1. */
  readonly receive = (): number => {
    if (this.#inputCount === 0) return -1
    const byte = this.#input[this.#inputFirst] ?? 0
    this.#inputFirst = (this.#inputFirst + 1) % INPUT_BUFFER_SIZE
    this.#inputCount--
    if (this.#inputWaiter !== undefined && this.#room >= INPUT_BUFFER_SIZE / 2) this.#want()
    return byte
  }

  /** Takes back a byte that {@link receive} gave. */
  readonly unreceive = (byte: number): void => {
    if (this.#inputCount === INPUT_BUFFER_SIZE) return
    this.#inputFirst = (this.#inputFirst + INPUT_BUFFER_SIZE - 1) % INPUT_BUFFER_SIZE
    this.#input[this.#inputFirst] = byte
    this.#inputCount++
  }

  get #room(): number {
    return INPUT_BUFFER_SIZE - GIVE_BACK_ROOM - this.#inputCount
  }

  get #oldest(): number {
    return Math.max(0, this.#sent - OUTPUT_HISTORY_SIZE)
  }

  #want(): void {
    if (this.#wanted) return
    this.#wanted = true
    this.#attention?.()
  }

  /** Doubles the output ring, which is full and has not wrapped yet: every byte keeps its place. */
  #growHistory(): void {
    const larger = new Uint8Array(Math.min(this.#history.length * 2, OUTPUT_HISTORY_SIZE))
    larger.set(this.#history)
    this.#history = larger
  }

  /** A copy of the output from `position` on. */
  #bytesFrom(position: number): Uint8Array<ArrayBuffer> {
    const bytes = new Uint8Array(this.#sent - position)
    const start = position % OUTPUT_HISTORY_SIZE
    const first = Math.min(bytes.length, OUTPUT_HISTORY_SIZE - start)
    bytes.set(this.#history.subarray(start, start + first))
    bytes.set(this.#history.subarray(0, bytes.length - first), first)
    return bytes
  }

  get #output(): Stream.Stream<Uint8Array> {
    return Stream.fromPull(Effect.sync(() => {
      let position = this.#oldest
      const pull: Effect.Effect<readonly [Uint8Array], Cause.Done> = Effect.suspend(() => {
        const oldest = this.#oldest
        if (position < oldest) {
          this.#dropped += oldest - position
          position = oldest
        }
        if (position < this.#sent) {
          const bytes = this.#bytesFrom(position)
          position = this.#sent
          return Effect.succeed([bytes] as const)
        }
        if (this.#closed) return Cause.done()
        this.#outputWaiter ??= Deferred.makeUnsafe()
        return Effect.flatMap(Deferred.await(this.#outputWaiter), () => pull)
      })
      return pull
    }))
  }

  #write(bytes: Uint8Array): Effect.Effect<void> {
    return Effect.suspend(() => {
      if (this.#closed) return Effect.void
      const taken = Math.min(this.#room, bytes.length)
      if (this.#input.length === 0) this.#input = new Uint8Array(INPUT_BUFFER_SIZE)
      for (let i = 0; i < taken; i++) {
        this.#input[(this.#inputFirst + this.#inputCount) % INPUT_BUFFER_SIZE] = bytes[i] ?? 0
        this.#inputCount++
      }
      if (taken > 0) this.#attention?.()
      if (taken === bytes.length) return Effect.void
      // The caller may reuse its array as soon as it is scheduled again.
      const rest = bytes.slice(taken)
      this.#inputWaiter ??= Deferred.makeUnsafe()
      return Effect.flatMap(Deferred.await(this.#inputWaiter), () => this.#write(rest))
    })
  }
}
