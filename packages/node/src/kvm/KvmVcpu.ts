/**
 * One vCPU on KVM: made, given its CPUID, local APIC and registers, and run on a thread of the pool.
 */
import { HypervisorError, type Vcpu } from "@troupe/core/Hypervisor"
import type { VcpuState } from "@troupe/core/VcpuState"
import * as Effect from "effect/Effect"
import { Ffi } from "../Ffi.ts"
import type { AccessDispatcher } from "./AccessDispatcher.ts"
import { cpuidFor, decodeCpuid, encodeCpuid, HiddenCpuid } from "./Cpuid.ts"
import { applySregs, encodeRegs } from "./CpuState.ts"
import { ExitObserver, readExitCounts } from "./ExitCounts.ts"
import { KvmFpu, KvmLapicState, KvmSregs } from "./KvmCpuState.ts"
import { kvmError } from "./KvmError.ts"
import { KvmIoctl } from "./KvmIoctl.ts"
import { KvmMsrEntry, KvmMsrs } from "./KvmStructs.ts"
import { KvmSystem } from "./KvmSystem.ts"
import type { VcpuJob } from "./thread/VcpuLoop.ts"
import { VcpuRunner } from "./VcpuRunner.ts"
import { vcpuStats } from "./VcpuStats.ts"
import { VcpuThreads } from "./VcpuThreads.ts"

/** What a vCPU shares with its machine. */
export interface Machine {
  /** The machine's descriptor. */
  readonly vm: number
  /** The vCPUs made so far. */
  readonly runners: Array<VcpuRunner>
  readonly dropStaleMemory: Effect.Effect<void, HypervisorError>
  /** What the threads are given beside the vCPU itself. */
  readonly job: () => Omit<VcpuJob, "vcpu" | "run" | "control">
  /** Serves the machine's accesses, once it has a bus. */
  readonly dispatcher: () => AccessDispatcher | undefined
  /** What a handler of the bus threw: it ends every vCPU. */
  readonly defect: () => { readonly value: unknown } | undefined
}

/** `IA32_MISC_ENABLE` and its bit for fast string operations (Intel SDM volume 4, table 2-2): firmware sets it. */
const IA32_MISC_ENABLE = 0x1a0
const MISC_ENABLE_FAST_STRING = 1n

/** Offsets of the local vector table in the local APIC, and delivery modes (Intel SDM volume 3, section 11.5.1). */
const APIC_LVT_LINT0 = 0x350
const APIC_LVT_LINT1 = 0x360
const APIC_DELIVERY_MODE_SHIFT = 8
const APIC_DELIVERY_MODE_MASK = 0x700
const APIC_MODE_NMI = 4
const APIC_MODE_EXTINT = 7

/** The x87 control word and MXCSR after reset of the units (Intel SDM volume 3, table 10-1, `FNINIT`). */
const FPU_CONTROL_WORD = 0x37f
const MXCSR_DEFAULT = 0x1f80

/** What firmware does to the local APIC before it boots: the 8259's interrupts arrive at LINT0, NMIs at LINT1. */
const prepareLapic = (view: DataView<ArrayBuffer>): void => {
  const at = KvmLapicState.fields.regs.offset
  for (const [register, mode] of [[APIC_LVT_LINT0, APIC_MODE_EXTINT], [APIC_LVT_LINT1, APIC_MODE_NMI]] as const) {
    const value = view.getUint32(at + register, true) & ~APIC_DELIVERY_MODE_MASK
    view.setUint32(at + register, value | (mode << APIC_DELIVERY_MODE_SHIFT), true)
  }
}

const fastStrings = () => {
  const view = KvmMsrs.make(1)
  const base = KvmMsrs.fields.entries.at(0)
  KvmMsrs.fields.nmsrs.set(view, 1)
  KvmMsrEntry.fields.index.set(view, IA32_MISC_ENABLE, base)
  KvmMsrEntry.fields.data.set(view, MISC_ENABLE_FAST_STRING, base)
  return view
}

const floatingPoint = () => {
  const view = KvmFpu.make()
  KvmFpu.fields.fcw.set(view, FPU_CONTROL_WORD)
  KvmFpu.fields.mxcsr.set(view, MXCSR_DEFAULT)
  return view
}

/** Makes a vCPU of the machine. */
export const makeVcpu = Effect.fnUntraced(function*(machine: Machine, id: number) {
  const ffi = yield* Ffi
  const system = yield* KvmSystem
  const threads = yield* VcpuThreads
  const hidden = yield* HiddenCpuid
  const observe = yield* ExitObserver
  const { ioctl } = system

  if (machine.runners.some((runner) => runner.parts.id === id)) {
    return yield* new HypervisorError({
      operation: KvmIoctl.KVM_CREATE_VCPU.name,
      arguments: `${id}`,
      detail: "the machine has a vCPU with this number already"
    })
  }
  yield* machine.dropStaleMemory
  const fd = yield* Effect.mapError(ffi.own(ffi.ioctl(machine.vm, KvmIoctl.KVM_CREATE_VCPU, id)), kvmError)
  const mapping = yield* Effect.mapError(ffi.mapShared(fd, system.vcpuMappingSize), kvmError)
  const stats = yield* vcpuStats(fd)
  const runner = yield* Effect.acquireRelease(
    Effect.sync(() => {
      const runner = new VcpuRunner({ id, fd, mapping, stats, ioctl })
      machine.runners.push(runner)
      machine.dispatcher()?.add(runner.control)
      observe(id, () => readExitCounts(runner.control))
      return runner
    }),
    // The vCPU may be run by a fiber of another scope, so its end does not wait for that fiber.
    (runner) =>
      Effect.andThen(
        runner.stop,
        Effect.sync(() => {
          machine.runners.splice(machine.runners.indexOf(runner), 1)
          machine.dispatcher()?.remove(runner.control)
        })
      )
  )

  const setCpuid = (count: number) => {
    const leaves = cpuidFor(decodeCpuid(system.supportedCpuid()), {
      id,
      count,
      hidden,
      tscDeadline: system.capability("KVM_CAP_TSC_DEADLINE_TIMER") > 0
    })
    return ioctl(fd, KvmIoctl.KVM_SET_CPUID2, encodeCpuid(leaves))
  }
  yield* setCpuid(id + 1)
  yield* ioctl(fd, KvmIoctl.KVM_SET_MSRS, fastStrings())
  yield* ioctl(fd, KvmIoctl.KVM_SET_FPU, floatingPoint())
  const lapic = KvmLapicState.make()
  yield* ioctl(fd, KvmIoctl.KVM_GET_LAPIC, lapic)
  prepareLapic(lapic)
  yield* ioctl(fd, KvmIoctl.KVM_SET_LAPIC, lapic)

  const setState = Effect.fnUntraced(function*(state: VcpuState) {
    const sregs = KvmSregs.make()
    yield* ioctl(fd, KvmIoctl.KVM_GET_SREGS, sregs)
    applySregs(sregs, state)
    yield* ioctl(fd, KvmIoctl.KVM_SET_SREGS, sregs)
    yield* ioctl(fd, KvmIoctl.KVM_SET_REGS, encodeRegs(state))
  })

  /** Every write that the guest posted reaches its device before the vCPU's end is known. */
  const delivered = Effect.callback<void>((resume) => {
    const dispatcher = machine.dispatcher()
    if (dispatcher === undefined) return resume(Effect.void)
    const cancel = dispatcher.whenDelivered(() => resume(Effect.void))
    return Effect.sync(cancel)
  })

  const runOnce = Effect.gen(function*() {
    // The topology leaves name the number of vCPUs, which is known only now.
    const count = 1 + Math.max(...machine.runners.map((runner) => runner.parts.id))
    if (count !== id + 1) yield* setCpuid(count)
    const thread = yield* threads.acquire
    yield* Effect.acquireUseRelease(
      Effect.sync(() => runner.start(thread, machine.job())),
      () => runner.untilStopped,
      () => runner.stop
    )
    const defect = machine.defect()
    if (defect !== undefined) return yield* Effect.die(defect.value)
    yield* delivered
    return yield* runner.outcome
  })

  let started = false
  const run = Effect.suspend(() => {
    if (started) {
      return Effect.fail(
        new HypervisorError({
          operation: KvmIoctl.KVM_RUN.name,
          arguments: `vCPU ${id}`,
          detail: "a vCPU is run once; make a new machine to run again"
        })
      )
    }
    started = true
    return Effect.scoped(runOnce)
  })
  return { id, setState, run } satisfies Vcpu
})
