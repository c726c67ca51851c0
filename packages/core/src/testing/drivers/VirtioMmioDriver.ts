/** A driver of virtio-mmio devices (virtio 1.3, sections 3.1 and 4.2), as a guest's kernel has it. It works for any device type. */
import type { AccessSize, GuestCpu, GuestRoutine } from "../GuestCpu.ts"
import { type DriverBuffer, SplitQueueDriver, splitQueueMemory, type UsedChain } from "./SplitQueueDriver.ts"

/** Offsets of the registers (section 4.2.2). */
export const VirtioMmio = {
  MagicValue: 0x00,
  Version: 0x04,
  DeviceID: 0x08,
  VendorID: 0x0c,
  DeviceFeatures: 0x10,
  DeviceFeaturesSel: 0x14,
  DriverFeatures: 0x20,
  DriverFeaturesSel: 0x24,
  QueueSel: 0x30,
  QueueSizeMax: 0x34,
  QueueSize: 0x38,
  QueueReady: 0x44,
  QueueNotify: 0x50,
  InterruptStatus: 0x60,
  InterruptACK: 0x64,
  Status: 0x70,
  QueueDescLow: 0x80,
  QueueDescHigh: 0x84,
  QueueDriverLow: 0x90,
  QueueDriverHigh: 0x94,
  QueueDeviceLow: 0xa0,
  QueueDeviceHigh: 0xa4,
  ConfigGeneration: 0xfc,
  Config: 0x100
} as const

/** Bits of the device status. */
export const VirtioStatus = {
  ACKNOWLEDGE: 1,
  DRIVER: 2,
  DRIVER_OK: 4,
  FEATURES_OK: 8,
  DEVICE_NEEDS_RESET: 64,
  FAILED: 128
} as const

const MAGIC = 0x7472_6976
const INDIRECT_DESC = 1 << 28
const EVENT_IDX = 1 << 29
/** VIRTIO_F_VERSION_1, in the high half. */
const VERSION_1 = 1
const CAUSE_CONFIGURATION = 2
const RESET_TRIES = 1000

/** Where a device is. */
export interface VirtioMmioPlace {
  readonly base: number
  readonly gsi: number
}

/** What a driver wants of a device. */
export interface VirtioMmioOptions {
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
}

/** Resets the device and waits until it says that it is done. */
export function* resetVirtioMmio(cpu: GuestCpu, place: VirtioMmioPlace): GuestRoutine {
  yield* cpu.store(place.base + VirtioMmio.Status, 4, 0)
  for (let tries = 0; tries < RESET_TRIES; tries++) {
    if ((yield* cpu.load(place.base + VirtioMmio.Status, 4)) === 0) return
    yield* cpu.yield()
  }
  throw new Error("the device does not come out of its reset")
}

/** The device's type, or `undefined` when there is no virtio-mmio device of layout 2. */
export function* probeVirtioMmio(cpu: GuestCpu, place: VirtioMmioPlace): GuestRoutine<number | undefined> {
  if ((yield* cpu.load(place.base + VirtioMmio.MagicValue, 4)) !== MAGIC) return undefined
  if ((yield* cpu.load(place.base + VirtioMmio.Version, 4)) !== 2) return undefined
  const type = yield* cpu.load(place.base + VirtioMmio.DeviceID, 4)
  return type === 0 ? undefined : type
}

/** Initialises the device as section 3.1.1 says: reset, status, features, queues, ready. Throws where it refuses. */
export function* startVirtioMmio(
  cpu: GuestCpu,
  place: VirtioMmioPlace,
  options: VirtioMmioOptions
): GuestRoutine<VirtioMmioDriver> {
  const { base } = place
  const write = (register: number, value: number) => cpu.store(base + register, 4, value)
  const read = (register: number) => cpu.load(base + register, 4)
  yield* resetVirtioMmio(cpu, place)
  let status: number = VirtioStatus.ACKNOWLEDGE
  yield* write(VirtioMmio.Status, status)
  status |= VirtioStatus.DRIVER
  yield* write(VirtioMmio.Status, status)

  yield* write(VirtioMmio.DeviceFeaturesSel, 0)
  const offeredLow = yield* read(VirtioMmio.DeviceFeatures)
  yield* write(VirtioMmio.DeviceFeaturesSel, 1)
  const offeredHigh = yield* read(VirtioMmio.DeviceFeatures)
  if ((offeredHigh & VERSION_1) === 0) throw new Error("the device is not one of virtio 1.0 or later")
  const wanted = (options.features?.low ?? 0) | (options.indirect === false ? 0 : INDIRECT_DESC) |
    (options.eventIndex === false ? 0 : EVENT_IDX)
  const low = (offeredLow & wanted) >>> 0
  const high = (offeredHigh & ((options.features?.high ?? 0) | VERSION_1)) >>> 0
  yield* write(VirtioMmio.DriverFeaturesSel, 0)
  yield* write(VirtioMmio.DriverFeatures, low)
  yield* write(VirtioMmio.DriverFeaturesSel, 1)
  yield* write(VirtioMmio.DriverFeatures, high)
  status |= VirtioStatus.FEATURES_OK
  yield* write(VirtioMmio.Status, status)
  if (((yield* read(VirtioMmio.Status)) & VirtioStatus.FEATURES_OK) === 0) {
    throw new Error("the device refuses the features")
  }

  const queues: Array<SplitQueueDriver> = []
  let address = options.memoryAddress
  for (const [index, size] of (options.queueSizes ?? [16]).entries()) {
    yield* write(VirtioMmio.QueueSel, index)
    if ((yield* read(VirtioMmio.QueueReady)) !== 0) throw new Error(`queue ${index} is ready after a reset`)
    const sizeMax = yield* read(VirtioMmio.QueueSizeMax)
    if (sizeMax === 0) throw new Error(`the device has no queue ${index}`)
    const queue = new SplitQueueDriver({
      memory: cpu.memory,
      address,
      size: Math.min(size, sizeMax),
      indirect: (low & INDIRECT_DESC) !== 0,
      eventIndex: (low & EVENT_IDX) !== 0
    })
    address += splitQueueMemory(queue.size)
    yield* write(VirtioMmio.QueueSize, queue.size)
    const addresses = [
      [VirtioMmio.QueueDescLow, queue.descriptorTable],
      [VirtioMmio.QueueDriverLow, queue.availableRing],
      [VirtioMmio.QueueDeviceLow, queue.usedRing]
    ] as const
    for (const [register, value] of addresses) {
      yield* write(register, value % 2 ** 32)
      yield* write(register + 4, Math.floor(value / 2 ** 32))
    }
    yield* write(VirtioMmio.QueueReady, 1)
    if ((yield* read(VirtioMmio.QueueReady)) !== 1) throw new Error(`the device refuses queue ${index}`)
    queues.push(queue)
  }
  status |= VirtioStatus.DRIVER_OK
  yield* write(VirtioMmio.Status, status)
  return new VirtioMmioDriver(place, { low, high }, queues)
}

/** A device that a driver has made ready. */
export class VirtioMmioDriver {
  readonly place: VirtioMmioPlace
  /** What was negotiated. */
  readonly features: { readonly low: number; readonly high: number }
  readonly queues: ReadonlyArray<SplitQueueDriver>
  /** How often the device has interrupted, and how often because of its configuration. */
  interrupts = 0
  configurationInterrupts = 0

  constructor(
    place: VirtioMmioPlace,
    features: { readonly low: number; readonly high: number },
    queues: ReadonlyArray<SplitQueueDriver>
  ) {
    this.place = place
    this.features = features
    this.queues = queues
  }

  /** A queue of the driver. */
  queue(index: number): SplitQueueDriver {
    const queue = this.queues[index]
    if (queue === undefined) throw new RangeError(`there is no queue ${index}`)
    return queue
  }

  /** Gives chains to the device and notifies it if it wants that. Returns how many had room. */
  *send(
    cpu: GuestCpu,
    queue: number,
    chains: ReadonlyArray<ReadonlyArray<DriverBuffer>>,
    indirect = false
  ): GuestRoutine<number> {
    const driver = this.queue(queue)
    let added = 0
    for (const chain of chains) {
      if (driver.add(chain, indirect) === undefined) break
      added++
    }
    if (driver.publish()) yield* this.notify(cpu, queue)
    return added
  }

  /** Notifies the device of new chains. */
  *notify(cpu: GuestCpu, queue: number): GuestRoutine {
    yield* cpu.store(this.place.base + VirtioMmio.QueueNotify, 4, queue)
  }

  /** Waits by interrupts until the device has used a chain. */
  *receive(cpu: GuestCpu, queue: number): GuestRoutine<UsedChain> {
    const driver = this.queue(queue)
    for (;;) {
      const used = driver.poll()
      if (used !== undefined) return used
      if (driver.enableInterrupts()) continue
      yield* cpu.waitForInterrupt(this.place.gsi)
      yield* this.handleInterrupt(cpu)
      driver.disableInterrupts()
    }
  }

  /** What an interrupt handler does first: reads the causes and acknowledges them. Returns them. */
  *handleInterrupt(cpu: GuestCpu): GuestRoutine<number> {
    const causes = yield* cpu.load(this.place.base + VirtioMmio.InterruptStatus, 4)
    yield* cpu.store(this.place.base + VirtioMmio.InterruptACK, 4, causes)
    this.interrupts++
    if ((causes & CAUSE_CONFIGURATION) !== 0) this.configurationInterrupts++
    return causes
  }

  /** The device status. */
  *status(cpu: GuestCpu): GuestRoutine<number> {
    return yield* cpu.load(this.place.base + VirtioMmio.Status, 4)
  }

  /** Fields of the configuration space that belong together: read again until its generation has not changed meanwhile. */
  *configuration(
    cpu: GuestCpu,
    fields: ReadonlyArray<{ readonly offset: number; readonly size: AccessSize }>
  ): GuestRoutine<
    ReadonlyArray<number>
  > {
    for (;;) {
      const generation = yield* cpu.load(this.place.base + VirtioMmio.ConfigGeneration, 4)
      const values: Array<number> = []
      for (const { offset, size } of fields) {
        values.push(yield* cpu.load(this.place.base + VirtioMmio.Config + offset, size))
      }
      if ((yield* cpu.load(this.place.base + VirtioMmio.ConfigGeneration, 4)) === generation) return values
    }
  }
}
