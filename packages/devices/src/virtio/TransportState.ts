/**
 * The state machine of a virtio device (virtio 1.3, sections 2.1, 2.2, 2.4, 2.5 and 3.1), whatever transport shows it: status,
 * negotiation, queues, reset, what a broken driver leads to. Plain synchronous code; whatever the guest does, in whatever
 * order, leads to a legal state, and none of it throws.
 */
import { addressFromHalves } from "@troupe/core/GuestAddress"
import type { GuestMemory } from "@troupe/core/GuestMemory"
import { DeviceStatus } from "./DeviceStatus.ts"
import { type Features, hasFeature, includesFeatures, unionFeatures, VIRTIO_F_VERSION_1 } from "./Features.ts"
import { makeVirtqueue, TRANSPORT_FEATURES } from "./QueueMaker.ts"
import { VIRTIO_SIGNAL_LIMIT, type VirtioBehaviour, type VirtioDevice } from "./VirtioDevice.ts"
import type { Virtqueue } from "./Virtqueue.ts"

const { ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK } = DeviceStatus
/** The bits of the device status that the driver sets. */
const STATUS_OF_DRIVER = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED

/** The transport's own signal: queues are to be looked at. */
export const SIGNAL_LOOK = VIRTIO_SIGNAL_LIMIT

/** What the state machine acts on. */
export interface TransportPorts {
  readonly memory: GuestMemory
  /** The device's configuration space where the driver reads it, at most as long as the device says it is. */
  readonly config: DataView
  /** Something that the driver can read has changed: show it. */
  readonly show: () => void
  /** Interrupts the driver for used buffers of the queues whose entry is not 0. The array is used again. */
  readonly interruptQueues: (wants: Uint8Array) => void
  /** Interrupts the driver for a change of the configuration or of the status. */
  readonly interruptConfiguration: () => void
  /** The device was reset: the transport's own registers go back to their first values, before they are shown. */
  readonly wasReset: () => void
  readonly signal: (number: number) => void
  /** Has the vCPU whose write is being handled wait for the function that comes back. */
  readonly hold: () => () => void
  /** Takes a sentence about a driver that broke a rule. */
  readonly report: (text: string) => void
}

/** What a driver may know of an earlier generation of the device. */
export interface EarlierGeneration {
  readonly status: number
  readonly configGeneration: number
}

/** The registers by which a driver sets a queue up. Halves of addresses are unsigned. */
export interface QueueRegisters {
  readonly sizeMax: number
  size: number
  descriptorLow: number
  descriptorHigh: number
  driverLow: number
  driverHigh: number
  deviceLow: number
  deviceHigh: number
}

/** A register of {@link QueueRegisters} that the driver writes. */
export type QueueRegister = Exclude<keyof QueueRegisters, "sizeMax">

const freshQueue = (sizeMax: number): QueueRegisters => ({
  sizeMax,
  size: sizeMax,
  descriptorLow: 0,
  descriptorHigh: 0,
  driverLow: 0,
  driverHigh: 0,
  deviceLow: 0,
  deviceHigh: 0
})

/** One generation of a virtio device as its driver sees it. */
export class TransportState {
  /** The features that the device offers. */
  readonly offered: Features
  readonly #device: VirtioDevice
  readonly #ports: TransportPorts
  #behaviour: VirtioBehaviour | undefined

  #status: number
  #configGeneration: number
  #driverLow = 0
  #driverHigh = 0
  /** The driver has accepted a feature beyond bit 63: none is offered there. */
  #driverBeyond = false
  #queueRegisters: ReadonlyArray<QueueRegisters>
  /** The queues that are ready. */
  readonly #queues: Array<Virtqueue | undefined>
  /** Queues that are to be notified by {@link look}. */
  readonly #toLook: Uint8Array
  /** Queues whose driver is to be interrupted; used while it is settled. */
  readonly #wants: Uint8Array
  /** Whether nothing that the device has begun will touch guest memory after it lost its driver. */
  #idle = true
  /** The driver has asked for a reset, and the device is not idle yet. */
  #resetting = false
  /** Lets the vCPUs go on that have asked for it, or that have stopped a queue. */
  #waiting: Array<() => void> = []

  constructor(device: VirtioDevice, ports: TransportPorts, earlier: EarlierGeneration) {
    this.#device = device
    this.#ports = ports
    this.offered = unionFeatures(device.features, TRANSPORT_FEATURES)
    this.#status = earlier.status
    this.#configGeneration = earlier.configGeneration
    this.#queueRegisters = device.queueSizes.map(freshQueue)
    this.#queues = device.queueSizes.map(() => undefined)
    this.#toLook = new Uint8Array(device.queueSizes.length)
    this.#wants = new Uint8Array(device.queueSizes.length)
    for (let i = 0; i < ports.config.byteLength; i++) ports.config.setUint8(i, device.config[i] ?? 0)
  }

  /** The device has started. If a driver was at work with an earlier generation, it hears that a reset is needed. */
  start(behaviour: VirtioBehaviour): void {
    this.#behaviour = behaviour
    if (this.#status === 0) return
    this.#bumpConfigGeneration()
    this.#needReset("the device has failed and was started again")
  }

  /** This generation has ended, and all its work with it: a reset that was waited for is done. */
  end(): void {
    if (this.#resetting) this.#wasReset()
    else this.#letGoOn()
  }

  // --- what the driver reads -------------------------------------------------------------------------------------------

  /** The device status. */
  get status(): number {
    return this.#status
  }

  /** Changes with the configuration space. */
  get configGeneration(): number {
    return this.#configGeneration
  }

  /** 32 of the features that the device offers. */
  deviceFeatures(select: number): number {
    return select === 0 ? this.offered.low : select === 1 ? this.offered.high : 0
  }

  /** 32 of the features that the driver accepts. */
  driverFeatures(select: number): number {
    return select === 0 ? this.#driverLow : select === 1 ? this.#driverHigh : 0
  }

  /** Whether the driver accepts a feature. */
  hasAccepted(feature: number): boolean {
    return hasFeature(this.#features, feature)
  }

  /** The registers of a queue, or `undefined` when there is no such queue. */
  queueRegisters(queue: number): Readonly<QueueRegisters> | undefined {
    return this.#queueRegisters[queue]
  }

  /** Whether the device may use a queue. */
  isReady(queue: number): boolean {
    return this.#queues[queue] !== undefined
  }

  // --- what the driver writes ------------------------------------------------------------------------------------------

  /**
   * Writes the device status, in the order of section 3.1.1: each step needs the one before, and nothing but a reset goes back.
   *
   * The answer to the write of 0 waits until the device is idle: not every driver looks again afterwards.
   */
  writeStatus(value: number): void {
    if (value === 0) {
      this.#reset()
      if (this.#resetting) this.#waiting.push(this.#ports.hold())
      return
    }
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
    this.#ports.show()
  }

  /** Writes 32 of the features that the driver accepts. FEATURES_OK freezes them (section 2.2.1). */
  writeDriverFeatures(select: number, value: number): void {
    if (this.#resetting || (this.#status & FEATURES_OK) !== 0) return
    if (select === 0) this.#driverLow = value
    else if (select === 1) this.#driverHigh = value
    else if (value !== 0) this.#driverBeyond = true
  }

  /** Writes a register of a queue: after FEATURES_OK, before DRIVER_OK, and not while the queue is ready. */
  writeQueue(queue: number, register: QueueRegister, value: number): void {
    const registers = this.#queueRegisters[queue]
    if (registers !== undefined && this.#settingUp(queue)) registers[register] = value
  }

  /** Makes a queue ready. One whose set-up is wrong does not become ready. */
  enableQueue(queue: number): void {
    const registers = this.#queueRegisters[queue]
    if (registers === undefined || !this.#settingUp(queue) || registers.size > registers.sizeMax) return
    this.#queues[queue] = makeVirtqueue(this.#ports.memory, {
      size: registers.size,
      descriptorArea: addressFromHalves(registers.descriptorLow, registers.descriptorHigh),
      driverArea: addressFromHalves(registers.driverLow, registers.driverHigh),
      deviceArea: addressFromHalves(registers.deviceLow, registers.deviceHigh),
      features: this.#features
    })
  }

  /**
   * Stops a queue, which the driver may do at any time where the transport allows it.
   *
   * The answer to its write means that the device writes to no buffer of the queue any more. What a device does with the buffers
   * that it has in hand ends with a reset and not otherwise, so a driver that stops a queue before it has them back stops all of
   * the device.
   */
  disableQueue(queue: number): void {
    if (this.#resetting) return
    const stopped = this.#queues[queue]
    if (stopped !== undefined) {
      stopped.close()
      this.#queues[queue] = undefined
      const { inFlight } = stopped
      if (inFlight > 0) this.#needReset(`queue ${queue} was stopped while the device had ${inFlight} of its chains`)
    }
    if (!this.#idle) this.#waiting.push(this.#ports.hold())
  }

  /** Writes the configuration space. */
  writeConfig(offset: number, size: number, value: number): void {
    if (this.#resetting || offset + size > this.#ports.config.byteLength) return
    if ((this.#status & FEATURES_OK) === 0 && this.#device.isWritableEarly?.(offset) !== true) return
    this.#behaviour?.writeConfig?.(offset, size, value)
    this.#settle()
  }

  // --- what the device's own fiber has it do ---------------------------------------------------------------------------

  /** The driver has made chains available in a queue. Returns `true` to be called again, later. */
  notify(queue: number): boolean {
    if (!this.#live || this.#queues[queue] === undefined) return false
    const more = this.#behaviour?.notify(queue) ?? false
    this.#settle()
    return more && this.#live
  }

  /** Has a queue notified soon, by {@link look}. */
  lookAt(queue: number): void {
    if (queue >= this.#toLook.length) return
    this.#toLook[queue] = 1
    this.#ports.signal(SIGNAL_LOOK)
  }

  /** Notifies the queues of {@link lookAt}, or all of a driver that has just become ready. Returns `true` to be called again, later. */
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
    if (!this.#idle) this.#idle = this.#behaviour?.reset() ?? true
    if (!this.#resetting) {
      if (this.#idle) this.#letGoOn()
      this.#settle()
    } else if (this.#idle) this.#wasReset()
    return more
  }

  /**
   * Changes the configuration space.
   *
   * The generation changes before and after, so a driver that reads while this writes sees another generation, or a mix of old
   * and new bytes with the interrupt still to come, on which it reads again.
   */
  updateConfig(change: (config: DataView) => void, quietly = false): void {
    this.#bumpConfigGeneration()
    change(this.#ports.config)
    this.#bumpConfigGeneration()
    if (!quietly && (this.#status & DRIVER_OK) !== 0 && !this.#resetting) this.#ports.interruptConfiguration()
  }

  // --- inside ----------------------------------------------------------------------------------------------------------

  /** A driver is at work, and the device may use its queues. */
  get #live(): boolean {
    return (this.#status & (DRIVER_OK | DEVICE_NEEDS_RESET | FAILED)) === DRIVER_OK && !this.#resetting
  }

  get #features(): Features {
    return { low: this.#driverLow, high: this.#driverHigh }
  }

  get #acceptable(): boolean {
    const features = this.#features
    return !this.#driverBeyond && includesFeatures(this.offered, features) &&
      hasFeature(features, VIRTIO_F_VERSION_1) &&
      (this.#device.accepts?.(features) ?? true)
  }

  /** Whether a queue may be set up now. */
  #settingUp(queue: number): boolean {
    return (this.#status & (FEATURES_OK | DRIVER_OK | DEVICE_NEEDS_RESET | FAILED)) === FEATURES_OK &&
      !this.#resetting && this.#queues[queue] === undefined
  }

  #bumpConfigGeneration(): void {
    this.#configGeneration = (this.#configGeneration + 1) >>> 0
    this.#ports.show()
  }

  #activate(): void {
    this.#behaviour?.activate({ features: this.#features, queues: this.#queues.slice() })
    this.#toLook.fill(1)
    this.#ports.signal(SIGNAL_LOOK)
    this.#settle()
  }

  /** Takes the queues from the device. */
  #stop(): void {
    for (let queue = 0; queue < this.#queues.length; queue++) {
      this.#queues[queue]?.close()
      this.#queues[queue] = undefined
    }
    this.#toLook.fill(0)
    this.#idle = this.#behaviour?.reset() ?? true
  }

  /** The driver sees the status 0, which means that the reset is done, only when the device is idle. */
  #reset(): void {
    this.#stop()
    if (this.#idle) return this.#wasReset()
    this.#resetting = true
    this.#ports.show()
  }

  #wasReset(): void {
    this.#resetting = false
    this.#status = 0
    this.#driverLow = 0
    this.#driverHigh = 0
    this.#driverBeyond = false
    this.#queueRegisters = this.#device.queueSizes.map(freshQueue)
    this.#ports.wasReset()
    this.#ports.show()
    this.#letGoOn()
  }

  #letGoOn(): void {
    if (this.#waiting.length === 0) return
    const waiting = this.#waiting
    this.#waiting = []
    for (const release of waiting) release()
  }

  /** Publishes what the device has completed, and looks for faults. */
  #settle(): void {
    let interrupt = false
    let broken: string | undefined
    for (let index = 0; index < this.#queues.length; index++) {
      const queue = this.#queues[index]
      if (queue === undefined) continue
      if (queue.publish()) {
        this.#wants[index] = 1
        interrupt = true
      }
      const fault = queue.fault
      if (fault !== undefined) broken ??= `queue ${index}: ${fault.kind}: ${fault.detail}`
    }
    if (interrupt) {
      this.#ports.interruptQueues(this.#wants)
      this.#wants.fill(0)
    }
    if (broken !== undefined) this.#needReset(broken)
  }

  /** The device cannot go on with this driver (section 2.1.2). */
  #needReset(why: string): void {
    this.#stop()
    this.#status |= DEVICE_NEEDS_RESET
    this.#ports.show()
    this.#ports.report(`needs a reset: ${why}`)
    if ((this.#status & DRIVER_OK) !== 0) this.#ports.interruptConfiguration()
  }
}
