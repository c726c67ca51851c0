/**
 * A driver of virtio-pci devices with MSI-X (virtio 1.3, section 4.1), as a guest's kernel has it: it finds functions in the
 * configuration pages, asks the base address registers for their sizes, and has a vector for the configuration and one for each
 * queue.
 */
import { type AccessSize, type GuestCpu, type GuestRoutine, messageInterrupt } from "../GuestCpu.ts"
import type { QueuePlace } from "./QueueDriver.ts"
import { type ConfigurationField, VirtioDriver, type VirtioDriverOptions } from "./VirtioDriver.ts"

const FUNCTION_SIZE = 0x1000
const FUNCTIONS_PER_BUS = 256
const FUNCTIONS_PER_DEVICE = 8
const MULTI_FUNCTION = 0x80
const NO_VENDOR = 0xffff
const VIRTIO_VENDOR = 0x1af4
const VIRTIO_DEVICE_BASE = 0x1040

const Header = {
  VENDOR: 0x00,
  DEVICE: 0x02,
  COMMAND: 0x04,
  STATUS: 0x06,
  TYPE: 0x0e,
  BAR0: 0x10,
  CAPABILITIES: 0x34
} as const
const COMMAND_MEMORY_AND_MASTER = 0x6
const STATUS_CAPABILITIES = 0x10
const CAP_VENDOR = 0x09
const CAP_MSIX = 0x11
const CAPABILITIES_MAX = 48

/** Offsets in a vendor capability. */
const Cap = { kind: 3, bar: 4, offset: 8, length: 12, multiplier: 16 } as const
const COMMON_CFG = 1
const NOTIFY_CFG = 2
const ISR_CFG = 3
const DEVICE_CFG = 4
const PCI_CFG = 5

/** Offsets of the common configuration's registers (section 4.1.4.3). */
export const VirtioPciCommon = {
  device_feature_select: 0x00,
  device_feature: 0x04,
  driver_feature_select: 0x08,
  driver_feature: 0x0c,
  config_msix_vector: 0x10,
  num_queues: 0x12,
  device_status: 0x14,
  config_generation: 0x15,
  queue_select: 0x16,
  queue_size: 0x18,
  queue_msix_vector: 0x1a,
  queue_enable: 0x1c,
  queue_notify_off: 0x1e,
  queue_desc: 0x20,
  queue_driver: 0x28,
  queue_device: 0x30
} as const

const MSIX_CONTROL = 2
const MSIX_TABLE = 4
const MSIX_PENDING = 8
const MSIX_ENABLE = 0x8000
const MSIX_FUNCTION_MASK = 0x4000
const MSIX_SIZE_MASK = 0x7ff
const MSIX_ENTRY_SIZE = 16
const MSIX_BAR_MASK = 0x7
/** The address of messages to the local APIC of a vCPU, and where its identifier is. */
const MESSAGE_ADDRESS = 0xfee0_0000
const MESSAGE_DESTINATION_SHIFT = 12

/** A virtio function that was found. All addresses are guest physical. */
export interface VirtioPciPlace {
  /** Its configuration page. */
  readonly config: number
  /** Device type. */
  readonly type: number
  readonly common: number
  readonly notify: number
  readonly notifyMultiplier: number
  readonly isr: number
  /** The device configuration, if there is one, and its length in bytes. */
  readonly device: number | undefined
  readonly deviceLength: number
  /** The MSI-X capability, table and pending bits, and the number of vectors. */
  readonly msixCapability: number
  readonly msixTable: number
  readonly msixPending: number
  readonly vectors: number
}

/** The memory behind the base address registers of a function, found and measured as an operating system does it. */
function* probeMemory(cpu: GuestCpu, config: number): GuestRoutine<ReadonlyArray<{ base: number; size: number }>> {
  const memories: Array<{ base: number; size: number }> = []
  for (let register = 0; register < 6; register++) {
    const at = config + Header.BAR0 + 4 * register
    const before = yield* cpu.load(at, 4)
    yield* cpu.store(at, 4, 0xffff_ffff)
    const mask = yield* cpu.load(at, 4)
    yield* cpu.store(at, 4, before)
    if ((yield* cpu.load(at, 4)) !== before) {
      throw new Error(`base address register ${register} does not keep its value`)
    }
    memories.push({ base: (before & ~0xf) >>> 0, size: mask === 0 ? 0 : (~(mask & ~0xf) + 1) >>> 0 })
  }
  return memories
}

/** The virtio functions of bus 0, whose configuration pages begin at `pages`. */
export function* findVirtioPci(cpu: GuestCpu, pages: number): GuestRoutine<ReadonlyArray<VirtioPciPlace>> {
  const places: Array<VirtioPciPlace> = []
  for (let index = 0; index < FUNCTIONS_PER_BUS;) {
    const config = pages + index * FUNCTION_SIZE
    const vendor = yield* cpu.load(config + Header.VENDOR, 2)
    const isFirst = index % FUNCTIONS_PER_DEVICE === 0
    // Without a first function there are no others; with it, there are if it says so.
    const isLast = isFirst &&
      (vendor === NO_VENDOR || ((yield* cpu.load(config + Header.TYPE, 1)) & MULTI_FUNCTION) === 0)
    index += isLast ? FUNCTIONS_PER_DEVICE : 1
    if (vendor === NO_VENDOR) continue
    const device = yield* cpu.load(config + Header.DEVICE, 2)
    if (vendor === VIRTIO_VENDOR && device >= VIRTIO_DEVICE_BASE) {
      places.push(yield* probeVirtioPci(cpu, config, device - VIRTIO_DEVICE_BASE))
    }
  }
  return places
}

function* probeVirtioPci(cpu: GuestCpu, config: number, type: number): GuestRoutine<VirtioPciPlace> {
  const memories = yield* probeMemory(cpu, config)
  if (((yield* cpu.load(config + Header.STATUS, 2)) & STATUS_CAPABILITIES) === 0) throw new Error("no capabilities")
  yield* cpu.store(config + Header.COMMAND, 2, COMMAND_MEMORY_AND_MASTER)
  const within = (bar: number, offset: number, length: number): number => {
    const memory = memories[bar]
    if (memory === undefined || offset + length > memory.size) throw new Error("a capability leaves its memory")
    return memory.base + offset
  }
  const parts = new Map<number, { readonly address: number; readonly length: number }>()
  let notifyMultiplier = 0
  let msix: Pick<VirtioPciPlace, "msixCapability" | "msixTable" | "msixPending" | "vectors"> | undefined
  let at = yield* cpu.load(config + Header.CAPABILITIES, 1)
  for (let count = 0; at !== 0; count++) {
    if (count === CAPABILITIES_MAX) throw new Error("the list of capabilities does not end")
    const id = yield* cpu.load(config + at, 1)
    if (id === CAP_VENDOR) {
      const kind = yield* cpu.load(config + at + Cap.kind, 1)
      // The window for access through configuration space points where a driver has last pointed it.
      if (kind === PCI_CFG) {
        at = yield* cpu.load(config + at + 1, 1)
        continue
      }
      const bar = yield* cpu.load(config + at + Cap.bar, 1)
      const offset = yield* cpu.load(config + at + Cap.offset, 4)
      const length = yield* cpu.load(config + at + Cap.length, 4)
      parts.set(kind, { address: within(bar, offset, length), length })
      if (kind === NOTIFY_CFG) notifyMultiplier = yield* cpu.load(config + at + Cap.multiplier, 4)
    } else if (id === CAP_MSIX) {
      const vectors = ((yield* cpu.load(config + at + MSIX_CONTROL, 2)) & MSIX_SIZE_MASK) + 1
      const table = yield* cpu.load(config + at + MSIX_TABLE, 4)
      const pending = yield* cpu.load(config + at + MSIX_PENDING, 4)
      const place = (word: number, length: number) =>
        within(word & MSIX_BAR_MASK, (word & ~MSIX_BAR_MASK) >>> 0, length)
      msix = {
        msixCapability: config + at,
        msixTable: place(table, vectors * MSIX_ENTRY_SIZE),
        msixPending: place(pending, Math.ceil(vectors / 64) * 8),
        vectors
      }
    }
    at = yield* cpu.load(config + at + 1, 1)
  }
  const part = (kind: number) => {
    const found = parts.get(kind)
    if (found === undefined) throw new Error(`the function has no capability of kind ${kind}`)
    return found.address
  }
  if (msix === undefined) throw new Error("the function has no MSI-X")
  return {
    config,
    type,
    common: part(COMMON_CFG),
    notify: part(NOTIFY_CFG),
    notifyMultiplier,
    isr: part(ISR_CFG),
    device: parts.get(DEVICE_CFG)?.address,
    deviceLength: parts.get(DEVICE_CFG)?.length ?? 0,
    ...msix
  }
}

/** What a driver of a PCI function wants. */
export interface VirtioPciOptions extends VirtioDriverOptions {
  /** The first vector of the processor that it uses; one for the configuration, then one for each queue. Default: 0x40. */
  readonly firstVector?: number
}

/** Sets MSI-X up, and initialises the device as section 3.1.1 says. Throws where it refuses. */
export function* startVirtioPci(
  cpu: GuestCpu,
  place: VirtioPciPlace,
  options: VirtioPciOptions
): GuestRoutine<VirtioPciDriver> {
  const driver = new VirtioPciDriver(place, options.firstVector ?? 0x40)
  yield* driver.start(cpu, options)
  return driver
}

/** A driver of a device on virtio-pci. */
export class VirtioPciDriver extends VirtioDriver {
  readonly place: VirtioPciPlace
  readonly firstVector: number
  /** Where each queue's doorbell is. */
  readonly #notifyAddresses: Array<number> = []

  constructor(place: VirtioPciPlace, firstVector: number) {
    super()
    this.place = place
    this.firstVector = firstVector
  }

  /** The number under which the vCPU gets the interrupts of an entry of the table. */
  interruptOf(entry: number): number {
    return messageInterrupt(this.firstVector + entry)
  }

  override *start(cpu: GuestCpu, options: VirtioDriverOptions): GuestRoutine {
    const count = 1 + (options.queueSizes?.length ?? 1)
    if (count > this.place.vectors) throw new Error(`the function has ${this.place.vectors} vectors of ${count}`)
    for (let entry = 0; entry < count; entry++) yield* this.routeVector(cpu, entry)
    yield* cpu.store(this.place.msixCapability + MSIX_CONTROL, 2, MSIX_ENABLE)
    yield* super.start(cpu, options)
  }

  /** Sends the interrupts of an entry of the table to this vCPU. */
  *routeVector(cpu: GuestCpu, entry: number): GuestRoutine {
    const at = this.place.msixTable + entry * MSIX_ENTRY_SIZE
    yield* this.maskVector(cpu, entry, true)
    yield* cpu.store(at, 4, MESSAGE_ADDRESS + cpu.id * 2 ** MESSAGE_DESTINATION_SHIFT)
    yield* cpu.store(at + 4, 4, 0)
    yield* cpu.store(at + 8, 4, this.firstVector + entry)
    yield* this.maskVector(cpu, entry, false)
  }

  /** Masks an entry of the table, or unmasks it. */
  *maskVector(cpu: GuestCpu, entry: number, masked: boolean): GuestRoutine {
    yield* cpu.store(this.place.msixTable + entry * MSIX_ENTRY_SIZE + 12, 4, masked ? 1 : 0)
  }

  /** Masks all entries of the table, or those that are not masked themselves no more. */
  *maskFunction(cpu: GuestCpu, masked: boolean): GuestRoutine {
    const control = MSIX_ENABLE | (masked ? MSIX_FUNCTION_MASK : 0)
    yield* cpu.store(this.place.msixCapability + MSIX_CONTROL, 2, control)
  }

  /** Whether an entry's interrupt waits for the end of a mask. */
  *isPending(cpu: GuestCpu, entry: number): GuestRoutine<boolean> {
    const bits = yield* cpu.load(this.place.msixPending + (entry >>> 5) * 4, 4)
    return ((bits >>> (entry & 31)) & 1) !== 0
  }

  *status(cpu: GuestCpu): GuestRoutine<number> {
    return yield* this.#load(cpu, VirtioPciCommon.device_status, 1)
  }

  *writeStatus(cpu: GuestCpu, status: number): GuestRoutine {
    yield* this.#store(cpu, VirtioPciCommon.device_status, 1, status)
    // The vector for the configuration is forgotten by a reset.
    if (status === 0) return
    if ((yield* this.#load(cpu, VirtioPciCommon.config_msix_vector, 2)) === 0) return
    yield* this.#store(cpu, VirtioPciCommon.config_msix_vector, 2, 0)
    if ((yield* this.#load(cpu, VirtioPciCommon.config_msix_vector, 2)) !== 0) throw new Error("no vector 0")
  }

  *offeredFeatures(cpu: GuestCpu, word: number): GuestRoutine<number> {
    yield* this.#store(cpu, VirtioPciCommon.device_feature_select, 4, word)
    return yield* this.#load(cpu, VirtioPciCommon.device_feature, 4)
  }

  *acceptFeatures(cpu: GuestCpu, word: number, features: number): GuestRoutine {
    yield* this.#store(cpu, VirtioPciCommon.driver_feature_select, 4, word)
    yield* this.#store(cpu, VirtioPciCommon.driver_feature, 4, features)
    if ((yield* this.#load(cpu, VirtioPciCommon.driver_feature, 4)) !== features) {
      throw new Error("the device does not show the features that the driver accepts")
    }
  }

  *queueSizeMax(cpu: GuestCpu, index: number): GuestRoutine<number> {
    yield* this.#store(cpu, VirtioPciCommon.queue_select, 2, index)
    if ((yield* this.#load(cpu, VirtioPciCommon.queue_enable, 2)) !== 0) {
      throw new Error(`queue ${index} is ready after a reset`)
    }
    return yield* this.#load(cpu, VirtioPciCommon.queue_size, 2)
  }

  *enableQueue(cpu: GuestCpu, index: number, queue: QueuePlace): GuestRoutine {
    yield* this.#store(cpu, VirtioPciCommon.queue_select, 2, index)
    yield* this.#store(cpu, VirtioPciCommon.queue_size, 2, queue.size)
    const addresses = [
      [VirtioPciCommon.queue_desc, queue.areas.descriptor],
      [VirtioPciCommon.queue_driver, queue.areas.driver],
      [VirtioPciCommon.queue_device, queue.areas.device]
    ] as const
    for (const [register, value] of addresses) {
      yield* this.#store(cpu, register, 4, value % 2 ** 32)
      yield* this.#store(cpu, register + 4, 4, Math.floor(value / 2 ** 32))
    }
    yield* this.#store(cpu, VirtioPciCommon.queue_msix_vector, 2, 1 + index)
    if ((yield* this.#load(cpu, VirtioPciCommon.queue_msix_vector, 2)) !== 1 + index) {
      throw new Error(`the device refuses the vector of queue ${index}`)
    }
    yield* this.#store(cpu, VirtioPciCommon.queue_enable, 2, 1)
    if ((yield* this.#load(cpu, VirtioPciCommon.queue_enable, 2)) !== 1) {
      throw new Error(`the device refuses queue ${index}`)
    }
    this.#notifyAddresses[index] = this.place.notify +
      (yield* this.#load(cpu, VirtioPciCommon.queue_notify_off, 2)) * this.place.notifyMultiplier
  }

  *notify(cpu: GuestCpu, queue: number): GuestRoutine {
    yield* cpu.store(this.#notifyAddresses[queue] ?? this.place.notify, 2, queue)
  }

  *awaitInterrupt(cpu: GuestCpu, queue: number): GuestRoutine {
    yield* cpu.waitForInterrupt(this.interruptOf(1 + queue))
    this.interrupts++
    if (cpu.interrupts.acknowledge(this.interruptOf(0))) this.configurationInterrupts++
  }

  *awaitConfigurationChange(cpu: GuestCpu): GuestRoutine {
    yield* cpu.waitForInterrupt(this.interruptOf(0))
    this.interrupts++
    this.configurationInterrupts++
  }

  *configurationGeneration(cpu: GuestCpu): GuestRoutine<number> {
    return yield* this.#load(cpu, VirtioPciCommon.config_generation, 1)
  }

  *loadConfiguration(cpu: GuestCpu, { offset, size }: ConfigurationField): GuestRoutine<number> {
    return yield* cpu.load(this.#device(offset + size) + offset, size)
  }

  *storeConfiguration(cpu: GuestCpu, { offset, size }: ConfigurationField, value: number): GuestRoutine {
    yield* cpu.store(this.#device(offset + size) + offset, size, value)
  }

  #device(end: number): number {
    if (this.place.device === undefined || end > this.place.deviceLength) {
      throw new Error(`the device configuration has ${this.place.deviceLength} bytes`)
    }
    return this.place.device
  }

  *#load(cpu: GuestCpu, register: number, size: AccessSize): GuestRoutine<number> {
    return yield* cpu.load(this.place.common + register, size)
  }

  *#store(cpu: GuestCpu, register: number, size: AccessSize, value: number): GuestRoutine {
    yield* cpu.store(this.place.common + register, size, value)
  }
}
