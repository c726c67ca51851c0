/**
 * The bus: which guest addresses belong to which device, and how each kind of access to them is served.
 *
 * A range declares, for its reads and its writes, the cheapest way that is still right; the hypervisor layers honour the
 * declaration and device code never sees which of them is below.
 */
import { ADDRESS_LIMIT, addressEnd, formatAddress, INVALID_ADDRESS } from "./GuestAddress.ts"
import { PAGE_SIZE } from "./GuestMemory.ts"

/** Port I/O (`in`, `out`) or memory-mapped I/O. */
export type AddressSpace = "pio" | "mmio"

/** One past the last I/O port. */
export const PORT_LIMIT = 0x1_0000

/**
 * How reads are served.
 *
 * - `register-page`: the guest reads a page of real memory; there is no exit (memory-mapped, whole pages only)
 * - `shadowed`: answered by the vCPU's own thread from a table that the device keeps up to date; a register whose shadow is
 *   {@link SHADOW_INVALID} is read by a call
 * - `call`: the vCPU waits while the device answers
 */
export type ReadAccess = "register-page" | "shadowed" | "call"

/**
 * How writes are served.
 *
 * - `posted`: appended to a ring, and the vCPU goes on at once; the device drains the ring in order, and always before it
 *   answers a later call of the same vCPU
 * - `call`: the vCPU waits while the device takes the write
 */
export type WriteAccess = "posted" | "call"

/** A register whose write is absorbed by the hypervisor and only wakes the device; the value is not kept. */
export interface Doorbell {
  /** Offset of the register in its range, in bytes. */
  readonly offset: number
  /** Width of the write in bytes that rings it (1, 2 or 4). Other widths reach the range's `write`. */
  readonly size: 1 | 2 | 4
  /** When given, only a write of this value rings; other values reach the range's `write`. */
  readonly value?: number
  /** `false` when nobody has to know: the write is absorbed, and the device is not woken. Default: `true`. */
  readonly wakes?: boolean
}

/** A range of addresses of one device, and how accesses to it are served. */
export interface BusRange {
  readonly space: AddressSpace
  /** First address. Pages of `register-page` ranges are aligned to `PAGE_SIZE`. */
  readonly base: number
  /** Length in bytes. */
  readonly size: number
  readonly read: ReadAccess
  readonly write: WriteAccess
  readonly doorbells: ReadonlyArray<Doorbell>
  /** Name of the device, for reports. */
  readonly device: string
}

/** An entry of a shadow table that is not valid: the read becomes a call. */
export const SHADOW_INVALID = -1

/** What backs a range once a hypervisor has attached it. */
export interface RangeBacking {
  /** `shadowed` ranges: one entry a byte register, 0 to 255 or {@link SHADOW_INVALID} (its first value). Shared with the vCPU threads. */
  readonly shadow: Int16Array | undefined
  /** `register-page` ranges: the memory that the guest reads. Only the host can write it. */
  readonly page: DataView | undefined
}

/** Takes the answer to a call. Called once for each call, also for writes (with 0). */
export interface CallReply {
  readonly complete: (value: number) => void
}

/**
 * Where a hypervisor delivers the accesses of a guest. `range` is the index in {@link Bus.ranges}, `size` is 1, 2 or 4 (a
 * wider access is delivered as its 4-byte parts, lowest address first), values are unsigned.
 */
export interface BusHandlers {
  /** An access that the vCPU waits for. `reply.complete` gives the value read; the vCPU goes on then. */
  readonly call: (
    range: number,
    offset: number,
    size: number,
    isWrite: boolean,
    value: number,
    reply: CallReply
  ) => void
  /** A posted write. Returns `false` when the device has no room for it now: deliver it again later, before any other. */
  readonly posted: (range: number, offset: number, size: number, value: number) => boolean
  /** A doorbell was rung, once or many times. */
  readonly doorbell: (range: number, doorbell: number) => void
}

/** Why a set of ranges is not a bus. */
export interface BusConflict {
  readonly kind: "overlap" | "malformed"
  readonly message: string
  readonly devices: ReadonlyArray<string>
}

/** What a read that no device answers returns: all bits one, as on an open bus. Writes of that kind are ignored. */
export const openBusValue = (size: number): number => (size === 1 ? 0xff : size === 2 ? 0xffff : 0xffff_ffff)

const describe = (range: BusRange): string =>
  `${range.device} [${formatAddress(range.base)}, ${formatAddress(range.base + range.size)}) (${range.space})`

const ringTogether = (a: Doorbell, b: Doorbell): boolean =>
  a.offset === b.offset && a.size === b.size && (a.value === undefined || b.value === undefined || a.value === b.value)

const malformed = (range: BusRange): string | undefined => {
  const limit = range.space === "pio" ? PORT_LIMIT : ADDRESS_LIMIT
  const end = addressEnd(range.base, range.size)
  if (range.size <= 0 || end === INVALID_ADDRESS || end > limit) return "is empty or leaves its address space"
  if (range.read === "register-page") {
    if (range.space === "pio") return "is read from a page, and ports are not memory"
    if (range.base % PAGE_SIZE !== 0 || range.size % PAGE_SIZE !== 0) {
      return "is read from pages, and is not whole pages"
    }
  }
  for (const [index, doorbell] of range.doorbells.entries()) {
    if (doorbell.offset < 0 || doorbell.offset + doorbell.size > range.size) return "has a doorbell outside itself"
    if (range.doorbells.some((other, at) => at < index && ringTogether(doorbell, other))) {
      return "has two doorbells that the same write rings"
    }
  }
  return undefined
}

/** The ranges of a machine's devices, sorted for look-up. No two overlap. */
export class Bus {
  /** In the order in which they were given: an index here is the `range` of {@link BusHandlers}. */
  readonly ranges: ReadonlyArray<BusRange>
  readonly #sorted: { readonly [space in AddressSpace]: ReadonlyArray<number> }

  private constructor(ranges: ReadonlyArray<BusRange>) {
    this.ranges = ranges
    const sorted = (space: AddressSpace) =>
      ranges.map((_, index) => index)
        .filter((index) => ranges[index]?.space === space)
        .toSorted((a, b) => (ranges[a]?.base ?? 0) - (ranges[b]?.base ?? 0))
    this.#sorted = { pio: sorted("pio"), mmio: sorted("mmio") }
  }

  /** A bus of these ranges, or the first conflict between them. */
  static make(ranges: ReadonlyArray<BusRange>): Bus | BusConflict {
    for (const range of ranges) {
      const fault = malformed(range)
      if (fault !== undefined) {
        return { kind: "malformed", message: `${describe(range)} ${fault}`, devices: [range.device] }
      }
    }
    const bus = new Bus(ranges)
    for (const space of ["pio", "mmio"] as const) {
      const sorted = bus.#sorted[space]
      for (let i = 1; i < sorted.length; i++) {
        const before = ranges[sorted[i - 1] ?? -1]
        const range = ranges[sorted[i] ?? -1]
        if (before !== undefined && range !== undefined && before.base + before.size > range.base) {
          return {
            kind: "overlap",
            message: `${describe(before)} and ${describe(range)} overlap`,
            devices: [before.device, range.device]
          }
        }
      }
    }
    return bus
  }

  /**
   * The index of the range that holds all of an access, or -1. An access that begins in a range and leaves it belongs to
   * no range: it reads as {@link openBusValue} and its write is ignored.
   */
  find(space: AddressSpace, address: number, size: number): number {
    const sorted = this.#sorted[space]
    let low = 0
    let high = sorted.length - 1
    while (low <= high) {
      const middle = (low + high) >>> 1
      const index = sorted[middle] ?? -1
      const range = this.ranges[index]
      if (range === undefined) return -1
      if (address < range.base) high = middle - 1
      else if (address >= range.base + range.size) low = middle + 1
      else return address + size <= range.base + range.size ? index : -1
    }
    return -1
  }

  /** A memory-mapped range that overlaps `[base, base + size)`, or `undefined`. */
  overlapping(base: number, size: number): BusRange | undefined {
    return this.ranges.find((range) =>
      range.space === "mmio" && range.base < base + size && base < range.base + range.size
    )
  }
}
