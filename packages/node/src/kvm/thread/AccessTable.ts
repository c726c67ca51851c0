/**
 * The bus of a machine as its vCPU threads see it: sorted rows in shared memory, and the shadow table. Imports nothing at run
 * time, so that a vCPU thread can load it cheaply.
 */
import type { AddressSpace, Bus } from "@troupe/core/Bus"

/** Reads of a row are calls. */
export const READ_CALL = 0
/** Reads of a row are answered from the shadow table. */
export const READ_SHADOWED = 1
/** Writes of a row are calls. */
export const WRITE_CALL = 0
/** Writes of a row are posted. */
export const WRITE_POSTED = 1

/** The shared memory of a table. */
export interface AccessTableBuffers {
  /** First and end address of each row. */
  readonly bounds: SharedArrayBuffer
  /** Four words a row: index of the range, kind of reads, kind of writes, first entry in the shadow table. */
  readonly rows: SharedArrayBuffer
  readonly shadow: SharedArrayBuffer
  /** Rows of port I/O; those of memory-mapped I/O follow. */
  readonly pioRows: number
}

/** No shadow entry, or a register that is not shadowed now (`SHADOW_INVALID` of the bus). */
const INVALID = -1

const ROW_WORDS = 4

/** Makes the table of a bus. Rows of a space are sorted by address; shadow entries begin invalid. */
export const buildAccessTable = (bus: Bus): AccessTableBuffers => {
  const sorted = (space: AddressSpace) =>
    bus.ranges.map((range, index) => ({ range, index })).filter((row) => row.range.space === space)
      .toSorted((a, b) => a.range.base - b.range.base)
  const pio = sorted("pio")
  const rows = [...pio, ...sorted("mmio")]
  const bounds = new Float64Array(new SharedArrayBuffer(Math.max(rows.length, 1) * 2 * 8))
  const words = new Int32Array(new SharedArrayBuffer(Math.max(rows.length, 1) * ROW_WORDS * 4))
  let shadowed = 0
  for (const [row, { range, index }] of rows.entries()) {
    bounds.set([range.base, range.base + range.size], row * 2)
    const isShadowed = range.read === "shadowed"
    words.set([
      index,
      isShadowed ? READ_SHADOWED : READ_CALL,
      range.write === "posted" ? WRITE_POSTED : WRITE_CALL,
      isShadowed ? shadowed : INVALID
    ], row * ROW_WORDS)
    if (isShadowed) shadowed += range.size
  }
  const shadow = new Int16Array(new SharedArrayBuffer(Math.max(shadowed, 1) * 2)).fill(INVALID)
  return { bounds: bounds.buffer, rows: words.buffer, shadow: shadow.buffer, pioRows: pio.length }
}

/** One thread's face of a table. */
export class AccessTable {
  readonly #bounds: Float64Array<SharedArrayBuffer>
  readonly #rows: Int32Array<SharedArrayBuffer>
  readonly #shadow: Int16Array<SharedArrayBuffer>
  readonly #pioRows: number
  readonly #allRows: number

  constructor(buffers: AccessTableBuffers, rowCount: number) {
    this.#bounds = new Float64Array(buffers.bounds)
    this.#rows = new Int32Array(buffers.rows)
    this.#shadow = new Int16Array(buffers.shadow)
    this.#pioRows = buffers.pioRows
    this.#allRows = rowCount
  }

  /** The row that holds all of an access to ports, or -1. */
  findPort(port: number, size: number): number {
    return this.#find(0, this.#pioRows, port, size)
  }

  /** The row that holds all of an access to memory, or -1. */
  findAddress(address: number, size: number): number {
    return this.#find(this.#pioRows, this.#allRows, address, size)
  }

  #find(first: number, end: number, address: number, size: number): number {
    const bounds = this.#bounds
    let low = first
    let high = end - 1
    while (low <= high) {
      const row = (low + high) >>> 1
      if (address < (bounds[row * 2] ?? 0)) high = row - 1
      else if (address >= (bounds[row * 2 + 1] ?? 0)) low = row + 1
      else return address + size <= (bounds[row * 2 + 1] ?? 0) ? row : -1
    }
    return -1
  }

  /** Index of the row's range in the bus. */
  range(row: number): number {
    return this.#rows[row * ROW_WORDS] ?? 0
  }

  /** First address of a row. */
  base(row: number): number {
    return this.#bounds[row * 2] ?? 0
  }

  /** Whether writes of a row are posted. */
  isPosted(row: number): boolean {
    return this.#rows[row * ROW_WORDS + 2] === WRITE_POSTED
  }

  /** What a read of a row gives without a call, or -1 when it needs one. The lowest address is the lowest byte. */
  shadow(row: number, offset: number, size: number): number {
    const first = this.#rows[row * ROW_WORDS + 3] ?? INVALID
    if (first < 0) return INVALID
    let value = 0
    for (let i = size - 1; i >= 0; i--) {
      const entry = Atomics.load(this.#shadow, first + offset + i)
      if (entry < 0) return INVALID
      value = value * 0x100 + (entry & 0xff)
    }
    return value
  }

  /** The shadow entries of the range with this index: one for each of its `size` byte registers. */
  shadowOf(range: number, size: number): Int16Array<SharedArrayBuffer> {
    for (let row = 0; row < this.#allRows; row++) {
      const first = this.#rows[row * ROW_WORDS + 3] ?? INVALID
      if (this.range(row) === range && first >= 0) return this.#shadow.subarray(first, first + size)
    }
    return this.#shadow.subarray(0, 0)
  }
}
