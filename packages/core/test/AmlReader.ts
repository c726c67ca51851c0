/**
 * A reader of AML that shares nothing with the encoder: it follows the grammar of ACPI 6.5, section 20.2, as far as the encoder
 * can write, and gives back the same kind of tree. Names come back as they are encoded, in segments of four characters.
 */
import type { AmlData, AmlResource, AmlTerm } from "@troupe/core/acpi/Aml"

class Cursor {
  readonly bytes: Uint8Array
  position: number
  readonly end: number
  constructor(bytes: Uint8Array, position: number, end: number) {
    this.bytes = bytes
    this.position = position
    this.end = end
  }
  get done(): boolean {
    return this.position === this.end
  }
  peek(): number {
    if (this.position >= this.end) throw new Error(`AML ends at ${this.position}`)
    return this.bytes[this.position]!
  }
  byte(): number {
    const value = this.peek()
    this.position++
    return value
  }
  number(size: number): number {
    let value = 0
    for (let i = 0; i < size; i++) value += this.byte() * 2 ** (8 * i)
    return value
  }
  text(size: number): string {
    let text = ""
    for (let i = 0; i < size; i++) text += String.fromCharCode(this.byte())
    return text
  }
  /** The part that a PkgLength at this place covers. */
  sized(): Cursor {
    const start = this.position
    const lead = this.byte()
    const count = lead >>> 6
    let length = count === 0 ? lead & 0x3f : lead & 0x0f
    if (count > 0 && (lead & 0x30) !== 0) throw new Error("PkgLength: bits 4 and 5 must be zero")
    for (let i = 0; i < count; i++) length += this.byte() * 2 ** (4 + 8 * i)
    const end = start + length
    const body = end - this.position
    if (count > 0 && body + count <= 2 ** (count === 1 ? 6 : 8 * count - 4) - 1) {
      throw new Error("PkgLength is not the shortest")
    }
    if (end > this.end) throw new Error(`PkgLength ${length} at ${start} leaves its container`)
    const part = new Cursor(this.bytes, this.position, end)
    this.position = end
    return part
  }
}

const NAME_START = /[A-Z_\\^./]/

const readName = (cursor: Cursor): string => {
  let prefix = ""
  while (cursor.peek() === 0x5c || cursor.peek() === 0x5e) prefix += cursor.text(1)
  const lead = cursor.peek()
  if (lead === 0) {
    cursor.byte()
    return prefix
  }
  let count = 1
  if (lead === 0x2e) {
    cursor.byte()
    count = 2
  } else if (lead === 0x2f) {
    cursor.byte()
    count = cursor.byte()
  }
  const segments = Array.from({ length: count }, () => cursor.text(4))
  for (const segment of segments) {
    if (!/^[A-Z_][A-Z0-9_]{3}$/.test(segment)) throw new Error(`bad name segment ${JSON.stringify(segment)}`)
  }
  return prefix + segments.join(".")
}

const readInteger = (cursor: Cursor): number => {
  const op = cursor.byte()
  if (op === 0x00) return 0
  if (op === 0x01) return 1
  const size = { 0x0a: 1, 0x0b: 2, 0x0c: 4, 0x0e: 8 }[op]
  if (size === undefined) throw new Error(`no integer starts with ${op}`)
  return cursor.number(size)
}

const readData = (cursor: Cursor): AmlData => {
  const op = cursor.peek()
  if (op === 0x0d) {
    cursor.byte()
    let value = ""
    for (;;) {
      const code = cursor.byte()
      if (code === 0) return { _tag: "String", value }
      value += String.fromCharCode(code)
    }
  }
  if (op === 0x11) {
    cursor.byte()
    const part = cursor.sized()
    const size = readInteger(part)
    const bytes = part.bytes.slice(part.position, part.end)
    if (bytes.length !== size) throw new Error(`a buffer of ${size} bytes has ${bytes.length}`)
    return { _tag: "Buffer", bytes }
  }
  if (op === 0x12) {
    cursor.byte()
    const part = cursor.sized()
    const elements = Array.from({ length: part.byte() }, () => readData(part))
    if (!part.done) throw new Error("a package has more bytes than elements")
    return { _tag: "Package", elements }
  }
  if (op !== 0 && NAME_START.test(String.fromCharCode(op))) return { _tag: "Reference", path: readName(cursor) }
  return { _tag: "Integer", value: readInteger(cursor) }
}

const readTerms = (cursor: Cursor): ReadonlyArray<AmlTerm> => {
  const terms: Array<AmlTerm> = []
  while (!cursor.done) terms.push(readTerm(cursor))
  return terms
}

const readTerm = (cursor: Cursor): AmlTerm => {
  const op = cursor.byte()
  switch (op) {
    case 0x08:
      return { _tag: "Name", path: readName(cursor), value: readData(cursor) }
    case 0x10: {
      const part = cursor.sized()
      return { _tag: "Scope", path: readName(part), terms: readTerms(part) }
    }
    case 0x14: {
      const part = cursor.sized()
      const path = readName(part)
      const flags = part.byte()
      const serialized = (flags & 8) !== 0
      return { _tag: "Method", path, argumentCount: flags & 7, serialized, terms: readTerms(part) }
    }
    case 0x5b: {
      const extended = cursor.byte()
      if (extended !== 0x82) throw new Error(`no term starts with 5b ${extended.toString(16)}`)
      const part = cursor.sized()
      return { _tag: "Device", path: readName(part), terms: readTerms(part) }
    }
    case 0xa4:
      return { _tag: "Return", value: readData(cursor) }
    default:
      throw new Error(`no term starts with ${op.toString(16)}`)
  }
}

/** The tree that these bytes encode. Throws when they are not AML. */
export const readAml = (bytes: Uint8Array): ReadonlyArray<AmlTerm> => readTerms(new Cursor(bytes, 0, bytes.length))

/** The descriptors of a resource template. Throws when it is malformed. */
export const readResources = (bytes: Uint8Array): ReadonlyArray<AmlResource> => {
  const cursor = new Cursor(bytes, 0, bytes.length)
  const resources: Array<AmlResource> = []
  for (;;) {
    const tag = cursor.byte()
    if (tag === 0x79) {
      cursor.byte()
      if (!cursor.done) throw new Error("bytes follow the end tag")
      return resources
    }
    const size = (tag & 0x80) === 0 ? tag & 7 : cursor.number(2)
    const part = new Cursor(bytes, cursor.position, cursor.position + size)
    cursor.position += size
    if (tag === 0x47) {
      if (part.byte() !== 1) throw new Error("an I/O descriptor decodes 16 bits")
      const base = part.number(2)
      if (part.number(2) !== base) throw new Error("the I/O range is not fixed")
      const alignment = part.byte()
      resources.push({ _tag: "Io", base, size: part.byte(), alignment })
    } else if (tag === 0x86) {
      const writable = part.byte() === 1
      const base = part.number(4)
      resources.push({ _tag: "Memory32Fixed", base, size: part.number(4), writable })
    } else if (tag === 0x87) {
      const head = [part.byte(), part.byte(), part.byte(), part.number(4)]
      if (head.join() !== "0,12,1,0") throw new Error(`unknown window ${head.join()}`)
      const base = part.number(4)
      const last = part.number(4)
      if (part.number(4) !== 0) throw new Error("a translation")
      const size = part.number(4)
      if (last !== base + size - 1) throw new Error(`a window of ${size} bytes from ${base} to ${last}`)
      resources.push({ _tag: "MemoryWindow", base, size })
    } else if (tag === 0x88) {
      const head = [part.byte(), part.byte(), part.byte(), part.number(2)]
      if (head.join() !== "2,12,0,0") throw new Error(`unknown window ${head.join()}`)
      const first = part.number(2)
      const last = part.number(2)
      if (part.number(2) !== 0) throw new Error("a translation")
      const count = part.number(2)
      if (last !== first + count - 1) throw new Error(`${count} buses from ${first} to ${last}`)
      resources.push({ _tag: "BusNumbers", first, count })
    } else if (tag === 0x89) {
      const flags = part.byte()
      if ((flags & 1) === 0) throw new Error("the device consumes its interrupt")
      resources.push({
        _tag: "Interrupt",
        trigger: (flags & 2) === 0 ? "level" : "edge",
        polarity: (flags & 4) === 0 ? "high" : "low",
        sharing: (flags & 8) === 0 ? "exclusive" : "shared",
        gsis: Array.from({ length: part.byte() }, () => part.number(4))
      })
    } else {
      throw new Error(`unknown descriptor ${tag.toString(16)}`)
    }
    if (!part.done) throw new Error(`a descriptor ${tag.toString(16)} has another length than it says`)
  }
}
