/**
 * A driver of a virtio device with a dial: from a correct one to one that does nothing right.
 *
 * It plays scripts (`HostileScript.ts`). What it does follows from its numbers alone, so a failing seed repeats itself. The device
 * may do what it likes with it, as long as a correct driver finds it working afterwards.
 */
import type { GuestCpu, GuestRoutine } from "../GuestCpu.ts"
import { Choice } from "./HostileChoice.ts"
import { entropyProfile } from "./HostileProfiles.ts"
import {
  HOSTILE_QUEUES_MAX,
  type HostileDescriptor,
  HostileLayout,
  type HostileProfile,
  hostileScript,
  type HostileStep
} from "./HostileScript.ts"
import type { VirtioDriver } from "./VirtioDriver.ts"
import { VirtioMmioDriver, type VirtioMmioPlace } from "./VirtioMmioDriver.ts"

const DESCRIPTOR_SIZE = 16
const NEXT = 1
const INDIRECT = 4
const AVAIL = 0x80
const USED = 0x8000
const INDEX_MASK = 0xffff
const RING_PACKED_HIGH = 1 << 2
const VERSION_1_HIGH = 1
const RESET_TRIES = 50

/** What a script can do besides driving its device. Each default does nothing. */
export interface HostileHooks {
  readonly race?: (seed: number) => void
  readonly host?: (action: number) => void
  readonly neighbour?: () => GuestRoutine
}

/** Where a script is played. */
export interface HostileStage {
  /** Reaches the device; its own queues are not used. */
  readonly driver: VirtioDriver
  /** The device's windows in guest memory. */
  readonly windows: ReadonlyArray<{ readonly base: number; readonly size: number }>
  /** First address of {@link HostileLayout.size} bytes of the driver's own, a multiple of 4096. */
  readonly memory: number
  readonly queues: number
  readonly hooks?: HostileHooks
}

/** The rings of one queue as the driver writes them, whatever the device makes of that. */
class HostileQueue {
  readonly #cpu: GuestCpu
  readonly #rings: number
  readonly #tables: number
  #size = 16
  #packed = false
  /** The next entry of the table or the ring to write, and the lap. */
  #next = 0
  #wrap = 1
  #ids = 0

  constructor(cpu: GuestCpu, memory: number, queue: number) {
    this.#cpu = cpu
    this.#rings = memory + HostileLayout.rings + queue * HostileLayout.ringStride
    this.#tables = memory + HostileLayout.tables + queue * HostileLayout.tableStride
  }

  begin(size: number, packed: boolean): void {
    this.#size = size
    this.#packed = packed
    this.#next = 0
    this.#wrap = 1
    this.#ids = 0
    this.#cpu.memory.slice(this.#rings, HostileLayout.ringStride)?.fill(0)
  }

  /** Descriptors first; the available ring 2048 bytes before the end of the ring's part, and before it the used ring. */
  get place() {
    const descriptor = this.#rings
    return {
      size: this.#size,
      areas: this.#packed
        ? { descriptor, driver: descriptor + 16 * this.#size, device: descriptor + 16 * this.#size + 4 }
        : { descriptor, driver: descriptor + 16 * this.#size, device: descriptor + HostileLayout.ringStride / 2 }
    }
  }

  /** Makes a chain available. */
  request(descriptors: ReadonlyArray<HostileDescriptor>): void {
    for (const { address, bytes } of descriptors) {
      if (bytes !== undefined) this.#cpu.memory.write(address, Uint8Array.from(bytes))
    }
    if (this.#packed) {
      for (const descriptor of descriptors) this.#writePacked(descriptor)
      this.#ids++
      return
    }
    const head = this.#next
    descriptors.forEach((descriptor) => {
      const following = (this.#next + 1) % this.#size
      const at = this.#rings + this.#next * DESCRIPTOR_SIZE
      this.#write(at, descriptor, descriptor.flags, descriptor.next ?? following, false)
      this.#next = following
    })
    const index = this.#load(this.place.areas.driver + 2)
    this.#store(this.place.areas.driver + 4 + 2 * (index % this.#size), head)
    this.#store(this.place.areas.driver + 2, index + 1)
  }

  /** The same through a table. */
  table(descriptors: ReadonlyArray<HostileDescriptor>, length: number | undefined, flags: number): void {
    descriptors.slice(0, HostileLayout.tableStride / DESCRIPTOR_SIZE).forEach((descriptor, i) => {
      if (descriptor.bytes !== undefined) {
        this.#cpu.memory.write(descriptor.address, Uint8Array.from(descriptor.bytes))
      }
      const at = this.#tables + i * DESCRIPTOR_SIZE
      this.#write(at, descriptor, descriptor.flags, descriptor.next ?? i + 1, this.#packed)
    })
    this.request([{
      address: this.#tables,
      length: length ?? descriptors.length * DESCRIPTOR_SIZE,
      flags: INDIRECT | flags
    }])
  }

  /** Says that so many more are available. */
  jump(by: number): void {
    if (!this.#packed) {
      this.#store(this.place.areas.driver + 2, this.#load(this.place.areas.driver + 2) + by)
      return
    }
    for (let i = 0; i < Math.min(by, 2 * this.#size); i++) {
      const at = this.#rings + this.#next * DESCRIPTOR_SIZE + 14
      this.#store(at, (this.#load(at) & (NEXT | 2 | INDIRECT)) | this.#lap)
      this.#advance()
    }
  }

  get #lap(): number {
    return this.#wrap === 1 ? AVAIL : USED
  }

  #writePacked(descriptor: HostileDescriptor): void {
    const at = this.#rings + this.#next * DESCRIPTOR_SIZE
    this.#write(at, descriptor, descriptor.flags ^ this.#lap, descriptor.next ?? this.#ids & INDEX_MASK, true)
    this.#advance()
  }

  #advance(): void {
    this.#next++
    if (this.#next < this.#size) return
    this.#next = 0
    this.#wrap ^= 1
  }

  #write(at: number, descriptor: HostileDescriptor, flags: number, next: number, packed: boolean): void {
    const place = this.#cpu.memory.regionOf(at, DESCRIPTOR_SIZE)
    if (place === undefined) return
    const offset = at - place.guestAddress
    place.view.setUint32(offset, descriptor.address % 2 ** 32, true)
    place.view.setUint32(offset + 4, Math.floor(descriptor.address / 2 ** 32), true)
    place.view.setUint32(offset + 8, descriptor.length, true)
    place.view.setUint16(offset + (packed ? 14 : 12), flags, true)
    place.view.setUint16(offset + (packed ? 12 : 14), next, true)
  }

  #load(address: number): number {
    const region = this.#cpu.memory.regionOf(address, 2)
    return region === undefined ? 0 : region.view.getUint16(address - region.guestAddress, true)
  }

  #store(address: number, value: number): void {
    const region = this.#cpu.memory.regionOf(address, 2)
    region?.view.setUint16(address - region.guestAddress, value & INDEX_MASK, true)
  }
}

/** Plays a script. Steps that make no sense in the state that the device is in are played all the same. */
export function* playHostile(cpu: GuestCpu, stage: HostileStage, script: ReadonlyArray<HostileStep>): GuestRoutine {
  const { driver, hooks = {}, memory, windows } = stage
  const queues = Array.from({ length: HOSTILE_QUEUES_MAX }, (_, queue) => new HostileQueue(cpu, memory, queue))
  for (const step of script) {
    switch (step.do) {
      case "start":
        yield* begin(cpu, stage, queues, step)
        break
      case "request": {
        const queue = queues[step.queue]
        if (step.table === undefined) queue?.request(step.descriptors)
        else queue?.table(step.descriptors, step.table.length, step.table.flags)
        if (step.kick) yield* kick(cpu, driver, step.queue)
        break
      }
      case "write": {
        const window = windows[step.window % windows.length]
        if (window !== undefined && step.offset + step.size <= window.size) {
          yield* cpu.store(window.base + step.offset, step.size, step.value % 2 ** (8 * step.size))
        }
        break
      }
      case "status":
        yield* driver.writeStatus(cpu, step.value)
        break
      case "config":
        yield* attempt(driver.storeConfiguration(cpu, step, step.value % 2 ** (8 * step.size)))
        break
      case "poke": {
        const region = cpu.memory.regionOf(memory + step.at, 2)
        region?.view.setUint16(memory + step.at - region.guestAddress, step.value, true)
        break
      }
      case "jump":
        queues[step.queue]?.jump(step.by)
        yield* kick(cpu, driver, step.queue)
        break
      case "kick":
        for (let i = 0; i < step.times; i++) yield* kick(cpu, driver, step.queue)
        break
      case "turn":
        for (let i = 0; i < step.turns; i++) yield* cpu.yield()
        break
      case "race":
        hooks.race?.(step.seed)
        break
      case "host":
        hooks.host?.(step.action)
        break
      case "neighbour":
        if (hooks.neighbour !== undefined) yield* hooks.neighbour()
        break
    }
  }
}

/** Initialises the device without asking how it likes that. */
function* begin(
  cpu: GuestCpu,
  stage: HostileStage,
  queues: ReadonlyArray<HostileQueue>,
  step: Extract<HostileStep, { readonly do: "start" }>
): GuestRoutine {
  const { driver } = stage
  yield* driver.writeStatus(cpu, 0)
  for (let tries = 0; tries < RESET_TRIES && (yield* driver.status(cpu)) !== 0; tries++) yield* cpu.yield()
  yield* driver.writeStatus(cpu, 1)
  yield* driver.writeStatus(cpu, 3)
  const [withoutLow, withoutHigh] = step.without
  const low = (yield* driver.offeredFeatures(cpu, 0)) & ~withoutLow
  const offeredHigh = yield* driver.offeredFeatures(cpu, 1)
  const packed = step.packed && (offeredHigh & RING_PACKED_HIGH) !== 0
  const high = (offeredHigh & ~withoutHigh & ~RING_PACKED_HIGH) | VERSION_1_HIGH | (packed ? RING_PACKED_HIGH : 0)
  yield* driver.acceptFeatures(cpu, 0, low >>> 0)
  yield* driver.acceptFeatures(cpu, 1, high >>> 0)
  yield* driver.writeStatus(cpu, 11)
  for (let index = 0; index < stage.queues; index++) {
    const queue = queues[index]
    if (queue === undefined || (step.omit >>> index & 1) !== 0) continue
    try {
      const sizeMax = yield* driver.queueSizeMax(cpu, index)
      queue.begin(Math.max(1, Math.min(step.size, sizeMax)), packed)
      yield* driver.enableQueue(cpu, index, queue.place)
    } catch {
      // The device refuses the queue, and has every right to.
    }
  }
  yield* driver.writeStatus(cpu, 15)
}

/** Does what the driver kit may refuse because the device has no such thing. */
function* attempt(routine: GuestRoutine): GuestRoutine {
  try {
    yield* routine
  } catch {
    // Nothing was done.
  }
}

const kick = (cpu: GuestCpu, driver: VirtioDriver, queue: number): GuestRoutine => attempt(driver.notify(cpu, queue))

/** How a hostile driver behaves. */
export interface HostileOptions {
  /** First address of {@link HostileLayout.size} bytes of memory, a multiple of 4096. */
  readonly memoryAddress: number
  /** How many things it does. */
  readonly steps: number
  /** How many of them are wrong: 0 (none) to 1 (all). */
  readonly hostility: number
  /** What it chooses: the same seed does the same. */
  readonly seed: number
  /** What it knows of the device. Default: the entropy device. */
  readonly profile?: HostileProfile
}

/**
 * Drives a device on virtio-mmio for a number of steps. What state it leaves is the test's subject; a correct driver begins by a
 * reset.
 */
export function* driveHostile(cpu: GuestCpu, place: VirtioMmioPlace, options: HostileOptions): GuestRoutine {
  const profile = options.profile ?? entropyProfile
  const { hostility, memoryAddress: memory, seed, steps } = options
  const stage: HostileStage = {
    driver: new VirtioMmioDriver(place),
    windows: [{ base: place.base, size: 0x1000 }],
    memory,
    queues: profile.queues
  }
  yield* playHostile(cpu, stage, hostileScript(profile, { memory }, new Choice(seed), steps, hostility))
}
