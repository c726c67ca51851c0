/** Disks: opens what a configuration names, puts formats and modes over it, and makes block devices of it. */
import { type BlockBackend, BlockBackendError, SECTOR_SIZE } from "@troupe/core/BlockBackend"
import type { BlockAccess } from "@troupe/core/BlockClient"
import { BLOCK_EVENTS_MAX, BlockDevices, type BlockEvent } from "@troupe/core/BlockDevices"
import { type Device, DeviceFailure } from "@troupe/core/Device"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import type { BlockBacking, BlockSpec, GuestConfig } from "@troupe/core/GuestConfig"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"
import * as PubSub from "effect/PubSub"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { openQcow2 } from "./block/qcow2/Qcow2Backend.ts"
import { type VirtioBlk, virtioBlk } from "./block/VirtioBlk.ts"
import { makeVolatileBackend } from "./block/VolatileBackend.ts"
import { makeThrottle } from "./Throttle.ts"
import { virtioOn } from "./virtio/VirtioTransport.ts"

/** Puts the format over what a client opened, and opens what an image is the difference to. */
const openFormat = Effect.fnUntraced(
  function*(
    spec: BlockSpec | BlockBacking,
    below: BlockBackend,
    access: BlockAccess
  ): Effect.fn.Return<BlockBackend, BlockBackendError, Scope.Scope> {
    if (spec.format !== "QCOW") return below
    const readOnly = access === "read-only"
    if (spec.backing === undefined) return yield* openQcow2(below, { readOnly })
    const opened = yield* spec.backing.client.open("read-only")
    const backing = yield* openFormat(spec.backing, opened, "read-only")
    return yield* openQcow2(below, { readOnly, backing })
  }
)

/** Opens a disk: the client, the format over it, the mode over that. */
export const openDisk = Effect.fnUntraced(
  function*(spec: BlockSpec): Effect.fn.Return<BlockBackend, BlockBackendError, Scope.Scope> {
    const access = spec.mode === "READ_WRITE" ? "read-write" : "read-only"
    const backend = yield* spec.client.open(access)
    const wrong = (detail: string, hint: string) =>
      new BlockBackendError({ name: backend.name, operation: "open", kind: "range", detail, hint })
    const { blockSize, capacity } = backend
    if (spec.format === "BLOCK" && capacity % blockSize !== 0) {
      return yield* wrong(
        `${capacity} bytes are not a multiple of the device's block size of ${blockSize}`,
        "Use the format FILE, which leaves the rest out, or make the device larger"
      )
    }
    if (!Number.isInteger(Math.log2(blockSize)) || blockSize < SECTOR_SIZE || blockSize > 0x1_0000) {
      return yield* wrong(`a block size of ${blockSize}`, "It is a power of two from 512 to 65536")
    }
    const disk = yield* openFormat(spec, backend, access)
    return spec.mode === "VOLATILE_WRITE" ? makeVolatileBackend(disk, spec.volatileLimit) : disk
  }
)

const makeDevices = Effect.fnUntraced(
  function*(config: GuestConfig): Effect.fn.Return<ReadonlyArray<Device>, DeviceFailure, Scope.Scope> {
    if (config.blockDevices.length === 0) return []
    const events = yield* PubSub.sliding<BlockEvent>(BLOCK_EVENTS_MAX)
    const disks: Array<VirtioBlk> = []
    for (const [index, spec] of config.blockDevices.entries()) {
      const backend = yield* openDisk(spec).pipe(
        Effect.mapError(({ hint, message }) =>
          new DeviceFailure({
            device: `block${index}`,
            detail: `the disk ${JSON.stringify(spec.id)} could not be opened: ${message}`,
            ...(hint === undefined ? {} : { hint })
          })
        )
      )
      disks.push(
        virtioBlk({
          id: spec.id,
          backend,
          onEvent: (event) => void PubSub.publishUnsafe(events, event),
          throttle: yield* makeThrottle(spec.rateLimit)
        })
      )
    }
    const services = Context.make(BlockDevices, {
      events: Stream.fromPubSub(events),
      statistics: () => disks.map((disk) => disk.statistics())
    })
    return disks.map(({ device }, index) =>
      virtioOn(config, device, {
        name: `block${index}`,
        // One service for all disks: the first one publishes it.
        ...(index === 0 ? { services } : {})
      })
    )
  }
)

/** Adds the disks that `blockDevices` names, in their order. */
export const layerBlock: Layer.Layer<DeviceCatalog, never, DeviceCatalog> = DeviceCatalog.layerAdd(
  Effect.succeed({ provides: "blockDevices" as const, devices: makeDevices })
)
