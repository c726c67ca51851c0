/** A fake virtual machine: memory as array buffers, a bus, latched interrupt lines and vCPUs that run guest programs. */
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import type * as Fiber from "effect/Fiber"
import type * as Scope from "effect/Scope"
import { BlockMap, PLUGGABLE_BLOCKS_MAX } from "../BlockMap.ts"
import type { Bus, BusHandlers, RangeBacking } from "../Bus.ts"
import { ADDRESS_LIMIT, addressEnd, formatAddress, INVALID_ADDRESS } from "../GuestAddress.ts"
import { GuestMemory, MemoryRegion, PAGE_SIZE } from "../GuestMemory.ts"
import type {
  HypervisorError,
  HypervisorLimits,
  InterruptLine,
  MessageInterrupt,
  PluggableMemory,
  Vcpu,
  Vm
} from "../Hypervisor.ts"
import type { VcpuExit } from "../VcpuExit.ts"
import type { VcpuState } from "../VcpuState.ts"
import { FakeBus } from "./FakeBus.ts"
import { FakeVcpu } from "./FakeVcpu.ts"
import { type FakeWorld, refusal } from "./FakeWorld.ts"
import { EBUSY, EEXIST, EINVAL, ENOMEM } from "./FaultPlan.ts"
import { type GuestProgram, messageInterrupt } from "./GuestCpu.ts"
import { SimulationControl, type SimulationParticipant } from "./SimulationControl.ts"
import type { TraceKind } from "./Trace.ts"

/** A machine of the fake hypervisor. */
export class FakeVm implements Vm, SimulationParticipant {
  readonly world: FakeWorld
  /** Number of the machine, counted from 1. */
  readonly number: number
  readonly limits: HypervisorLimits
  memory = new GuestMemory([])
  bus: FakeBus | undefined
  /** Puts a task among those that the fibers' scheduler chooses from. */
  readonly schedule: (task: () => void) => void
  /** Virtual time in milliseconds. */
  readonly now: () => number
  /** Whether to let others run at this point. */
  readonly pause: () => boolean
  readonly #name: string
  readonly #vcpus = new Map<number, FakeVcpu>()
  readonly #lines = new Set<number>()
  readonly #routes = new Map<number, number>()
  /** Interrupts that came before the boot vCPU was made. */
  readonly #early = new Set<number>()
  readonly #control: SimulationControl | undefined
  /** Message-signalled interrupts made so far. */
  #messages = 0
  #open = true

  constructor(world: FakeWorld, limits: HypervisorLimits, fiber: Fiber.Fiber<unknown, unknown>) {
    this.world = world
    this.limits = limits
    this.number = world.nextMachine()
    this.#name = `vm${this.number}`
    const clock = fiber.getRef(Clock.Clock)
    this.now = () => clock.currentTimeMillisUnsafe()
    const dispatcher = fiber.currentDispatcher
    this.schedule = (task) => dispatcher.scheduleTask(task, 0)
    const control = fiber.getRef(SimulationControl) ?? world.control
    this.pause = control === undefined ? never : control.pause
    this.#control = control
    control?.join(world)
    control?.join(this)
    this.trace("create-vm", -1, 0, 0)
  }

  // --- Vm --------------------------------------------------------------------------------------------------------------

  readonly addMemory = (
    guestAddress: number,
    size: number
  ): Effect.Effect<MemoryRegion, HypervisorError, Scope.Scope> => {
    const what = `${formatAddress(guestAddress)}, ${formatAddress(size)}`
    return this.world.operation(
      "addMemory",
      what,
      this.world.resource(
        `${this.#name} memory ${what}`,
        () => this.#allocate(guestAddress, size, what),
        (region) => this.#free(region)
      )
    )
  }

  readonly addPluggableMemory = (
    guestAddress: number,
    size: number,
    blockSize: number
  ): Effect.Effect<PluggableMemory, HypervisorError, Scope.Scope> => {
    const what = `${formatAddress(guestAddress)}, ${formatAddress(size)}, ${formatAddress(blockSize)}`
    const allocate = (): MemoryRegion | HypervisorError => {
      const count = size / blockSize
      if (
        !Number.isInteger(Math.log2(blockSize)) || blockSize < PAGE_SIZE || guestAddress % blockSize !== 0 ||
        !Number.isInteger(count) || count > PLUGGABLE_BLOCKS_MAX
      ) {
        return refusal("addPluggableMemory", what, "this is not a region of whole blocks, or of too many", EINVAL)
      }
      return this.#allocate(guestAddress, size, what, new BlockMap(count, blockSize))
    }
    return Effect.map(
      this.world.operation(
        "addPluggableMemory",
        what,
        this.world.resource(`${this.#name} pluggable memory ${what}`, allocate, (region) => this.#free(region))
      ),
      (region) => this.#pluggable(region)
    )
  }

  readonly attachBus = (
    bus: Bus,
    handlers: BusHandlers
  ): Effect.Effect<ReadonlyArray<RangeBacking>, HypervisorError, Scope.Scope> => {
    const what = `${bus.ranges.length} ranges`
    return Effect.map(
      this.world.operation(
        "attachBus",
        what,
        this.world.resource(
          `${this.#name} bus of ${what}`,
          () => this.#attach(bus, handlers, what),
          (attached) => {
            this.#quiet("the bus")
            attached.release()
            if (this.bus === attached) this.bus = undefined
            this.trace("release-bus", -1, 0, 0)
          }
        )
      ),
      (attached) => attached.backings
    )
  }

  readonly interruptLine = (gsi: number): Effect.Effect<InterruptLine, HypervisorError, Scope.Scope> =>
    this.world.operation(
      "interruptLine",
      String(gsi),
      this.world.resource(
        `${this.#name} interrupt line ${gsi}`,
        () => this.#line(gsi),
        () => {
          this.#lines.delete(gsi)
          this.trace("release-line", -1, gsi, 0)
        }
      )
    )

  readonly messageInterrupt: Effect.Effect<MessageInterrupt, HypervisorError, Scope.Scope> = Effect.suspend(() => {
    const what = String(this.#messages++)
    return this.world.operation(
      "messageInterrupt",
      what,
      this.world.resource(
        `${this.#name} message-signalled interrupt ${what}`,
        () => new FakeMessage((message) => this.#send(message)),
        (message) => message.release()
      )
    )
  })

  readonly createVcpu = (id: number): Effect.Effect<Vcpu, HypervisorError, Scope.Scope> =>
    Effect.map(
      this.world.operation(
        "createVcpu",
        String(id),
        this.world.resource(
          `${this.#name} vCPU ${id}`,
          () => this.#makeVcpu(id),
          (vcpu) => {
            this.#quiet(`vCPU ${id}`, [vcpu])
            this.#vcpus.delete(id)
            this.trace("release-vcpu", id, 0, 0)
          }
        )
      ),
      (vcpu) => this.#face(vcpu)
    )

  /** Ends the machine. */
  release(): void {
    this.#quiet("the machine")
    this.#open = false
    this.#control?.leave(this)
    this.trace("release-vm", -1, 0, 0)
  }

  // --- the machine's inside --------------------------------------------------------------------------------------------

  /** Sends the later interrupts of a line to a vCPU. */
  route(gsi: number, vcpu: number): void {
    this.#routes.set(gsi, vcpu)
  }

  /** INIT and start-up interrupts to another vCPU. Returns whether it waited for them. */
  startVcpu(id: number, program: GuestProgram): boolean {
    return this.#vcpus.get(id)?.start(program) ?? false
  }

  /** A vCPU has halted: when all have, or were never started, nobody is left who could wake one, and all runs end. */
  halted(): void {
    for (const vcpu of this.#vcpus.values()) {
      if (!vcpu.isHalted && !vcpu.isNotStarted) return
    }
    for (const vcpu of this.#vcpus.values()) vcpu.endHalted()
  }

  /** Ends every run with a defect. */
  fail(defect: unknown): void {
    this.world.violation(`${this.#name}: ${String(defect)}`, defect)
    for (const vcpu of this.#vcpus.values()) vcpu.die(defect)
  }

  readonly waiting = (): ReadonlyArray<string> => {
    const lines: Array<string> = []
    for (const vcpu of this.#vcpus.values()) {
      const waiting = vcpu.waiting
      if (waiting !== undefined) lines.push(waiting)
    }
    for (const doorbell of this.bus?.rung ?? []) lines.push(`${this.#name}: ${doorbell} was rung and not delivered`)
    return lines
  }

  readonly violations = (): ReadonlyArray<string> => []

  /** Records an event of this machine. */
  trace(kind: TraceKind, vcpu: number, address: number, value: number): void {
    this.world.trace.record(this.now(), kind, this.number, vcpu, address, 0, value)
  }

  #pluggable(region: MemoryRegion): PluggableMemory {
    const blocks = region.blocks ?? new BlockMap(0, PAGE_SIZE)
    const change = (operation: "plug" | "unplug") => (first: number, count: number) => {
      const what = `${count} blocks from ${first} on`
      return this.world.operation(
        operation,
        what,
        Effect.suspend(() => {
          if (region.bytes.length === 0) return Effect.fail(refusal(operation, what, "the memory was released", EINVAL))
          if (!Number.isInteger(first) || first < 0 || !(count >= 0) || first + count > blocks.count) {
            return Effect.fail(refusal(operation, what, "the region does not have all of these blocks", EINVAL))
          }
          const plugged = operation === "plug"
          this.trace(operation, -1, region.guestAddress + first * blocks.blockSize, count)
          // One block after the other: whoever interrupts it finds some of them changed.
          const from = (i: number): Effect.Effect<void> =>
            Effect.suspend(() => {
              if (i === count) return Effect.void
              const block = plugged ? first + count - 1 - i : first + i
              if (blocks.isPlugged(block) === plugged) return from(i + 1)
              region.bytes.fill(0, block * blocks.blockSize, (block + 1) * blocks.blockSize)
              blocks.set(block, plugged)
              return Effect.andThen(Effect.yieldNow, from(i + 1))
            })
          return from(0)
        })
      )
    }
    return { region, blocks, plug: change("plug"), unplug: change("unplug") }
  }

  #allocate(guestAddress: number, size: number, what: string, blocks?: BlockMap): MemoryRegion | HypervisorError {
    const end = addressEnd(guestAddress, size)
    if (end === INVALID_ADDRESS || end > ADDRESS_LIMIT || size === 0) {
      return refusal("addMemory", what, "this is no range of addresses", EINVAL)
    }
    if (guestAddress % PAGE_SIZE !== 0 || size % PAGE_SIZE !== 0) {
      return refusal("addMemory", what, "address and size must be whole pages", EINVAL)
    }
    if (
      this.memory.regions.some((region) =>
        region.guestAddress < end && guestAddress < region.guestAddress + region.size
      )
    ) {
      return refusal("addMemory", what, "the range overlaps memory that the machine has", EEXIST)
    }
    const overlapping = this.bus?.bus.overlapping(guestAddress, size)
    if (overlapping !== undefined) {
      return refusal("addMemory", what, `the range overlaps the device ${overlapping.device}`, EEXIST)
    }
    let buffer: ArrayBuffer
    try {
      // A resizable buffer is reserved address space: pages that the guest never touches cost neither clearing nor memory.
      buffer = new ArrayBuffer(size, { maxByteLength: size })
    } catch {
      return refusal("addMemory", what, "there is not enough memory", ENOMEM)
    }
    const region = new MemoryRegion(guestAddress, buffer, undefined, blocks)
    this.memory = new GuestMemory([...this.memory.regions, region])
    this.trace("add-memory", -1, guestAddress, size)
    return region
  }

  #free(region: MemoryRegion): void {
    this.#quiet("memory")
    this.memory = new GuestMemory(this.memory.regions.filter((other) => other !== region))
    region.bytes.buffer.transferToFixedLength(0)
    this.trace("release-memory", -1, region.guestAddress, region.size)
  }

  #attach(bus: Bus, handlers: BusHandlers, what: string): FakeBus | HypervisorError {
    if (this.bus !== undefined) return refusal("attachBus", what, "the machine has a bus already", EEXIST)
    for (const region of this.memory.regions) {
      const range = bus.overlapping(region.guestAddress, region.size)
      if (range !== undefined) {
        return refusal("attachBus", what, `the device ${range.device} overlaps memory`, EEXIST)
      }
    }
    const attached = new FakeBus(bus, handlers, this.world, this.schedule, (defect) => this.fail(defect))
    this.bus = attached
    this.trace("attach-bus", -1, 0, bus.ranges.length)
    return attached
  }

  #line(gsi: number): InterruptLine | HypervisorError {
    if (!Number.isInteger(gsi) || gsi < 0 || gsi >= this.limits.interruptLines) {
      return refusal(
        "interruptLine",
        String(gsi),
        `lines are numbered from 0 to ${this.limits.interruptLines - 1}`,
        EINVAL
      )
    }
    if (this.#lines.has(gsi)) return refusal("interruptLine", String(gsi), "the line is taken", EEXIST)
    this.#lines.add(gsi)
    this.trace("interrupt-line", -1, gsi, 0)
    return {
      gsi,
      trigger: () => {
        if (!this.#open || !this.#lines.has(gsi)) return
        this.trace("trigger", -1, gsi, 0)
        const vcpu = this.#vcpus.get(this.#routes.get(gsi) ?? 0)
        if (vcpu === undefined) this.#early.add(gsi)
        else vcpu.interrupt(gsi)
      }
    }
  }

  /** A write to the local APICs: physical destination, fixed delivery. */
  #send({ addressLow, data }: FakeMessage): void {
    const number = messageInterrupt(data & MESSAGE_VECTOR)
    this.trace("trigger", -1, number, addressLow)
    if (!this.#open || addressLow >>> MESSAGE_PREFIX_SHIFT !== MESSAGE_PREFIX) return
    this.#vcpus.get((addressLow >>> MESSAGE_DESTINATION_SHIFT) & 0xff)?.interrupt(number)
  }

  #makeVcpu(id: number): FakeVcpu | HypervisorError {
    if (!Number.isInteger(id) || id < 0 || id >= this.limits.maxVcpus) {
      return refusal("createVcpu", String(id), `vCPUs are numbered from 0 to ${this.limits.maxVcpus - 1}`, EINVAL)
    }
    if (this.#vcpus.has(id)) return refusal("createVcpu", String(id), "the machine has this vCPU already", EEXIST)
    for (const vcpu of this.#vcpus.values()) {
      if (vcpu.entered) return refusal("createVcpu", String(id), "a vCPU of the machine has run already", EBUSY)
    }
    const vcpu = new FakeVcpu(this, id)
    this.#vcpus.set(id, vcpu)
    if (id === 0) {
      for (const gsi of this.#early) vcpu.interrupt(gsi)
      this.#early.clear()
    }
    this.trace("create-vcpu", id, 0, 0)
    return vcpu
  }

  #face(vcpu: FakeVcpu): Vcpu {
    const subject = `vCPU ${vcpu.id}`
    const setState = (state: VcpuState): Effect.Effect<void, HypervisorError> =>
      this.world.operation(
        "setState",
        subject,
        Effect.suspend(() => {
          if (vcpu.entered) return Effect.fail(refusal("setState", subject, "the vCPU has run already", EBUSY))
          vcpu.state = state
          this.trace("set-state", vcpu.id, state.rip, 0)
          return Effect.void
        })
      )
    const run: Effect.Effect<VcpuExit, HypervisorError> = this.world.operation(
      "run",
      subject,
      Effect.withFiber((fiber) => {
        if (vcpu.active) return Effect.fail(refusal("run", subject, "the vCPU is running", EBUSY))
        if (vcpu.stopped) return Effect.fail(refusal("run", subject, "the vCPU has stopped for good", EINVAL))
        if (vcpu.id === 0 && vcpu.state === undefined) {
          return Effect.fail(refusal("run", subject, "the boot vCPU has no state: call setState first", EINVAL))
        }
        return Effect.callback<VcpuExit, HypervisorError>((resume) => {
          this.trace("run", vcpu.id, vcpu.state?.rip ?? 0, 0)
          vcpu.enter(fiber, resume)
          return Effect.suspend(() => {
            vcpu.leave()
            return this.pause() ? Effect.yieldNow : Effect.void
          })
        })
      })
    )
    return { id: vcpu.id, setState, run }
  }

  /** Nothing is taken from under a vCPU that runs: that breaks a rule, and ends the run. */
  #quiet(what: string, vcpus: Iterable<FakeVcpu> = this.#vcpus.values()): void {
    for (const vcpu of vcpus) {
      if (vcpu.active) vcpu.die(this.world.violation(`${what} of ${this.#name} was released while vCPU ${vcpu.id} ran`))
    }
  }
}

/** Addresses and data of messages (Intel SDM volume 3, section 11.11). */
const MESSAGE_PREFIX = 0xfee
const MESSAGE_PREFIX_SHIFT = 20
const MESSAGE_DESTINATION_SHIFT = 12
const MESSAGE_VECTOR = 0xff

/** A message-signalled interrupt of the fake. */
class FakeMessage implements MessageInterrupt {
  addressLow = 0
  data = 0
  #routed = false
  readonly #send: (message: FakeMessage) => void

  constructor(send: (message: FakeMessage) => void) {
    this.#send = send
  }

  readonly route = (addressLow: number, _addressHigh: number, data: number): void => {
    this.addressLow = addressLow
    this.data = data
    this.#routed = true
  }

  readonly trigger = (): void => {
    if (this.#routed) this.#send(this)
  }

  release(): void {
    this.#routed = false
  }
}

const never = (): boolean => false
