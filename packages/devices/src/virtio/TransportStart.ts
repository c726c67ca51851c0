/** What the start of a virtio device has alike on every transport: its context, its state machine, the log of broken drivers. */
import type { DeviceBehaviour, DeviceContext, DeviceFailure } from "@troupe/core/Device"
import * as Effect from "effect/Effect"
import * as Queue from "effect/Queue"
import type * as Scope from "effect/Scope"
import { SIGNAL_LOOK, type TransportPorts, type TransportState } from "./TransportState.ts"
import type { VirtioDevice } from "./VirtioDevice.ts"

/** Reports of broken drivers that wait to be logged; a guest that breaks things quickly is not worth more. */
const REPORTS_WAITING_MAX = 4
/** Reports that one generation of a device logs. */
const REPORTS_MAX = 16

/** What a transport's registers take from the machine as it is. */
export type MachinePorts = Pick<TransportPorts, "memory" | "signal" | "hold" | "report">

/** Starts a device behind the registers that a transport makes of its machine. The transport adds how it is accessed. */
export const startTransport = <Registers extends { readonly state: TransportState }>(
  device: VirtioDevice,
  context: DeviceContext,
  makeRegisters: (ports: MachinePorts) => Registers
): Effect.Effect<
  { readonly registers: Registers; readonly behaviour: Pick<DeviceBehaviour, "signal" | "run"> },
  DeviceFailure,
  Scope.Scope
> =>
  Effect.gen(function*() {
    const { generation, memory, name, signal } = context
    const reports = yield* Queue.dropping<string>(REPORTS_WAITING_MAX)
    const registers = makeRegisters({
      memory,
      signal,
      hold: context.hold,
      report: (text) => Queue.offerUnsafe(reports, text)
    })
    const { state } = registers
    // Before the device, so that it comes after all that the device has begun.
    yield* Effect.addFinalizer(() => Effect.sync(() => state.end()))
    const behaviour = yield* device.start({
      name,
      memory,
      generation,
      signal,
      pluggableMemory: context.pluggableMemory,
      updateConfig: (change, options) => state.updateConfig(change, options?.quietly)
    })
    state.start(behaviour)
    const log = Queue.take(reports).pipe(
      Effect.flatMap((text) => Effect.logWarning(`${name}: ${text}`)),
      Effect.repeat({ times: REPORTS_MAX - 1 }),
      Effect.andThen(Effect.never)
    )
    return {
      registers,
      behaviour: {
        signal: (number) => number === SIGNAL_LOOK ? state.look() : state.signal(number),
        run: behaviour.run === undefined ? log : Effect.raceFirst(behaviour.run, log)
      }
    }
  })
