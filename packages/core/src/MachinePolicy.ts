/** What a host decides about its machines: what a reset does, and what happens to a device that fails. */
import * as Context from "effect/Context"
import type * as Schedule from "effect/Schedule"
import type { DevicePolicy } from "./Device.ts"
import { restartPolicy } from "./RestartSchedule.ts"

/** Decisions that belong to the host. */
export interface MachinePolicy {
  /**
   * What the guest's reset does. `stop`: `run` returns `Reset`. `run-again`: the machine is built anew from its
   * configuration, as after power-on, and goes on within the same `run`; published services stay.
   */
  readonly reset: "stop" | "run-again"
  /**
   * With `run-again`: how soon the machine is built anew after a reset. When the schedule ends, `run` returns `Reset`. Default:
   * `resetPace` of `RestartSchedule.ts`, which never ends.
   */
  readonly resetPace?: Schedule.Schedule<unknown, unknown>
  /** What happens to a device that fails, unless the device has a policy of its own. */
  readonly device: DevicePolicy
}

/**
 * The policy in force where a guest is created; it stays that guest's. The default stops at a reset, and starts a failed device again up to
 * five times in a row, after 10, 20, 40, 80 and 160 ms; a minute without failure begins that anew.
 */
export const MachinePolicy: Context.Reference<MachinePolicy> = Context.Reference("@troupe/core/MachinePolicy", {
  defaultValue: (): MachinePolicy => ({
    reset: "stop",
    device: restartPolicy()
  })
})
