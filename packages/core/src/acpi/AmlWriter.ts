/**
 * A growing list of bytes with the primitives of AML: names, package lengths, EISA identifiers.
 *
 * A value that has no encoding does not throw: the first one is kept in `problem`, and what is written from there on is of no
 * use. This keeps the encoder free of error paths at every step.
 */

/** The first value that could not be encoded. */
export interface AmlProblem {
  readonly rule: string
  readonly value: string
}

const DUAL_NAME_PREFIX = 0x2e
const MULTI_NAME_PREFIX = 0x2f
const NULL_NAME = 0x00
const FIRST_CAPACITY = 512
const NAME_SEGMENT_SIZE = 4
const MAXIMUM_SEGMENTS = 255
/** `\A.B`, `^^A`, `A`, `\`, with segments of 1 to 4 characters. */
const NAME_STRING = /^(\\|\^*)((?:[A-Z_][A-Z0-9_]{0,3})(?:\.[A-Z_][A-Z0-9_]{0,3})*)?$/
const EISA_ID = /^[A-Z]{3}[0-9A-F]{4}$/
/** The largest value of a package length, which counts its own bytes as well (ACPI 6.5, section 20.2.4). */
const MAXIMUM_PACKAGE_LENGTH = 2 ** 28 - 1

/** Bytes of a package length: one up to 63, otherwise a nibble and one to three bytes; it counts itself. */
const packageLengthSize = (bodyLength: number): number =>
  bodyLength + 1 <= 0x3f ? 1 : bodyLength + 2 <= 0xfff ? 2 : bodyLength + 3 <= 0xf_ffff ? 3 : 4

/** Collects AML bytes. */
export class AmlWriter {
  #bytes = new Uint8Array(FIRST_CAPACITY)
  #length = 0
  #problem: AmlProblem | undefined

  /** The first value that had no encoding. */
  get problem(): AmlProblem | undefined {
    return this.#problem
  }

  /** Number of bytes so far. */
  get length(): number {
    return this.#length
  }

  /** A copy of the bytes so far. */
  toBytes(): Uint8Array {
    return this.#bytes.slice(0, this.#length)
  }

  /** Records a problem unless `condition` holds or there is one already. */
  demand(condition: boolean, rule: string, value: number | string): void {
    if (!condition && this.#problem === undefined) this.#problem = { rule, value: String(value) }
  }

  /** Records a problem unless `value` is an integer from 0 to `limit`. */
  requireUnsigned(what: string, value: number, limit: number): void {
    this.demand(
      Number.isInteger(value) && value >= 0 && value <= limit,
      `${what} is an integer from 0 to ${limit}`,
      value
    )
  }

  byte(value: number): void {
    this.#room(1)
    this.#bytes[this.#length++] = value
  }

  word(value: number): void {
    this.byte(value & 0xff)
    this.byte((value >>> 8) & 0xff)
  }

  dword(value: number): void {
    this.word(value & 0xffff)
    this.word(value >>> 16)
  }

  bytes(values: Uint8Array): void {
    this.#room(values.length)
    this.#bytes.set(values, this.#length)
    this.#length += values.length
  }

  /** Text and a terminating zero. */
  asciiz(text: string): void {
    for (let index = 0; index < text.length; index++) {
      const code = text.charCodeAt(index)
      this.demand(code > 0 && code <= 0x7f, "a string is ASCII without NUL", JSON.stringify(text))
      this.byte(code & 0x7f)
    }
    this.byte(0)
  }

  /** A name with its path (ACPI 6.5, section 20.2.2). */
  nameString(path: string): void {
    const match = NAME_STRING.exec(path)
    this.demand(
      match !== null,
      "a name is made of segments of 1 to 4 characters from A-Z, 0-9 and _",
      JSON.stringify(path)
    )
    if (match === null) return
    const prefix = match[1] ?? ""
    const segments = match[2] === undefined ? [] : match[2].split(".")
    this.demand(segments.length > 0 || prefix === "\\", "a name other than \\ has a segment", JSON.stringify(path))
    this.demand(segments.length <= MAXIMUM_SEGMENTS, "a name has at most 255 segments", segments.length)
    for (let index = 0; index < prefix.length; index++) this.byte(prefix.charCodeAt(index))
    if (segments.length === 0) {
      this.byte(NULL_NAME)
    } else if (segments.length === 2) {
      this.byte(DUAL_NAME_PREFIX)
    } else if (segments.length > 2) {
      this.byte(MULTI_NAME_PREFIX)
      this.byte(segments.length & 0xff)
    }
    for (const segment of segments) {
      const padded = segment.padEnd(NAME_SEGMENT_SIZE, "_")
      for (let index = 0; index < NAME_SEGMENT_SIZE; index++) this.byte(padded.charCodeAt(index))
    }
  }

  /** A Plug and Play identifier compressed to 32 bits: letters of 5 bits and four digits, most significant byte first. */
  eisaId(id: string): void {
    const valid = EISA_ID.test(id)
    this.demand(valid, "an EISA identifier is three letters A-Z and four digits 0-9, A-F", JSON.stringify(id))
    if (!valid) return
    const letter = (index: number) => id.charCodeAt(index) - 0x40
    const letters = (letter(0) << 10) | (letter(1) << 5) | letter(2)
    const digits = Number.parseInt(id.slice(3), 16)
    this.byte(letters >>> 8)
    this.byte(letters & 0xff)
    this.byte(digits >>> 8)
    this.byte(digits & 0xff)
  }

  /** A writer for a part whose length must be known before it is written. */
  child(): AmlWriter {
    const child = new AmlWriter()
    child.#problem = this.#problem
    return child
  }

  /** A package length and what it covers: the bytes that `write` writes. */
  sized(write: () => void): void {
    const start = this.#length
    write()
    const bodyLength = this.#length - start
    const size = packageLengthSize(bodyLength)
    this.#room(size)
    this.#bytes.copyWithin(start + size, start, this.#length)
    this.#length = start
    this.#packageLength(bodyLength)
    this.#length += bodyLength
  }

  /** Takes over the problem of a part. */
  adopt(part: AmlWriter): void {
    this.#problem ??= part.#problem
  }

  /** The length of what follows and of itself: one byte up to 63, otherwise a nibble and one to three bytes. */
  #packageLength(bodyLength: number): void {
    if (packageLengthSize(bodyLength) === 1) {
      this.byte(bodyLength + 1)
      return
    }
    const extra = packageLengthSize(bodyLength) - 1
    const total = bodyLength + 1 + extra
    this.demand(total <= MAXIMUM_PACKAGE_LENGTH, `a term is at most ${MAXIMUM_PACKAGE_LENGTH} bytes long`, total)
    this.byte((extra << 6) | (total & 0x0f))
    for (let index = 0; index < extra; index++) this.byte((total >>> (4 + 8 * index)) & 0xff)
  }

  #room(count: number): void {
    if (this.#length + count <= this.#bytes.length) return
    const larger = new Uint8Array(Math.max(this.#bytes.length * 2, this.#length + count))
    larger.set(this.#bytes.subarray(0, this.#length))
    this.#bytes = larger
  }
}
