/**
 * A vCPU on KVM that does what a guest program of the fake tells it, one load or store at a time: so the driver kit of the fake
 * drives devices on a real hypervisor as well.
 *
 * The kernel polls a mailbox in its memory, which the host fills, and counts the interrupts that it gets.
 */
import { SLEEP_CONTROL_S5 } from "@troupe/core/acpi/AcpiTables"
import { SLEEP_CONTROL_PORT } from "@troupe/core/acpi/PowerPorts"
import type { Device } from "@troupe/core/Device"
import { GuestMemory } from "@troupe/core/GuestMemory"
import {
  type AccessSize,
  type GuestCpu,
  type GuestOperation,
  type GuestRoutine,
  messageInterrupt
} from "@troupe/core/testing/GuestCpu"
import { makeElfKernel } from "@troupe/core/testing/KernelImages"
import { Effect } from "effect"
import { setImmediate, setTimeout } from "node:timers"

const CODE = 0x20_0000
const HANDLERS = 0x20_1000
const HANDLER_SIZE = 24
const IDT = 0x20_3000
const IDTR = 0x20_4000
/** What to do (0: nothing), the address, the value to store, the value that was loaded. */
const MAILBOX = 0x20_5000
const COUNTS = 0x20_5400
const END = 0x20_6000
const VECTORS = 256
/** Turns of the event loop for which an operation is looked at without a pause. With a processor of its own, a vCPU needs fewer. */
const BUSY_TURNS = 100
/** The flat code segment of the boot protocol. */
const CODE_SELECTOR = 0x10
const INTERRUPT_GATE = 0x8e

const LOAD = { 1: 1, 2: 2, 4: 3 } as const
const STORE = { 1: 4, 2: 5, 4: 6 } as const
const OUT_8 = 7

const word = (value: number): ReadonlyArray<number> => [
  value & 0xff,
  (value >>> 8) & 0xff,
  (value >>> 16) & 0xff,
  value >>> 24
]

/** Enables interrupts, then polls the mailbox for ever. */
const code = (): Uint8Array => {
  const bodies = [
    [0x0f, 0xb6, 0x06], // movzx eax, byte [rsi]
    [0x0f, 0xb7, 0x06], // movzx eax, word [rsi]
    [0x8b, 0x06], // mov eax, [rsi]
    [0x88, 0x16], // mov [rsi], dl
    [0x66, 0x89, 0x16], // mov [rsi], dx
    [0x89, 0x16], // mov [rsi], edx
    [0x89, 0xd0, 0x89, 0xf2, 0xee] // mov eax, edx; mov edx, esi; out dx, al
  ]
  const head = [
    ...[0xb0, 0xff, 0xe6, 0x21, 0xe6, 0xa1], // mov al, 0xff; out 0x21, al; out 0xa1, al
    ...[0x0f, 0x01, 0x1c, 0x25, ...word(IDTR)], // lidt [IDTR]
    0xfb // sti
  ]
  const poll = [
    ...[0x8b, 0x04, 0x25, ...word(MAILBOX)], // mov eax, [what]
    ...[0x85, 0xc0, 0x74, 0xf5], // test eax, eax; jz poll
    ...[0x8b, 0x34, 0x25, ...word(MAILBOX + 4)], // mov esi, [address]
    ...[0x8b, 0x14, 0x25, ...word(MAILBOX + 8)] // mov edx, [value]
  ]
  // Each: dec eax; jnz the next one; the body; jmp done.
  const parts = bodies.map((body) => [0xff, 0xc8, 0x75, body.length + 2].concat(body, 0xeb, 0))
  const rest = (index: number) => parts.slice(index + 1).reduce((sum, part) => sum + part.length, 0)
  parts.forEach((part, index) => {
    part[part.length - 1] = rest(index)
  })
  const done = [
    ...[0x89, 0x04, 0x25, ...word(MAILBOX + 12)], // mov [result], eax
    ...[0xc7, 0x04, 0x25, ...word(MAILBOX), 0, 0, 0, 0] // mov dword [what], 0
  ]
  const loop = [...poll, ...parts.flat(), ...done]
  return Uint8Array.from([...head, ...loop, 0xe9, ...word(-(loop.length + 5))])
}

/** Counts the interrupt and tells the local APIC that it was taken. */
const handler = (vector: number): ReadonlyArray<number> => [
  ...[0xff, 0x04, 0x25, ...word(COUNTS + 4 * vector)], // inc dword [count]
  0x50, // push rax
  ...[0xb8, ...word(0xfee0_00b0)], // mov eax, EOI
  ...[0xc7, 0x00, 0, 0, 0, 0], // mov dword [rax], 0
  ...[0x58, 0x48, 0xcf] // pop rax; iretq
]

/** The kernel of such a machine. */
export const remoteKernel = (): Uint8Array => {
  const bytes = new Uint8Array(END - CODE)
  const view = new DataView(bytes.buffer)
  bytes.set(code())
  for (let vector = 0; vector < VECTORS; vector++) {
    const address = HANDLERS + vector * HANDLER_SIZE
    bytes.set(handler(vector), address - CODE)
    const gate = IDT - CODE + 16 * vector
    view.setUint16(gate, address & 0xffff, true)
    view.setUint16(gate + 2, CODE_SELECTOR, true)
    view.setUint8(gate + 5, INTERRUPT_GATE)
    view.setUint16(gate + 6, address >>> 16, true)
  }
  view.setUint16(IDTR - CODE, 16 * VECTORS - 1, true)
  view.setUint32(IDTR - CODE + 2, IDT, true)
  return makeElfKernel({ segments: [{ guestAddress: CODE, bytes }], entry: CODE })
}

/** The host's side: it needs the machine's memory, which a device without registers brings it. */
export class RemoteMachine {
  memory = new GuestMemory([])

  /** To be put in the machine. */
  readonly device: Device = {
    name: "remote",
    ranges: [],
    interrupts: [],
    start: (context) =>
      Effect.sync(() => {
        this.memory = context.memory
        return { read: () => 0, write: () => undefined }
      })
  }

  readonly #taken = new Map<number, number>()
  /** Operations begun so far. */
  #begun = 0

  get #mailbox(): Int32Array<ArrayBuffer> {
    const region = this.memory.regionOf(MAILBOX, 16)
    if (region === undefined) throw new Error("the machine has no memory yet")
    return new Int32Array(region.bytes.buffer, MAILBOX - region.guestAddress, 4)
  }

  #count(vector: number): number {
    const region = this.memory.regionOf(COUNTS + 4 * vector, 4)
    if (region === undefined) return 0
    return region.view.getUint32(COUNTS + 4 * vector - region.guestAddress, true)
  }

  /** Whether an operation that was begun has not come to its end. */
  get isBusy(): boolean {
    return Atomics.load(this.#mailbox, 0) !== 0
  }

  #operation(what: number, address: number, value: number): GuestOperation<number> {
    const begin = () => {
      this.#begun++
      const mailbox = this.#mailbox
      mailbox[1] = address | 0
      mailbox[2] = value | 0
      Atomics.store(mailbox, 0, what)
      return mailbox
    }
    return {
      *[Symbol.iterator]() {
        const mailbox = begin()
        while (Atomics.load(mailbox, 0) !== 0) yield undefined
        return (mailbox[3] ?? 0) >>> 0
      }
    }
  }

  #nothing(operation: GuestOperation<number>): GuestOperation<void> {
    return {
      *[Symbol.iterator]() {
        yield* operation
      }
    }
  }

  /** The vCPU as a driver of the kit sees it: loads, stores, ports of bytes, and messages with their vectors. */
  get cpu(): GuestCpu {
    const unsupported = (): never => {
      throw new Error("this vCPU has no such operation")
    }
    const acknowledge = (number: number): boolean => {
      const count = this.#count(number - messageInterrupt(0))
      const was = count > (this.#taken.get(number) ?? 0)
      this.#taken.set(number, count)
      return was
    }
    const yielding: GuestOperation<void> = {
      *[Symbol.iterator]() {
        yield undefined
      }
    }
    return {
      id: 0,
      state: undefined,
      memory: this.memory,
      interrupts: { enabled: true, pending: new Set(), handle: unsupported, route: unsupported, acknowledge },
      in8: unsupported,
      in16: unsupported,
      in32: unsupported,
      out8: (port, value) => this.#nothing(this.#operation(OUT_8, port, value)),
      out16: unsupported,
      out32: unsupported,
      load: (address, size: AccessSize) => this.#operation(LOAD[size], address, 0),
      store: (address, size: AccessSize, value) => this.#nothing(this.#operation(STORE[size], address, value)),
      enableInterrupts: unsupported,
      disableInterrupts: unsupported,
      waitForInterrupt: (number = -1) => ({
        *[Symbol.iterator]() {
          while (!acknowledge(number)) yield undefined
          return number
        }
      }),
      waitForInterruptWithin: unsupported,
      halt: unsupported,
      tripleFault: unsupported,
      internalError: unsupported,
      sleep: unsupported,
      yield: () => yielding,
      now: () => 0,
      startVcpu: unsupported
    }
  }

  /** Lets the local APIC take messages. */
  *enableApic(): GuestRoutine {
    yield* this.cpu.store(0xfee0_00f0, 4, 0x1ff)
  }

  /** Turns the machine off. */
  *powerOff(): GuestRoutine {
    yield* this.cpu.out8(SLEEP_CONTROL_PORT, SLEEP_CONTROL_S5)
  }

  /** Runs guest code to its end, one operation in each turn of the event loop. What waits for long leaves the vCPU the processor. */
  readonly run = <A>(routine: GuestRoutine<A>): Effect.Effect<A> =>
    Effect.callback((resume) => {
      let stopped = false
      let begun = 0
      let turns = 0
      const step = () => {
        if (stopped) return
        try {
          const next = routine.next(undefined)
          if (next.done === true) resume(Effect.succeed(next.value))
          else {
            turns = begun === this.#begun ? turns + 1 : 0
            begun = this.#begun
            if (turns < BUSY_TURNS) setImmediate(step)
            else setTimeout(step, 1)
          }
        } catch (defect) {
          resume(Effect.die(defect))
        }
      }
      step()
      return Effect.sync(() => {
        stopped = true
      })
    })
}
