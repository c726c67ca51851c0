/** Runs one device without a machine: accesses as the bus would make them, posted writes that wait, shadows, pages, interrupts. */
import { openBusValue, type RangeBacking, SHADOW_INVALID } from "@troupe/core/Bus"
import type { Device, DeviceBehaviour, DeviceContext } from "@troupe/core/Device"
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import type { GuestStop } from "@troupe/core/GuestStop"
import type { GuestFailure } from "@troupe/core/VcpuExit"
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"

/** Where the first range without a base is for the guest, and the distance to the next. */
export const HARNESS_BASE = 0xd000_0000
export const HARNESS_STEP = 0x10_0000

export class DeviceHarness {
  readonly device: Device
  readonly memory: GuestMemory
  /** Where its ranges are. */
  readonly bases: ReadonlyArray<number>
  readonly backings: ReadonlyArray<RangeBacking>
  readonly stops: Array<GuestStop | GuestFailure> = []
  readonly interrupts: Array<number>
  /** The message-signalled interrupts: where they are routed to, and how often each was sent. */
  readonly messages: Array<{ addressLow: number; addressHigh: number; data: number; sent: number } | undefined>
  readonly signals = new Set<number>()
  readonly doorbells = new Set<string>()
  /** How many writes the device holds: in a machine, a vCPU would wait for each. */
  held = 0
  readonly #posted: Array<() => void> = []
  #behaviour: DeviceBehaviour | undefined
  #generation = 0

  constructor(device: Device, memory = new GuestMemory([new MemoryRegion(0, new ArrayBuffer(0x10_0000))])) {
    this.device = device
    this.memory = memory
    this.interrupts = device.interrupts.map(() => 0)
    this.messages = Array.from({ length: device.messages ?? 0 })
    this.bases = device.ranges.map((range, index) => range.base ?? HARNESS_BASE + index * HARNESS_STEP)
    this.backings = device.ranges.map((range) => ({
      shadow: range.read === "shadowed" ? new Int16Array(range.size).fill(SHADOW_INVALID) : undefined,
      page: range.read === "register-page" ? new DataView(new ArrayBuffer(range.size)) : undefined
    }))
  }

  /** Starts the device, or the next generation of it. */
  readonly start: Effect.Effect<void, never, Scope.Scope> = Effect.suspend(() => {
    const context: DeviceContext = {
      name: this.device.name,
      memory: this.memory,
      bases: this.bases,
      ranges: this.backings,
      interrupts: this.interrupts.map((_, index) => ({
        gsi: index,
        trigger: () => {
          this.interrupts[index] = (this.interrupts[index] ?? 0) + 1
        }
      })),
      messages: this.messages.map((_, index) => ({
        route: (addressLow, addressHigh, data) => {
          this.messages[index] = { addressLow, addressHigh, data, sent: this.messages[index]?.sent ?? 0 }
        },
        trigger: () => {
          const message = this.messages[index]
          if (message !== undefined) message.sent++
        }
      })),
      generation: this.#generation++,
      signal: (number) => void this.signals.add(number),
      hold: () => {
        let held = true
        this.held++
        return () => {
          if (held) this.held--
          held = false
        }
      },
      stop: (reason) => void this.stops.push(reason)
    }
    return Effect.map(Effect.orDie(this.device.start(context)), (behaviour) => {
      this.#behaviour = behaviour
    })
  })

  get behaviour(): DeviceBehaviour {
    if (this.#behaviour === undefined) throw new Error("the device was not started")
    return this.#behaviour
  }

  /** Does all posted writes that wait. */
  drain(): void {
    for (const write of this.#posted.splice(0)) write()
  }

  /** Everything that waits, until nothing does. Fails when it never ends. */
  settle(turns = 1000): void {
    for (let turn = 0; turn < turns; turn++) {
      this.drain()
      if (this.signals.size === 0 && this.doorbells.size === 0) return
      const bells = [...this.doorbells]
      this.doorbells.clear()
      for (const bell of bells) {
        const [range, index] = bell.split(":").map(Number)
        if (this.behaviour.doorbell?.(range ?? 0, index ?? 0) === true) this.doorbells.add(bell)
      }
      const signals = [...this.signals]
      this.signals.clear()
      for (const signal of signals) if (this.behaviour.signal?.(signal) === true) this.signals.add(signal)
    }
    throw new Error("the device does not come to rest")
  }

  /** A read of a range, served as the range declares. */
  read(range: number, offset: number, size: number): number {
    const request = this.device.ranges[range]
    const backing = this.backings[range]
    if (request === undefined || backing === undefined || offset + size > request.size) return openBusValue(size)
    if (backing.page !== undefined) {
      let value = 0
      for (let i = 0; i < size; i++) value += backing.page.getUint8(offset + i) * 2 ** (8 * i)
      return value
    }
    if (backing.shadow !== undefined) {
      let value = 0
      let valid = true
      for (let i = 0; i < size; i++) {
        const byte = backing.shadow[offset + i] ?? SHADOW_INVALID
        valid &&= byte !== SHADOW_INVALID
        value += byte * 2 ** (8 * i)
      }
      if (valid) return value
    }
    this.drain()
    return this.behaviour.read(range, offset, size)
  }

  /** A write to a range, served as the range declares. */
  write(range: number, offset: number, size: number, value: number): void {
    const request = this.device.ranges[range]
    if (request === undefined || offset + size > request.size) return
    const bell = (request.doorbells ?? []).findIndex((doorbell) =>
      doorbell.offset === offset && doorbell.size === size && (doorbell.value === undefined || doorbell.value === value)
    )
    if (bell >= 0) {
      if (request.doorbells?.[bell]?.wakes !== false) this.doorbells.add(`${range}:${bell}`)
    } else if (request.write === "posted") {
      this.#posted.push(() => this.behaviour.write(range, offset, size, value))
    } else {
      this.drain()
      this.behaviour.write(range, offset, size, value)
    }
  }

  /** The range of a port, and the offset in it. */
  portRange(port: number): { readonly range: number; readonly offset: number } {
    const range = this.device.ranges.findIndex((request) =>
      request.space === "pio" && request.base !== undefined && port >= request.base &&
      port < request.base + request.size
    )
    return { range, offset: port - (this.device.ranges[range]?.base ?? 0) }
  }

  /** `in` of one byte. */
  in8(port: number): number {
    const { offset, range } = this.portRange(port)
    return this.read(range, offset, 1)
  }

  /** `out` of one byte. */
  out8(port: number, value: number): void {
    const { offset, range } = this.portRange(port)
    this.write(range, offset, 1, value)
  }
}
