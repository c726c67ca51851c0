/**
 * A fake vCPU: runs a guest program, one operation after the other, as a task of the fibers' own scheduler.
 *
 * It steps the program's generator synchronously and gives way only where it must: for an answer, for an interrupt, for time,
 * when a turn has lasted {@link TURN_OPERATIONS}, or when the seed of a simulation says so.
 */
import * as Clock from "effect/Clock"
import type * as Context from "effect/Context"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import type * as Fiber from "effect/Fiber"
import { formatAddress } from "../GuestAddress.ts"
import type { GuestMemory } from "../GuestMemory.ts"
import type { HypervisorError } from "../Hypervisor.ts"
import type { VcpuExit, VcpuRegisters } from "../VcpuExit.ts"
import type { VcpuState } from "../VcpuState.ts"
import { type BusPortOwner, FakeBusPort } from "./FakeBusPort.ts"
import { FakeGuestCpu } from "./FakeGuestCpu.ts"
import type { FakeVm } from "./FakeVm.ts"
import { BoundaryViolation } from "./FakeWorld.ts"
import type { GuestProgram, GuestReply, GuestRoutine } from "./GuestCpu.ts"
import { type Operation, type OperationOwner, OperationSlot } from "./GuestOperations.ts"
import { programAt } from "./GuestProgram.ts"
import type { TraceKind } from "./Trace.ts"

/** Operations that a vCPU does before it lets others run. */
export const TURN_OPERATIONS = 64

/**
 * What a vCPU is doing.
 *
 * - `new`, `unstarted`: it has not run; it runs and waits for its start-up interrupt
 * - `ready`, `running`: its next turn is scheduled, or would be if it were not out of the guest; its turn is going on
 * - `call`, `interrupt`, `sleep`, `room`: its operation waits for an answer, an interrupt, time, room for posted writes
 * - `halted`: it has halted with interrupts off
 * - `ending`, `stopped`: its exit waits for posted writes to be delivered; it has stopped for good
 */
type Phase =
  | "new"
  | "unstarted"
  | "ready"
  | "running"
  | "call"
  | "interrupt"
  | "sleep"
  | "room"
  | "halted"
  | "ending"
  | "stopped"

/** An interrupt handler that runs, and what the code below it goes on with. */
interface Frame {
  readonly routine: GuestRoutine
  readonly operation: Operation
  readonly redo: boolean
  readonly reply: GuestReply
  readonly enabled: boolean
}

/** A virtual processor of a fake machine. */
export class FakeVcpu implements OperationOwner, BusPortOwner {
  readonly id: number
  readonly vm: FakeVm
  readonly #slot = new OperationSlot(this)
  readonly #guest: FakeGuestCpu
  readonly #port: FakeBusPort
  readonly #frames: Array<Frame> = []
  #routine: GuestRoutine | undefined
  #phase: Phase = "new"
  /** `run` is going on. */
  #active = false
  #scheduled = false
  /** The operation has not been done: do it (again) before the program goes on. */
  #redo = false
  #exit: VcpuExit | undefined
  #resume: ((effect: Effect.Effect<VcpuExit, HypervisorError>) => void) | undefined
  #context: Context.Context<never> | undefined
  #timer: (() => void) | undefined
  schedule: (task: () => void) => void

  constructor(vm: FakeVm, id: number) {
    this.vm = vm
    this.id = id
    this.schedule = vm.schedule
    this.#guest = new FakeGuestCpu(vm, id, this.#slot)
    this.#port = new FakeBusPort(vm, this)
  }

  // --- from the host ---------------------------------------------------------------------------------------------------

  /** The state in which the boot vCPU starts. */
  get state(): VcpuState | undefined {
    return this.#guest.state
  }

  set state(state: VcpuState | undefined) {
    this.#guest.state = state
  }

  /** Whether `run` is going on. */
  get active(): boolean {
    return this.#active
  }

  /** Whether the vCPU has stopped for good. */
  get stopped(): boolean {
    return this.#phase === "stopped"
  }

  /** Whether the vCPU has ever run. */
  get entered(): boolean {
    return this.#phase !== "new"
  }

  /** Whether the vCPU waits for its start-up interrupt. */
  get isNotStarted(): boolean {
    return this.id !== 0 && (this.#phase === "new" || this.#phase === "unstarted")
  }

  /** Whether the vCPU has halted with interrupts off. */
  get isHalted(): boolean {
    return this.#phase === "halted"
  }

  /** Begins or goes on to run the program as a task of this fiber's scheduler. */
  enter(
    fiber: Fiber.Fiber<unknown, unknown>,
    resume: (effect: Effect.Effect<VcpuExit, HypervisorError>) => void
  ): void {
    this.#active = true
    this.#resume = resume
    this.#context = fiber.context
    const dispatcher = fiber.currentDispatcher
    this.schedule = (task) => dispatcher.scheduleTask(task, 0)
    if (this.#phase === "new") this.#boot()
    if (this.#phase === "ready") this.#ready()
    else if (this.#phase === "interrupt" || this.#phase === "sleep") this.#armTimer(this.#slot.operation.deadline)
    else if (this.#phase === "ending") this.#finish()
    else if (this.#phase === "room") this.#port.scheduleDrain()
  }

  /** Takes the vCPU out of the guest. It can be entered again. */
  leave(): void {
    this.#active = false
    this.#resume = undefined
    this.#cancelTimer()
    this.#trace("leave", 0, 0)
  }

  /** Ends a run with a defect. */
  die(defect: unknown): void {
    if (!this.#active) return
    this.#stop(Effect.die(defect))
  }

  /** Reports that the whole machine has halted for good. */
  endHalted(): void {
    if (this.#active) this.#end({ _tag: "Halted", registers: this.#registers() })
  }

  /** Gives the vCPU its first instruction, as a start-up interrupt does. Returns whether it waited for one. */
  start(program: GuestProgram): boolean {
    if (this.id === 0 || !(this.isNotStarted || this.isHalted)) return false
    this.#frames.length = 0
    this.#guest.interrupts.enabled = false
    this.#redo = false
    this.#slot.reply = undefined
    this.#begin(program)
    if (this.#active) this.#ready()
    return true
  }

  /** Latches an interrupt. */
  interrupt(gsi: number): void {
    this.#guest.interrupts.pending.add(gsi)
    if (this.#phase === "interrupt") this.#wake()
  }

  /** What the vCPU waits for, for reports. */
  get waiting(): string | undefined {
    if (!this.#active) return undefined
    const { pending } = this.#guest.interrupts
    const left = (pending.size === 0 ? "" : `; interrupts that wait: ${Array.from(pending).join(", ")}`) +
      (this.#port.posted === 0 ? "" : `; posted writes that wait: ${this.#port.posted}`)
    return `vm${this.vm.number} vCPU ${this.id} ${this.#describePhase()}${left}`
  }

  #describePhase(): string {
    const { deadline, gsi } = this.#slot.operation
    switch (this.#phase) {
      case "call":
        return `waits for the answer to ${this.#port.calling}`
      case "interrupt":
        return `waits for ${gsi < 0 ? "an interrupt" : `interrupt ${gsi}`}`
      case "halted":
        return "has halted with interrupts off"
      case "unstarted":
        return "waits to be started by another vCPU"
      case "room":
      case "ending":
        return "waits for its devices to take posted writes"
      case "sleep":
        return `sleeps until ${deadline} ms`
      default:
        return `is ${this.#phase}`
    }
  }

  // --- from its own parts ----------------------------------------------------------------------------------------------

  readonly violation = (message: string): Error => this.vm.world.violation(message)

  readonly immediate = (operation: Operation): boolean => {
    const isWrite = operation.kind === "mmio-write"
    if ((!isWrite && operation.kind !== "mmio-read") || this.vm.pause()) return false
    if (!this.#port.accessMemory(operation, isWrite)) return false
    this.#slot.reply = this.#port.value
    return true
  }

  readonly answered = (value: number): void => {
    this.#slot.reply = value
    this.#phase = "ready"
    if (this.#active) this.#ready()
  }

  readonly delivered = (drained: boolean): void => {
    if (this.#phase === "room") this.#wake()
    else if (drained && this.#phase === "ending") this.#finish()
  }

  readonly after = (millis: number, task: () => void): () => void => {
    const context = this.#context
    if (context === undefined) return () => undefined
    const sleep = Clock.clockWith((clock) => clock.sleep(Duration.millis(millis)))
    const fiber = Effect.runForkWith(context)(sleep)
    let over = false
    fiber.addObserver(() => {
      if (!over) task()
    })
    return () => {
      over = true
      fiber.interruptUnsafe()
    }
  }

  // --- the turn --------------------------------------------------------------------------------------------------------

  #boot(): void {
    if (this.id !== 0) {
      this.#phase = "unstarted"
      return
    }
    const rip = this.state?.rip ?? 0
    const program = programAt(this.vm.memory, rip)
    if (program === undefined) this.#endInternalError(codeAt(this.vm.memory, rip))
    else this.#begin(program)
  }

  #begin(program: GuestProgram): void {
    this.#routine = program(this.#guest)
    this.#phase = "ready"
  }

  #ready(): void {
    if (this.#scheduled) return
    this.#scheduled = true
    this.schedule(this.#turn)
  }

  /** The condition that the operation waits for may have come: look at it again. */
  #wake(): void {
    this.#cancelTimer()
    this.#redo = true
    this.#phase = "ready"
    if (this.#active) this.#ready()
  }

  readonly #turn = (): void => {
    this.#scheduled = false
    if (!this.#active || this.#phase !== "ready") return
    this.#phase = "running"
    try {
      for (let operations = 0; operations < TURN_OPERATIONS; operations++) {
        if (!this.#redo) {
          if (this.#guest.interrupts.enabled) this.#deliver()
          if (!this.#advance()) return
          if (this.vm.pause()) {
            this.#redo = true
            break
          }
        }
        this.#redo = false
        if (!this.#perform()) return
        // What a device did with the access may have taken this vCPU out of the guest.
        if (!this.#active) break
      }
      this.#phase = "ready"
      if (this.#active) this.#ready()
    } catch (defect) {
      if (!(defect instanceof BoundaryViolation)) {
        this.violation(`vm${this.vm.number} vCPU ${this.id}: ${String(defect)}`)
      }
      this.die(defect)
    }
  }

  /** Resumes the program up to its next operation. Returns whether there is one. */
  #advance(): boolean {
    for (;;) {
      const frame = this.#frames.at(-1)
      const routine = frame?.routine ?? this.#routine
      if (routine === undefined) throw new Error("a vCPU without a program runs")
      const { reply } = this.#slot
      this.#slot.reply = undefined
      this.#slot.operation.kind = "none"
      const step = routine.next(reply)
      this.#slot.checkDone()
      if (step.done !== true) return true
      if (frame === undefined) {
        this.#halt()
        return false
      }
      this.#frames.pop()
      this.#slot.restore(frame.operation, frame.reply)
      this.#redo = frame.redo
      this.#guest.interrupts.enabled = frame.enabled
      if (this.#redo) return true
      if (frame.enabled) this.#deliver()
    }
  }

  /** With interrupts on: begins the handler of the oldest interrupt that has one. */
  #deliver(): void {
    const gsi = this.#guest.interrupts.takeHandled()
    if (gsi >= 0) this.#handle(gsi, false, this.#slot.reply)
  }

  /** Begins the handler of an interrupt. The code below goes on with `reply`, or does its operation again. */
  #handle(gsi: number, redo: boolean, reply: GuestReply): void {
    const { interrupts } = this.#guest
    this.#trace("interrupt", gsi, 0)
    const handler = interrupts.handlers.get(gsi)
    if (handler === undefined) {
      this.#slot.reply = reply
      return
    }
    const { operation } = this.#slot
    this.#frames.push({ routine: handler(this.#guest, gsi), operation, redo, reply, enabled: interrupts.enabled })
    this.#slot.nest()
    interrupts.enabled = false
  }

  /** Does the operation. Returns whether it is done; otherwise the turn is over. */
  #perform(): boolean {
    const { operation } = this.#slot
    switch (operation.kind) {
      case "pio-read":
        return this.#access(false, false)
      case "pio-write":
        return this.#access(false, true)
      case "mmio-read":
        return this.#access(true, false)
      case "mmio-write":
        return this.#access(true, true)
      case "wait":
        return this.#wait()
      case "halt":
        return this.#guest.interrupts.enabled ? this.#wait() : this.#halt()
      case "triple-fault":
        return this.#end({ _tag: "TripleFault", registers: this.#registers() })
      case "internal-error":
        return this.#endInternalError(operation.bytes)
      case "sleep":
        if (this.vm.now() >= operation.deadline) return true
        this.#trace("sleep", 0, operation.deadline)
        this.#phase = "sleep"
        this.#armTimer(operation.deadline)
        return false
      case "yield":
        this.#phase = "ready"
        this.#ready()
        return false
      case "start-vcpu": {
        const started = operation.program !== undefined && this.vm.startVcpu(operation.address, operation.program)
        this.#slot.reply = started ? 1 : 0
        this.#trace("start-vcpu", operation.address, this.#slot.reply)
        return true
      }
      case "none":
        throw this.violation(`vCPU ${this.id}: the guest program yielded something that is no operation`)
    }
  }

  #wait(): boolean {
    const { deadline, gsi } = this.#slot.operation
    const taken = this.#guest.interrupts.takeAwaited(gsi)
    if (taken >= 0) {
      const isAwaited = gsi < 0 || taken === gsi
      this.#handle(taken, !isAwaited, isAwaited ? taken : undefined)
      return true
    }
    if (this.vm.now() >= deadline) {
      this.#slot.reply = undefined
      return true
    }
    this.#trace("wait", gsi < 0 ? 0 : gsi, 0)
    this.#phase = "interrupt"
    this.#armTimer(deadline)
    return false
  }

  #access(mmio: boolean, isWrite: boolean): boolean {
    switch (this.#port.access(this.#slot.operation, mmio, isWrite)) {
      case "done":
        this.#slot.reply = this.#port.value
        return true
      case "call":
        this.#phase = "call"
        return false
      case "room":
        this.#phase = "room"
        return false
      case "gone":
        this.#redo = true
        this.#phase = "ready"
        return false
    }
  }

  // --- the end ---------------------------------------------------------------------------------------------------------

  /** `hlt` with interrupts off: for good only when no other vCPU is left that could start this one again. */
  #halt(): boolean {
    this.#trace("halt", 0, 0)
    this.#phase = "halted"
    this.vm.halted()
    return false
  }

  #endInternalError(bytes: Uint8Array | undefined): boolean {
    return this.#end({
      _tag: "HypervisorInternalError",
      suberror: 1,
      instructionBytes: bytes === undefined ? "" : hex(bytes),
      registers: this.#registers()
    })
  }

  #end(exit: VcpuExit): boolean {
    this.#exit = exit
    this.#phase = "ending"
    this.#finish()
    return false
  }

  /** Reports the exit once everything that the vCPU posted before it is delivered. */
  #finish(): void {
    const exit = this.#exit
    if (exit === undefined || !this.#active) return
    const drained = this.#port.drain()
    // To deliver a write may have ended the run.
    if (!this.#active) return
    if (!drained) {
      this.#port.scheduleDrain()
      return
    }
    this.#trace("exit", 0, 0)
    this.#stop(Effect.succeed(exit))
  }

  #stop(result: Effect.Effect<VcpuExit>): void {
    this.#phase = "stopped"
    this.#active = false
    this.#cancelTimer()
    const resume = this.#resume
    this.#resume = undefined
    resume?.(result)
  }

  #registers(): VcpuRegisters {
    const { state } = this
    if (state === undefined) return {}
    return {
      rip: formatAddress(state.rip),
      rsp: formatAddress(state.rsp),
      rbx: formatAddress(state.rbx),
      rsi: formatAddress(state.rsi)
    }
  }

  // --- time ------------------------------------------------------------------------------------------------------------

  #armTimer(deadline: number): void {
    if (!this.#active || deadline === Number.POSITIVE_INFINITY) return
    this.#cancelTimer()
    this.#timer = this.after(Math.max(0, deadline - this.vm.now()), () => {
      this.#timer = undefined
      if (this.#phase === "sleep" || this.#phase === "interrupt") this.#wake()
    })
  }

  #cancelTimer(): void {
    const cancel = this.#timer
    this.#timer = undefined
    cancel?.()
  }

  #trace(kind: TraceKind, address: number, value: number): void {
    this.vm.world.trace.record(this.vm.now(), kind, this.vm.number, this.id, address, 0, value)
  }
}

/** Longest instruction of x86 in bytes (Intel SDM volume 2, section 2.3.11). */
const INSTRUCTION_SIZE = 15

/** The bytes at an address, as many as memory has of an instruction's length. */
const codeAt = (memory: GuestMemory, address: number): Uint8Array | undefined => {
  for (let size = INSTRUCTION_SIZE; size > 0; size--) {
    const code = memory.slice(address, size)
    if (code !== undefined) return code
  }
  return undefined
}

const hex = (bytes: Uint8Array): string => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ")
