// The least that a device with memory-mapped ranges needs around it: what backs its ranges, doorbells and signals that wait, and a
// vCPU whose every access is made at once.
import { openBusValue, type RangeBacking } from "@troupe/core/Bus"
import type { Device, DeviceBehaviour, DeviceContext } from "@troupe/core/Device"
import type { GuestMemory } from "@troupe/core/GuestMemory"
import type { GuestCpu, GuestOperation, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"

/** Where the first range without an address is for the guest, and the distance to the next. */
export const FIRST_BASE = 0xd000_0000
const BASE_STEP = 0x10_0000
/** More bells than a range has. */
const BELLS_MAX = 0x1_0000

const operation = <A>(run: () => A): GuestOperation<A> => ({
  [Symbol.iterator]: () => ({ next: () => ({ done: true, value: run() }) })
})

const unsupported = (): never => {
  throw new Error("a device alone has no such operation")
}

/** Runs guest code to its end. */
export const runRoutine = <A>(routine: GuestRoutine<A>): A => {
  for (;;) {
    const step = routine.next(undefined)
    if (step.done === true) return step.value
  }
}

export class OneDevice {
  readonly device: Device
  readonly memory: GuestMemory
  readonly bases: ReadonlyArray<number>
  /** A vCPU. Its `yield` is what the device's owner makes of it. */
  readonly cpu: GuestCpu
  onYield: () => void = () => {}
  readonly #backings: ReadonlyArray<RangeBacking>
  readonly #signals = new Set<number>()
  readonly #bells = new Set<number>()
  #behaviour: DeviceBehaviour | undefined

  constructor(device: Device, memory: GuestMemory) {
    this.device = device
    this.memory = memory
    this.bases = device.ranges.map((range, index) => range.base ?? FIRST_BASE + index * BASE_STEP)
    this.#backings = device.ranges.map((range) => ({
      shadow: undefined,
      page: range.read === "register-page" ? new DataView(new ArrayBuffer(range.size)) : undefined
    }))
    this.cpu = {
      id: 0,
      state: undefined,
      memory,
      interrupts: {
        enabled: false,
        pending: new Set(),
        handle: unsupported,
        route: unsupported,
        acknowledge: () => true
      },
      in8: unsupported,
      in16: unsupported,
      in32: unsupported,
      out8: unsupported,
      out16: unsupported,
      out32: unsupported,
      load: (address, size) => operation(() => this.#load(address, size)),
      store: (address, size, value) => operation(() => this.#store(address, size, value)),
      enableInterrupts: unsupported,
      disableInterrupts: unsupported,
      waitForInterrupt: unsupported,
      waitForInterruptWithin: unsupported,
      halt: unsupported,
      tripleFault: unsupported,
      internalError: unsupported,
      sleep: unsupported,
      yield: () => operation(() => this.onYield()),
      now: () => 0,
      startVcpu: unsupported
    }
  }

  /** Starts the device. */
  readonly start = (
    more: Pick<DeviceContext, "pluggableMemory"> = {}
  ): Effect.Effect<DeviceBehaviour, never, Scope.Scope> =>
    Effect.map(
      Effect.orDie(this.device.start({
        ...more,
        name: this.device.name,
        memory: this.memory,
        bases: this.bases,
        ranges: this.#backings,
        interrupts: this.device.interrupts.map((_, gsi) => ({ gsi, trigger: () => {} })),
        messages: Array.from({ length: this.device.messages ?? 0 }, () => ({ route: () => {}, trigger: () => {} })),
        generation: 0,
        signal: (number) => void this.#signals.add(number),
        hold: () => () => {},
        stop: unsupported
      })),
      (behaviour) => this.#behaviour = behaviour
    )

  /** Whether nothing waits. */
  get atRest(): boolean {
    return this.#signals.size === 0 && this.#bells.size === 0
  }

  /** What waits, for people. */
  get waiting(): string {
    return `signals ${Array.from(this.#signals).join(" ")}, doorbells ${Array.from(this.#bells).join(" ")}`
  }

  /** A turn for each doorbell and each signal that waits. */
  turn(): void {
    const behaviour = this.#behaviour
    if (this.atRest || behaviour === undefined) return
    for (const bell of Array.from(this.#bells)) {
      this.#bells.delete(bell)
      if (behaviour.doorbell?.(Math.floor(bell / BELLS_MAX), bell % BELLS_MAX) === true) this.#bells.add(bell)
    }
    for (const signal of Array.from(this.#signals)) {
      this.#signals.delete(signal)
      if (behaviour.signal?.(signal) === true) this.#signals.add(signal)
    }
  }

  /** The range at an address, or -1. */
  #find(address: number, size: number): number {
    for (let range = 0; range < this.bases.length; range++) {
      const offset = address - (this.bases[range] ?? 0)
      if (offset >= 0 && offset + size <= (this.device.ranges[range]?.size ?? 0)) return range
    }
    return -1
  }

  #load(address: number, size: number): number {
    const range = this.#find(address, size)
    if (range < 0) return openBusValue(size)
    const offset = address - (this.bases[range] ?? 0)
    const page = this.#backings[range]?.page
    if (page === undefined) return this.#behaviour?.read(range, offset, size) ?? 0
    let value = 0
    for (let i = 0; i < size; i++) value += page.getUint8(offset + i) * 2 ** (8 * i)
    return value
  }

  #store(address: number, size: number, value: number): void {
    const range = this.#find(address, size)
    if (range < 0) return
    const offset = address - (this.bases[range] ?? 0)
    const bells = this.device.ranges[range]?.doorbells ?? []
    for (let bell = 0; bell < bells.length; bell++) {
      const one = bells[bell]
      if (one === undefined || one.offset !== offset || one.size !== size) continue
      if (one.value !== undefined && one.value !== value) continue
      if (one.wakes !== false) this.#bells.add(range * BELLS_MAX + bell)
      return
    }
    this.#behaviour?.write(range, offset, size, value)
  }
}
