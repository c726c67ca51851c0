/**
 * The devices that a host has at hand: a service that turns a configuration into devices. Packages add to it by layers.
 *
 * ```ts
 * const catalog = layerSerial.pipe(Layer.provide(layerPower), Layer.provide(DeviceCatalog.layerEmpty))
 * ```
 */
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import type { Device, DeviceFailure } from "./Device.ts"
import type { DeviceField, GuestConfig } from "./GuestConfig.ts"

/** Makes the devices of one kind that a configuration asks for. */
export interface DeviceFactory {
  /** What it makes: a field of the configuration, or the name of a device that every machine has. */
  readonly provides: DeviceField | "serial" | "power" | "pci"
  /** The devices, in order; none when the configuration does not ask for this kind. Runs once for each machine. */
  readonly devices: (config: GuestConfig) => Effect.Effect<ReadonlyArray<Device>, DeviceFailure, Scope.Scope>
}

/** The device kinds that a host has at hand, in the order in which they are placed in a machine. */
export class DeviceCatalog extends Context.Service<DeviceCatalog, {
  readonly factories: ReadonlyArray<DeviceFactory>
}>()("@troupe/core/DeviceCatalog") {
  /** A catalog without devices, the start of every other one. */
  static readonly layerEmpty: Layer.Layer<DeviceCatalog> = Layer.succeed(DeviceCatalog, { factories: [] })

  /** Adds one kind of device after those of the catalog below. */
  static readonly layerAdd = <E, R>(
    factory: Effect.Effect<DeviceFactory, E, R>
  ): Layer.Layer<DeviceCatalog, E, DeviceCatalog | Exclude<R, Scope.Scope>> =>
    Layer.effect(
      DeviceCatalog,
      Effect.gen(function*() {
        const below = yield* DeviceCatalog
        return { factories: [...below.factories, yield* factory] }
      })
    )
}
