/**
 * The way of one vCPU to the devices: serves each access as its range declares it, and keeps the order that the bus promises.
 *
 * Posted writes wait in a ring and are delivered as a task of their own, in order, and at the latest before the vCPU's next
 * call. Between vCPUs, and between doorbells and the rest, there is no order.
 */
import type { CallReply } from "../Bus.ts"
import { openBusValue, SHADOW_INVALID } from "../Bus.ts"
import { describeRegister, type FakeBus } from "./FakeBus.ts"
import type { FakeVm } from "./FakeVm.ts"
import type { FakeWorld } from "./FakeWorld.ts"
import type { GuestReply } from "./GuestCpu.ts"
import type { Operation } from "./GuestOperations.ts"
import { PostedRing } from "./PostedRing.ts"
import type { TraceKind } from "./Trace.ts"

/** How often a device that has no room for a posted write is asked again at once, before a millisecond is let pass each time. */
const POSTED_RETRIES = 64

/**
 * What became of an access: it is done, its device will answer, a posted write must find room first, or a device took the
 * machine down over an earlier write and there is nobody to ask.
 */
export type AccessProgress = "done" | "call" | "room" | "gone"

/** What a port needs of its vCPU. */
export interface BusPortOwner {
  readonly id: number
  /** Puts a task among those that the scheduler chooses from. */
  readonly schedule: (task: () => void) => void
  /** Does a task after some milliseconds of virtual time. */
  readonly after: (millis: number, task: () => void) => void
  /** The device has answered the call that the vCPU waits for. */
  readonly answered: (value: number) => void
  /** Posted writes were delivered; `drained` when none is left. */
  readonly delivered: (drained: boolean) => void
}

class PendingCall implements CallReply {
  done = false
  value = 0
  readonly #world: FakeWorld
  readonly #what: string
  readonly #size: number
  readonly #isWrite: boolean
  readonly #answered: (call: PendingCall) => void

  constructor(world: FakeWorld, what: string, size: number, isWrite: boolean, answered: (call: PendingCall) => void) {
    this.#world = world
    this.#what = what
    this.#size = size
    this.#isWrite = isWrite
    this.#answered = answered
  }

  readonly complete = (value: number): void => {
    if (this.done) throw this.#world.violation(`the answer to ${this.#what} was given twice`)
    const limit = 2 ** (8 * this.#size)
    if (!this.#isWrite && !(Number.isInteger(value) && value >= 0 && value < limit)) {
      throw this.#world.violation(
        `the answer to ${this.#what} is ${value}, not an unsigned number of ${this.#size} bytes`
      )
    }
    this.done = true
    this.value = this.#isWrite ? 0 : value
    this.#answered(this)
  }
}

/** One vCPU's way to the devices. */
export class FakeBusPort {
  /** The value that the last access read. */
  value: GuestReply
  /** The call that was made last, for reports. */
  calling = ""
  readonly #vm: FakeVm
  readonly #owner: BusPortOwner
  readonly #ring = new PostedRing()
  #drainScheduled = false
  #refusals = 0
  #call: PendingCall | undefined
  /** The handler of the call has not returned yet. */
  #inCall = false

  constructor(vm: FakeVm, owner: BusPortOwner) {
    this.#vm = vm
    this.#owner = owner
  }

  /** Number of posted writes that wait. */
  get posted(): number {
    return this.#ring.length
  }

  /** Does an access, as far as it can be done now. */
  access(operation: Operation, mmio: boolean, isWrite: boolean): AccessProgress {
    const { address, size, value } = operation
    if (mmio && this.accessMemory(operation, isWrite)) return "done"
    const fakeBus = this.#vm.bus
    const index = fakeBus === undefined ? -1 : fakeBus.bus.find(mmio ? "mmio" : "pio", address, size)
    const range = fakeBus?.bus.ranges[index]
    if (fakeBus === undefined || range === undefined) {
      this.#trace(isWrite ? "open-bus-write" : "open-bus-read", address, size, value)
      this.value = isWrite ? undefined : openBusValue(size)
      return "done"
    }
    const offset = address - range.base
    this.value = undefined
    if (isWrite) {
      const doorbell = fakeBus.doorbellOf(index, offset, size, value)
      if (doorbell >= 0) {
        this.#trace("ring", address, size, value)
        fakeBus.ring(this.#vm.number, this.#vm.now, index, doorbell)
        return "done"
      }
      if (range.write === "posted") return this.#post(index, offset, size, value, address)
    } else if (range.read === "register-page") {
      const page = fakeBus.backings[index]?.page
      this.value = page === undefined ? openBusValue(size) : accessView(page, offset, size, false, 0)
      this.#trace("page-read", address, size, this.value ?? 0)
      return "done"
    } else if (range.read === "shadowed") {
      const shadowed = fakeBus.shadowed(index, offset, size)
      if (shadowed !== SHADOW_INVALID) {
        this.#trace("shadowed-read", address, size, shadowed)
        this.value = shadowed
        return "done"
      }
    }
    return this.#callDevice(fakeBus, index, offset, size, isWrite, value, address)
  }

  /** Does an access that RAM answers. Returns whether it is one. */
  accessMemory(operation: Operation, isWrite: boolean): boolean {
    const { address, size, value } = operation
    const region = this.#vm.memory.regionOf(address, size)
    if (region === undefined) return false
    this.value = accessView(region.view, address - region.guestAddress, size, isWrite, value)
    return true
  }

  /** Delivers posted writes in order. Returns whether none is left, or nobody who could take them. */
  drain(): boolean {
    const fakeBus = this.#vm.bus
    if (this.#ring.empty || fakeBus === undefined || !fakeBus.open) return true
    return this.#ring.drain((range, offset, size, value) => {
      // A device that fails over a write may have taken the whole machine with it: nobody is left for the rest.
      if (!fakeBus.open) return true
      const taken = fakeBus.post(range, offset, size, value)
      this.#trace(taken ? "posted" : "posted-later", (fakeBus.bus.ranges[range]?.base ?? 0) + offset, size, value)
      this.#refusals = taken ? 0 : this.#refusals + 1
      return taken
    })
  }

  /** Has posted writes delivered soon. */
  scheduleDrain(): void {
    if (this.#drainScheduled) return
    this.#drainScheduled = true
    if (this.#refusals < POSTED_RETRIES) this.#owner.schedule(this.#drainTask)
    else this.#owner.after(1, this.#drainTask)
  }

  readonly #drainTask = (): void => {
    this.#drainScheduled = false
    if (this.#vm.bus?.open !== true) return
    try {
      const drained = this.drain()
      if (!drained) this.scheduleDrain()
      if (drained || !this.#ring.full) this.#owner.delivered(drained)
    } catch (defect) {
      this.#vm.fail(defect)
    }
  }

  #post(range: number, offset: number, size: number, value: number, address: number): AccessProgress {
    if (this.#ring.full) return this.#awaitRoom()
    this.#trace("post", address, size, value)
    this.#ring.push(range, offset, size, value)
    this.scheduleDrain()
    return "done"
  }

  #awaitRoom(): AccessProgress {
    this.scheduleDrain()
    return "room"
  }

  #callDevice(
    fakeBus: FakeBus,
    range: number,
    offset: number,
    size: number,
    isWrite: boolean,
    value: number,
    address: number
  ): AccessProgress {
    if (!this.drain()) return this.#awaitRoom()
    if (!fakeBus.open) return "gone"
    this.#trace(isWrite ? "call-write" : "call-read", address, size, value)
    this.calling = `${isWrite ? "a write to" : "a read of"} ${describeRegister(fakeBus.bus.ranges[range], offset)}`
    const call = new PendingCall(this.#vm.world, this.calling, size, isWrite, this.#answered)
    this.#call = call
    this.#inCall = true
    try {
      fakeBus.call(range, offset, size, isWrite, value, call)
    } finally {
      this.#inCall = false
    }
    if (!call.done) return "call"
    this.#call = undefined
    this.value = isWrite ? undefined : call.value
    return "done"
  }

  readonly #answered = (call: PendingCall): void => {
    if (this.#call !== call) return
    this.#trace("reply", 0, 0, call.value)
    if (this.#inCall) return // the vCPU sees it when the handler returns
    this.#call = undefined
    this.#owner.answered(call.value)
  }

  #trace(kind: TraceKind, address: number, size: number, value: number): void {
    this.#vm.world.trace.record(this.#vm.now(), kind, this.#vm.number, this.#owner.id, address, size, value)
  }
}

/** One little-endian access of 1, 2 or 4 bytes. Returns the value read, or `undefined` for a write. */
const accessView = (view: DataView, offset: number, size: number, isWrite: boolean, value: number): GuestReply => {
  if (isWrite) {
    if (size === 1) view.setUint8(offset, value)
    else if (size === 2) view.setUint16(offset, value, true)
    else view.setUint32(offset, value, true)
    return undefined
  }
  return size === 1 ? view.getUint8(offset) : size === 2 ? view.getUint16(offset, true) : view.getUint32(offset, true)
}
