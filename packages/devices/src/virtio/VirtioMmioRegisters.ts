/**
 * The registers of virtio-mmio (virtio 1.3, section 4.2.2) and the state machine behind them (sections 2.1, 3.1 and 4.2.3):
 * plain synchronous code over the register page. Whatever the guest writes, in whatever order, leads to a legal state.
 */
import { addressFromHalves } from "@troupe/core/GuestAddress"
import type { GuestMemory } from "@troupe/core/GuestMemory"
import {
  type Features,
  hasFeature,
  includesFeatures,
  makeFeatures,
  unionFeatures,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1
} from "./Features.ts"
import { SplitQueue } from "./SplitQueue.ts"
import { CONFIG_SIZE_MAX, VIRTIO_SIGNAL_LIMIT, type VirtioBehaviour, type VirtioDevice } from "./VirtioDevice.ts"
import { DeviceStatus, InterruptCause, MAGIC_VALUE, MMIO_VERSION, Register, VENDOR_ID } from "./VirtioMmioLayout.ts"

const { ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK } = DeviceStatus
/** The bits of the device status that the driver sets. */
const STATUS_OF_DRIVER = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED

/** The features of the transport and its queues, offered with every device. */
export const TRANSPORT_FEATURES = makeFeatures(VIRTIO_F_VERSION_1, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX)

/** The transport's own signal: queues are to be looked at. */
export const SIGNAL_LOOK = VIRTIO_SIGNAL_LIMIT

/** What the registers act on. */
export interface MmioPorts {
  /** The register page, from its first byte. */
  readonly page: DataView
  readonly memory: GuestMemory
  readonly interrupt: () => void
  readonly signal: (number: number) => void
  /** Takes a sentence about a driver that broke a rule. */
  readonly report: (text: string) => void
}

interface QueueRegisters {
  readonly sizeMax: number
  size: number
  descLow: number
  descHigh: number
  driverLow: number
  driverHigh: number
  deviceLow: number
  deviceHigh: number
}

const freshQueue = (sizeMax: number): QueueRegisters => ({
  sizeMax,
  size: sizeMax,
  descLow: 0,
  descHigh: 0,
  driverLow: 0,
  driverHigh: 0,
  deviceLow: 0,
  deviceHigh: 0
})

/** One virtio-mmio device's registers. All methods are synchronous; none throws for what a guest does. */
export class MmioRegisters {
  readonly #device: VirtioDevice
  readonly #ports: MmioPorts
  readonly #page: DataView
  readonly #offered: Features
  #behaviour: VirtioBehaviour | undefined

  #status = 0
  #deviceFeaturesSel = 0
  #driverFeaturesSel = 0
  #driverLow = 0
  #driverHigh = 0
  /** The driver has accepted a feature beyond bit 63: none is offered there. */
  #driverBeyond = false
  #queueSel = 0
  #queueRegisters: ReadonlyArray<QueueRegisters>
  /** The queues that are ready. */
  #queues: Array<SplitQueue | undefined>
  /** Queues that are to be notified by {@link look}. */
  readonly #toLook: Uint8Array
  #interruptStatus: number
  #configGeneration: number
  /** The driver has asked for a reset, and the device is not idle yet. */
  #resetting = false

  /** Takes over the page: what an earlier generation of the device left there says what the driver believes. */
  constructor(device: VirtioDevice, ports: MmioPorts) {
    this.#device = device
    this.#ports = ports
    this.#page = ports.page
    this.#offered = unionFeatures(device.features, TRANSPORT_FEATURES)
    this.#queueRegisters = device.queueSizes.map(freshQueue)
    this.#queues = device.queueSizes.map(() => undefined)
    this.#toLook = new Uint8Array(device.queueSizes.length)
    this.#status = this.#page.getUint32(Register.Status, true)
    this.#interruptStatus = this.#page.getUint32(Register.InterruptStatus, true)
    this.#configGeneration = this.#page.getUint32(Register.ConfigGeneration, true)
    this.#show(Register.MagicValue, MAGIC_VALUE)
    this.#show(Register.Version, MMIO_VERSION)
    this.#show(Register.DeviceID, device.deviceId)
    this.#show(Register.VendorID, VENDOR_ID)
    for (const register of [Register.SHMLenLow, Register.SHMLenHigh, Register.SHMBaseLow, Register.SHMBaseHigh]) {
      this.#show(register, 0xffff_ffff)
    }
    this.#showSelected()
    const config = device.config.subarray(0, CONFIG_SIZE_MAX)
    for (let i = 0; i < CONFIG_SIZE_MAX; i++) this.#page.setUint8(Register.Config + i, config[i] ?? 0)
  }

  /** The device has started. If a driver was at work with an earlier generation, it hears that a reset is needed. */
  start(behaviour: VirtioBehaviour): void {
    this.#behaviour = behaviour
    if (this.#status === 0) return
    this.#configGeneration = (this.#configGeneration + 1) >>> 0
    this.#show(Register.ConfigGeneration, this.#configGeneration)
    this.#needReset("the device has failed and was started again")
  }

  /** Takes a write of the guest that is not a doorbell. */
  write(offset: number, size: number, value: number): void {
    if (offset >= Register.Config) {
      this.#writeConfig(offset - Register.Config, size, value)
      return
    }
    // Control registers have 32 bits, and are accessed as such (section 4.2.2.2).
    if (size !== 4 || offset % 4 !== 0) return
    if (offset === Register.Status) this.#writeStatus(value)
    else if (offset === Register.InterruptACK) this.#acknowledge(value)
    else if (!this.#resetting) this.#writeRegister(offset, value)
  }

  /** The driver has made chains available in a queue. Returns `true` to be called again, later. */
  notify(queue: number): boolean {
    if (!this.#live || this.#queues[queue] === undefined) return false
    const more = this.#behaviour?.notify(queue) ?? false
    this.#settle()
    return more && this.#live
  }

  /** Notifies the queues of a driver that has just become ready. Returns `true` to be called again, later. */
  look(): boolean {
    let more = false
    for (let queue = 0; queue < this.#toLook.length; queue++) {
      if (this.#toLook[queue] === 0) continue
      this.#toLook[queue] = 0
      if (this.notify(queue)) {
        this.#toLook[queue] = 1
        more = true
      }
    }
    return more
  }

  /** A signal of the device's own background work. Returns `true` to be called again, later. */
  signal(number: number): boolean {
    const more = this.#behaviour?.signal?.(number) ?? false
    if (this.#resetting) this.#reset()
    else this.#settle()
    return more
  }

  /**
   * Changes the configuration space.
   *
   * The generation changes before and after, so a driver that reads while this writes sees another generation, or a mix of old
   * and new bytes with the interrupt still to come, on which it reads again.
   */
  updateConfig(change: (config: DataView) => void): void {
    const bump = () => {
      this.#configGeneration = (this.#configGeneration + 1) >>> 0
      this.#show(Register.ConfigGeneration, this.#configGeneration)
    }
    bump()
    change(new DataView(this.#page.buffer, this.#page.byteOffset + Register.Config, this.#configLength))
    bump()
    if ((this.#status & DRIVER_OK) !== 0) this.#raise(InterruptCause.CONFIGURATION)
  }

  get #configLength(): number {
    return Math.min(this.#device.config.length, CONFIG_SIZE_MAX)
  }

  /** A driver is at work, and the device may use its queues. */
  get #live(): boolean {
    return (this.#status & (DRIVER_OK | DEVICE_NEEDS_RESET | FAILED)) === DRIVER_OK &&
      !this.#resetting
  }

  get #features(): Features {
    return { low: this.#driverLow, high: this.#driverHigh }
  }

  #show(register: number, value: number): void {
    this.#page.setUint32(register, value, true)
  }

  /** Everything on the page that depends on a selector or on the state. */
  #showSelected(): void {
    const features = this.#deviceFeaturesSel === 0
      ? this.#offered.low
      : this.#deviceFeaturesSel === 1
      ? this.#offered.high
      : 0
    this.#show(Register.DeviceFeatures, features)
    this.#show(Register.QueueSizeMax, this.#queueRegisters[this.#queueSel]?.sizeMax ?? 0)
    this.#show(Register.QueueReady, this.#queues[this.#queueSel] === undefined ? 0 : 1)
    this.#show(Register.Status, this.#status)
    this.#show(Register.InterruptStatus, this.#interruptStatus)
    this.#show(Register.ConfigGeneration, this.#configGeneration)
  }

  #writeRegister(register: number, value: number): void {
    switch (register) {
      case Register.DeviceFeaturesSel:
        this.#deviceFeaturesSel = value
        return this.#showSelected()
      case Register.DriverFeaturesSel:
        this.#driverFeaturesSel = value
        return
      case Register.DriverFeatures:
        return this.#writeDriverFeatures(value)
      case Register.QueueSel:
        this.#queueSel = value
        return this.#showSelected()
      case Register.QueueReady:
        this.#writeQueueReady(value)
        return this.#showSelected()
      default:
        return this.#writeQueueSetup(register, value)
    }
  }

  /** Features are frozen by FEATURES_OK (section 2.2.1). */
  #writeDriverFeatures(value: number): void {
    if ((this.#status & FEATURES_OK) !== 0) return
    if (this.#driverFeaturesSel === 0) this.#driverLow = value
    else if (this.#driverFeaturesSel === 1) this.#driverHigh = value
    else if (value !== 0) this.#driverBeyond = true
  }

  /** Whether the selected queue may be set up now: after FEATURES_OK, before DRIVER_OK, and not while it is ready. */
  get #settingUp(): boolean {
    return (this.#status & (FEATURES_OK | DRIVER_OK | DEVICE_NEEDS_RESET | FAILED)) ===
        FEATURES_OK && this.#queues[this.#queueSel] === undefined
  }

  #writeQueueSetup(register: number, value: number): void {
    const queue = this.#queueRegisters[this.#queueSel]
    if (queue === undefined || !this.#settingUp) return
    switch (register) {
      case Register.QueueSize:
        queue.size = value
        return
      case Register.QueueDescLow:
        queue.descLow = value
        return
      case Register.QueueDescHigh:
        queue.descHigh = value
        return
      case Register.QueueDriverLow:
        queue.driverLow = value
        return
      case Register.QueueDriverHigh:
        queue.driverHigh = value
        return
      case Register.QueueDeviceLow:
        queue.deviceLow = value
        return
      case Register.QueueDeviceHigh:
        queue.deviceHigh = value
        return
    }
  }

  /** A queue whose set-up is wrong does not become ready. One that is ready can be stopped at any time (section 4.2.2.2). */
  #writeQueueReady(value: number): void {
    const registers = this.#queueRegisters[this.#queueSel]
    if (registers === undefined) return
    if (value === 0) {
      this.#queues[this.#queueSel]?.close()
      this.#queues[this.#queueSel] = undefined
      return
    }
    if (value !== 1 || !this.#settingUp || registers.size > registers.sizeMax) return
    this.#queues[this.#queueSel] = SplitQueue.make(this.#ports.memory, {
      size: registers.size,
      descriptorTable: addressFromHalves(registers.descLow, registers.descHigh),
      availableRing: addressFromHalves(registers.driverLow, registers.driverHigh),
      usedRing: addressFromHalves(registers.deviceLow, registers.deviceHigh),
      indirect: hasFeature(this.#features, VIRTIO_F_INDIRECT_DESC),
      eventIndex: hasFeature(this.#features, VIRTIO_F_EVENT_IDX)
    })
  }

  #writeConfig(offset: number, size: number, value: number): void {
    if ((this.#status & FEATURES_OK) === 0 || this.#resetting || offset + size > this.#configLength) return
    this.#behaviour?.writeConfig?.(offset, size, value)
    this.#settle()
  }

  /** The order of section 3.1.1: each step needs the one before, and nothing but a reset goes back. */
  #writeStatus(value: number): void {
    if (value === 0) return this.#reset()
    if (this.#resetting) return
    const before = this.#status
    const wanted = value & STATUS_OF_DRIVER
    if ((before & STATUS_OF_DRIVER & ~wanted) !== 0) return
    let status = before | (wanted & (ACKNOWLEDGE | FAILED))
    if ((wanted & DRIVER) !== 0 && (status & ACKNOWLEDGE) !== 0) status |= DRIVER
    const working = (status & (DRIVER | FAILED | DEVICE_NEEDS_RESET)) === DRIVER
    if (working && (wanted & FEATURES_OK) !== 0 && this.#acceptable) status |= FEATURES_OK
    if (working && (wanted & DRIVER_OK) !== 0 && (status & FEATURES_OK) !== 0) status |= DRIVER_OK
    this.#status = status
    if ((status & ~before & FAILED) !== 0) this.#stop()
    if ((status & ~before & DRIVER_OK) !== 0) this.#activate()
    this.#showSelected()
  }

  get #acceptable(): boolean {
    const features = this.#features
    return !this.#driverBeyond && includesFeatures(this.#offered, features) &&
      hasFeature(features, VIRTIO_F_VERSION_1) &&
      (this.#device.accepts?.(features) ?? true)
  }

  #activate(): void {
    this.#behaviour?.activate({ features: this.#features, queues: this.#queues.slice() })
    this.#toLook.fill(1)
    this.#ports.signal(SIGNAL_LOOK)
    this.#settle()
  }

  /** Takes the queues from the device. Returns whether it is idle. */
  #stop(): boolean {
    for (let queue = 0; queue < this.#queues.length; queue++) {
      this.#queues[queue]?.close()
      this.#queues[queue] = undefined
    }
    this.#toLook.fill(0)
    return this.#behaviour?.reset() ?? true
  }

  /** The driver sees the status 0, which means that the reset is done, only when the device is idle. */
  #reset(): void {
    this.#resetting = !this.#stop()
    if (!this.#resetting) {
      this.#status = 0
      this.#deviceFeaturesSel = 0
      this.#driverFeaturesSel = 0
      this.#driverLow = 0
      this.#driverHigh = 0
      this.#driverBeyond = false
      this.#queueSel = 0
      this.#queueRegisters = this.#device.queueSizes.map(freshQueue)
      this.#interruptStatus = 0
    }
    this.#showSelected()
  }

  /** Publishes what the device has completed, and looks for faults. */
  #settle(): void {
    let interrupt = false
    let broken: string | undefined
    for (let index = 0; index < this.#queues.length; index++) {
      const queue = this.#queues[index]
      if (queue === undefined) continue
      if (queue.publish()) interrupt = true
      const fault = queue.fault
      if (fault !== undefined) broken ??= `queue ${index}: ${fault.kind}: ${fault.detail}`
    }
    if (interrupt) this.#raise(InterruptCause.USED_BUFFERS)
    if (broken !== undefined) this.#needReset(broken)
  }

  /** The device cannot go on with this driver (section 2.1.2). */
  #needReset(why: string): void {
    this.#stop()
    this.#status |= DEVICE_NEEDS_RESET
    this.#showSelected()
    this.#ports.report(`needs a reset: ${why}`)
    if ((this.#status & DRIVER_OK) !== 0) this.#raise(InterruptCause.CONFIGURATION)
  }

  /**
   * Raises the interrupt.
   *
   * The page shows the cause before the interrupt comes, and a driver acknowledges what it has read before it looks at the
   * queues or the configuration. The cause "used buffers" is never taken back before a reset: its acknowledgement is a
   * doorbell, which could take effect at any later time, perhaps after a newer interrupt whose cause it must leave. So a
   * handler that runs for a configuration change alone looks at the queues in vain, and no interrupt is lost. The cause
   * "configuration" is taken back by an acknowledgement that names it. That one is a call, so it takes effect after the driver
   * has read the cause and before it looks: what has changed by then is seen, and what changes later is raised again.
   */
  #raise(cause: number): void {
    this.#interruptStatus |= cause
    this.#show(Register.InterruptStatus, this.#interruptStatus)
    this.#ports.interrupt()
  }

  #acknowledge(value: number): void {
    this.#interruptStatus &= ~(value & InterruptCause.CONFIGURATION)
    this.#show(Register.InterruptStatus, this.#interruptStatus)
  }
}
