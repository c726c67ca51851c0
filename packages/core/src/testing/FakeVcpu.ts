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
import type { CallReply } from "../Bus.ts"
import { openBusValue, SHADOW_INVALID } from "../Bus.ts"
import { formatAddress } from "../GuestAddress.ts"
import type { GuestMemory } from "../GuestMemory.ts"
import type { HypervisorError } from "../Hypervisor.ts"
import type { VcpuExit, VcpuRegisters } from "../VcpuExit.ts"
import type { VcpuState } from "../VcpuState.ts"
import { describeRegister, type FakeBus } from "./FakeBus.ts"
import type { FakeVm } from "./FakeVm.ts"
import { BoundaryViolation } from "./FakeWorld.ts"
import type {
  AccessSize,
  GuestCpu,
  GuestInterrupts,
  GuestOperation,
  GuestProgram,
  GuestReply,
  GuestRequest,
  GuestRoutine,
  InterruptHandler
} from "./GuestCpu.ts"
import { programAt } from "./GuestProgram.ts"
import { PostedRing } from "./PostedRing.ts"
import type { TraceKind } from "./Trace.ts"

/** Operations that a vCPU does before it lets others run. */
export const TURN_OPERATIONS = 64

/** How often a device that has no room for a posted write is asked again at once, before a millisecond is let pass each time. */
const POSTED_RETRIES = 64

type OperationKind =
  | "none"
  | "pio-read"
  | "pio-write"
  | "mmio-read"
  | "mmio-write"
  | "wait"
  | "halt"
  | "triple-fault"
  | "internal-error"
  | "sleep"
  | "yield"
  | "start-vcpu"

type Phase =
  | "new"
  | "unstarted"
  | "ready"
  | "running"
  | "call"
  | "interrupt"
  | "sleep"
  | "ring"
  | "halted"
  | "ending"
  | "stopped"

/** What `perform` says about the operation: its result is there, it waits, or the vCPU has stopped. */
type Progress = "done" | "wait" | "stop"

interface Frame {
  readonly routine: GuestRoutine
  /** What the interrupted frame below goes on with. */
  readonly below: {
    readonly operation: Operation
    readonly redo: boolean
    readonly reply: GuestReply
    readonly enabled: boolean
  }
}

const REQUEST: IteratorYieldResult<GuestRequest> = { done: false, value: undefined }

class Operation {
  kind: OperationKind = "none"
  address = 0
  size = 0
  value = 0
  /** Line of a wait, or -1 for any. */
  gsi = -1
  /** Virtual time at which a wait or a sleep ends. */
  deadline = Number.POSITIVE_INFINITY
  bytes: Uint8Array | undefined
  program: GuestProgram | undefined
}

class PendingCall implements CallReply {
  done = false
  value = 0
  readonly #vcpu: FakeVcpu
  readonly #what: string
  readonly #size: number
  readonly #isWrite: boolean

  constructor(vcpu: FakeVcpu, what: string, size: number, isWrite: boolean) {
    this.#vcpu = vcpu
    this.#what = what
    this.#size = size
    this.#isWrite = isWrite
  }

  readonly complete = (value: number): void => {
    const world = this.#vcpu.vm.world
    if (this.done) throw world.violation(`the answer to ${this.#what} was given twice`)
    const limit = 2 ** (8 * this.#size)
    if (!this.#isWrite && !(Number.isInteger(value) && value >= 0 && value < limit)) {
      throw world.violation(`the answer to ${this.#what} is ${value}, not an unsigned number of ${this.#size} bytes`)
    }
    this.done = true
    this.value = this.#isWrite ? 0 : value
    this.#vcpu.answered(this)
  }
}

/** A virtual processor of a fake machine, seen from the host (`enter`, `leave`) and from its program (`GuestCpu`). */
export class FakeVcpu implements GuestCpu {
  readonly id: number
  readonly vm: FakeVm
  state: VcpuState | undefined
  readonly interrupts: GuestInterrupts
  readonly #ring = new PostedRing()
  readonly #pending = new Set<number>()
  readonly #handlers = new Map<number, InterruptHandler>()
  readonly #frames: Array<Frame> = []
  // One of each kind serves all operations of this vCPU: it does one at a time.
  readonly #numberOperation: GuestOperation<number>
  readonly #optionalOperation: GuestOperation<number | undefined>
  readonly #voidOperation: GuestOperation<void>
  readonly #endOperation: GuestOperation<never>
  #operation = new Operation()
  #armed = false
  #started = false
  #enabled = false
  #phase: Phase = "new"
  #active = false
  #scheduled = false
  #drainScheduled = false
  #refusals = 0
  #redo = false
  #reply: GuestReply
  #routine: GuestRoutine | undefined
  #call: PendingCall | undefined
  #calling = ""
  #exit: VcpuExit | undefined
  #resume: ((effect: Effect.Effect<VcpuExit, HypervisorError>) => void) | undefined
  #schedule: (task: () => void) => void
  #context: Context.Context<never> | undefined
  #timer: (() => void) | undefined

  constructor(vm: FakeVm, id: number) {
    this.vm = vm
    this.id = id
    this.#schedule = vm.schedule
    const handlers = this.#handlers
    const pending = this.#pending
    const isEnabled = (): boolean => this.#enabled
    this.interrupts = {
      get enabled() {
        return isEnabled()
      },
      pending,
      handle: (gsi, handler) => {
        handlers.set(gsi, handler)
      },
      route: (gsi) => vm.route(gsi, id),
      acknowledge: (gsi) => pending.delete(gsi)
    }
    this.#numberOperation = this.#makeOperation((reply) => reply ?? 0)
    this.#optionalOperation = this.#makeOperation((reply) => reply)
    this.#voidOperation = this.#makeOperation(() => undefined)
    this.#endOperation = this.#makeOperation(() => {
      throw vm.world.violation(`vCPU ${id} went on after it had stopped for good`)
    })
  }

  #makeOperation<A>(result: (reply: GuestReply) => A): GuestOperation<A> {
    const iterator: Iterator<GuestRequest, A, GuestReply> = {
      next: (reply) => {
        if (!this.#started) {
          this.#started = true
          if (!this.#immediate()) return REQUEST
          return { done: true, value: result(this.#reply) }
        }
        return { done: true, value: result(reply) }
      }
    }
    return {
      [Symbol.iterator]: () => {
        this.#armed = false
        this.#started = false
        return iterator
      }
    }
  }

  // --- the program's side ----------------------------------------------------------------------------------------------

  get memory(): GuestMemory {
    return this.vm.memory
  }

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
    this.#enabled = true
  }
  readonly disableInterrupts = (): void => {
    this.#enabled = false
  }
  readonly waitForInterrupt = (gsi = -1): GuestOperation<number> => {
    this.#arm("wait", 0, 0, 0)
    this.#operation.gsi = gsi
    return this.#numberOperation
  }
  readonly waitForInterruptWithin = (limit: Duration.Input, gsi = -1): GuestOperation<number | undefined> => {
    this.#arm("wait", 0, 0, 0)
    this.#operation.gsi = gsi
    this.#operation.deadline = this.now() + Duration.toMillis(Duration.fromInputUnsafe(limit))
    return this.#optionalOperation
  }
  readonly halt = (): GuestOperation<void> => {
    this.#arm("halt", 0, 0, 0)
    return this.#voidOperation
  }
  readonly tripleFault = (): GuestOperation<never> => {
    this.#arm("triple-fault", 0, 0, 0)
    return this.#endOperation
  }
  readonly internalError = (instructionBytes?: Uint8Array): GuestOperation<never> => {
    this.#arm("internal-error", 0, 0, 0)
    this.#operation.bytes = instructionBytes
    return this.#endOperation
  }
  readonly sleep = (duration: Duration.Input): GuestOperation<void> => {
    this.#arm("sleep", 0, 0, 0)
    this.#operation.deadline = this.now() + Duration.toMillis(Duration.fromInputUnsafe(duration))
    return this.#voidOperation
  }
  readonly yield = (): GuestOperation<void> => {
    this.#arm("yield", 0, 0, 0)
    return this.#voidOperation
  }
  readonly now = (): number => this.vm.now()
  readonly startVcpu = (id: number, program: GuestProgram): GuestOperation<number> => {
    this.#arm("start-vcpu", id, 0, 0)
    this.#operation.program = program
    return this.#numberOperation
  }

  #read(kind: "pio-read" | "mmio-read", address: number, size: AccessSize): GuestOperation<number> {
    this.#arm(kind, address, size, 0)
    return this.#numberOperation
  }

  #write(kind: "pio-write" | "mmio-write", address: number, size: AccessSize, value: number): GuestOperation<void> {
    this.#arm(kind, address, size, size === 4 ? value >>> 0 : value & (size === 2 ? 0xffff : 0xff))
    return this.#voidOperation
  }

  #arm(kind: OperationKind, address: number, size: number, value: number): void {
    if (this.#armed) {
      throw this.vm.world.violation(
        `vCPU ${this.id}: the guest program made a ${this.#operation.kind} operation and did not do it; write yield* before it`
      )
    }
    this.#armed = true
    const operation = this.#operation
    operation.kind = kind
    operation.address = address
    operation.size = size
    operation.value = value
    operation.gsi = -1
    operation.deadline = Number.POSITIVE_INFINITY
    operation.bytes = undefined
    operation.program = undefined
  }

  /** Does an access to RAM at once, as no one else is asked for it. */
  #immediate(): boolean {
    const { address, kind, size, value } = this.#operation
    if (kind !== "mmio-read" && kind !== "mmio-write") return false
    const region = this.vm.memory.regionOf(address, size)
    if (region === undefined || this.vm.pause()) return false
    this.#reply = accessView(region.view, address - region.guestAddress, size, kind === "mmio-write", value)
    return true
  }

  // --- the host's side -------------------------------------------------------------------------------------------------

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

  /** Begins or goes on to run the program as a task of this fiber's scheduler. */
  enter(
    fiber: Fiber.Fiber<unknown, unknown>,
    resume: (effect: Effect.Effect<VcpuExit, HypervisorError>) => void
  ): void {
    this.#active = true
    this.#resume = resume
    this.#context = fiber.context
    const dispatcher = fiber.currentDispatcher
    this.#schedule = (task) => dispatcher.scheduleTask(task, 0)
    if (this.#phase === "new") this.#boot()
    if (this.#phase === "ready") this.#ready()
    else if (this.#phase === "interrupt" || this.#phase === "sleep") this.#armTimer(this.#operation.deadline)
    else if (this.#phase === "ending") this.#finish()
    else if (this.#phase === "ring") this.#scheduleDrain()
  }

  /** Takes the vCPU out of the guest. It can be entered again. */
  leave(): void {
    this.#active = false
    this.#resume = undefined
    this.#cancelTimer()
    this.#trace("leave", 0, 0, 0)
  }

  /** Ends a run with a defect. */
  die(defect: unknown): void {
    if (!this.#active) return
    this.#phase = "stopped"
    this.#cancelTimer()
    this.#active = false
    const resume = this.#resume
    this.#resume = undefined
    resume?.(Effect.die(defect))
  }

  /** Whether the vCPU waits for its start-up interrupt. */
  get isNotStarted(): boolean {
    return this.id !== 0 && (this.#phase === "new" || this.#phase === "unstarted")
  }

  /** Whether the vCPU has halted with interrupts off. */
  get isHalted(): boolean {
    return this.#phase === "halted"
  }

  /** Reports that the whole machine has halted for good. */
  endHalted(): void {
    if (this.#active) this.#end({ _tag: "Halted", registers: this.#registers() })
  }

  /** Gives the vCPU its first instruction, as a start-up interrupt does. Returns whether it waited for one. */
  start(program: GuestProgram): boolean {
    if (this.id === 0 || !(this.isNotStarted || this.#phase === "halted")) return false
    this.#frames.length = 0
    this.#enabled = false
    this.#redo = false
    this.#reply = undefined
    this.#begin(program)
    if (this.#active) this.#ready()
    return true
  }

  /** Latches an interrupt. */
  interrupt(gsi: number): void {
    this.#pending.add(gsi)
    if (this.#phase === "interrupt") this.#wake()
  }

  /** Takes the answer of a device. */
  answered(call: PendingCall): void {
    if (this.#call !== call) return
    this.#trace("reply", 0, 0, call.value)
    if (this.#phase !== "call") return // answered before the handler returned: the turn goes on by itself
    this.#call = undefined
    this.#reply = call.value
    this.#phase = "ready"
    if (this.#active) this.#ready()
  }

  /** What the vCPU waits for, for reports. */
  get waiting(): string | undefined {
    const name = `vm${this.vm.number} vCPU ${this.id}`
    const pending = this.#pending.size === 0 ? "" : `; interrupts that wait: ${Array.from(this.#pending).join(", ")}`
    const posted = this.#ring.empty ? "" : `; posted writes that wait: ${this.#ring.length}`
    if (!this.#active) return undefined
    switch (this.#phase) {
      case "call":
        return `${name} waits for the answer to ${this.#calling}${pending}${posted}`
      case "interrupt": {
        const gsi = this.#operation.gsi
        return `${name} waits for ${gsi < 0 ? "an interrupt" : `interrupt ${gsi}`}${pending}${posted}`
      }
      case "halted":
        return `${name} has halted with interrupts off${pending}${posted}`
      case "unstarted":
        return `${name} waits to be started by another vCPU`
      case "ring":
      case "ending":
        return `${name} waits for its devices to take posted writes${pending}${posted}`
      case "sleep":
        return `${name} sleeps until ${this.#operation.deadline} ms${pending}${posted}`
      default:
        return `${name} is ${this.#phase}${pending}${posted}`
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
    if (program === undefined) {
      this.#phase = "ready"
      const code = this.vm.memory.slice(rip, 1) === undefined ? undefined : codeAt(this.vm.memory, rip)
      this.#end({
        _tag: "HypervisorInternalError",
        suberror: 1,
        instructionBytes: code === undefined ? "" : hex(code),
        registers: this.#registers()
      })
      return
    }
    this.#begin(program)
  }

  #begin(program: GuestProgram): void {
    this.#routine = program(this)
    this.#phase = "ready"
  }

  #ready(): void {
    if (this.#scheduled) return
    this.#scheduled = true
    this.#schedule(this.#turn)
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
          if (this.#enabled) this.#deliver()
          if (!this.#advance()) return
          if (this.vm.pause()) {
            this.#redo = true
            break
          }
        }
        this.#redo = false
        if (this.#perform() !== "done") return
        // What a device did with the access may have taken this vCPU out of the guest.
        if (!this.#active) break
      }
      this.#phase = "ready"
      if (this.#active) this.#ready()
    } catch (defect) {
      if (!(defect instanceof BoundaryViolation)) {
        this.vm.world.violation(`vm${this.vm.number} vCPU ${this.id}: ${String(defect)}`)
      }
      this.#phase = "running"
      this.die(defect)
    }
  }

  /** Resumes the program up to its next operation. Returns whether there is one. */
  #advance(): boolean {
    for (;;) {
      const frame = this.#frames.at(-1)
      const routine = frame?.routine ?? this.#routine
      if (routine === undefined) throw new Error("a vCPU without a program runs")
      const reply = this.#reply
      this.#reply = undefined
      this.#operation.kind = "none"
      const step = routine.next(reply)
      if (this.#armed) {
        throw this.vm.world.violation(
          `vCPU ${this.id}: the guest program made a ${this.#operation.kind} operation and did not do it; write yield* before it`
        )
      }
      if (step.done !== true) return true
      if (frame === undefined) {
        this.#halt()
        return false
      }
      this.#frames.pop()
      this.#operation = frame.below.operation
      this.#reply = frame.below.reply
      this.#redo = frame.below.redo
      this.#enabled = frame.below.enabled
      this.#started = true
      if (this.#redo) return true
      if (this.#enabled) this.#deliver()
    }
  }

  /** With interrupts on: begins the handler of the oldest interrupt that has one. */
  #deliver(): void {
    for (const gsi of this.#pending) {
      if (this.#handlers.has(gsi)) {
        this.#pending.delete(gsi)
        this.#handle(gsi, false, this.#reply)
        return
      }
    }
  }

  #handle(gsi: number, redo: boolean, reply: GuestReply): void {
    const handler = this.#handlers.get(gsi)
    this.#trace("interrupt", gsi, 0, 0)
    if (handler === undefined) {
      this.#reply = reply
      return
    }
    const below = { operation: this.#operation, redo, reply, enabled: this.#enabled }
    this.#operation = new Operation()
    this.#enabled = false
    this.#reply = undefined
    this.#frames.push({ routine: handler(this, gsi), below })
  }

  #perform(): Progress {
    const operation = this.#operation
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
        if (this.#enabled) return this.#wait()
        return this.#halt()
      case "triple-fault":
        return this.#end({ _tag: "TripleFault", registers: this.#registers() })
      case "internal-error":
        return this.#end({
          _tag: "HypervisorInternalError",
          suberror: 1,
          instructionBytes: operation.bytes === undefined ? "" : hex(operation.bytes),
          registers: this.#registers()
        })
      case "sleep":
        if (this.now() >= operation.deadline) return "done"
        this.#trace("sleep", 0, 0, operation.deadline)
        this.#phase = "sleep"
        this.#armTimer(operation.deadline)
        return "wait"
      case "yield":
        this.#phase = "ready"
        this.#ready()
        return "wait"
      case "start-vcpu": {
        const started = operation.program !== undefined && this.vm.startVcpu(operation.address, operation.program)
        this.#trace("start-vcpu", operation.address, 0, started ? 1 : 0)
        this.#reply = started ? 1 : 0
        return "done"
      }
      case "none":
        throw this.vm.world.violation(`vCPU ${this.id}: the guest program yielded something that is no operation`)
    }
  }

  #wait(): Progress {
    const { deadline, gsi } = this.#operation
    for (const candidate of this.#pending) {
      const matches = gsi < 0 || candidate === gsi
      if (!matches && !this.#handlers.has(candidate)) continue
      this.#pending.delete(candidate)
      this.#handle(candidate, !matches, matches ? candidate : undefined)
      return "done"
    }
    if (this.now() >= deadline) {
      this.#reply = undefined
      return "done"
    }
    this.#trace("wait", gsi < 0 ? 0 : gsi, 0, 0)
    this.#phase = "interrupt"
    this.#armTimer(deadline)
    return "wait"
  }

  #access(mmio: boolean, isWrite: boolean): Progress {
    const { address, size, value } = this.#operation
    if (mmio) {
      const region = this.vm.memory.regionOf(address, size)
      if (region !== undefined) {
        this.#reply = accessView(region.view, address - region.guestAddress, size, isWrite, value)
        return "done"
      }
    }
    const fakeBus = this.vm.bus
    const index = fakeBus === undefined ? -1 : fakeBus.bus.find(mmio ? "mmio" : "pio", address, size)
    const range = fakeBus?.bus.ranges[index]
    if (fakeBus === undefined || range === undefined) {
      this.#trace(isWrite ? "open-bus-write" : "open-bus-read", address, size, value)
      this.#reply = isWrite ? undefined : openBusValue(size)
      return "done"
    }
    const offset = address - range.base
    if (isWrite) {
      const doorbell = fakeBus.doorbellOf(index, offset, size, value)
      if (doorbell >= 0) {
        this.#trace("ring", address, size, value)
        fakeBus.ring(this.vm.number, this.vm.now, index, doorbell)
        return "done"
      }
      if (range.write === "posted") return this.#post(index, offset, size, value, address)
    } else if (range.read === "register-page") {
      const page = fakeBus.backings[index]?.page
      this.#reply = page === undefined ? openBusValue(size) : accessView(page, offset, size, false, 0)
      this.#trace("page-read", address, size, this.#reply ?? 0)
      return "done"
    } else if (range.read === "shadowed") {
      const shadowed = fakeBus.shadowed(index, offset, size)
      if (shadowed !== SHADOW_INVALID) {
        this.#trace("shadowed-read", address, size, shadowed)
        this.#reply = shadowed
        return "done"
      }
    }
    return this.#callDevice(fakeBus, index, offset, size, isWrite, value, address)
  }

  #callDevice(
    fakeBus: FakeBus,
    range: number,
    offset: number,
    size: number,
    isWrite: boolean,
    value: number,
    address: number
  ): Progress {
    if (!this.#drain()) return this.#waitForRing()
    this.#trace(isWrite ? "call-write" : "call-read", address, size, value)
    this.#calling = `${isWrite ? "a write to" : "a read of"} ${describeRegister(fakeBus.bus.ranges[range], offset)}`
    const call = new PendingCall(this, this.#calling, size, isWrite)
    this.#call = call
    fakeBus.call(range, offset, size, isWrite, value, call)
    if (call.done) {
      this.#call = undefined
      this.#reply = isWrite ? undefined : call.value
      return "done"
    }
    this.#phase = "call"
    return "wait"
  }

  #post(range: number, offset: number, size: number, value: number, address: number): Progress {
    if (this.#ring.full) return this.#waitForRing()
    this.#trace("post", address, size, value)
    this.#ring.push(range, offset, size, value)
    this.#scheduleDrain()
    return "done"
  }

  #waitForRing(): Progress {
    this.#phase = "ring"
    this.#scheduleDrain()
    return "wait"
  }

  /** Delivers posted writes in order. Returns whether all are delivered. */
  #drain(): boolean {
    if (this.#ring.empty) return true
    const fakeBus = this.vm.bus
    if (fakeBus === undefined || !fakeBus.open) return true // nobody is left to take them
    return this.#ring.drain((range, offset, size, value) => {
      // A device that fails over a write may have taken the whole machine with it: nobody is left for the rest.
      if (!fakeBus.open) return true
      const taken = fakeBus.post(range, offset, size, value)
      this.#trace(taken ? "posted" : "posted-later", (fakeBus.bus.ranges[range]?.base ?? 0) + offset, size, value)
      if (taken) this.#refusals = 0
      else this.#refusals++
      return taken
    })
  }

  #scheduleDrain(): void {
    if (this.#drainScheduled) return
    this.#drainScheduled = true
    if (this.#refusals < POSTED_RETRIES) this.#schedule(this.#drainTask)
    else this.#after(1, this.#drainTask)
  }

  readonly #drainTask = (): void => {
    this.#drainScheduled = false
    const fakeBus = this.vm.bus
    if (fakeBus === undefined || !fakeBus.open) return
    try {
      const drained = this.#drain()
      if (!drained) this.#scheduleDrain()
      if (this.#phase === "ring" && (drained || !this.#ring.full)) this.#wake()
      else if (this.#phase === "ending") this.#finish()
    } catch (defect) {
      this.vm.fail(defect)
    }
  }

  // --- the end ---------------------------------------------------------------------------------------------------------

  /** `hlt` with interrupts off: for good only when no other vCPU is left that could start this one again. */
  #halt(): Progress {
    this.#trace("halt", 0, 0, 0)
    this.#phase = "halted"
    this.vm.halted()
    return "stop"
  }

  #end(exit: VcpuExit): Progress {
    this.#exit = exit
    this.#phase = "ending"
    this.#finish()
    return "stop"
  }

  /** Reports the exit once everything that the vCPU posted before it is delivered. */
  #finish(): void {
    const exit = this.#exit
    if (exit === undefined || !this.#active || this.#phase !== "ending") return
    if (!this.#drain()) {
      this.#scheduleDrain()
      return
    }
    this.#phase = "stopped"
    this.#active = false
    this.#trace("exit", 0, 0, 0)
    const resume = this.#resume
    this.#resume = undefined
    resume?.(Effect.succeed(exit))
  }

  #registers(): VcpuRegisters {
    const state = this.state
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
    this.#timer = this.#after(Math.max(0, deadline - this.now()), () => {
      this.#timer = undefined
      if (this.#phase === "sleep" || this.#phase === "interrupt") this.#wake()
    })
  }

  #cancelTimer(): void {
    const cancel = this.#timer
    this.#timer = undefined
    cancel?.()
  }

  #after(millis: number, task: () => void): () => void {
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

  #trace(kind: TraceKind, address: number, size: number, value: number): void {
    this.vm.world.trace.record(this.vm.now(), kind, this.vm.number, this.id, address, size, value)
  }
}

/** One little-endian access of 1, 2 or 4 bytes. Returns the value read, or `undefined` for a write. */
const accessView = (view: DataView, offset: number, size: number, isWrite: boolean, value: number): GuestReply => {
  if (isWrite) {
    if (size === 1) view.setUint8(offset, value)
    else if (size === 2) view.setUint16(offset, value, true)
    else view.setUint32(offset, value, true)
    return undefined
  }
  return size === 1 ? view.getUint8(offset) : size === 2 ? view.getUint16(offset, true) : view.getUint32(offset, true)
}

/** Longest instruction of x86 in bytes (Intel SDM volume 2, section 2.3.11). */
const INSTRUCTION_SIZE = 15

const codeAt = (memory: GuestMemory, address: number): Uint8Array | undefined => {
  for (let size = INSTRUCTION_SIZE; size > 0; size--) {
    const code = memory.slice(address, size)
    if (code !== undefined) return code
  }
  return undefined
}

const hex = (bytes: Uint8Array): string => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ")
