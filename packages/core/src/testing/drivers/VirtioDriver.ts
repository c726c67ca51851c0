/**
 * A driver of virtio devices (virtio 1.3, section 3.1), as a guest's kernel has it, whatever the transport and the type of the
 * device. The transports' drivers add how the device is reached.
 */
import type { AccessSize, GuestCpu, GuestRoutine } from "../GuestCpu.ts"
import { PackedQueueDriver, packedQueueMemory } from "./PackedQueueDriver.ts"
import type { QueueDriver, QueuePlace } from "./QueueDriver.ts"
import { type DriverBuffer, SplitQueueDriver, splitQueueMemory, type UsedChain } from "./SplitQueueDriver.ts"

/** Bits of the device status. */
export const VirtioStatus = {
  ACKNOWLEDGE: 1,
  DRIVER: 2,
  DRIVER_OK: 4,
  FEATURES_OK: 8,
  DEVICE_NEEDS_RESET: 64,
  FAILED: 128
} as const

const INDIRECT_DESC = 1 << 28
const EVENT_IDX = 1 << 29
/** VIRTIO_F_VERSION_1, in the high half. */
const VERSION_1 = 1
/** VIRTIO_F_RING_PACKED, in the high half. */
const RING_PACKED = 4
const RESET_TRIES = 1000

/** What a driver wants of a device. */
export interface VirtioDriverOptions {
  /** First address of guest memory for the queues, a multiple of 16. */
  readonly memoryAddress: number
  /** Sizes of the queues; a device's smaller maximum counts. Default: one queue of 16. */
  readonly queueSizes?: ReadonlyArray<number>
  /** Features of the device type to accept where they are offered: low and high half. Default: none. */
  readonly features?: { readonly low: number; readonly high: number }
  /** Use tables of descriptors where they are offered. Default: `true`. */
  readonly indirect?: boolean
  /** Use event indices where they are offered. Default: `true`. */
  readonly eventIndex?: boolean
  /** Use packed queues where they are offered. Default: `false`. */
  readonly packed?: boolean
}

/** A field of a configuration space. */
export interface ConfigurationField {
  readonly offset: number
  readonly size: AccessSize
}

/** The driver of one device: {@link start} makes the device ready. */
export abstract class VirtioDriver {
  /** What was negotiated. */
  features: { readonly low: number; readonly high: number } = { low: 0, high: 0 }
  /** The queues, whatever their format. */
  rings: ReadonlyArray<QueueDriver> = []
  /** The same; none when they are packed. */
  queues: ReadonlyArray<SplitQueueDriver> = []
  /** How often the device has interrupted, and how often because of its configuration. */
  interrupts = 0
  configurationInterrupts = 0

  /** The device status. */
  abstract status(cpu: GuestCpu): GuestRoutine<number>
  abstract writeStatus(cpu: GuestCpu, status: number): GuestRoutine
  /** 32 of the features that the device offers. */
  abstract offeredFeatures(cpu: GuestCpu, word: number): GuestRoutine<number>
  /** Accepts 32 features. */
  abstract acceptFeatures(cpu: GuestCpu, word: number, features: number): GuestRoutine
  /** The largest size of a queue, 0 when the device does not have it. Throws when the queue is ready. */
  abstract queueSizeMax(cpu: GuestCpu, index: number): GuestRoutine<number>
  /** Sets a queue up and makes it ready. Throws when the device refuses. */
  abstract enableQueue(cpu: GuestCpu, index: number, queue: QueuePlace): GuestRoutine
  /** Notifies the device of new chains. */
  abstract notify(cpu: GuestCpu, queue: number): GuestRoutine
  /** Waits for an interrupt for the queue (others may end the wait as well) and does what an interrupt handler does first. */
  abstract awaitInterrupt(cpu: GuestCpu, queue: number): GuestRoutine
  /** Waits for an interrupt for the configuration, which the device status is a part of. */
  abstract awaitConfigurationChange(cpu: GuestCpu): GuestRoutine
  abstract configurationGeneration(cpu: GuestCpu): GuestRoutine<number>
  /** One field of the configuration space. */
  abstract loadConfiguration(cpu: GuestCpu, field: ConfigurationField): GuestRoutine<number>
  abstract storeConfiguration(cpu: GuestCpu, field: ConfigurationField, value: number): GuestRoutine

  // Not a generator: where only types are taken away, a field and a generator behind it would be one expression.
  /** A queue of the driver. */
  ring(index: number): QueueDriver {
    const ring = this.rings[index]
    if (ring === undefined) throw new RangeError(`there is no queue ${index}`)
    return ring
  }

  /** A split queue of the driver. */
  queue(index: number): SplitQueueDriver {
    const queue = this.queues[index]
    if (queue === undefined) throw new RangeError(`there is no split queue ${index}`)
    return queue
  }

  /** Resets the device and waits until it says that it is done. */
  *reset(cpu: GuestCpu): GuestRoutine {
    yield* this.writeStatus(cpu, 0)
    for (let tries = 0; tries < RESET_TRIES; tries++) {
      if ((yield* this.status(cpu)) === 0) return
      yield* cpu.yield()
    }
    throw new Error("the device does not come out of its reset")
  }

  /** Initialises the device as section 3.1.1 says: reset, status, features, queues, ready. Throws where it refuses. */
  *start(cpu: GuestCpu, options: VirtioDriverOptions): GuestRoutine {
    yield* this.reset(cpu)
    let status: number = VirtioStatus.ACKNOWLEDGE
    yield* this.writeStatus(cpu, status)
    status |= VirtioStatus.DRIVER
    yield* this.writeStatus(cpu, status)
    const offeredLow = yield* this.offeredFeatures(cpu, 0)
    const offeredHigh = yield* this.offeredFeatures(cpu, 1)
    if ((offeredHigh & VERSION_1) === 0) throw new Error("the device is not one of virtio 1.0 or later")
    const wanted = (options.features?.low ?? 0) | (options.indirect === false ? 0 : INDIRECT_DESC) |
      (options.eventIndex === false ? 0 : EVENT_IDX)
    const low = (offeredLow & wanted) >>> 0
    const high = (offeredHigh &
      ((options.features?.high ?? 0) & ~RING_PACKED | VERSION_1 | (options.packed === true ? RING_PACKED : 0))) >>> 0
    yield* this.acceptFeatures(cpu, 0, low)
    yield* this.acceptFeatures(cpu, 1, high)
    status |= VirtioStatus.FEATURES_OK
    yield* this.writeStatus(cpu, status)
    if (((yield* this.status(cpu)) & VirtioStatus.FEATURES_OK) === 0) throw new Error("the device refuses the features")

    const packed = (high & RING_PACKED) !== 0
    const rings: Array<QueueDriver> = []
    const queues: Array<SplitQueueDriver> = []
    let address = options.memoryAddress
    for (const [index, size] of (options.queueSizes ?? [16]).entries()) {
      const sizeMax = yield* this.queueSizeMax(cpu, index)
      if (sizeMax === 0) throw new Error(`the device has no queue ${index}`)
      const place = {
        memory: cpu.memory,
        address,
        size: Math.min(size, sizeMax),
        indirect: (low & INDIRECT_DESC) !== 0,
        eventIndex: (low & EVENT_IDX) !== 0
      }
      let ring: QueueDriver
      if (packed) {
        ring = new PackedQueueDriver(place)
        address += packedQueueMemory(place.size)
      } else {
        const queue = new SplitQueueDriver(place)
        queues.push(queue)
        ring = queue
        address += splitQueueMemory(place.size)
      }
      yield* this.enableQueue(cpu, index, ring)
      rings.push(ring)
    }
    this.features = { low, high }
    this.rings = rings
    this.queues = queues
    status |= VirtioStatus.DRIVER_OK
    yield* this.writeStatus(cpu, status)
  }

  /** Gives chains to the device and notifies it if it wants that. Returns how many had room. */
  *send(
    cpu: GuestCpu,
    queue: number,
    chains: ReadonlyArray<ReadonlyArray<DriverBuffer>>,
    indirect = false
  ): GuestRoutine<number> {
    const driver = this.ring(queue)
    let added = 0
    for (const chain of chains) {
      if (driver.add(chain, indirect) === undefined) break
      added++
    }
    if (driver.publish()) yield* this.notify(cpu, queue)
    return added
  }

  /** Waits by interrupts until the device has used a chain. */
  *receive(cpu: GuestCpu, queue: number): GuestRoutine<UsedChain> {
    const driver = this.ring(queue)
    for (;;) {
      const used = driver.poll()
      if (used !== undefined) return used
      if (driver.enableInterrupts()) continue
      yield* this.awaitInterrupt(cpu, queue)
      driver.disableInterrupts()
    }
  }

  /** Fields of the configuration space that belong together: read again until its generation has not changed meanwhile. */
  *configuration(cpu: GuestCpu, fields: ReadonlyArray<ConfigurationField>): GuestRoutine<ReadonlyArray<number>> {
    for (;;) {
      const generation = yield* this.configurationGeneration(cpu)
      const values: Array<number> = []
      for (const field of fields) values.push(yield* this.loadConfiguration(cpu, field))
      if ((yield* this.configurationGeneration(cpu)) === generation) return values
    }
  }
}
