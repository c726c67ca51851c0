/**
 * The registers of virtio-pci (virtio 1.3, section 4.1.4) on their pages: what each of them means to the state machine, and how
 * the state machine shows on the pages.
 */
import type { MessageInterrupt } from "@troupe/core/Hypervisor"
import { Msix, MSIX_CONTROL } from "../pci/Msix.ts"
import { PciConfigSpace, type PciFunction } from "../pci/PciConfigSpace.ts"
import { PciStatus } from "../pci/PciLayout.ts"
import { readPage } from "../RegisterPage.ts"
import { VIRTIO_F_RING_PACKED } from "./Features.ts"
import type { MachinePorts } from "./TransportStart.ts"
import { type QueueRegister, TransportState } from "./TransportState.ts"
import { CONFIG_SIZE_MAX, type VirtioDevice } from "./VirtioDevice.ts"
import {
  Common,
  IsrStatus,
  NOTIFY_OFF_MULTIPLIER,
  PciMemoryLayout,
  VIRTIO_MSI_NO_VECTOR,
  VirtioPciCap
} from "./VirtioPciLayout.ts"

/** What the registers act on. */
export interface PciPorts extends MachinePorts {
  readonly generation: number
  /** The function's configuration page, and where it is. */
  readonly configPage: DataView
  readonly configAddress: number
  /** The pages behind the first base address register. */
  readonly pages: DataView
  readonly messages: ReadonlyArray<MessageInterrupt>
}

/** Where the capabilities are in a function's list; see `VirtioPci.ts`. */
export const CapabilityOrder = { MSIX: 0, PCI_CFG: 1 } as const

/** Offsets in the capability for access through the configuration space (section 4.1.4.9). */
const WindowCapability = { bar: 4, offset: 8, length: 12, data: 16 } as const

/** The registers of 32 bits by which the selected queue is set up. */
const queueRegisters: ReadonlyMap<number, QueueRegister> = new Map([
  [Common.queue_desc, "descriptorLow"],
  [Common.queue_desc + 4, "descriptorHigh"],
  [Common.queue_driver, "driverLow"],
  [Common.queue_driver + 4, "driverHigh"],
  [Common.queue_device, "deviceLow"],
  [Common.queue_device + 4, "deviceHigh"]
])

/** The width of each register of the common configuration by which it is accessed. */
const commonSize = (offset: number): number =>
  offset < Common.config_msix_vector || (offset >= Common.queue_desc && offset < Common.queue_notif_config_data)
    ? 4
    : offset === Common.device_status || offset === Common.config_generation
    ? 1
    : 2

const isPowerOfTwo = (value: number): boolean => value > 0 && (value & (value - 1)) === 0

/** One virtio-pci function's registers. All methods are synchronous; none throws for what a guest does. */
export class PciRegisters {
  /** What is behind the registers. */
  readonly state: TransportState
  readonly #pages: DataView
  readonly #configPage: DataView
  readonly #config: PciConfigSpace
  readonly #msix: Msix
  readonly #signalLook: (queue: number) => void
  #deviceFeatureSelect = 0
  #driverFeatureSelect = 0
  #queueSelect = 0
  #configVector: number
  readonly #queueVectors: Uint16Array
  /** The queues' vectors that were interrupted in one go, each once. */
  readonly #triggered: Uint8Array
  #isr = 0

  /** Takes over the pages: what an earlier generation of the device left there says what the driver believes. */
  constructor(device: VirtioDevice, pciFunction: PciFunction, ports: PciPorts) {
    const { configAddress, configPage, generation, messages, pages } = ports
    this.#pages = pages
    this.#configPage = configPage
    this.#config = new PciConfigSpace(pciFunction, configPage, configAddress, generation)
    const msixPage = new DataView(
      pages.buffer,
      pages.byteOffset + PciMemoryLayout.MSIX,
      PciMemoryLayout.PAGES_SIZE - PciMemoryLayout.MSIX
    )
    this.#msix = new Msix(msixPage, messages, this.#messageControl, generation)
    const kept = generation > 0
    this.#configVector = kept ? pages.getUint16(Common.config_msix_vector, true) : VIRTIO_MSI_NO_VECTOR
    this.#queueVectors = new Uint16Array(device.queueSizes.length).fill(VIRTIO_MSI_NO_VECTOR)
    this.#triggered = new Uint8Array(messages.length)
    const configLength = Math.min(device.config.length, CONFIG_SIZE_MAX)
    this.state = new TransportState(device, {
      memory: ports.memory,
      config: new DataView(pages.buffer, pages.byteOffset + PciMemoryLayout.DEVICE_CONFIG, configLength),
      show: () => this.#showState(),
      interruptQueues: (wants) => this.#interruptQueues(wants),
      interruptConfiguration: () => this.#interruptConfiguration(),
      wasReset: () => this.#wasReset(),
      signal: ports.signal,
      hold: ports.hold,
      report: ports.report
    }, {
      status: kept ? pages.getUint8(Common.device_status) : 0,
      configGeneration: kept ? pages.getUint8(Common.config_generation) : 0
    })
    this.#signalLook = (queue) => this.state.lookAt(queue)
    this.#showState()
  }

  /** Takes a write of the guest to the configuration page. */
  writeConfigSpace(offset: number, size: number, value: number): void {
    this.#config.write(offset, size, value)
    this.#msix.setControl(this.#messageControl)
    const window = this.#config.capability(CapabilityOrder.PCI_CFG)
    if (offset === window + WindowCapability.data) this.#writeWindow()
    this.#showWindow()
  }

  /** Takes a write of the guest to the pages behind the first base address register. */
  writePages(offset: number, size: number, value: number): void {
    if (offset < Common.End) this.#writeCommon(offset, size, value)
    else if (offset >= PciMemoryLayout.MSIX) this.#msix.write(offset - PciMemoryLayout.MSIX, size, value)
    else if (offset >= PciMemoryLayout.DEVICE_CONFIG) {
      this.state.writeConfig(offset - PciMemoryLayout.DEVICE_CONFIG, size, value)
    }
    this.#showWindow()
  }

  /** Answers a read behind the second base address register: the ISR status, which is clear afterwards. */
  readCalls(offset: number, size: number): number {
    if (offset !== PciMemoryLayout.ISR) return 0
    const isr = this.#isr
    this.#setIsr(0)
    return size >= 1 ? isr : 0
  }

  /** Takes a write behind the second base address register that is not a doorbell: a notification in another width. */
  writeCalls(offset: number, _size: number, _value: number): void {
    const queue = (offset - PciMemoryLayout.NOTIFY) / NOTIFY_OFF_MULTIPLIER
    if (Number.isInteger(queue) && queue >= 0) this.#signalLook(queue)
  }

  get #messageControl(): number {
    return this.#configPage.getUint16(this.#config.capability(CapabilityOrder.MSIX) + MSIX_CONTROL, true)
  }

  #writeCommon(offset: number, size: number, value: number): void {
    const { state } = this
    // Each register is accessed in its own width, the addresses in halves (section 4.1.3.1).
    if (size !== commonSize(offset) || offset % size !== 0) return
    switch (offset) {
      case Common.device_feature_select:
        this.#deviceFeatureSelect = value
        break
      case Common.driver_feature_select:
        this.#driverFeatureSelect = value
        break
      case Common.driver_feature:
        state.writeDriverFeatures(this.#driverFeatureSelect, value)
        break
      case Common.config_msix_vector:
        this.#configVector = this.#mapped(value)
        break
      case Common.device_status:
        return state.writeStatus(value)
      case Common.queue_select:
        this.#queueSelect = value
        break
      case Common.queue_size:
        // What it shows is a size that a queue can have (section 4.1.4.3.1).
        if (state.hasAccepted(VIRTIO_F_RING_PACKED) || isPowerOfTwo(value)) {
          state.writeQueue(this.#queueSelect, "size", value)
        }
        break
      case Common.queue_msix_vector:
        if (this.#queueSelect < this.#queueVectors.length) this.#queueVectors[this.#queueSelect] = this.#mapped(value)
        break
      case Common.queue_enable:
        // A driver does not write 0 (section 4.1.4.3.2).
        if (value === 1) state.enableQueue(this.#queueSelect)
        break
      default: {
        const register = queueRegisters.get(offset)
        if (register === undefined) return
        state.writeQueue(this.#queueSelect, register, value)
      }
    }
    this.#showState()
  }

  /** A vector that there is not cannot be mapped, which the driver reads back (section 4.1.5.1.2). */
  #mapped(vector: number): number {
    return vector < this.#msix.count ? vector : VIRTIO_MSI_NO_VECTOR
  }

  /** Everything in the common configuration that the driver reads. */
  #showState(): void {
    const { state } = this
    const pages = this.#pages
    const queue = this.#queueSelect
    const registers = state.queueRegisters(queue)
    pages.setUint32(Common.device_feature_select, this.#deviceFeatureSelect, true)
    pages.setUint32(Common.device_feature, state.deviceFeatures(this.#deviceFeatureSelect), true)
    pages.setUint32(Common.driver_feature_select, this.#driverFeatureSelect, true)
    pages.setUint32(Common.driver_feature, state.driverFeatures(this.#driverFeatureSelect), true)
    pages.setUint16(Common.config_msix_vector, this.#configVector, true)
    pages.setUint16(Common.num_queues, this.#queueVectors.length, true)
    pages.setUint8(Common.device_status, state.status)
    pages.setUint8(Common.config_generation, state.configGeneration & 0xff)
    pages.setUint16(Common.queue_select, queue, true)
    pages.setUint16(Common.queue_size, registers?.size ?? 0, true)
    pages.setUint16(Common.queue_msix_vector, this.#queueVectors[queue] ?? VIRTIO_MSI_NO_VECTOR, true)
    pages.setUint16(Common.queue_enable, state.isReady(queue) ? 1 : 0, true)
    pages.setUint16(Common.queue_notify_off, registers === undefined ? 0 : queue, true)
    for (const [offset, register] of queueRegisters) pages.setUint32(offset, registers?.[register] ?? 0, true)
    this.#showWindow()
  }

  #wasReset(): void {
    this.#deviceFeatureSelect = 0
    this.#driverFeatureSelect = 0
    this.#queueSelect = 0
    this.#configVector = VIRTIO_MSI_NO_VECTOR
    this.#queueVectors.fill(VIRTIO_MSI_NO_VECTOR)
    this.#setIsr(0)
  }

  // --- interrupts ------------------------------------------------------------------------------------------------------

  #interruptQueues(wants: Uint8Array): void {
    if (!this.#msix.isEnabled) return this.#setIsr(this.#isr | IsrStatus.QUEUE)
    const triggered = this.#triggered.fill(0)
    for (let queue = 0; queue < wants.length; queue++) {
      const vector = this.#queueVectors[queue] ?? VIRTIO_MSI_NO_VECTOR
      if (wants[queue] === 0 || vector >= triggered.length || triggered[vector] !== 0) continue
      triggered[vector] = 1
      this.#msix.trigger(vector)
    }
  }

  #interruptConfiguration(): void {
    this.#setIsr(this.#isr | IsrStatus.CONFIGURATION)
    this.#msix.trigger(this.#configVector)
  }

  /** The function has no interrupt pin. Its status says what it would do to it. */
  #setIsr(isr: number): void {
    this.#isr = isr
    this.#config.showStatus(PciStatus.INTERRUPT, isr !== 0 && !this.#msix.isEnabled)
  }

  // --- access through the configuration space (section 4.1.4.9) --------------------------------------------------------

  /** Where the window is, or `undefined` when the driver has not said so in a way that makes sense. */
  get #window(): { readonly bar: number; readonly offset: number; readonly size: number } | undefined {
    const at = this.#config.capability(CapabilityOrder.PCI_CFG)
    const bar = this.#configPage.getUint8(at + WindowCapability.bar)
    const offset = this.#configPage.getUint32(at + WindowCapability.offset, true)
    const size = this.#configPage.getUint32(at + WindowCapability.length, true)
    const end = bar === PciMemoryLayout.PAGES
      ? PciMemoryLayout.PAGES_SIZE
      : bar === PciMemoryLayout.CALLS
      ? PciMemoryLayout.CALLS_SIZE
      : 0
    if ((size !== 1 && size !== 2 && size !== 4) || offset % size !== 0 || offset + size > end) return undefined
    return { bar, offset, size }
  }

  /** The window's data is on the page, so that it can be read; it follows what it shows. The ISR status is not cleared so. */
  #showWindow(): void {
    const window = this.#window
    if (window === undefined) return
    const data = this.#config.capability(CapabilityOrder.PCI_CFG) + WindowCapability.data
    const value = window.bar === PciMemoryLayout.PAGES
      ? readPage(this.#pages, window.offset, window.size)
      : window.offset === PciMemoryLayout.ISR
      ? this.#isr
      : 0
    if (window.size === 1) this.#configPage.setUint8(data, value)
    else if (window.size === 2) this.#configPage.setUint16(data, value, true)
    else this.#configPage.setUint32(data, value, true)
  }

  #writeWindow(): void {
    const window = this.#window
    if (window === undefined) return
    const data = this.#config.capability(CapabilityOrder.PCI_CFG) + WindowCapability.data
    const value = readPage(this.#configPage, data, window.size)
    if (window.bar === PciMemoryLayout.PAGES) this.writePages(window.offset, window.size, value)
    else this.writeCalls(window.offset, window.size, value)
  }
}

/** The kinds of the capabilities that describe a part of a function's memory, and where it is. */
export const memoryCapabilities = (queues: number, configLength: number) => [
  { kind: VirtioPciCap.COMMON_CFG, bar: PciMemoryLayout.PAGES, offset: PciMemoryLayout.COMMON, length: Common.End },
  {
    kind: VirtioPciCap.NOTIFY_CFG,
    bar: PciMemoryLayout.CALLS,
    offset: PciMemoryLayout.NOTIFY,
    length: Math.max(queues, 1) * NOTIFY_OFF_MULTIPLIER
  },
  { kind: VirtioPciCap.ISR_CFG, bar: PciMemoryLayout.CALLS, offset: PciMemoryLayout.ISR, length: 1 },
  ...(configLength === 0
    ? []
    : [{
      kind: VirtioPciCap.DEVICE_CFG,
      bar: PciMemoryLayout.PAGES,
      offset: PciMemoryLayout.DEVICE_CONFIG,
      length: configLength
    }])
]
