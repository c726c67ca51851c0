/**
 * The registers of virtio-mmio (virtio 1.3, section 4.2.2) on their page: what each of them means to the state machine, and
 * how the state machine shows on the page.
 */
import type { GuestMemory } from "@troupe/core/GuestMemory"
import { type QueueRegister, TransportState } from "./TransportState.ts"
import { CONFIG_SIZE_MAX, type VirtioDevice } from "./VirtioDevice.ts"
import { InterruptCause, MAGIC_VALUE, MMIO_VERSION, Register, VENDOR_ID } from "./VirtioMmioLayout.ts"

/** What the registers act on. */
export interface MmioPorts {
  /** The register page, from its first byte. */
  readonly page: DataView
  readonly memory: GuestMemory
  readonly interrupt: () => void
  readonly signal: (number: number) => void
  /** Has the vCPU whose write is being handled wait for the function that comes back. */
  readonly hold: () => () => void
  /** Takes a sentence about a driver that broke a rule. */
  readonly report: (text: string) => void
}

/** The registers by which the selected queue is set up. */
const queueRegisters: ReadonlyMap<number, QueueRegister> = new Map([
  [Register.QueueSize, "size"],
  [Register.QueueDescLow, "descriptorLow"],
  [Register.QueueDescHigh, "descriptorHigh"],
  [Register.QueueDriverLow, "driverLow"],
  [Register.QueueDriverHigh, "driverHigh"],
  [Register.QueueDeviceLow, "deviceLow"],
  [Register.QueueDeviceHigh, "deviceHigh"]
])

/** One virtio-mmio device's registers. All methods are synchronous; none throws for what a guest does. */
export class MmioRegisters {
  /** What is behind the registers. */
  readonly state: TransportState
  readonly #page: DataView
  readonly #interrupt: () => void
  #deviceFeaturesSel = 0
  #driverFeaturesSel = 0
  #queueSel = 0
  #interruptStatus: number

  /** Takes over the page: what an earlier generation of the device left there says what the driver believes. */
  constructor(device: VirtioDevice, ports: MmioPorts) {
    const page = ports.page
    this.#page = page
    this.#interrupt = ports.interrupt
    this.#interruptStatus = page.getUint32(Register.InterruptStatus, true)
    const configLength = Math.min(device.config.length, CONFIG_SIZE_MAX)
    this.state = new TransportState(device, {
      memory: ports.memory,
      config: new DataView(page.buffer, page.byteOffset + Register.Config, configLength),
      show: () => this.#showState(),
      interruptQueues: () => this.#raise(InterruptCause.USED_BUFFERS),
      interruptConfiguration: () => this.#raise(InterruptCause.CONFIGURATION),
      wasReset: () => {
        this.#deviceFeaturesSel = 0
        this.#driverFeaturesSel = 0
        this.#queueSel = 0
        this.#interruptStatus = 0
      },
      signal: ports.signal,
      hold: ports.hold,
      report: ports.report
    }, {
      status: page.getUint32(Register.Status, true),
      configGeneration: page.getUint32(Register.ConfigGeneration, true)
    })
    this.#show(Register.MagicValue, MAGIC_VALUE)
    this.#show(Register.Version, MMIO_VERSION)
    this.#show(Register.DeviceID, device.deviceId)
    this.#show(Register.VendorID, VENDOR_ID)
    for (const register of [Register.SHMLenLow, Register.SHMLenHigh, Register.SHMBaseLow, Register.SHMBaseHigh]) {
      this.#show(register, 0xffff_ffff)
    }
    this.#showState()
  }

  /** Takes a write of the guest that is not a doorbell. */
  write(offset: number, size: number, value: number): void {
    if (offset >= Register.Config) {
      this.state.writeConfig(offset - Register.Config, size, value)
      return
    }
    // Control registers have 32 bits, and are accessed as such (section 4.2.2.2).
    if (size !== 4 || offset % 4 !== 0) return
    switch (offset) {
      case Register.Status:
        return this.state.writeStatus(value)
      case Register.InterruptACK:
        return this.#acknowledge(value)
      case Register.DeviceFeaturesSel:
        this.#deviceFeaturesSel = value
        return this.#showState()
      case Register.DriverFeaturesSel:
        this.#driverFeaturesSel = value
        return
      case Register.DriverFeatures:
        return this.state.writeDriverFeatures(this.#driverFeaturesSel, value)
      case Register.QueueSel:
        this.#queueSel = value
        return this.#showState()
      case Register.QueueReady:
        // A queue that is ready can be stopped at any time (section 4.2.2.2).
        if (value === 0) this.state.disableQueue(this.#queueSel)
        else if (value === 1) this.state.enableQueue(this.#queueSel)
        return this.#showState()
      default: {
        const register = queueRegisters.get(offset)
        if (register !== undefined) this.state.writeQueue(this.#queueSel, register, value)
      }
    }
  }

  #show(register: number, value: number): void {
    this.#page.setUint32(register, value, true)
  }

  /** Everything on the page that depends on a selector or on the state. */
  #showState(): void {
    const { state } = this
    this.#show(Register.DeviceFeatures, state.deviceFeatures(this.#deviceFeaturesSel))
    this.#show(Register.QueueSizeMax, state.queueRegisters(this.#queueSel)?.sizeMax ?? 0)
    this.#show(Register.QueueReady, state.isReady(this.#queueSel) ? 1 : 0)
    this.#show(Register.Status, state.status)
    this.#show(Register.InterruptStatus, this.#interruptStatus)
    this.#show(Register.ConfigGeneration, state.configGeneration)
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
    this.#interrupt()
  }

  #acknowledge(value: number): void {
    this.#interruptStatus &= ~(value & InterruptCause.CONFIGURATION)
    this.#show(Register.InterruptStatus, this.#interruptStatus)
  }
}
