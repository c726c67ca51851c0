/**
 * Foreign memory and its owner: a view never outlives its mapping. Imports nothing of Effect.
 *
 * `ArrayBuffer`s over foreign memory are handed out by an owner only. Before the memory goes away the owner detaches the
 * buffer, which empties every typed array and `DataView` made from it; a later access finds nothing, or throws `TypeError`,
 * and cannot reach the address. Each thread makes its own view from the address.
 */
import { ErrnoNumber, type ForeignFunctions } from "./ForeignFunctions.ts"

/** `mmap` gives addresses that are multiples of this; larger pages of the host only waste a little of what is trimmed. */
const PAGE_SIZE = 4096

/** Memory was asked for after its owner had given it back. */
export class UseAfterUnmap extends Error {
  readonly _tag = "UseAfterUnmap"
  /** Where the memory was. */
  readonly address: bigint
  /** Its length in bytes. */
  readonly length: number

  constructor(address: bigint, length: number) {
    super(`memory at 0x${address.toString(16)} (${length} bytes) was used after it had been unmapped`)
    this.name = "UseAfterUnmap"
    this.address = address
    this.length = length
  }
}

/** One thread's view of foreign memory that somebody else keeps mapped. */
export class ForeignView {
  readonly address: bigint
  /** Length in bytes. */
  readonly length: number
  readonly #functions: ForeignFunctions
  #buffer: ArrayBuffer | undefined
  #released = false

  constructor(functions: ForeignFunctions, address: bigint, length: number) {
    this.#functions = functions
    this.address = address
    this.length = length
  }

  /** Whether the memory has been given back. */
  get released(): boolean {
    return this.#released
  }

  /**
   * The memory. Always the same buffer until {@link ForeignView.release}, after which it throws {@link UseAfterUnmap}. Never
   * transfer it.
   */
  get buffer(): ArrayBuffer {
    if (this.#released) throw new UseAfterUnmap(this.address, this.length)
    this.#buffer ??= this.#functions.viewAt(this.address, this.length)
    return this.#buffer
  }

  /**
   * Makes the buffer, and every typed array over it, unusable. Idempotent. Returns `false`, and changes nothing, when the
   * memory cannot be taken back because somebody has transferred the buffer away.
   */
  release(): boolean {
    if (this.#released) return true
    if (this.#buffer !== undefined) {
      if (this.#buffer.detached) return false
      this.#buffer.transfer(0)
      this.#buffer = undefined
    }
    this.#released = true
    return true
  }
}

/** A mapping of this process, with the view of the thread that made it. */
export class Mapping extends ForeignView {
  readonly #functions: ForeignFunctions

  constructor(functions: ForeignFunctions, address: bigint, length: number) {
    super(functions, address, length)
    this.#functions = functions
  }

  /**
   * Makes the view unusable and unmaps the memory; every other thread has released its own view before. Idempotent. Returns 0
   * or `-errno`; `-EBUSY`, with the memory still mapped, when the buffer was transferred away: a leak is better than a
   * dangling pointer.
   */
  unmap(): number {
    if (this.released) return 0
    if (!this.release()) return -ErrnoNumber.EBUSY
    return this.#functions.munmap(this.address, this.length)
  }
}

/** What to map. */
export interface MappingOptions {
  /** Length in bytes, greater than 0. */
  readonly length: number
  /** `PROT_*`. */
  readonly protection: number
  /** `MAP_*`. */
  readonly flags: number
  /** The descriptor to map, or -1. */
  readonly fd: number
  /** Where in the file to begin, in bytes, a multiple of the page size. */
  readonly offset: number
  /** What the address is a multiple of: a power of two, at least a page. Default: a page. For memory without a file. */
  readonly alignment?: number
}

/** Maps memory; the result is its owner, or `-errno`. */
export const map = (functions: ForeignFunctions, options: MappingOptions): Mapping | number => {
  // Sizes are often the caller's own input, so nonsense is an error like any other, not an exception.
  if (!(Number.isSafeInteger(options.length) && options.length > 0 && Number.isSafeInteger(options.offset))) {
    return -ErrnoNumber.EINVAL
  }
  const spare = options.alignment === undefined ? 0 : options.alignment - PAGE_SIZE
  const total = options.length + spare
  const found = functions.mmap(total, options.protection, options.flags, options.fd, options.offset)
  if (found < 0n) return Number(found)
  const before = options.alignment === undefined ? 0 : Number(-found & BigInt(options.alignment - 1))
  const address = found + BigInt(before)
  const trimmed = trim(functions, found, before) || trim(functions, address + BigInt(options.length), spare - before)
  if (trimmed < 0) {
    functions.munmap(found, total)
    return trimmed
  }
  return new Mapping(functions, address, options.length)
}

/** Unmaps what an aligned mapping does not need. Returns 0 or `-errno`. */
const trim = (functions: ForeignFunctions, address: bigint, length: number): number =>
  length === 0 ? 0 : functions.munmap(address, length)
