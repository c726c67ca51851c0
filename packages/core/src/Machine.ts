/**
 * A machine: the devices that a configuration asks for, the services that they publish, and one life of the guest after
 * another.
 *
 * What the devices publish lives as long as the machine. An incarnation is one life of the guest from power-on to its end; a
 * reset may be followed by the next one.
 */
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import type { Device } from "./Device.ts"
import { DeviceCatalog } from "./DeviceCatalog.ts"
import { deviceFields, type GuestConfig } from "./GuestConfig.ts"
import {
  BadConfig,
  DuplicatePublicServices,
  FailedServiceConnect,
  GuestError,
  type GuestErrorReason
} from "./GuestError.ts"
import { type GuestStop, Reset } from "./GuestStop.ts"
import { Hypervisor } from "./Hypervisor.ts"
import { buildIncarnation, runIncarnation } from "./Incarnation.ts"
import { MachinePolicy } from "./MachinePolicy.ts"
import { deviceInitializationFailure } from "./Placement.ts"
import { resetPace } from "./RestartSchedule.ts"

/** A machine that has been built and has not run yet. */
export interface Machine {
  /** The services that its devices publish. */
  readonly services: Context.Context<never>
  /** Runs the guest to its end. Run it once. Interruption ends the guest and returns when nothing of it is left. */
  readonly run: Effect.Effect<GuestStop, GuestError>
  /** Whether a life of the guest has come to its end. */
  readonly hasLived: () => boolean
}

/** A life of the guest has ended in a reset, and the machine is to run again. */
class RunAgain extends Schema.TaggedError<RunAgain>()("RunAgain", { stop: Reset }) {}

const fail = (reason: GuestErrorReason): Effect.Effect<never, GuestError> => Effect.fail(new GuestError({ reason }))

/** Builds a machine from a checked configuration. Everything that it holds belongs to the scope. */
export const makeMachine: (
  config: GuestConfig
) => Effect.Effect<Machine, GuestError, Hypervisor | DeviceCatalog | Scope.Scope> = Effect.fnUntraced(
  function*(config) {
    const hypervisor = yield* Hypervisor
    const policy = yield* MachinePolicy
    const scope = yield* Effect.scope
    if (config.cpus > hypervisor.limits.maxVcpus) {
      return yield* fail(
        new BadConfig({
          operation: "create",
          detail: "one field is wrong",
          issues: [{
            field: "cpus",
            rule: `must be at most ${hypervisor.limits.maxVcpus} with the hypervisor ${hypervisor.name}`,
            value: String(config.cpus)
          }]
        })
      )
    }
    const devices = yield* makeDevices(config)
    const services = yield* publishServices(devices)
    const build = buildIncarnation(config, devices, scope)
    let incarnation = yield* build
    let lived = false
    const life = Effect.gen(function*() {
      if (lived) incarnation = yield* build
      const stop = yield* runIncarnation(incarnation, config, services)
      lived = true
      return stop._tag === "Reset" && policy.reset === "run-again" ? yield* new RunAgain({ stop }) : stop
    })
    const run = Effect.retry(life, {
      schedule: policy.resetPace ?? resetPace,
      while: (error) => error._tag === "RunAgain"
    }).pipe(Effect.catchTag("RunAgain", ({ stop }) => Effect.succeed(stop)))
    return {
      services,
      hasLived: () => lived,
      run: Effect.provideService(run, MachinePolicy, policy).pipe(Effect.provideService(Hypervisor, hypervisor))
    }
  }
)

/** The devices that the configuration asks for, in the catalog's order. */
const makeDevices = Effect.fnUntraced(function*(config: GuestConfig) {
  const catalog = yield* DeviceCatalog
  for (const field of deviceFields(config)) {
    if (!catalog.factories.some((factory) => factory.provides === field)) {
      return yield* fail(
        new FailedServiceConnect({
          operation: "create",
          detail: `the configuration has ${field}, and the device catalog has no such device`,
          hint: "Provide the device's layer (for all of them: the layer of @troupe/devices)"
        })
      )
    }
  }
  if (config.virtioTransport === "pci" && !catalog.factories.some((factory) => factory.provides === "pci")) {
    return yield* fail(
      new FailedServiceConnect({
        operation: "create",
        detail: "the configuration puts virtio devices on PCI, and the device catalog has no host bridge",
        hint: "Provide layerPci of @troupe/devices beside the devices"
      })
    )
  }
  const devices: Array<Device> = []
  for (const factory of catalog.factories) {
    devices.push(
      ...yield* factory.devices(config).pipe(
        Effect.mapError((failure) => new GuestError({ reason: deviceInitializationFailure(failure) }))
      )
    )
  }
  return devices
})

const publishServices = Effect.fnUntraced(function*(devices: ReadonlyArray<Device>) {
  let services = Context.empty()
  const publishers = new Map<string, string>()
  for (const device of devices) {
    if (device.services === undefined) continue
    for (const key of device.services.mapUnsafe.keys()) {
      const publisher = publishers.get(key)
      if (publisher !== undefined) {
        return yield* fail(
          new DuplicatePublicServices({
            operation: "create",
            device: device.name,
            detail: `${device.name} publishes ${key}, and so does ${publisher}`,
            hint: "Keep one of the two in the device catalog"
          })
        )
      }
      publishers.set(key, device.name)
    }
    services = Context.merge(services, device.services)
  }
  return services
})
