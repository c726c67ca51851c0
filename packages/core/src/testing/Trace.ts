/**
 * What happened at the boundary between guests and host, in order: one fixed-size record for each event.
 *
 * Two runs are the same run when their traces are the same bytes. A trace keeps its last {@link TRACE_LIMIT} events.
 */
import { formatAddress } from "../GuestAddress.ts"

/** The events of a trace. A record's kind is an index here. */
export const TRACE_KINDS = [
  "create-vm",
  "release-vm",
  "add-memory",
  "release-memory",
  "plug",
  "unplug",
  "attach-bus",
  "release-bus",
  "interrupt-line",
  "release-line",
  "create-vcpu",
  "release-vcpu",
  "set-state",
  "run",
  "leave",
  "exit",
  "fault",
  "open-bus-read",
  "open-bus-write",
  "page-read",
  "shadowed-read",
  "call-read",
  "call-write",
  "reply",
  "post",
  "posted",
  "posted-later",
  "ring",
  "doorbell",
  "trigger",
  "interrupt",
  "wait",
  "sleep",
  "start-vcpu",
  "halt",
  "mark"
] as const

/** The kind of one event. */
export type TraceKind = (typeof TRACE_KINDS)[number]

/** One event of a trace. */
export interface TraceEvent {
  /** Virtual time in milliseconds. */
  readonly time: number
  readonly kind: TraceKind
  /** Number of the machine, counted from 1 in the order of their creation. */
  readonly vm: number
  /** Number of the vCPU, or -1 where there is none. */
  readonly vcpu: number
  /** Address of an access, or the number of a line, a doorbell or an operation. */
  readonly address: number
  /** Width of an access in bytes, otherwise 0. */
  readonly size: number
  readonly value: number
}

/** The number of events that a trace keeps. */
export const TRACE_LIMIT = 0x1_0000

const RECORD_SIZE = 32
const FIRST_CAPACITY = 64
const NO_VCPU = 0xffff

const kindNumbers: { readonly [kind: string]: number } = Object.fromEntries(
  TRACE_KINDS.map((kind, index) => [kind, index])
)

/** A growing record of events. */
export class Trace {
  #view = new DataView(new ArrayBuffer(FIRST_CAPACITY * RECORD_SIZE))
  #count = 0

  /** Number of events that were ever recorded. */
  get count(): number {
    return this.#count
  }

  /** Records one event. */
  record(time: number, kind: TraceKind, vm: number, vcpu: number, address: number, size: number, value: number): void {
    const slot = this.#count % TRACE_LIMIT
    if ((slot + 1) * RECORD_SIZE > this.#view.byteLength) {
      this.#view = new DataView(this.#view.buffer.transfer(this.#view.byteLength * 2))
    }
    const at = slot * RECORD_SIZE
    const view = this.#view
    view.setFloat64(at, time, true)
    view.setFloat64(at + 8, address, true)
    view.setFloat64(at + 16, value, true)
    view.setUint16(at + 24, vm, true)
    view.setUint16(at + 26, vcpu < 0 ? NO_VCPU : vcpu, true)
    view.setUint8(at + 28, kindNumbers[kind] ?? 0)
    view.setUint8(at + 29, size)
    this.#count++
  }

  /** A copy of the records that are kept, oldest first, each of 32 bytes. */
  get bytes(): Uint8Array<ArrayBuffer> {
    const all = new Uint8Array(this.#view.buffer)
    if (this.#count <= TRACE_LIMIT) return all.slice(0, this.#count * RECORD_SIZE)
    const start = (this.#count % TRACE_LIMIT) * RECORD_SIZE
    const bytes = new Uint8Array(TRACE_LIMIT * RECORD_SIZE)
    bytes.set(all.subarray(start, TRACE_LIMIT * RECORD_SIZE))
    bytes.set(all.subarray(0, start), TRACE_LIMIT * RECORD_SIZE - start)
    return bytes
  }

  /** The events that are kept, oldest first. */
  get events(): ReadonlyArray<TraceEvent> {
    const bytes = this.bytes
    const view = new DataView(bytes.buffer)
    const events: Array<TraceEvent> = []
    for (let at = 0; at < bytes.length; at += RECORD_SIZE) {
      const vcpu = view.getUint16(at + 26, true)
      events.push({
        time: view.getFloat64(at, true),
        kind: TRACE_KINDS[view.getUint8(at + 28)] ?? "mark",
        vm: view.getUint16(at + 24, true),
        vcpu: vcpu === NO_VCPU ? -1 : vcpu,
        address: view.getFloat64(at + 8, true),
        size: view.getUint8(at + 29),
        value: view.getFloat64(at + 16, true)
      })
    }
    return events
  }

  /** The events that are kept as text, one a line. */
  get text(): string {
    return this.events.map(formatEvent).join("\n")
  }
}

/** One event as people read it: `12.5 ms vm1 vcpu0 call-write 0xd0000070/4 = 0x3`. */
export const formatEvent = (event: TraceEvent): string => {
  const vm = event.vm === 0 ? "" : ` vm${event.vm}`
  const who = event.vcpu === -1 ? vm : `${vm} vcpu${event.vcpu}`
  const width = event.size === 0 ? "" : `/${event.size}`
  return `${event.time} ms${who} ${event.kind} ${formatAddress(event.address)}${width} = ${formatAddress(event.value)}`
}
