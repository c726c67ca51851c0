/** The socket device in the catalog of devices. */
import { DeviceFailure } from "@troupe/core/Device"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { HostVsockEndpoint } from "@troupe/core/HostVsockEndpoint"
import { virtioOn } from "@troupe/devices/virtio/VirtioTransport"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"
import { vsockDevice } from "./VsockDevice.ts"
import { makeVsockEndpoint } from "./VsockEndpoint.ts"
import { VsockManager } from "./VsockManager.ts"

const NAME = "vsock0"

/** Adds the socket device, which a machine has when `virtioVsock` is set. */
export const layerVsock: Layer.Layer<DeviceCatalog, never, DeviceCatalog | VsockManager> = DeviceCatalog.layerAdd(
  Effect.map(VsockManager, (manager) => ({
    provides: "virtioVsock" as const,
    devices: Effect.fnUntraced(function*(config) {
      if (!config.virtioVsock) return []
      const { deviceHost, service } = yield* Effect.mapError(
        makeVsockEndpoint(manager, config.vsockListeners),
        (error) => new DeviceFailure({ device: NAME, detail: error.message })
      )
      return [
        virtioOn(config, vsockDevice(deviceHost), {
          name: NAME,
          services: Context.make(HostVsockEndpoint, service)
        })
      ]
    })
  }))
)
