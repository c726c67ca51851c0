// One device with its transport and its queues, on plain memory without a machine, and beside it a second device with a correct
// driver: as little as there can be around a device, so that a million hostile drivers take minutes.
//
// Everything runs in a simulation, so a rig and the scripts that it has played decide what happens.
import { BlockMap } from "@troupe/core/BlockMap"
import type { Device, DeviceBehaviour } from "@troupe/core/Device"
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import type { PluggableMemory } from "@troupe/core/Hypervisor"
import { Simulation } from "@troupe/core/testing"

import {
  HOSTILE_MEM_ADDRESS,
  HOSTILE_MEM_BLOCK,
  HOSTILE_MEM_BLOCKS,
  HostileLayout,
  type HostileStep
} from "@troupe/core/testing/drivers/HostileScript"
import { type HostileStage, playHostile } from "@troupe/core/testing/drivers/HostileVirtioDriver"
import { type VirtioDriver, VirtioStatus } from "@troupe/core/testing/drivers/VirtioDriver"
import { VirtioMmioDriver } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import { findVirtioPci, VirtioPciDriver } from "@troupe/core/testing/drivers/VirtioPciDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import { Seed } from "@troupe/core/testing/Seed"
import { DescriptorChain } from "@troupe/devices/virtio/DescriptorChain"
import { PackedQueue } from "@troupe/devices/virtio/PackedQueue"
import { SplitQueue } from "@troupe/devices/virtio/SplitQueue"
import * as Effect from "effect/Effect"
import * as References from "effect/References"
import { getHeapStatistics } from "node:v8"
import {
  correctQueueSizes,
  entropySubject,
  type HostileChoices,
  type HostileSubject,
  type MakeSubject
} from "./HostileDevices.ts"
import { FIRST_BASE, OneDevice, runRoutine } from "./OneDevice.ts"

/** Memory of the hostile driver's machine: one region below and a small one at 4 GiB. */
const MEMORY_SIZE = 0x10_0000
const HIGH_ADDRESS = 2 ** 32
const HIGH_SIZE = 0x1_0000
/** Where the hostile driver, and after it the correct one, has its things. */
export const HOSTILE_MEMORY = 0x4_0000
const CORRECT_QUEUES = 0xd_0000
const CORRECT_DATA = 0xc_0000
const NEIGHBOUR_MEMORY_SIZE = 0x2_0000

/** Where a device on virtio-mmio is. */
const PLACE = { base: FIRST_BASE, gsi: 0 } as const

/** What one turn of a device may do at most. */
export const TURN_CHAINS_MAX = 1024
/** Descriptors walked and copies made in one turn. */
export const TURN_STEPS_MAX = 0x2_0000
/** Bytes copied in one turn. */
export const TURN_BYTES_MAX = 0x200_0000
/** Bytes that one script may have the host allocate, on the heap and outside of it, besides {@link HEAP_PER_BYTE}. */
export const CASE_HEAP_MAX = 0x180_0000
/** Bytes that may be allocated for each byte that the device copied: what goes to the host's streams does not stay. */
const HEAP_PER_BYTE = 4
/** Rounds of work after which a device must have answered a correct driver, and come to rest. */
const ROUNDS_MAX = 1000
/** Rounds that a device gets for what a script has left to do. */
const ROUNDS_AFTER = 200
/** Tasks of the simulation that a round may take. */
const TASKS_PER_ROUND = 10_000

/** A property does not hold. */
export class HostileFinding extends Error {
  override readonly name = "HostileFinding"
}

/** What a turn has done so far. Queues and chains are counted for all rigs of the process: one turn runs at a time. */
const turn = { chains: 0, steps: 0, bytes: 0 }
/** Changes guest memory under the device's eyes, after each look at it; `undefined` when nobody does. */
let race: ((chain: DescriptorChain) => void) | undefined

const instrument = (): void => {
  for (const queue of [SplitQueue.prototype, PackedQueue.prototype]) {
    const take = queue.take
    queue.take = function(this: SplitQueue & PackedQueue, chain: DescriptorChain): boolean {
      const taken = take.call(this, chain)
      turn.steps += 1 + chain.descriptors
      if (taken) turn.chains++
      race?.(chain)
      return taken
    }
  }
  const { read, write } = DescriptorChain.prototype
  DescriptorChain.prototype.read = function(this: DescriptorChain, position: number, target: Uint8Array): number {
    const bytes = read.call(this, position, target)
    turn.bytes += bytes
    turn.steps++
    race?.(this)
    return bytes
  }
  DescriptorChain.prototype.write = function(this: DescriptorChain, position: number, source: Uint8Array): number {
    const bytes = write.call(this, position, source)
    turn.bytes += bytes
    turn.steps++
    race?.(this)
    return bytes
  }
}
instrument()

/** What the rigs have seen, for people. */
export const hostileStatistics = {
  longestTurn: 0,
  mostChains: 0,
  mostBytes: 0,
  mostSteps: 0,
  longest: "",
  mostHeap: 0,
  turns: 0,
  chains: 0,
  bytes: 0,
  needsReset: 0
}

/** A device whose handlers are looked at: nothing leaves them, and no turn goes too far. */
const watched = (device: Device, crash: (cause: unknown) => never): Device => {
  const guard = <A>(what: string, run: () => A): A => {
    turn.chains = 0
    turn.steps = 0
    turn.bytes = 0
    const begun = performance.now()
    let result: A
    try {
      result = run()
    } catch (cause) {
      return crash(new HostileFinding(`${what} threw`, { cause }))
    }
    const statistics = hostileStatistics
    statistics.turns++
    statistics.chains += turn.chains
    statistics.bytes += turn.bytes
    const duration = performance.now() - begun
    if (duration > statistics.longestTurn) {
      statistics.longestTurn = duration
      statistics.longest = `${what} of ${device.name}`
    }
    statistics.mostSteps = Math.max(statistics.mostSteps, turn.steps)
    statistics.mostChains = Math.max(statistics.mostChains, turn.chains)
    statistics.mostBytes = Math.max(statistics.mostBytes, turn.bytes)
    if (turn.chains > TURN_CHAINS_MAX || turn.steps > TURN_STEPS_MAX || turn.bytes > TURN_BYTES_MAX) {
      crash(new HostileFinding(`${what} took ${turn.chains} chains, ${turn.steps} steps and ${turn.bytes} bytes`))
    }
    return result
  }
  return {
    ...device,
    start: (context) =>
      Effect.map(device.start(context), (behaviour): DeviceBehaviour => ({
        ...behaviour,
        read: (range, offset, size) => guard("a read", () => behaviour.read(range, offset, size)),
        write: (range, offset, size, value) => guard("a write", () => behaviour.write(range, offset, size, value)),
        doorbell: (range, bell) => guard(`doorbell ${bell}`, () => behaviour.doorbell?.(range, bell) ?? false),
        signal: (number) => guard(`signal ${number}`, () => behaviour.signal?.(number) ?? false)
      }))
  }
}

/** Memory that comes and goes, as a hypervisor has it. */
const pluggable = (): PluggableMemory => {
  const blocks = new BlockMap(HOSTILE_MEM_BLOCKS, HOSTILE_MEM_BLOCK)
  const buffer = new ArrayBuffer(HOSTILE_MEM_BLOCKS * HOSTILE_MEM_BLOCK)
  const change = (plugged: boolean) => (first: number, count: number) =>
    Effect.sync(() => {
      for (let i = 0; i < count; i++) blocks.set(first + i, plugged)
    })
  return {
    region: new MemoryRegion(HOSTILE_MEM_ADDRESS, buffer, undefined, blocks),
    blocks,
    plug: change(true),
    unplug: change(false)
  }
}

/** A device on which scripts are played, one after the other. */
export class HostileRig {
  readonly subject: HostileSubject
  readonly one: OneDevice
  readonly #world = Simulation.make({ seed: 1, preempt: false, maxSteps: Number.POSITIVE_INFINITY })
  readonly #cpu: GuestCpu
  readonly #driver: VirtioDriver
  readonly #stage: HostileStage
  readonly #neighbour: OneDevice
  readonly #neighbourDriver = new VirtioMmioDriver(PLACE)
  /** Whether the correct driver uses packed queues; the hostile one uses what it likes. */
  readonly #packed: boolean
  #crashed: unknown

  constructor(make: MakeSubject, choices: HostileChoices) {
    const crash = (cause: unknown): never => {
      this.#crashed ??= cause
      throw cause
    }
    this.#packed = choices.packed
    let subject: HostileSubject | undefined
    let one: OneDevice | undefined
    let neighbour: OneDevice | undefined
    const lives = this.#world.fork(
      Effect.gen(function*() {
        subject = yield* make(choices)
        const pluggableMemory = subject.pluggable ? pluggable() : undefined
        const memory = new GuestMemory([
          new MemoryRegion(0, new ArrayBuffer(MEMORY_SIZE)),
          new MemoryRegion(HIGH_ADDRESS, new ArrayBuffer(HIGH_SIZE)),
          ...(pluggableMemory === undefined ? [] : [pluggableMemory.region])
        ])
        one = new OneDevice(watched(subject.device, crash), memory)
        const behaviour = yield* one.start({ pluggableMemory })
        const other = yield* entropySubject({ transport: "mmio", packed: false })
        const ownMemory = new MemoryRegion(0, new ArrayBuffer(NEIGHBOUR_MEMORY_SIZE))
        neighbour = new OneDevice(other.device, new GuestMemory([ownMemory]))
        const { run = Effect.never } = yield* neighbour.start()
        yield* Effect.forkChild(subject.background)
        yield* Effect.raceFirst(behaviour.run ?? Effect.never, run)
      }).pipe(Effect.provideService(References.MinimumLogLevel, "None"))
    )
    lives.addObserver((exit) => {
      this.#crashed ??= new HostileFinding("the device's background work has ended", { cause: exit })
    })
    this.#world.settle()
    if (subject === undefined || one === undefined || neighbour === undefined) {
      throw new Error("the device does not start", { cause: this.#crashed })
    }
    this.subject = subject
    this.one = one
    one.onYield = () => this.#round(true)
    this.#cpu = one.cpu
    this.#driver = choices.transport === "pci" ? this.#findPci() : new VirtioMmioDriver(PLACE)
    this.#neighbour = neighbour
    runRoutine(this.#neighbourDriver.start(neighbour.cpu, { memoryAddress: 0x1_0000, queueSizes: [4] }))
    const { bases } = one
    const windows = one.device.ranges.flatMap(({ size, space }, index) => {
      const base = bases[index]
      return space === "mmio" && base !== undefined ? [{ base, size }] : []
    })
    this.#stage = {
      driver: this.#driver,
      windows,
      memory: HOSTILE_MEMORY,
      queues: subject.profile.queues,
      hooks: {
        race: (seed) => this.#race(seed),
        host: (action) => {
          this.#world.fork(this.subject.host(action))
          this.#world.settle()
        },
        neighbour: () => this.#neighbourWorks()
      }
    }
  }

  /** Plays a script, and looks at what is left of the device. Throws what is wrong. */
  play(script: ReadonlyArray<HostileStep>): void {
    for (const region of this.one.memory.regions) region.bytes.fill(0)
    const before = getHeapStatistics()
    const copiedBefore = hostileStatistics.bytes
    try {
      this.#attempt("the script", () => runRoutine(playHostile(this.#cpu, this.#stage, script)))
      race = undefined
      this.subject.calm()
      this.#attempt("the work that was left", () => this.#goOn())
      this.#attempt("the state", () => this.#legal())
      this.#attempt("the neighbour", () => runRoutine(this.#neighbourWorks()))
      this.#attempt("a correct driver afterwards", () => runRoutine(this.#works()))
    } finally {
      race = undefined
    }
    const after = getHeapStatistics()
    const heap = after.total_allocated_bytes - before.total_allocated_bytes
    const outside = after.external_memory - before.external_memory
    const limit = CASE_HEAP_MAX + HEAP_PER_BYTE * (hostileStatistics.bytes - copiedBefore)
    hostileStatistics.mostHeap = Math.max(hostileStatistics.mostHeap, heap + outside - limit + CASE_HEAP_MAX)
    if (heap + outside > limit) {
      throw new HostileFinding(`the script had ${heap} + ${outside} bytes allocated, of ${limit}`)
    }
  }

  /** A correct driver resets the device and has a request done; then the device is reset again, for the next script. */
  *#works(): GuestRoutine {
    const { features, profile, request } = this.subject
    const queueSizes = correctQueueSizes(profile)
    const packed = this.#packed
    yield* this.#driver.start(this.#cpu, { memoryAddress: CORRECT_QUEUES, queueSizes, features, packed })
    const { buffers, bytes, queue } = request(CORRECT_DATA)
    this.#cpu.memory.write(CORRECT_DATA, Uint8Array.from(bytes))
    const head = this.#driver.ring(queue).add(buffers)
    this.#driver.ring(queue).publish()
    yield* this.#driver.notify(this.#cpu, queue)
    for (let round = 0; round < ROUNDS_MAX; round++) {
      this.#round(round > 4)
      const used = this.#driver.ring(queue).poll()
      if (used?.head !== head) continue
      this.#rest()
      yield* this.#driver.reset(this.#cpu)
      this.#rest()
      return
    }
    throw new HostileFinding(
      `the device does not answer a correct driver, status ${yield* this.#driver.status(this.#cpu)}`
    )
  }

  *#neighbourWorks(): GuestRoutine {
    const { cpu } = this.#neighbour
    yield* this.#neighbourDriver.send(cpu, 0, [[{ address: 0, length: 16, writable: true }]])
    this.#neighbour.turn()
    const used = this.#neighbourDriver.queue(0).poll()
    if (used?.written !== 16) throw new HostileFinding("the neighbour's request is not answered")
  }

  /** Any bits of the status that there are, in an order that there is, and registers that say what they always say. */
  #legal(): void {
    const status = runRoutine(this.#driver.status(this.#cpu))
    const { ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK } = VirtioStatus
    const implies = (bit: number, needed: number) => (status & bit) === 0 || (status & needed) === needed
    if (
      (status & ~(ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | DEVICE_NEEDS_RESET | FAILED)) !== 0 ||
      !implies(DRIVER, ACKNOWLEDGE) || !implies(FEATURES_OK, DRIVER) || !implies(DRIVER_OK, FEATURES_OK)
    ) throw new HostileFinding(`the device status is ${status}`)
    if ((status & DEVICE_NEEDS_RESET) !== 0) hostileStatistics.needsReset++
  }

  /** Some of what a script has left to do: there may be hours of it, and a reset must end them. */
  #goOn(): void {
    for (let round = 0; round < ROUNDS_AFTER && !this.one.atRest; round++) this.#round(round > 4)
  }

  /** Nothing is left to do. */
  #rest(): void {
    for (let round = 0; round < ROUNDS_MAX; round++) {
      if (this.one.atRest) return
      this.#round(round > 4)
    }
    throw new HostileFinding(`the device does not come to rest: ${this.one.waiting}`)
  }

  /** A turn for everything that waits. Later rounds let time pass, for what a device does at a pace. */
  #round(timePasses: boolean): void {
    this.one.turn()
    const limit = this.#world.steps + TASKS_PER_ROUND
    if (timePasses) this.#world.advance(1)
    this.#world.settle()
    if (this.#world.steps > limit) throw new HostileFinding("a round took more tasks than it may")
    if (this.#crashed !== undefined) throw this.#crashed
  }

  #attempt(what: string, run: () => void): void {
    try {
      run()
    } catch (cause) {
      if (this.#crashed !== undefined && cause !== this.#crashed) {
        throw new HostileFinding(`${what}: the device has failed`, { cause: this.#crashed })
      }
      throw new HostileFinding(`${what}: ${cause instanceof Error ? cause.message : String(cause)}`, { cause })
    }
    if (this.#crashed !== undefined) {
      throw new HostileFinding(`${what}: the device has failed`, { cause: this.#crashed })
    }
  }

  /** Memory that changes whenever the device has looked: mostly where it looked, and anywhere in the rings and tables. */
  #race(seed: number): void {
    const choices = new Seed(seed)
    const region = this.one.memory.regions[0]
    if (region === undefined) return
    race = (chain) => {
      const at = HOSTILE_MEMORY + HostileLayout.rings + choices.choose(HostileLayout.data)
      region.bytes[at] = choices.choose(0x100)
      for (let buffer = 0; buffer < Math.min(chain.count, 4); buffer++) {
        const byte = choices.choose(Math.min(chain.length(buffer), 64))
        chain.array(buffer)[chain.offset(buffer) + byte] = choices.choose(0x100)
      }
    }
  }

  #findPci(): VirtioDriver {
    const [place] = runRoutine(findVirtioPci(this.#cpu, FIRST_BASE))
    if (place === undefined) throw new Error("there is no virtio function")
    return new VirtioPciDriver(place, 0x40)
  }
}
