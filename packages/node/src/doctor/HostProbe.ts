/** Finds out by running it what a hypervisor can run: the speed of both privilege levels, and instructions of kernels. */
import { Bus } from "@troupe/core/Bus"
import { Hypervisor, type HypervisorError } from "@troupe/core/Hypervisor"
import type { VcpuExit } from "@troupe/core/VcpuExit"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Queue from "effect/Queue"
import {
  ENTER_USER_MODE,
  PROBE_FAULT,
  PROBE_MEMORY_SIZE,
  PROBE_PORT,
  PROBE_RAN,
  PROBE_STATE,
  PROBED_INSTRUCTIONS,
  type ProbedInstruction,
  timeKernelMode,
  timeUserMode,
  tryInstruction,
  writeProbeGuest
} from "./ProbeGuest.ts"

/** How an instruction did: it ran, the processor refused it with an exception, or the hypervisor could not run it. */
export type InstructionResult =
  | { readonly _tag: "Ran" }
  | { readonly _tag: "Faulted"; readonly vector: number }
  | { readonly _tag: "Missing"; readonly exit: VcpuExit }

/** What the probe found. */
export interface HostReport {
  readonly instructions: ReadonlyArray<{ readonly instruction: ProbedInstruction; readonly result: InstructionResult }>
  /** Simple instructions a second in kernel mode. */
  readonly kernelRate: number
  /** Simple instructions a second in user mode. */
  readonly userRate: number
}

/** Below this rate, in instructions a second, kernel-mode code is being emulated: a native processor is far above it. */
export const EMULATED_RATE = 50_000_000
/** A measurement shorter than this is repeated with more rounds: on a slow host two reports alone are some milliseconds apart. */
const MEASURABLE_MILLIS = 40
const FIRST_ROUNDS = 10_000
const ROUNDS_LIMIT = 50_000_000
const INSTRUCTIONS_A_ROUND = 2

type Report = { readonly value: number; readonly at: number } | { readonly exit: VcpuExit }

/** Runs a probe guest and hands its reports to `collect`; the machine is gone when that returns. */
const runProbe = <A>(
  kernelCode: ReadonlyArray<number>,
  userCode: ReadonlyArray<number>,
  collect: (next: Effect.Effect<Report>) => Effect.Effect<A, HypervisorError>
): Effect.Effect<A, HypervisorError, Hypervisor> =>
  Effect.scoped(Effect.gen(function*() {
    const hypervisor = yield* Hypervisor
    const clock = yield* Clock.Clock
    const vm = yield* hypervisor.createVm
    const memory = yield* vm.addMemory(0, PROBE_MEMORY_SIZE)
    writeProbeGuest(memory.bytes, kernelCode, userCode)
    const bus = Bus.make([{
      space: "pio",
      base: PROBE_PORT,
      size: 1,
      read: "call",
      write: "call",
      doorbells: [],
      device: "probe"
    }])
    if (!(bus instanceof Bus)) return yield* Effect.die(new Error(bus.message))
    const reports = yield* Queue.unbounded<Report>()
    yield* vm.attachBus(bus, {
      call: (_range, _offset, _size, _isWrite, value, reply) => {
        Queue.offerUnsafe(reports, { value, at: Number(clock.monotonicTimeNanosUnsafe()) / 1e6 })
        reply.complete(0)
      },
      posted: () => true,
      doorbell: () => undefined
    })
    const vcpu = yield* vm.createVcpu(0)
    yield* vcpu.setState(PROBE_STATE)
    const running = Effect.flatMap(vcpu.run, (exit) => {
      Queue.offerUnsafe(reports, { exit })
      return Effect.never
    })
    return yield* Effect.raceFirst(collect(Queue.take(reports)), running)
  }))

const probeInstruction = (instruction: ProbedInstruction) =>
  runProbe(tryInstruction(instruction), [], (next) =>
    Effect.map(next, (report): InstructionResult =>
      "exit" in report
        ? { _tag: "Missing", exit: report.exit }
        : report.value === PROBE_RAN
        ? { _tag: "Ran" }
        : { _tag: "Faulted", vector: report.value & ~PROBE_FAULT }))

/** Milliseconds between two reports, or `undefined` when the guest did not get that far. */
const measure = (kernelCode: ReadonlyArray<number>, userCode: ReadonlyArray<number>) =>
  runProbe(kernelCode, userCode, (next) =>
    Effect.gen(function*() {
      const begin = yield* next
      const end = yield* next
      return "exit" in begin || "exit" in end ? undefined : end.at - begin.at
    }))

/** Instructions a second of code that counts down; 0 when the guest did not get through it. */
const measureRate = Effect.fnUntraced(function*(
  code: (rounds: number) => { readonly kernel: ReadonlyArray<number>; readonly user: ReadonlyArray<number> }
) {
  for (let rounds = FIRST_ROUNDS;; rounds *= 10) {
    const { kernel, user } = code(rounds)
    const millis = yield* measure(kernel, user)
    if (millis === undefined) return 0
    if (millis >= MEASURABLE_MILLIS || rounds * 10 > ROUNDS_LIMIT) {
      return rounds * INSTRUCTIONS_A_ROUND / Math.max(millis, 0.001) * 1000
    }
  }
})

/** Which CPU features a guest must not see on this hypervisor, because it cannot run what they promise in kernel mode. */
export const featuresToHide: Effect.Effect<ReadonlyArray<"cx16" | "popcnt">, HypervisorError, Hypervisor> = Effect.gen(
  function*() {
    const hidden: Array<"cx16" | "popcnt"> = []
    for (const instruction of PROBED_INSTRUCTIONS) {
      if (instruction.feature === undefined) continue
      const result = yield* probeInstruction(instruction)
      if (result._tag === "Missing") hidden.push(instruction.feature)
    }
    return hidden
  }
)

/** Runs all probes. */
export const probeHost: Effect.Effect<HostReport, HypervisorError, Hypervisor> = Effect.gen(function*() {
  const instructions: Array<HostReport["instructions"][number]> = []
  for (const instruction of PROBED_INSTRUCTIONS) {
    instructions.push({ instruction, result: yield* probeInstruction(instruction) })
  }
  const kernelRate = yield* measureRate((rounds) => ({ kernel: timeKernelMode(rounds), user: [] }))
  const userRate = yield* measureRate((rounds) => ({ kernel: ENTER_USER_MODE, user: timeUserMode(rounds) }))
  return { instructions, kernelRate, userRate }
})
