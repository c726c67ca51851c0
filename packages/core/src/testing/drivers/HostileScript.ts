/**
 * Scripts of hostile drivers: what a driver does to one virtio device, right and wrong, as plain data that can be printed, repeated
 * and made smaller.
 *
 * A script follows from a seed. It breaks every rule that a driver can: chains with any address, length, direction and link,
 * loops, indices that jump, tables that are none, registers in any order, width and value, resets in the middle, memory that
 * changes after it was given to the device, kicks without end. Between that it does what is right, because a device is deep.
 */
import type { AccessSize } from "../GuestCpu.ts"
import type { Choice } from "./HostileChoice.ts"

/** A buffer of a request as a correct driver makes it, before it is placed in memory. */
export interface HostileBuffer {
  readonly length: number
  readonly writable: boolean
  /** What it holds at its beginning. Default: what is there. */
  readonly bytes?: ReadonlyArray<number>
  /** It begins at a page. */
  readonly page?: boolean
}

/** What a hostile driver knows of a type of device. */
export interface HostileProfile {
  /** What the device is called. */
  readonly name: string
  /** The number of its queues. */
  readonly queues: number
  /** Length of its configuration space in bytes. */
  readonly configSize: number
  /** A request as this queue may well hold it. */
  readonly request: (choice: Choice, queue: number) => ReadonlyArray<HostileBuffer>
}

/** A descriptor as it is written, right or wrong. */
export interface HostileDescriptor {
  readonly address: number
  readonly length: number
  readonly flags: number
  /** The index that `NEXT` means, or the id in a packed ring. Default: the right one. */
  readonly next?: number
  /** Written to its buffer, where there is memory. */
  readonly bytes?: ReadonlyArray<number>
}

/** One thing that a hostile driver does. */
export type HostileStep =
  /** Initialises the device, with these features masked out of those offered, queues of this size, and without some of them. */
  | {
    readonly do: "start"
    readonly packed: boolean
    readonly without: readonly [low: number, high: number]
    readonly size: number
    readonly omit: number
  }
  /** Makes a chain available, in the ring or in a table. */
  | {
    readonly do: "request"
    readonly queue: number
    readonly descriptors: ReadonlyArray<HostileDescriptor>
    readonly table?: { readonly length?: number; readonly flags: number }
    readonly kick: boolean
  }
  /** Writes anywhere into one of the windows that the device has in guest memory: registers in any order and width. */
  | {
    readonly do: "write"
    readonly window: number
    readonly offset: number
    readonly size: AccessSize
    readonly value: number
  }
  /** Writes the device status. */
  | { readonly do: "status"; readonly value: number }
  /** Writes the configuration space. */
  | { readonly do: "config"; readonly offset: number; readonly size: AccessSize; readonly value: number }
  /** Writes 16 bits into its memory: `at` counts from the rings of the first queue on. */
  | { readonly do: "poke"; readonly at: number; readonly value: number }
  /** Moves the available index of a split ring, or makes entries of a packed one available. */
  | { readonly do: "jump"; readonly queue: number; readonly by: number }
  /** Notifies a queue, that many times. */
  | { readonly do: "kick"; readonly queue: number; readonly times: number }
  /** Lets the device work, that many turns. */
  | { readonly do: "turn"; readonly turns: number }
  /** From now on, changes its memory while the device is at work. */
  | { readonly do: "race"; readonly seed: number }
  /** Has the device's host do something. */
  | { readonly do: "host"; readonly action: number }
  /** Has another device's correct driver do something. */
  | { readonly do: "neighbour" }

/** Where the memory device of a fuzzed machine has its region. */
export const HOSTILE_MEM_ADDRESS = 2 ** 33
/** Its blocks. */
export const HOSTILE_MEM_BLOCK = 0x1_0000
/** How many. */
export const HOSTILE_MEM_BLOCKS = 16

const NEXT = 1
const WRITE = 2
const INDIRECT = 4

/** Where the driver keeps things, from its memory's first byte on. */
export const HostileLayout = {
  /** Rings of the first queue, and the distance to those of the next. */
  rings: 0,
  ringStride: 0x4000,
  /** Tables of the first queue, and the distance to those of the next. */
  tables: 0x2_8000,
  tableStride: 0x1000,
  /** Buffers. */
  data: 0x4_0000,
  dataSize: 0x4_0000,
  /** The memory that a hostile driver takes. */
  size: 0x8_0000
} as const

/** The most queues that have room. */
export const HOSTILE_QUEUES_MAX = 10

const REGISTER_OFFSETS = [
  0x00,
  0x04,
  0x10,
  0x14,
  0x20,
  0x24,
  0x30,
  0x34,
  0x38,
  0x44,
  0x50,
  0x60,
  0x64,
  0x70,
  0x80,
  0x84,
  0x90,
  0x94,
  0xa0,
  0xa4,
  0xac,
  0xb0,
  0xc0,
  0xfc
] as const
const STATUSES = [0, 0, 1, 3, 7, 11, 15, 0x40, 0x4f, 0x80, 0x8f, 0xff] as const
/** Addresses at the edges: nothing, almost nothing, half, around 2^32, 2^52 and 2^63, the end. */
const ADDRESSES = [
  0,
  1,
  0xfff,
  0x10_0000 - 1,
  0x10_0000 - 16,
  2 ** 31,
  2 ** 32 - 1,
  2 ** 32 - 16,
  2 ** 32,
  2 ** 32 + 0x1_0000 - 8,
  // Where the memory device of a fuzzed machine has its region, and inside it.
  HOSTILE_MEM_ADDRESS,
  HOSTILE_MEM_ADDRESS + HOSTILE_MEM_BLOCK - 8,
  HOSTILE_MEM_ADDRESS + 3 * HOSTILE_MEM_BLOCK,
  2 ** 52 - 4096,
  2 ** 52,
  2 ** 63,
  2 ** 64 - 2048
] as const
const LENGTHS = [0, 1, 15, 16, 17, 32, 4095, 4096, 0x1_0000, 0xf_0000, 0x10_0000, 0x7fff_ffff, 0xffff_ffff] as const
const SIZES = [1, 2, 4, 4, 4] as const
const PAGE = 4096

/** Where a script's memory is. */
export interface HostilePlace {
  /** First address of {@link HostileLayout.size} bytes. */
  readonly memory: number
}

const place = (choice: Choice, where: HostilePlace, buffer: HostileBuffer): number => {
  const room = Math.max(1, HostileLayout.dataSize - Math.min(buffer.length, HostileLayout.dataSize))
  const offset = choice.below(room)
  return where.memory + HostileLayout.data + (buffer.page === true ? Math.floor(offset / PAGE) * PAGE : offset)
}

/** A request as it should be, in memory. */
const wellFormed = (choice: Choice, where: HostilePlace, request: ReadonlyArray<HostileBuffer>) =>
  request.map((buffer, i): HostileDescriptor => ({
    address: place(choice, where, buffer),
    length: buffer.length,
    flags: (buffer.writable ? WRITE : 0) | (i + 1 < request.length ? NEXT : 0),
    ...(buffer.bytes === undefined ? {} : { bytes: buffer.bytes })
  }))

/** The same with one thing wrong. */
const spoil = (choice: Choice, descriptors: ReadonlyArray<HostileDescriptor>): ReadonlyArray<HostileDescriptor> => {
  const index = choice.below(Math.max(1, descriptors.length))
  const one = descriptors[index]
  if (one === undefined) return [{ address: choice.of(ADDRESSES), length: choice.of(LENGTHS), flags: choice.below(8) }]
  const replaced = (changed: Partial<HostileDescriptor>) => descriptors.with(index, { ...one, ...changed })
  switch (choice.below(14)) {
    case 0:
      return replaced({ address: choice.of(ADDRESSES) })
    case 1:
      return replaced({ length: choice.of(LENGTHS) })
    case 2:
      return replaced({ length: Math.max(0, one.length + choice.below(5) - 2) })
    case 3:
      return replaced({ flags: one.flags ^ WRITE })
    case 4:
      return replaced({ flags: one.flags ^ choice.of([NEXT, INDIRECT, NEXT | INDIRECT, 0xfff8, 0x8080]) })
    case 5:
      // A loop, or out of the table.
      return replaced({
        flags: one.flags | NEXT,
        next: choice.of([0, choice.below(64), choice.below(0x1_0000), 0xffff])
      })
    case 6:
      return descriptors.toSpliced(index, 1)
    case 7:
      return descriptors.toSpliced(index, 0, { ...one, flags: one.flags | NEXT })
    case 8: {
      const other = choice.below(descriptors.length)
      const swapped = descriptors[other]
      return swapped === undefined ? descriptors : descriptors.with(index, swapped).with(other, one)
    }
    case 9: {
      // The same bytes in many buffers.
      const cut = choice.below(one.length + 1)
      return descriptors.toSpliced(
        index,
        1,
        { ...one, length: cut, flags: one.flags | NEXT },
        { address: one.address + cut, length: one.length - cut, flags: one.flags }
      )
    }
    case 10: {
      if (one.bytes === undefined || one.bytes.length === 0) return replaced({ bytes: choice.bytes(8) })
      return replaced({ bytes: one.bytes.with(choice.below(one.bytes.length), choice.of([0, 1, 0x7f, 0x80, 0xff])) })
    }
    case 11:
      // As much memory as there is.
      return replaced({ address: PAGE * choice.below(16), length: choice.of([0x1_0000, 0x8_0000, 0xf_0000]) })
    case 12: {
      const big = { ...one, address: PAGE * choice.below(16), length: choice.of([0x8_0000, 0xf_0000]) }
      const copies = 1 + choice.below(40)
      return descriptors.toSpliced(
        index,
        1,
        ...Array.from({ length: copies }, () => ({ ...big, flags: big.flags | NEXT })),
        one
      )
    }
    default: {
      const many = 1 + choice.below(70)
      return Array.from(
        { length: many },
        (_, i) => ({ ...one, flags: (one.flags & ~NEXT) | (i + 1 < many ? NEXT : 0) })
      )
    }
  }
}

const request = (choice: Choice, where: HostilePlace, profile: HostileProfile, hostility: number): HostileStep => {
  const queue = choice.chance(0.95) ? choice.below(profile.queues) : choice.below(12)
  let descriptors: ReadonlyArray<HostileDescriptor> = wellFormed(choice, where, profile.request(choice, queue))
  const wrong = choice.chance(hostility)
  if (wrong) { for (let count = 1 + choice.below(3); count > 0; count--) descriptors = spoil(choice, descriptors) }
  const kick = choice.chance(0.8)
  if (!choice.chance(0.3)) return { do: "request", queue, descriptors, kick }
  const table = wrong && choice.chance(0.3)
    ? {
      length: choice.of([0, 8, 15, 16, 17, 16 * 70, choice.of(LENGTHS)]),
      flags: choice.of([0, NEXT, WRITE, NEXT | WRITE])
    }
    : { flags: 0 }
  return { do: "request", queue, descriptors, table, kick }
}

const start = (choice: Choice, hostility: number): HostileStep => ({
  do: "start",
  packed: choice.chance(0.3),
  without: choice.chance(0.6) ? [0, 0] : [choice.any32() & choice.any32(), choice.any32() & choice.any32()],
  size: choice.chance(0.5) ? 16 : choice.of([1, 2, 3, 4, 8, 32, 64, 256]),
  omit: choice.chance(0.2 * hostility) ? choice.below(0x400) : 0
})

const wrong = (choice: Choice, profile: HostileProfile): HostileStep => {
  const queue = choice.below(profile.queues)
  switch (choice.below(10)) {
    case 0:
      return {
        do: "write",
        window: 0,
        offset: choice.of(REGISTER_OFFSETS),
        size: choice.of(SIZES),
        value: choice.number()
      }
    case 1:
      return { do: "status", value: choice.of(STATUSES) }
    case 2: {
      const size = choice.of(SIZES)
      const offset = choice.below(choice.of([0x40, 0x100, 0x1000]) / size) * size
      return { do: "write", window: choice.below(4), offset, size, value: choice.number() }
    }
    case 3: {
      const offset = choice.below(Math.max(1, profile.configSize))
      return { do: "config", offset, size: choice.of(SIZES), value: choice.number() }
    }
    case 4:
      return { do: "kick", queue: choice.below(12), times: choice.of([1, 2, 100]) }
    case 5:
      return { do: "jump", queue, by: choice.of([1, 2, 17, 0x100, 0x7fff, 0x8000, 0xffff, choice.below(0x1_0000)]) }
    case 6:
      return { do: "race", seed: choice.below(0x1_0000) }
    default: {
      const rings = queue * HostileLayout.ringStride
      // The beginning of the table, of the available ring, anywhere in the rings, or in the buffers.
      const at = choice.of([
        rings + choice.below(64) * 2,
        rings + choice.below(0x800) * 2,
        rings + 16 * 16 + choice.below(20) * 2,
        HostileLayout.data + choice.below(HostileLayout.dataSize / 2) * 2
      ])
      return { do: "poke", at, value: choice.chance(0.5) ? choice.below(64) : choice.below(0x1_0000) }
    }
  }
}

/** A script of this many steps. `hostility` says how much of it is wrong: 0 (nothing) to 1 (all). */
export const hostileScript = (
  profile: HostileProfile,
  where: HostilePlace,
  choice: Choice,
  steps: number,
  hostility: number
): ReadonlyArray<HostileStep> => {
  const script: Array<HostileStep> = []
  for (let i = 0; i < steps; i++) {
    const kind = choice.below(20)
    if (i === 0 ? choice.chance(0.97) : kind === 0) script.push(start(choice, hostility))
    else if (kind < 10) script.push(request(choice, where, profile, hostility))
    else if (kind < 14) script.push({ do: "turn", turns: 1 + choice.below(3) })
    else if (kind === 14) script.push({ do: "host", action: choice.below(0x1_0000) })
    else if (kind === 15) script.push({ do: "neighbour" })
    else if (choice.chance(hostility)) script.push(wrong(choice, profile))
    else script.push(request(choice, where, profile, 0))
  }
  return script
}
