/**
 * Inflates deflated data (RFC 1951) into a buffer of known length: what the compressed clusters of an image need, without a
 * dependency on a platform. Whatever the input is, it reads no byte beyond it, writes none beyond the output, and ends.
 */

/** Bits of a code at most (RFC 1951, section 3.2.7). */
const CODE_BITS_MAX = 15
const LITERALS = 288
const DISTANCES = 30
const END_OF_BLOCK = 256

const LENGTH_BASE = Uint16Array.of(
  3,
  4,
  5,
  6,
  7,
  8,
  9,
  10,
  11,
  13,
  15,
  17,
  19,
  23,
  27,
  31,
  35,
  43,
  51,
  59,
  67,
  83,
  99,
  115,
  131,
  163,
  195,
  227,
  258
)
const LENGTH_EXTRA = Uint8Array.of(
  0,
  0,
  0,
  0,
  0,
  0,
  0,
  0,
  1,
  1,
  1,
  1,
  2,
  2,
  2,
  2,
  3,
  3,
  3,
  3,
  4,
  4,
  4,
  4,
  5,
  5,
  5,
  5,
  0
)
const DISTANCE_BASE = Uint16Array.of(
  1,
  2,
  3,
  4,
  5,
  7,
  9,
  13,
  17,
  25,
  33,
  49,
  65,
  97,
  129,
  193,
  257,
  385,
  513,
  769,
  1025,
  1537,
  2049,
  3073,
  4097,
  6145,
  8193,
  12289,
  16385,
  24577
)
const DISTANCE_EXTRA = Uint8Array.of(
  0,
  0,
  0,
  0,
  1,
  1,
  2,
  2,
  3,
  3,
  4,
  4,
  5,
  5,
  6,
  6,
  7,
  7,
  8,
  8,
  9,
  9,
  10,
  10,
  11,
  11,
  12,
  12,
  13,
  13
)
/** The order in which the lengths of the codes for code lengths come. */
const CODE_LENGTH_ORDER = Uint8Array.of(16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)

/** A canonical Huffman code: how many codes there are of each length, and the symbols in the order of their codes. */
class Code {
  readonly counts = new Uint16Array(CODE_BITS_MAX + 1)
  readonly symbols: Uint16Array

  constructor(symbols: number) {
    this.symbols = new Uint16Array(symbols)
  }

  /** Makes the code of these lengths. Returns `false` when there are more codes than bits allow. */
  build(lengths: Uint8Array, first: number, count: number): boolean {
    this.counts.fill(0)
    for (let i = 0; i < count; i++) {
      const length = lengths[first + i] ?? 0
      this.counts[length] = (this.counts[length] ?? 0) + 1
    }
    this.counts[0] = 0
    let left = 1
    const offsets = new Uint16Array(CODE_BITS_MAX + 2)
    for (let bits = 1; bits <= CODE_BITS_MAX; bits++) {
      left = left * 2 - (this.counts[bits] ?? 0)
      if (left < 0) return false
      offsets[bits + 1] = (offsets[bits] ?? 0) + (this.counts[bits] ?? 0)
    }
    for (let i = 0; i < count; i++) {
      const length = lengths[first + i] ?? 0
      if (length === 0) continue
      const at = offsets[length] ?? 0
      offsets[length] = at + 1
      this.symbols[at] = i
    }
    return true
  }
}

class Inflater {
  readonly #input: Uint8Array
  readonly #output: Uint8Array
  #at = 0
  #bits = 0
  #bitCount = 0
  #written = 0
  /** The input has ended, or makes no sense. */
  #bad = false
  readonly #literals = new Code(LITERALS)
  readonly #distances = new Code(DISTANCES + 2)
  readonly #lengths = new Uint8Array(LITERALS + DISTANCES + 2)

  constructor(input: Uint8Array, output: Uint8Array) {
    this.#input = input
    this.#output = output
  }

  run(): boolean {
    for (;;) {
      const last = this.#take(1)
      const type = this.#take(2)
      if (this.#bad) return false
      if (type === 0) this.#stored()
      else if (type === 1) this.#fixed()
      else if (type === 2) this.#dynamic()
      else return false
      if (this.#bad) return false
      if (this.#written === this.#output.length) return true
      if (last === 1) return false
    }
  }

  #take(count: number): number {
    while (this.#bitCount < count) {
      if (this.#at === this.#input.length) {
        this.#bad = true
        return 0
      }
      this.#bits |= (this.#input[this.#at++] ?? 0) << this.#bitCount
      this.#bitCount += 8
    }
    const value = this.#bits & (2 ** count - 1)
    this.#bits >>>= count
    this.#bitCount -= count
    return value
  }

  #symbol(code: Code): number {
    let value = 0
    let first = 0
    let index = 0
    for (let bits = 1; bits <= CODE_BITS_MAX; bits++) {
      value |= this.#take(1)
      const count = code.counts[bits] ?? 0
      if (value - count < first) return code.symbols[index + value - first] ?? 0
      index += count
      first = (first + count) << 1
      value <<= 1
      if (this.#bad) return END_OF_BLOCK
    }
    this.#bad = true
    return END_OF_BLOCK
  }

  #stored(): void {
    this.#bits = 0
    this.#bitCount = 0
    const length = (this.#input[this.#at] ?? 0) | (this.#input[this.#at + 1] ?? 0) << 8
    const check = (this.#input[this.#at + 2] ?? 0) | (this.#input[this.#at + 3] ?? 0) << 8
    this.#at += 4
    if (length !== (~check & 0xffff) || this.#at + length > this.#input.length) {
      this.#bad = true
      return
    }
    const amount = Math.min(length, this.#output.length - this.#written)
    this.#output.set(this.#input.subarray(this.#at, this.#at + amount), this.#written)
    this.#written += amount
    this.#at += length
  }

  #fixed(): void {
    const lengths = this.#lengths
    lengths.fill(8, 0, 144).fill(9, 144, 256).fill(7, 256, 280).fill(8, 280, LITERALS)
    this.#literals.build(lengths, 0, LITERALS)
    lengths.fill(5, 0, DISTANCES)
    this.#distances.build(lengths, 0, DISTANCES)
    this.#block()
  }

  #dynamic(): void {
    const literals = this.#take(5) + 257
    const distances = this.#take(5) + 1
    const codes = this.#take(4) + 4
    const lengths = this.#lengths
    if (this.#bad || literals > LITERALS - 2 || distances > DISTANCES) {
      this.#bad = true
      return
    }
    lengths.fill(0)
    for (let i = 0; i < codes; i++) lengths[CODE_LENGTH_ORDER[i] ?? 0] = this.#take(3)
    if (this.#bad || !this.#literals.build(lengths, 0, 19)) {
      this.#bad = true
      return
    }
    const total = literals + distances
    const read = new Uint8Array(total)
    for (let i = 0; i < total && !this.#bad;) {
      const symbol = this.#symbol(this.#literals)
      if (symbol < 16) {
        read[i++] = symbol
        continue
      }
      const value = symbol === 16 ? read[i - 1] ?? 0 : 0
      const times = symbol === 16 ? 3 + this.#take(2) : symbol === 17 ? 3 + this.#take(3) : 11 + this.#take(7)
      if ((symbol === 16 && i === 0) || i + times > total) {
        this.#bad = true
        return
      }
      read.fill(value, i, i + times)
      i += times
    }
    if (
      this.#bad || !this.#literals.build(read, 0, literals) || !this.#distances.build(read, literals, distances)
    ) {
      this.#bad = true
      return
    }
    this.#block()
  }

  #block(): void {
    const output = this.#output
    while (!this.#bad) {
      const symbol = this.#symbol(this.#literals)
      if (symbol < END_OF_BLOCK) {
        if (this.#written === output.length) return
        output[this.#written++] = symbol
        continue
      }
      if (symbol === END_OF_BLOCK) return
      const base = LENGTH_BASE[symbol - 257]
      if (base === undefined) break
      const length = base + this.#take(LENGTH_EXTRA[symbol - 257] ?? 0)
      const code = this.#symbol(this.#distances)
      const near = DISTANCE_BASE[code]
      if (near === undefined) break
      const distance = near + this.#take(DISTANCE_EXTRA[code] ?? 0)
      if (this.#bad || distance > this.#written) break
      const end = Math.min(this.#written + length, output.length)
      for (; this.#written < end; this.#written++) output[this.#written] = output[this.#written - distance] ?? 0
      if (this.#written === output.length) return
    }
    this.#bad = true
  }
}

/**
 * Inflates `input` until `output` is full; what follows in the input is ignored. Returns `false` when the input makes no sense or
 * holds too little.
 */
export const inflateRaw = (input: Uint8Array, output: Uint8Array): boolean =>
  output.length === 0 || new Inflater(input, output).run()
