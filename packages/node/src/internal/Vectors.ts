/** Pieces of memory as the kernel takes them: an array of `struct iovec` that is used again and again. */
import type { BlockBytes } from "@troupe/core/BlockBackend"
import type { ForeignFunctions } from "./ForeignFunctions.ts"

/** The most pieces of one call. The kernel takes 1024. */
export const VECTORS_MAX = 256
/** Size of `struct iovec` in 32-bit words: address, length. */
const VECTOR_WORDS = 4

/** Up to {@link VECTORS_MAX} pieces of memory for one call. Guest memory has few buffers, which are asked for again and again. */
export class Vectors {
  readonly #functions: ForeignFunctions
  readonly #words = new Uint32Array(new ArrayBuffer(VECTORS_MAX * VECTOR_WORDS * 4))
  readonly #addresses = new WeakMap<ArrayBuffer, number>()
  #lastBuffer: ArrayBuffer | undefined
  #lastAddress = 0
  /** Where the structures are. */
  readonly address: bigint

  constructor(functions: ForeignFunctions) {
    this.#functions = functions
    this.address = functions.addressOf(new Uint8Array(this.#words.buffer))
  }

  /** Describes the buffers to the kernel, at most {@link VECTORS_MAX}. */
  set(buffers: ReadonlyArray<BlockBytes>): void {
    const words = this.#words
    for (let i = 0; i < buffers.length; i++) {
      const view = buffers[i]
      if (view === undefined) continue
      const address = this.#addressOf(view.buffer) + view.byteOffset
      const at = i * VECTOR_WORDS
      words[at] = address % 2 ** 32
      words[at + 1] = address / 2 ** 32
      words[at + 2] = view.length % 2 ** 32
      words[at + 3] = view.length / 2 ** 32
    }
  }

  #addressOf(buffer: ArrayBuffer): number {
    if (buffer === this.#lastBuffer) return this.#lastAddress
    let address = this.#addresses.get(buffer)
    if (address === undefined) {
      // Addresses of user space have 47 bits, or 56, and are multiples of what makes them exact as numbers.
      address = Number(this.#functions.addressOf(new Uint8Array(buffer)))
      this.#addresses.set(buffer, address)
    }
    this.#lastBuffer = buffer
    this.#lastAddress = address
    return address
  }
}
