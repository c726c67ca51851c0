/** The face of a fake vCPU that its program sees: each method makes an operation, and the vCPU does it. */
import * as Duration from "effect/Duration"
import type { GuestMemory } from "../GuestMemory.ts"
import type { VcpuState } from "../VcpuState.ts"
import type { FakeVm } from "./FakeVm.ts"
import type {
  AccessSize,
  GuestCpu,
  GuestInterrupts,
  GuestOperation,
  GuestProgram,
  InterruptHandler
} from "./GuestCpu.ts"
import type { OperationSlot } from "./GuestOperations.ts"

/** A vCPU's interrupt controller: one latch a line, in the order in which the interrupts came. */
export class FakeInterrupts implements GuestInterrupts {
  enabled = false
  readonly pending = new Set<number>()
  readonly handlers = new Map<number, InterruptHandler>()
  readonly #route: (gsi: number) => void

  constructor(route: (gsi: number) => void) {
    this.#route = route
  }

  readonly handle = (gsi: number, handler: InterruptHandler): void => {
    this.handlers.set(gsi, handler)
  }
  readonly route = (gsi: number): void => this.#route(gsi)
  readonly acknowledge = (gsi: number): boolean => this.pending.delete(gsi)

  /** Takes the oldest interrupt that has a handler out of its latch; -1 when there is none. */
  takeHandled(): number {
    for (const gsi of this.pending) {
      if (!this.handlers.has(gsi)) continue
      this.pending.delete(gsi)
      return gsi
    }
    return -1
  }

  /** Takes the oldest interrupt that is this one (any: -1) or has a handler out of its latch; -1 when there is none. */
  takeAwaited(awaited: number): number {
    for (const gsi of this.pending) {
      if (awaited >= 0 && gsi !== awaited && !this.handlers.has(gsi)) continue
      this.pending.delete(gsi)
      return gsi
    }
    return -1
  }
}

/** What a program holds of its vCPU. */
export class FakeGuestCpu implements GuestCpu {
  readonly id: number
  state: VcpuState | undefined
  readonly interrupts: FakeInterrupts
  readonly #vm: FakeVm
  readonly #slot: OperationSlot

  constructor(vm: FakeVm, id: number, slot: OperationSlot) {
    this.id = id
    this.#vm = vm
    this.#slot = slot
    this.interrupts = new FakeInterrupts((gsi) => vm.route(gsi, id))
  }

  get memory(): GuestMemory {
    return this.#vm.memory
  }

  readonly now = (): number => this.#vm.now()

  readonly in8 = (port: number): GuestOperation<number> => this.#read("pio-read", port, 1)
  readonly in16 = (port: number): GuestOperation<number> => this.#read("pio-read", port, 2)
  readonly in32 = (port: number): GuestOperation<number> => this.#read("pio-read", port, 4)
  readonly out8 = (port: number, value: number): GuestOperation<void> => this.#write("pio-write", port, 1, value)
  readonly out16 = (port: number, value: number): GuestOperation<void> => this.#write("pio-write", port, 2, value)
  readonly out32 = (port: number, value: number): GuestOperation<void> => this.#write("pio-write", port, 4, value)
  readonly load = (address: number, size: AccessSize): GuestOperation<number> => this.#read("mmio-read", address, size)
  readonly store = (address: number, size: AccessSize, value: number): GuestOperation<void> =>
    this.#write("mmio-write", address, size, value)

  readonly enableInterrupts = (): void => {
    this.interrupts.enabled = true
  }
  readonly disableInterrupts = (): void => {
    this.interrupts.enabled = false
  }
  readonly waitForInterrupt = (gsi = -1): GuestOperation<number> => {
    this.#slot.arm("wait").gsi = gsi
    return this.#slot.ofNumber
  }
  readonly waitForInterruptWithin = (limit: Duration.Input, gsi = -1): GuestOperation<number | undefined> => {
    const operation = this.#slot.arm("wait")
    operation.gsi = gsi
    operation.deadline = this.#deadline(limit)
    return this.#slot.ofOptional
  }
  readonly halt = (): GuestOperation<void> => {
    this.#slot.arm("halt")
    return this.#slot.ofVoid
  }
  readonly tripleFault = (): GuestOperation<never> => {
    this.#slot.arm("triple-fault")
    return this.#slot.ofEnd
  }
  readonly internalError = (instructionBytes?: Uint8Array): GuestOperation<never> => {
    this.#slot.arm("internal-error").bytes = instructionBytes
    return this.#slot.ofEnd
  }
  readonly sleep = (duration: Duration.Input): GuestOperation<void> => {
    this.#slot.arm("sleep").deadline = this.#deadline(duration)
    return this.#slot.ofVoid
  }
  readonly yield = (): GuestOperation<void> => {
    this.#slot.arm("yield")
    return this.#slot.ofVoid
  }
  readonly startVcpu = (id: number, program: GuestProgram): GuestOperation<number> => {
    this.#slot.arm("start-vcpu", id).program = program
    return this.#slot.ofNumber
  }

  #read(kind: "pio-read" | "mmio-read", address: number, size: AccessSize): GuestOperation<number> {
    this.#slot.arm(kind, address, size)
    return this.#slot.ofNumber
  }

  #write(kind: "pio-write" | "mmio-write", address: number, size: AccessSize, value: number): GuestOperation<void> {
    this.#slot.arm(kind, address, size, size === 4 ? value >>> 0 : value & (size === 2 ? 0xffff : 0xff))
    return this.#slot.ofVoid
  }

  #deadline(duration: Duration.Input): number {
    return this.now() + Duration.toMillis(Duration.fromInputUnsafe(duration))
  }
}
