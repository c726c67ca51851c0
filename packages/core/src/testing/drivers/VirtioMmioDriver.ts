/** A driver of virtio-mmio devices (virtio 1.3, sections 3.1 and 4.2), as a guest's kernel has it. It works for any device type. */
import type { GuestCpu, GuestRoutine } from "../GuestCpu.ts"
import type { QueuePlace } from "./QueueDriver.ts"
import { type ConfigurationField, VirtioDriver, type VirtioDriverOptions } from "./VirtioDriver.ts"

export { VirtioStatus } from "./VirtioDriver.ts"

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

const MAGIC = 0x7472_6976
const CAUSE_CONFIGURATION = 2

/** Where a device is. */
export interface VirtioMmioPlace {
  readonly base: number
  readonly gsi: number
}

/** What a driver wants of a device. */
export type VirtioMmioOptions = VirtioDriverOptions

/** Resets the device and waits until it says that it is done. */
export function* resetVirtioMmio(cpu: GuestCpu, place: VirtioMmioPlace): GuestRoutine {
  yield* new VirtioMmioDriver(place).reset(cpu)
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
  const driver = new VirtioMmioDriver(place)
  yield* driver.start(cpu, options)
  return driver
}

/** A driver of a device on virtio-mmio. */
export class VirtioMmioDriver extends VirtioDriver {
  readonly place: VirtioMmioPlace

  constructor(place: VirtioMmioPlace) {
    super()
    this.place = place
  }

  *status(cpu: GuestCpu): GuestRoutine<number> {
    return yield* this.#load(cpu, VirtioMmio.Status)
  }

  *writeStatus(cpu: GuestCpu, status: number): GuestRoutine {
    yield* this.#store(cpu, VirtioMmio.Status, status)
  }

  *offeredFeatures(cpu: GuestCpu, word: number): GuestRoutine<number> {
    yield* this.#store(cpu, VirtioMmio.DeviceFeaturesSel, word)
    return yield* this.#load(cpu, VirtioMmio.DeviceFeatures)
  }

  *acceptFeatures(cpu: GuestCpu, word: number, features: number): GuestRoutine {
    yield* this.#store(cpu, VirtioMmio.DriverFeaturesSel, word)
    yield* this.#store(cpu, VirtioMmio.DriverFeatures, features)
  }

  *queueSizeMax(cpu: GuestCpu, index: number): GuestRoutine<number> {
    yield* this.#store(cpu, VirtioMmio.QueueSel, index)
    if ((yield* this.#load(cpu, VirtioMmio.QueueReady)) !== 0) throw new Error(`queue ${index} is ready after a reset`)
    return yield* this.#load(cpu, VirtioMmio.QueueSizeMax)
  }

  *enableQueue(cpu: GuestCpu, index: number, queue: QueuePlace): GuestRoutine {
    yield* this.#store(cpu, VirtioMmio.QueueSel, index)
    yield* this.#store(cpu, VirtioMmio.QueueSize, queue.size)
    const addresses = [
      [VirtioMmio.QueueDescLow, queue.areas.descriptor],
      [VirtioMmio.QueueDriverLow, queue.areas.driver],
      [VirtioMmio.QueueDeviceLow, queue.areas.device]
    ] as const
    for (const [register, value] of addresses) {
      yield* this.#store(cpu, register, value % 2 ** 32)
      yield* this.#store(cpu, register + 4, Math.floor(value / 2 ** 32))
    }
    yield* this.#store(cpu, VirtioMmio.QueueReady, 1)
    if ((yield* this.#load(cpu, VirtioMmio.QueueReady)) !== 1) throw new Error(`the device refuses queue ${index}`)
  }

  *notify(cpu: GuestCpu, queue: number): GuestRoutine {
    yield* this.#store(cpu, VirtioMmio.QueueNotify, queue)
  }

  *awaitInterrupt(cpu: GuestCpu): GuestRoutine {
    yield* cpu.waitForInterrupt(this.place.gsi)
    yield* this.handleInterrupt(cpu)
  }

  *awaitConfigurationChange(cpu: GuestCpu): GuestRoutine {
    do yield* cpu.waitForInterrupt(this.place.gsi)
    while (((yield* this.handleInterrupt(cpu)) & CAUSE_CONFIGURATION) === 0)
  }

  /** What an interrupt handler does first: reads the causes and acknowledges them. Returns them. */
  *handleInterrupt(cpu: GuestCpu): GuestRoutine<number> {
    const causes = yield* this.#load(cpu, VirtioMmio.InterruptStatus)
    yield* this.#store(cpu, VirtioMmio.InterruptACK, causes)
    this.interrupts++
    if ((causes & CAUSE_CONFIGURATION) !== 0) this.configurationInterrupts++
    return causes
  }

  *configurationGeneration(cpu: GuestCpu): GuestRoutine<number> {
    return yield* this.#load(cpu, VirtioMmio.ConfigGeneration)
  }

  *loadConfiguration(cpu: GuestCpu, { offset, size }: ConfigurationField): GuestRoutine<number> {
    return yield* cpu.load(this.place.base + VirtioMmio.Config + offset, size)
  }

  *storeConfiguration(cpu: GuestCpu, { offset, size }: ConfigurationField, value: number): GuestRoutine {
    yield* cpu.store(this.place.base + VirtioMmio.Config + offset, size, value)
  }

  *#load(cpu: GuestCpu, register: number): GuestRoutine<number> {
    return yield* cpu.load(this.place.base + register, 4)
  }

  *#store(cpu: GuestCpu, register: number, value: number): GuestRoutine {
    yield* cpu.store(this.place.base + register, 4, value)
  }
}
