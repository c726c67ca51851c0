/**
 * Devices that break where a test says: every handler's begin and end, every interrupt and every look at guest memory is a
 * point at which a defect can be thrown, and is counted. So a test can walk through all points, or choose some at random.
 */
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type { Device, DeviceBehaviour, DeviceContext } from "../Device.ts"
import { DeviceCatalog } from "../DeviceCatalog.ts"
import { GuestMemory, type MemoryRegion } from "../GuestMemory.ts"

/**
 * Where a device can break.
 *
 * - `read`, `write`, `doorbell`, `signal`: before the handler has done anything
 * - `done`: a handler has done everything, and has not returned
 * - `memory`: in the middle of a handler, when it looks for a place in guest memory
 * - `interrupt`: when it raises an interrupt, which does not come
 * - `start`: before the device starts
 * - `host`: in the middle of a handler, in what the host provides; only where the test itself calls {@link DeviceDefects.reach}
 */
export type DefectPlace = "start" | "read" | "write" | "doorbell" | "signal" | "done" | "memory" | "interrupt" | "host"

/** Says whether a device breaks at a point. Points are numbered from 0 over all lives of the device. */
export type DefectPlan = (point: number, place: DefectPlace) => boolean

/** What a device that breaks throws. */
export class DeviceDefect extends Error {
  override readonly name = "DeviceDefect"
}

/** The points of one device, and its defects. */
export class DeviceDefects {
  readonly #plan: DefectPlan
  readonly #counts = new Map<DefectPlace, number>()
  #points = 0
  #defects = 0

  /** Default: the device never breaks, and its points are counted. */
  constructor(plan: DefectPlan = () => false) {
    this.#plan = plan
  }

  /** The number of points that were reached so far; of one kind, if a place is given. */
  points(place?: DefectPlace): number {
    return place === undefined ? this.#points : this.#counts.get(place) ?? 0
  }

  /** How often the device broke. */
  get defects(): number {
    return this.#defects
  }

  /** The device has come to a point. Throws when it is to break there. */
  reach(place: DefectPlace): void {
    const point = this.#points++
    this.#counts.set(place, this.points(place) + 1)
    if (!this.#plan(point, place)) return
    this.#defects++
    throw new DeviceDefect(`broken on purpose at point ${point} (${place})`)
  }
}

/** A device that breaks as planned. */
export const breaking = (device: Device, defects: DeviceDefects): Device => ({
  ...device,
  start: (context) =>
    Effect.sync(() => defects.reach("start")).pipe(
      Effect.andThen(device.start(breakingContext(context, defects))),
      Effect.map((behaviour) => breakingBehaviour(behaviour, defects))
    )
})

/** The catalog of the layer below, with each device replaced by what `change` makes of it. */
export const layer = (change: (device: Device) => Device): Layer.Layer<DeviceCatalog, never, DeviceCatalog> =>
  Layer.effect(
    DeviceCatalog,
    Effect.map(DeviceCatalog, ({ factories }) => ({
      factories: factories.map((factory) => ({
        ...factory,
        devices: (config) => Effect.map(factory.devices(config), (devices) => devices.map(change))
      }))
    }))
  )

class BreakingMemory extends GuestMemory {
  readonly #defects: DeviceDefects
  constructor(memory: GuestMemory, defects: DeviceDefects) {
    super(memory.regions)
    this.#defects = defects
  }
  override regionOf(address: number, length: number): MemoryRegion | undefined {
    this.#defects.reach("memory")
    return super.regionOf(address, length)
  }
}

const breakingContext = (context: DeviceContext, defects: DeviceDefects): DeviceContext => ({
  ...context,
  memory: new BreakingMemory(context.memory, defects),
  interrupts: context.interrupts.map((line) => ({
    gsi: line.gsi,
    trigger: () => {
      defects.reach("interrupt")
      line.trigger()
    }
  })),
  messages: context.messages.map((message) => ({
    route: (low, high, data) => message.route(low, high, data),
    trigger: () => {
      defects.reach("interrupt")
      message.trigger()
    }
  }))
})

const breakingBehaviour = (behaviour: DeviceBehaviour, defects: DeviceDefects): DeviceBehaviour => {
  const { doorbell, signal } = behaviour
  const done = <A>(result: A): A => {
    defects.reach("done")
    return result
  }
  return {
    ...behaviour,
    read: (range, offset, size) => {
      defects.reach("read")
      return done(behaviour.read(range, offset, size))
    },
    write: (range, offset, size, value) => {
      defects.reach("write")
      done(behaviour.write(range, offset, size, value))
    },
    ...(doorbell === undefined ? {} : {
      doorbell: (range, index) => {
        defects.reach("doorbell")
        return done(doorbell(range, index))
      }
    }),
    ...(signal === undefined ? {} : {
      signal: (number) => {
        defects.reach("signal")
        return done(signal(number))
      }
    })
  }
}
