/** A vCPU as guest code sees it: the operations, and the types of the generator functions that use them. */
import type * as Duration from "effect/Duration"
import type { GuestMemory } from "../GuestMemory.ts"
import type { VcpuState } from "../VcpuState.ts"

/** What a program hands to its vCPU at each operation: only the vCPU makes and reads it. */
export type GuestRequest = undefined

/** What a vCPU hands back: the result of an operation. */
export type GuestReply = number | undefined

/** One operation of a guest. It happens when a program delegates to it: `yield* operation`. */
export interface GuestOperation<out A> {
  readonly [Symbol.iterator]: () => Iterator<GuestRequest, A, GuestReply>
}

/** Guest code that returns an `A`: what a generator function with operations in it makes. */
export type GuestRoutine<A = void> = Generator<GuestRequest, A, GuestReply>

/** The code of one vCPU from its first instruction on. A program that returns halts with interrupts off. */
export type GuestProgram = (cpu: GuestCpu) => GuestRoutine

/** Runs with interrupts off whenever its line's interrupt is delivered. */
export type InterruptHandler = (cpu: GuestCpu, gsi: number) => GuestRoutine

/** Width of an access in bytes. */
export type AccessSize = 1 | 2 | 4

/** The number of the first vector of message-signalled interrupts: those of lines are lower. */
const FIRST_MESSAGE = 0x100

/** The number under which a vCPU gets messages with this vector, 0 to 255, where a line has its own number. */
export const messageInterrupt = (vector: number): number => FIRST_MESSAGE + vector

/** The interrupt controller as a guest sees it. Lines are edge-triggered, with one latch each: no edge is ever lost. */
export interface GuestInterrupts {
  /** Whether this vCPU takes interrupts now. Off at first. */
  readonly enabled: boolean
  /** Lines whose interrupt waits for this vCPU, oldest first. */
  readonly pending: ReadonlySet<number>
  /** Has interrupts of this line run this code on this vCPU when interrupts are on. */
  readonly handle: (gsi: number, handler: InterruptHandler) => void
  /** Sends the later interrupts of this line to this vCPU. At first all go to the boot vCPU. */
  readonly route: (gsi: number) => void
  /** Forgets an interrupt that waits; returns whether there was one. */
  readonly acknowledge: (gsi: number) => boolean
}

/** A vCPU as the program on it sees it. */
export interface GuestCpu {
  /** Number of the vCPU and its local APIC ID. 0 is the boot vCPU. */
  readonly id: number
  /** The state in which the machine started the boot vCPU; a started vCPU has none. See `GuestBoot` for what it points to. */
  readonly state: VcpuState | undefined
  /** The machine's RAM. The same bytes that devices see; changes are visible at once. */
  readonly memory: GuestMemory
  readonly interrupts: GuestInterrupts

  /** `in` from a port. A port that no device has reads as all ones. */
  readonly in8: (port: number) => GuestOperation<number>
  readonly in16: (port: number) => GuestOperation<number>
  readonly in32: (port: number) => GuestOperation<number>
  /** `out` to a port. */
  readonly out8: (port: number, value: number) => GuestOperation<void>
  readonly out16: (port: number, value: number) => GuestOperation<void>
  readonly out32: (port: number, value: number) => GuestOperation<void>
  /** A load from a physical address: RAM, a device, or (all ones) nothing. */
  readonly load: (address: number, size: AccessSize) => GuestOperation<number>
  /** A store to a physical address: RAM, a device, or nothing. */
  readonly store: (address: number, size: AccessSize, value: number) => GuestOperation<void>

  /** `sti`. */
  readonly enableInterrupts: () => void
  /** `cli`. */
  readonly disableInterrupts: () => void
  /**
   * `sti; hlt`: waits for an interrupt of this line (of any line when absent), runs its handler if it has one, and returns
   * its number. An interrupt that came before counts. Interrupts are as they were before, afterwards.
   */
  readonly waitForInterrupt: (gsi?: number) => GuestOperation<number>
  /** The same with a limit in virtual time: `undefined` when it has passed. */
  readonly waitForInterruptWithin: (limit: Duration.Input, gsi?: number) => GuestOperation<number | undefined>
  /**
   * `hlt`: with interrupts on it waits for one and goes on. With interrupts off only another vCPU can start this one again;
   * when all vCPUs have halted so, or were never started, the machine has halted for good (`Halted`).
   */
  readonly halt: () => GuestOperation<void>
  /** A fault that cannot be delivered: the vCPU stops for good (`TripleFault`). */
  readonly tripleFault: () => GuestOperation<never>
  /** An instruction that the hypervisor cannot emulate: the vCPU stops for good (`HypervisorInternalError`, suberror 1). */
  readonly internalError: (instructionBytes?: Uint8Array) => GuestOperation<never>
  /** Does nothing for a while (virtual time). */
  readonly sleep: (duration: Duration.Input) => GuestOperation<void>
  /** `pause`: lets everything else run. A loop that polls memory needs it. */
  readonly yield: () => GuestOperation<void>
  /** Virtual time in milliseconds. */
  readonly now: () => number
  /** INIT and start-up interrupts: another vCPU runs this program. Returns 0 when there is no such vCPU waiting for it, otherwise 1. */
  readonly startVcpu: (id: number, program: GuestProgram) => GuestOperation<number>
}
