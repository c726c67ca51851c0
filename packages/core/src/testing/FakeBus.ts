/** A bus that is attached to a fake machine: what backs its ranges, and the checked door to its handlers. */
import type { Bus, BusHandlers, BusRange, CallReply, RangeBacking } from "../Bus.ts"
import { SHADOW_INVALID } from "../Bus.ts"
import { formatAddress } from "../GuestAddress.ts"
import type { FakeWorld } from "./FakeWorld.ts"

const DOORBELLS_PER_RANGE = 256

const backingOf = (range: BusRange): RangeBacking => ({
  shadow: range.read === "shadowed" ? new Int16Array(range.size).fill(SHADOW_INVALID) : undefined,
  page: range.read === "register-page" ? new DataView(new ArrayBuffer(range.size)) : undefined
})

/** How a range and an offset in it are named in reports: `serial0+0x5`. */
export const describeRegister = (range: BusRange | undefined, offset: number): string =>
  `${range?.device ?? "?"}+${formatAddress(offset)}`

/** An attached bus. */
export class FakeBus {
  readonly bus: Bus
  readonly backings: ReadonlyArray<RangeBacking>
  readonly #handlers: BusHandlers
  readonly #world: FakeWorld
  readonly #schedule: (task: () => void) => void
  readonly #fail: (defect: unknown) => void
  readonly #rung = new Set<number>()
  #open = true
  #handling = false

  constructor(
    bus: Bus,
    handlers: BusHandlers,
    world: FakeWorld,
    schedule: (task: () => void) => void,
    fail: (defect: unknown) => void
  ) {
    this.bus = bus
    this.backings = bus.ranges.map(backingOf)
    this.#handlers = handlers
    this.#world = world
    this.#schedule = schedule
    this.#fail = fail
  }

  /** Whether handlers may still be called. */
  get open(): boolean {
    return this.#open
  }

  /** Ends all delivery, and makes every view of the backings empty. */
  release(): void {
    this.#open = false
    for (const { page, shadow } of this.backings) {
      if (page !== undefined && page.buffer instanceof ArrayBuffer) page.buffer.transfer(0)
      if (shadow !== undefined && shadow.buffer instanceof ArrayBuffer) shadow.buffer.transfer(0)
    }
  }

  /** The value that a table of shadows gives for a read, or `SHADOW_INVALID` when a part of it is not valid. */
  shadowed(range: number, offset: number, size: number): number {
    const shadow = this.backings[range]?.shadow
    if (shadow === undefined) return SHADOW_INVALID
    let value = 0
    for (let i = 0; i < size; i++) {
      const byte = shadow[offset + i] ?? SHADOW_INVALID
      if (byte === SHADOW_INVALID) return SHADOW_INVALID
      if (byte < 0 || byte > 0xff) {
        throw this.#world.violation(
          `the shadow of ${
            describeRegister(this.bus.ranges[range], offset + i)
          } is ${byte}, not a byte and not SHADOW_INVALID`
        )
      }
      value += byte * 2 ** (8 * i)
    }
    return value
  }

  /** The doorbell that a write rings, or -1. */
  doorbellOf(range: number, offset: number, size: number, value: number): number {
    const doorbells = this.bus.ranges[range]?.doorbells
    if (doorbells === undefined) return -1
    for (let i = 0; i < doorbells.length; i++) {
      const doorbell = doorbells[i]
      if (
        doorbell !== undefined && doorbell.offset === offset && doorbell.size === size &&
        (doorbell.value === undefined || doorbell.value === value)
      ) return i
    }
    return -1
  }

  /** Rings a doorbell: its handler is called later, once for all rings until then. */
  ring(vm: number, now: () => number, range: number, doorbell: number): void {
    const key = range * DOORBELLS_PER_RANGE + doorbell
    if (this.#rung.has(key) || this.bus.ranges[range]?.doorbells[doorbell]?.wakes === false) return
    this.#rung.add(key)
    this.#schedule(() => {
      this.#rung.delete(key)
      if (!this.#open) return
      this.#world.trace.record(now(), "doorbell", vm, -1, doorbell, 0, range)
      try {
        this.#enter("doorbell")
        this.#handlers.doorbell(range, doorbell)
      } catch (defect) {
        this.#fail(defect)
      } finally {
        this.#handling = false
      }
    })
  }

  /** Doorbells that were rung and not yet delivered. */
  get rung(): ReadonlyArray<string> {
    return Array.from(this.#rung, (key) => {
      const range = this.bus.ranges[Math.floor(key / DOORBELLS_PER_RANGE)]
      return `${range?.device ?? "?"} doorbell ${key % DOORBELLS_PER_RANGE}`
    })
  }

  /** Offers a posted write to its device. */
  readonly post = (range: number, offset: number, size: number, value: number): boolean => {
    this.#enter("posted")
    try {
      return this.#handlers.posted(range, offset, size, value)
    } finally {
      this.#handling = false
    }
  }

  /** Delivers an access that the vCPU waits for. */
  call(range: number, offset: number, size: number, isWrite: boolean, value: number, reply: CallReply): void {
    this.#enter("call")
    try {
      this.#handlers.call(range, offset, size, isWrite, value, reply)
    } finally {
      this.#handling = false
    }
  }

  #enter(handler: string): void {
    if (!this.#open) {
      throw this.#world.violation(`the bus handler ${handler} would be called after its bus was released`)
    }
    if (this.#handling) throw this.#world.violation(`the bus handler ${handler} was called from inside a bus handler`)
    this.#handling = true
  }
}
