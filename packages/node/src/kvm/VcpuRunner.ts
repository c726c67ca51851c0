/**
 * One vCPU's host side while its thread runs it: the control block, the start, requests, the wait for its end, and what that end
 * means.
 */
import { HypervisorError } from "@troupe/core/Hypervisor"
import type { VcpuExit } from "@troupe/core/VcpuExit"
import * as Effect from "effect/Effect"
import type { Mapping } from "../Ffi.ts"
import { formatRegisters } from "./CpuState.ts"
import { KvmRegs, KvmSregs } from "./KvmCpuState.ts"
import { kvmFailure } from "./KvmError.ts"
import { KvmIoctl } from "./KvmIoctl.ts"
import { KvmExit, KvmRun, KvmRunValue } from "./KvmRun.ts"
import type { KvmSystem } from "./KvmSystem.ts"
import {
  CONTROL_STOP,
  CONTROL_STOP_VALUE,
  CONTROL_THREAD,
  CONTROL_WORDS,
  REQUEST_STOP,
  STOP_EXIT,
  STOP_FAILED,
  STOP_REQUESTED,
  THREAD_IDLE,
  THREAD_RUNNING,
  THREAD_STOPPED
} from "./thread/VcpuControl.ts"
import type { VcpuJob } from "./thread/VcpuLoop.ts"
import type { VcpuStats } from "./VcpuStats.ts"
import type { VcpuThread } from "./VcpuThreads.ts"

/** What a runner needs of its vCPU. */
export interface VcpuParts {
  readonly id: number
  /** The vCPU's descriptor. */
  readonly fd: number
  /** Its `struct kvm_run` and what follows. */
  readonly mapping: Mapping
  /** `undefined` where the kernel has no statistics. */
  readonly stats: VcpuStats | undefined
  readonly ioctl: KvmSystem["Service"]["ioctl"]
}

/** One vCPU while it is run. */
export class VcpuRunner {
  readonly parts: VcpuParts
  readonly control = new Int32Array(new SharedArrayBuffer(CONTROL_WORDS * 4))
  readonly #run: DataView<ArrayBuffer>
  #thread: VcpuThread | undefined
  /** All vCPUs of the machine have halted for good, and so has this one. */
  halted = false

  constructor(parts: VcpuParts) {
    this.parts = parts
    this.#run = new DataView(parts.mapping.buffer)
  }

  /** Whether the thread is running the vCPU now. */
  get isRunning(): boolean {
    return Atomics.load(this.control, CONTROL_THREAD) === THREAD_RUNNING
  }

  /** Whether the vCPU was given to a thread that has not stopped. */
  get #isStarted(): boolean {
    return this.#thread !== undefined && Atomics.load(this.control, CONTROL_THREAD) !== THREAD_STOPPED
  }

  start(thread: VcpuThread, job: Omit<VcpuJob, "vcpu" | "run" | "control">): void {
    this.#thread = thread
    const { fd, mapping } = this.parts
    thread.start(
      { ...job, vcpu: fd, run: { address: mapping.address, length: mapping.length }, control: this.control.buffer },
      () => KvmRun.fields.immediate_exit.set(this.#run, 1)
    )
  }

  /** Makes a request (`REQUEST_*`) of the thread and takes it out of the guest. */
  request(request: number): void {
    if (this.#isStarted) this.#thread?.request(request)
  }

  /** Waits until the thread has left the vCPU. */
  readonly untilStopped: Effect.Effect<void> = Effect.callback((resume) => {
    const control = this.control
    const look = (): void => {
      for (;;) {
        const state = this.#thread === undefined ? THREAD_STOPPED : Atomics.load(control, CONTROL_THREAD)
        if (state === THREAD_STOPPED) return resume(Effect.void)
        const wait = Atomics.waitAsync(control, CONTROL_THREAD, state)
        if (wait.async) {
          void wait.value.then(look)
          return
        }
      }
    }
    look()
  })

  /** Takes the vCPU out of the guest for good, if it is there, and waits until its thread has left it. */
  readonly stop: Effect.Effect<void> = Effect.suspend(() => {
    this.request(REQUEST_STOP)
    return this.untilStopped
  })

  /** Why the thread has stopped. */
  readonly outcome: Effect.Effect<VcpuExit, HypervisorError> = Effect.suspend(() => {
    const value = this.control[CONTROL_STOP_VALUE] ?? 0
    switch (this.control[CONTROL_STOP]) {
      case STOP_EXIT:
        return this.#exit(value)
      case STOP_FAILED:
        return Effect.fail(kvmFailure(KvmIoctl.KVM_RUN.name, `vCPU ${this.parts.id}`, -value))
      case STOP_REQUESTED:
        return this.halted
          ? Effect.map(this.#registers, (registers): VcpuExit => ({ _tag: "Halted", registers }))
          : Effect.fail(
            new HypervisorError({
              operation: KvmIoctl.KVM_RUN.name,
              arguments: `vCPU ${this.parts.id}`,
              detail: "the vCPU was closed while it ran"
            })
          )
      default:
        return Effect.die(new Error(`the thread of vCPU ${this.parts.id} has crashed`))
    }
  })

  /** The registers as far as KVM gives them. */
  readonly #registers = Effect.suspend(() => {
    const { fd, ioctl } = this.parts
    const general = KvmRegs.make()
    const special = KvmSregs.make()
    return Effect.all([
      Effect.isSuccess(ioctl(fd, KvmIoctl.KVM_GET_REGS, general)),
      Effect.isSuccess(ioctl(fd, KvmIoctl.KVM_GET_SREGS, special))
    ]).pipe(
      Effect.map(([hasGeneral, hasSpecial]) =>
        formatRegisters(hasGeneral ? general : undefined, hasSpecial ? special : undefined)
      )
    )
  })

  #exit(reason: number): Effect.Effect<VcpuExit> {
    return Effect.map(this.#registers, (registers): VcpuExit => {
      const exit = KvmRun.fields.exit
      switch (reason) {
        case KvmExit.KVM_EXIT_HLT:
          return { _tag: "Halted", registers }
        case KvmExit.KVM_EXIT_SHUTDOWN:
          return { _tag: "TripleFault", registers }
        case KvmExit.KVM_EXIT_INTERNAL_ERROR:
          return {
            _tag: "HypervisorInternalError",
            suberror: exit.internal.suberror.get(this.#run),
            instructionBytes: this.#instructionBytes(),
            registers
          }
        case KvmExit.KVM_EXIT_FAIL_ENTRY:
          return {
            _tag: "EntryFailed",
            hardwareReason: `0x${exit.fail_entry.hardware_entry_failure_reason.get(this.#run).toString(16)}`,
            registers
          }
        default:
          return { _tag: "UnknownExit", exitReason: reason, registers }
      }
    })
  }

  /** The bytes of the instruction that KVM could not emulate, as far as it gives them. */
  #instructionBytes(): string {
    const { flags, insn_bytes, insn_size, ndata, suberror } = KvmRun.fields.exit.emulation_failure
    // `ndata` counts the 64-bit words that are valid: one for the flags, two for the instruction.
    const given = suberror.get(this.#run) === KvmRunValue.KVM_INTERNAL_ERROR_EMULATION && ndata.get(this.#run) >= 3 &&
      (flags.getNumber(this.#run) & KvmRunValue.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) !== 0
    if (!given) return ""
    const bytes = insn_bytes.of(this.#run).subarray(0, insn_size.get(this.#run))
    return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ")
  }

  /** Whether the thread has not begun yet. */
  get isIdle(): boolean {
    return Atomics.load(this.control, CONTROL_THREAD) === THREAD_IDLE
  }
}
