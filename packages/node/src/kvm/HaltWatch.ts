/**
 * Finds out that a machine has halted for good: every vCPU halted with interrupts off, or never started.
 *
 * With the interrupt controllers in the kernel `HLT` does not exit, so nobody is told. The watch reads each vCPU's statistics
 * about twice a second, which disturbs nothing. Only when all vCPUs have been blocked since the last look, and at least one of
 * them has halted since it was last looked at, does it take them out of the guest once and read their state: an idle guest is
 * disturbed at most once in an idle period. Where the kernel has no statistics, a vCPU whose thread has counted no exit since
 * the last look is taken for blocked, and is disturbed at every look.
 */
import * as Effect from "effect/Effect"
import { KvmValue } from "./KvmIoctl.ts"
import {
  CONTROL_EXITS,
  CONTROL_INSPECTIONS,
  CONTROL_INTERRUPTS_ENABLED,
  CONTROL_MP_STATE,
  REQUEST_INSPECT,
  REQUEST_STOP
} from "./thread/VcpuControl.ts"
import type { VcpuStats } from "./VcpuStats.ts"

/** What the watch needs of a vCPU. */
export interface WatchedVcpu {
  /** Whether a thread is running it now. */
  readonly isRunning: boolean
  /** Set by the watch before it has the vCPU stop. */
  halted: boolean
  /** The words that it shares with its thread. */
  readonly control: Int32Array<SharedArrayBuffer>
  /** `stats` is `undefined` where the kernel has none. */
  readonly parts: { readonly stats: VcpuStats | undefined }
  /** Makes a request of its thread. */
  readonly request: (request: number) => void
}

/** Time between two looks. Two looks and an inspection make the longest time until a halt is noticed. */
const LOOK_INTERVAL = "600 millis"
/** Time that a vCPU is given to answer an inspection, in steps. */
const ANSWER_INTERVAL = "5 millis"
const ANSWER_STEPS = 40

/** What a vCPU was last seen doing: how often it had halted, or -1 when it was not blocked for all that is known. */
const look = (runner: WatchedVcpu): number => {
  if (!runner.isRunning) return -1
  const stats = runner.parts.stats
  if (stats === undefined) return (runner.control[CONTROL_EXITS] ?? 0) >>> 0
  return stats.isBlocked() ? stats.halts() : -1
}

const isSame = (a: ReadonlyArray<number>, b: ReadonlyArray<number>): boolean =>
  a.length === b.length && a.every((value, i) => value === b[i])

const isHaltedForGood = (runner: WatchedVcpu): boolean =>
  runner.control[CONTROL_MP_STATE] === KvmValue.KVM_MP_STATE_HALTED && runner.control[CONTROL_INTERRUPTS_ENABLED] === 0

const isNotStarted = (runner: WatchedVcpu): boolean => {
  const state = runner.control[CONTROL_MP_STATE]
  return state === KvmValue.KVM_MP_STATE_UNINITIALIZED || state === KvmValue.KVM_MP_STATE_INIT_RECEIVED
}

/** Has every vCPU publish its state; `false` when one does not in time. */
const inspect = Effect.fnUntraced(function*(runners: ReadonlyArray<WatchedVcpu>) {
  const before = runners.map((runner) => Atomics.load(runner.control, CONTROL_INSPECTIONS))
  for (const runner of runners) runner.request(REQUEST_INSPECT)
  for (let step = 0; step < ANSWER_STEPS; step++) {
    yield* Effect.sleep(ANSWER_INTERVAL)
    if (runners.every((runner, i) => Atomics.load(runner.control, CONTROL_INSPECTIONS) !== before[i])) return true
  }
  return false
})

/** Watches the vCPUs of one machine; ends them when all have halted for good. Never returns. */
export const haltWatch = Effect.fnUntraced(function*(runners: ReadonlyArray<WatchedVcpu>) {
  let last: ReadonlyArray<number> = []
  let inspected: ReadonlyArray<number> = []
  for (;;) {
    yield* Effect.sleep(LOOK_INTERVAL)
    const seen = runners.map(look)
    const stayed = seen.length > 0 && seen.every((halts) => halts >= 0) && isSame(seen, last)
    last = seen
    // Without statistics a vCPU can have halted since then and nobody knows.
    const isCertain = runners.every((runner) => runner.parts.stats !== undefined)
    if (!stayed || (isCertain && isSame(seen, inspected))) continue
    const subjects = [...runners]
    if (!(yield* inspect(subjects))) continue
    inspected = seen
    if (subjects.some(isHaltedForGood) && subjects.every((runner) => isHaltedForGood(runner) || isNotStarted(runner))) {
      for (const runner of subjects) {
        runner.halted = true
        runner.request(REQUEST_STOP)
      }
    }
  }
})
