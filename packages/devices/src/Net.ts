/** The network devices of a machine: one virtio-net device (virtio 1.3, section 5.1) for each interface in its configuration. */
import { DeviceFailure, type DevicePolicy } from "@troupe/core/Device"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { netSpecs } from "@troupe/core/GuestConfig"
import { NetBackend } from "@troupe/core/NetBackend"
import { NetInterfaces } from "@troupe/core/NetInterfaces"
import { restartPolicy } from "@troupe/core/RestartSchedule"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"
import { NetLine } from "./net/NetLine.ts"
import { withSoftwareOffloads } from "./net/SoftwareOffloads.ts"
import { virtioNet } from "./net/VirtioNet.ts"
import { makeThrottle } from "./Throttle.ts"
import { virtioOn } from "./virtio/VirtioTransport.ts"

/** A network device that is started again a few times, at growing intervals, when it fails. Its port stays open. */
export const netPolicy: DevicePolicy = restartPolicy({ delay: "100 millis" })

/**
 * Adds the network devices, which a machine has when `netDevices` or `defaultNet` ask for them. Their interfaces are connected to the
 * {@link NetBackend} of the layer's context for as long as the machine lives. Without one a machine that asks for interfaces is refused,
 * as it is when the back end refuses an interface.
 */
export const layerNet: Layer.Layer<DeviceCatalog, never, DeviceCatalog> = DeviceCatalog.layerAdd(
  Effect.map(Effect.serviceOption(NetBackend), (found) => ({
    provides: "netDevices" as const,
    devices: Effect.fnUntraced(function*(config) {
      if (!config.defaultNet && config.netDevices.length === 0) return []
      const backend = yield* Effect.fromOption(found, () =>
        new DeviceFailure({
          device: "net0",
          detail: "there is no network for its interfaces",
          hint: "Provide a layer of NetBackend, such as Tap.layer, to the layer of the devices"
        }))
      const lines: Array<NetLine> = []
      for (const [index, { enableBridge, macAddress, rxRateLimit, txRateLimit }] of netSpecs(config).entries()) {
        const request = { index, name: `net${index}`, macAddress: macAddress.toLowerCase(), enableBridge }
        const port = yield* backend.open(request).pipe(
          Effect.mapError(({ detail, hint, operation }) =>
            new DeviceFailure({
              device: request.name,
              detail: `${operation}: ${detail}`,
              ...(hint === undefined ? {} : { hint })
            })
          )
        )
        lines.push(
          yield* NetLine.make({
            ...request,
            port: withSoftwareOffloads(port),
            receiveThrottle: yield* makeThrottle(rxRateLimit),
            sendThrottle: yield* makeThrottle(txRateLimit)
          })
        )
      }
      const interfaces = Context.make(NetInterfaces, { interfaces: lines.map((line) => line.interface) })
      return lines.map((line, index) =>
        virtioOn(config, virtioNet(line), {
          name: line.name,
          policy: netPolicy,
          // One service for all of them.
          ...(index === 0 ? { services: interfaces } : {})
        })
      )
    })
  }))
)
