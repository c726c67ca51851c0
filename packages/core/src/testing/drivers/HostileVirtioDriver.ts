/**
 * A driver of a virtio-mmio device with a dial: from a correct one to one that does nothing right.
 *
 * It breaks every rule that a driver can: descriptors with any address, length, direction and link, loops, indices that jump,
 * registers in any order, width and value, resets in the middle. What it does follows from its numbers alone, so a failing
 * seed repeats itself. The device may do what it likes with it, as long as a correct driver finds it working afterwards.
 */
import type { AccessSize, GuestCpu, GuestRoutine } from "../GuestCpu.ts"
import { Seed } from "../Seed.ts"
import { splitQueueMemory } from "./SplitQueueDriver.ts"
import {
  startVirtioMmio,
  VirtioMmio,
  type VirtioMmioDriver,
  type VirtioMmioOptions,
  type VirtioMmioPlace
} from "./VirtioMmioDriver.ts"

/** How a hostile driver behaves. */
export interface HostileOptions extends VirtioMmioOptions {
  /** How many things it does. */
  readonly steps: number
  /** How many of them are wrong: 0 (none) to 1 (all). */
  readonly hostility: number
  /** What it chooses: the same seed does the same. */
  readonly seed: number
  /** Memory that its chains use when they are correct: at least 4096 bytes. */
  readonly dataAddress: number
}

const REGISTERS: ReadonlyArray<number> = Object.values(VirtioMmio)
const SIZES: ReadonlyArray<AccessSize> = [1, 2, 4, 4, 4]
const STATUSES: ReadonlyArray<number> = [0, 1, 3, 7, 11, 15, 0x40, 0x4f, 0x80, 0x8f, 0xff]
/** Addresses at the edges: nothing, almost nothing, half, around 2^52 and 2^63, the end. */
const ADDRESSES: ReadonlyArray<number> = [
  0,
  1,
  0xfff,
  2 ** 31,
  2 ** 32 - 1,
  2 ** 32,
  2 ** 52 - 4096,
  2 ** 52,
  2 ** 63,
  2 ** 64 - 2048
]
const LENGTHS: ReadonlyArray<number> = [0, 1, 15, 16, 17, 32, 4096, 0x7fff_ffff, 0xffff_ffff]

class Choice {
  readonly #seed: Seed
  constructor(seed: number) {
    this.#seed = new Seed(seed)
  }
  below(limit: number): number {
    return this.#seed.choose(limit)
  }
  of<A>(items: ReadonlyArray<A>, otherwise: A): A {
    return items[this.below(items.length)] ?? otherwise
  }
  chance(probability: number): boolean {
    return this.#seed.next() / 2 ** 32 < probability
  }
}

/** Drives the device for a number of steps. What state it leaves is the test's subject; a correct driver begins by a reset. */
export function* driveHostile(cpu: GuestCpu, place: VirtioMmioPlace, options: HostileOptions): GuestRoutine {
  const choice = new Choice(options.seed)
  let driver: VirtioMmioDriver | undefined
  for (let step = 0; step < options.steps; step++) {
    if (choice.chance(options.hostility)) {
      yield* wrong(cpu, place, driver, options, choice)
    } else {
      driver = yield* right(cpu, place, driver, options, choice)
    }
  }
}

/** One thing that a correct driver does. After what was wrong before, the device may refuse it: then it starts again. */
function* right(
  cpu: GuestCpu,
  place: VirtioMmioPlace,
  driver: VirtioMmioDriver | undefined,
  options: HostileOptions,
  choice: Choice
): GuestRoutine<VirtioMmioDriver | undefined> {
  try {
    if (driver === undefined) return yield* startVirtioMmio(cpu, place, options)
    const queue = choice.below(driver.queues.length)
    switch (choice.below(4)) {
      case 0: {
        const length = 1 + choice.below(1024)
        const chain = [{ address: options.dataAddress + choice.below(1024), length, writable: true }]
        yield* driver.send(cpu, queue, [chain], choice.chance(0.5))
        return driver
      }
      case 1:
        if (cpu.interrupts.acknowledge(place.gsi)) yield* driver.handleInterrupt(cpu)
        return driver
      case 2:
        while (driver.queue(queue).poll() !== undefined) yield* cpu.yield()
        return driver
      default:
        yield* cpu.yield()
        return driver
    }
  } catch {
    return undefined
  }
}

/** One thing that no driver should do. */
function* wrong(
  cpu: GuestCpu,
  place: VirtioMmioPlace,
  driver: VirtioMmioDriver | undefined,
  options: HostileOptions,
  choice: Choice
): GuestRoutine {
  const write = (register: number, size: AccessSize, value: number) => cpu.store(place.base + register, size, value)
  const any32 = () => choice.below(2 ** 32)
  switch (choice.below(driver === undefined ? 3 : 8)) {
    case 0:
      return yield* write(choice.of(REGISTERS, 0), choice.of(SIZES, 4), choice.chance(0.5) ? choice.below(16) : any32())
    case 1:
      return yield* write(VirtioMmio.Status, 4, choice.of(STATUSES, 0))
    case 2: {
      const size = choice.of(SIZES, 4)
      return yield* write(choice.below(0x1000 / size) * size, size, any32())
    }
    case 3:
      return yield* write(VirtioMmio.QueueNotify, 4, choice.below(4))
    case 4: {
      // Anything, anywhere in the rings.
      const length = splitQueueMemory(driver?.queue(0).size ?? 1)
      const rings = cpu.memory.slice(options.memoryAddress, length)
      for (let count = choice.below(16); count > 0; count--) rings?.set([choice.below(0x100)], choice.below(length))
      return
    }
    case 5: {
      const queue = driver?.queue(choice.below(driver.queues.length))
      queue?.writeAvailableIndex(choice.below(0x1_0000))
      return yield* write(VirtioMmio.QueueNotify, 4, 0)
    }
    default: {
      const index = choice.below(driver?.queues.length ?? 1)
      const queue = driver?.queues[index]
      if (queue === undefined) return
      const size = queue.size
      const descriptors = 1 + choice.below(size)
      for (let i = 0; i < descriptors; i++) {
        const address = choice.chance(0.5) ? options.dataAddress : choice.of(ADDRESSES, 0)
        const length = choice.chance(0.5) ? 16 : choice.of(LENGTHS, 0)
        queue.writeDescriptor(i, address, length, choice.below(8), choice.chance(0.9) ? choice.below(size) : 0xffff)
      }
      queue.writeAvailable(choice.below(size), choice.chance(0.9) ? choice.below(size) : 0xffff)
      queue.writeAvailableIndex(choice.below(2 * size))
      return yield* write(VirtioMmio.QueueNotify, 4, index)
    }
  }
}
