/**
 * ACPI machine language as a typed tree, and its encoding (ACPI 6.5, chapters 20 and 6.4).
 *
 * Build terms with the constructors of {@link Aml} and {@link Resource}; they are plain data. `encodeAml` turns them into bytes or
 * says which term cannot be encoded.
 */
import * as Result from "effect/Result"
import { AcpiError } from "./AcpiError.ts"
import { AmlWriter } from "./AmlWriter.ts"

/** A resource descriptor of a resource template (ACPI 6.5, section 6.4). */
export type AmlResource =
  | { readonly _tag: "Memory32Fixed"; readonly base: number; readonly size: number; readonly writable: boolean }
  | {
    /** Addresses that a bridge passes on to the devices behind it. */
    readonly _tag: "MemoryWindow"
    readonly base: number
    readonly size: number
  }
  | {
    /** The numbers of the buses behind a bridge. */
    readonly _tag: "BusNumbers"
    readonly first: number
    readonly count: number
  }
  | {
    readonly _tag: "Io"
    readonly base: number
    readonly size: number
    readonly alignment: number
  }
  | {
    readonly _tag: "Interrupt"
    readonly gsis: ReadonlyArray<number>
    readonly trigger: "edge" | "level"
    readonly polarity: "high" | "low"
    readonly sharing: "exclusive" | "shared"
  }

/** A term that has a value: what a name can be given and a method can return. */
export type AmlData =
  | { readonly _tag: "Integer"; readonly value: number }
  | { readonly _tag: "String"; readonly value: string }
  | { readonly _tag: "EisaId"; readonly id: string }
  | { readonly _tag: "Buffer"; readonly bytes: Uint8Array }
  | { readonly _tag: "Package"; readonly elements: ReadonlyArray<AmlData> }
  | { readonly _tag: "ResourceTemplate"; readonly resources: ReadonlyArray<AmlResource> }
  | { readonly _tag: "Reference"; readonly path: string }

/** A term that puts something into the namespace, or a statement of a method. */
export type AmlTerm =
  | { readonly _tag: "Name"; readonly path: string; readonly value: AmlData }
  | { readonly _tag: "Scope"; readonly path: string; readonly terms: ReadonlyArray<AmlTerm> }
  | { readonly _tag: "Device"; readonly path: string; readonly terms: ReadonlyArray<AmlTerm> }
  | {
    readonly _tag: "Method"
    readonly path: string
    readonly argumentCount: number
    readonly serialized: boolean
    readonly terms: ReadonlyArray<AmlTerm>
  }
  | { readonly _tag: "Return"; readonly value: AmlData }

/** Constructors of terms. Paths are written as in ASL: `_HID`, `\\_SB`, `^PCI0.COM1`. */
export const Aml = {
  /** A non-negative safe integer, encoded as short as it can be. */
  integer: (value: number): AmlData => ({ _tag: "Integer", value }),
  /** ASCII text without NUL. */
  string: (value: string): AmlData => ({ _tag: "String", value }),
  /** A Plug and Play identifier of three capital letters and four hexadecimal digits, e.g. `PNP0501`. */
  eisaId: (id: string): AmlData => ({ _tag: "EisaId", id }),
  buffer: (bytes: Uint8Array): AmlData => ({ _tag: "Buffer", bytes }),
  /** At most 255 elements. */
  package: (elements: ReadonlyArray<AmlData>): AmlData => ({ _tag: "Package", elements }),
  resourceTemplate: (resources: ReadonlyArray<AmlResource>): AmlData => ({ _tag: "ResourceTemplate", resources }),
  /** The object at a path. */
  reference: (path: string): AmlData => ({ _tag: "Reference", path }),
  name: (path: string, value: AmlData): AmlTerm => ({ _tag: "Name", path, value }),
  scope: (path: string, terms: ReadonlyArray<AmlTerm>): AmlTerm => ({ _tag: "Scope", path, terms }),
  device: (path: string, terms: ReadonlyArray<AmlTerm>): AmlTerm => ({ _tag: "Device", path, terms }),
  /** A method with 0 to 7 arguments. */
  method: (
    path: string,
    terms: ReadonlyArray<AmlTerm>,
    options: { readonly argumentCount?: number; readonly serialized?: boolean } = {}
  ): AmlTerm => ({
    _tag: "Method",
    path,
    argumentCount: options.argumentCount ?? 0,
    serialized: options.serialized ?? false,
    terms
  }),
  return: (value: AmlData): AmlTerm => ({ _tag: "Return", value })
} as const

/** Constructors of resource descriptors. */
export const Resource = {
  /** Registers at a fixed 32-bit address (ACPI 6.5, section 6.4.3.4). */
  memory32Fixed: (base: number, size: number): AmlResource => ({ _tag: "Memory32Fixed", base, size, writable: true }),
  /** 32-bit addresses that a bridge passes on, which cannot be moved (section 6.4.3.5.2). */
  memoryWindow: (base: number, size: number): AmlResource => ({ _tag: "MemoryWindow", base, size }),
  /** Numbers of the buses behind a bridge (section 6.4.3.5.3). */
  busNumbers: (first: number, count: number): AmlResource => ({ _tag: "BusNumbers", first, count }),
  /** I/O ports at a fixed address (section 6.4.2.5). */
  io: (base: number, size: number): AmlResource => ({ _tag: "Io", base, size, alignment: 1 }),
  /** An edge-triggered, active-high, exclusive interrupt, as every device of this machine has it (section 6.4.3.6). */
  interrupt: (gsi: number): AmlResource => ({
    _tag: "Interrupt",
    gsis: [gsi],
    trigger: "edge",
    polarity: "high",
    sharing: "exclusive"
  })
} as const

/** The encoding of a list of terms, as the body of a DSDT or SSDT. */
export const encodeAml = (terms: ReadonlyArray<AmlTerm>): Result.Result<Uint8Array, AcpiError> => {
  const writer = new AmlWriter()
  writeTerms(writer, terms)
  const problem = writer.problem
  return problem === undefined ? Result.succeed(writer.toBytes()) : Result.fail(new AcpiError(problem))
}

/** Opcodes (ACPI 6.5, section 20.3). */
const Op = {
  ZERO: 0x00,
  ONE: 0x01,
  NAME: 0x08,
  BYTE: 0x0a,
  WORD: 0x0b,
  DWORD: 0x0c,
  STRING: 0x0d,
  QWORD: 0x0e,
  SCOPE: 0x10,
  BUFFER: 0x11,
  PACKAGE: 0x12,
  METHOD: 0x14,
  EXTENDED: 0x5b,
  EXTENDED_DEVICE: 0x82,
  RETURN: 0xa4
} as const

/** Terms of one scope. Two objects of one name would make an operating system drop the whole table. */
const writeTerms = (writer: AmlWriter, terms: ReadonlyArray<AmlTerm>): void => {
  const names = new Set<string>()
  for (const term of terms) {
    if (term._tag === "Name" || term._tag === "Device" || term._tag === "Method") {
      const name = term.path.split(".").map((segment) => segment.replace(/_+$/, "")).join(".")
      writer.demand(!names.has(name), "the objects of a scope have different names", JSON.stringify(term.path))
      names.add(name)
    }
    writeTerm(writer, term)
  }
}

const writeTerm = (writer: AmlWriter, term: AmlTerm): void => {
  switch (term._tag) {
    case "Name":
      writer.byte(Op.NAME)
      writer.nameString(term.path)
      writeData(writer, term.value)
      return
    case "Scope":
      writer.byte(Op.SCOPE)
      writer.sized(() => {
        writer.nameString(term.path)
        writeTerms(writer, term.terms)
      })
      return
    case "Device":
      writer.byte(Op.EXTENDED)
      writer.byte(Op.EXTENDED_DEVICE)
      writer.sized(() => {
        writer.nameString(term.path)
        writeTerms(writer, term.terms)
      })
      return
    case "Method":
      writer.demand(
        Number.isInteger(term.argumentCount) && term.argumentCount >= 0 && term.argumentCount <= 7,
        "a method has 0 to 7 arguments",
        term.argumentCount
      )
      writer.byte(Op.METHOD)
      writer.sized(() => {
        writer.nameString(term.path)
        writer.byte(term.argumentCount | (term.serialized ? 0x08 : 0))
        writeTerms(writer, term.terms)
      })
      return
    case "Return":
      writer.byte(Op.RETURN)
      writeData(writer, term.value)
      return
  }
}

const writeData = (writer: AmlWriter, data: AmlData): void => {
  switch (data._tag) {
    case "Integer":
      writeInteger(writer, data.value)
      return
    case "String":
      writer.byte(Op.STRING)
      writer.asciiz(data.value)
      return
    case "EisaId":
      writer.byte(Op.DWORD)
      writer.eisaId(data.id)
      return
    case "Buffer":
      writeBuffer(writer, data.bytes)
      return
    case "Package":
      writer.demand(data.elements.length <= 0xff, "a package has at most 255 elements", data.elements.length)
      writer.byte(Op.PACKAGE)
      writer.sized(() => {
        writer.byte(data.elements.length & 0xff)
        for (const element of data.elements) writeData(writer, element)
      })
      return
    case "ResourceTemplate": {
      const descriptors = writer.child()
      for (const resource of data.resources) writeResource(descriptors, resource)
      descriptors.byte(END_TAG)
      // A zero checksum says that the template is to be taken as it is (ACPI 6.5, section 6.4.2.9).
      descriptors.byte(0)
      writer.adopt(descriptors)
      writeBuffer(writer, descriptors.toBytes())
      return
    }
    case "Reference":
      writer.nameString(data.path)
      return
  }
}

const writeInteger = (writer: AmlWriter, value: number): void => {
  writer.demand(Number.isSafeInteger(value) && value >= 0, "an integer is a non-negative safe integer", value)
  if (value === 0) {
    writer.byte(Op.ZERO)
  } else if (value === 1) {
    writer.byte(Op.ONE)
  } else if (value <= 0xff) {
    writer.byte(Op.BYTE)
    writer.byte(value)
  } else if (value <= 0xffff) {
    writer.byte(Op.WORD)
    writer.word(value)
  } else if (value <= 0xffff_ffff) {
    writer.byte(Op.DWORD)
    writer.dword(value)
  } else {
    writer.byte(Op.QWORD)
    writer.dword(value % 2 ** 32)
    writer.dword(Math.floor(value / 2 ** 32))
  }
}

const writeBuffer = (writer: AmlWriter, bytes: Uint8Array): void => {
  writer.byte(Op.BUFFER)
  writer.sized(() => {
    writeInteger(writer, bytes.length)
    writer.bytes(bytes)
  })
}

/** Descriptor tags (ACPI 6.5, tables 6.30 and 6.40), small ones with their length. */
const IO_PORT_DESCRIPTOR = 0x47
const END_TAG = 0x79
const MEMORY_32_FIXED_DESCRIPTOR = 0x86
const DWORD_ADDRESS_SPACE_DESCRIPTOR = 0x87
const WORD_ADDRESS_SPACE_DESCRIPTOR = 0x88
const EXTENDED_INTERRUPT_DESCRIPTOR = 0x89
/** Address space descriptors: kinds, and flags (tables 6.46 and 6.47). */
const ADDRESS_SPACE_MEMORY = 0
const ADDRESS_SPACE_BUS = 2
/** A bridge's range, positively decoded, whose first and last address are fixed. */
const ADDRESS_SPACE_FIXED = 0x0c
/** Read and written, not cached. */
const ADDRESS_SPACE_READ_WRITE = 0x01
/** I/O port descriptor: the device decodes 16 bits of the address. */
const IO_DECODE_16 = 0x01
/** Extended interrupt descriptor flags (table 6.56). */
const INTERRUPT_CONSUMER = 0x01
const INTERRUPT_EDGE = 0x02
const INTERRUPT_ACTIVE_LOW = 0x04
const INTERRUPT_SHARED = 0x08

const writeResource = (writer: AmlWriter, resource: AmlResource): void => {
  switch (resource._tag) {
    case "Memory32Fixed":
      writer.requireUnsigned("a 32-bit memory base", resource.base, 0xffff_ffff)
      writer.requireUnsigned("a 32-bit memory size", resource.size, 0xffff_ffff)
      writer.demand(resource.base + resource.size <= 2 ** 32, "32-bit memory ends at 4 GiB", resource.base)
      writer.byte(MEMORY_32_FIXED_DESCRIPTOR)
      writer.word(9)
      writer.byte(resource.writable ? 1 : 0)
      writer.dword(resource.base)
      writer.dword(resource.size)
      return
    case "MemoryWindow":
      writer.requireUnsigned("a 32-bit memory base", resource.base, 0xffff_ffff)
      writer.demand(resource.size > 0, "a window is not empty", resource.size)
      writer.demand(resource.base + resource.size <= 2 ** 32, "32-bit memory ends at 4 GiB", resource.base)
      writer.byte(DWORD_ADDRESS_SPACE_DESCRIPTOR)
      writer.word(23)
      writer.byte(ADDRESS_SPACE_MEMORY)
      writer.byte(ADDRESS_SPACE_FIXED)
      writer.byte(ADDRESS_SPACE_READ_WRITE)
      // Granularity, first and last address, translation, length.
      writer.dword(0)
      writer.dword(resource.base)
      writer.dword(resource.base + resource.size - 1)
      writer.dword(0)
      writer.dword(resource.size)
      return
    case "BusNumbers":
      writer.requireUnsigned("a bus number", resource.first, 0xff)
      writer.demand(resource.count > 0, "a window is not empty", resource.count)
      writer.demand(resource.first + resource.count <= 0x100, "buses are numbered up to 255", resource.first)
      writer.byte(WORD_ADDRESS_SPACE_DESCRIPTOR)
      writer.word(13)
      writer.byte(ADDRESS_SPACE_BUS)
      writer.byte(ADDRESS_SPACE_FIXED)
      writer.byte(0)
      writer.word(0)
      writer.word(resource.first)
      writer.word(resource.first + resource.count - 1)
      writer.word(0)
      writer.word(resource.count)
      return
    case "Io":
      writer.requireUnsigned("an I/O port", resource.base, 0xffff)
      writer.requireUnsigned("an alignment of I/O ports", resource.alignment, 0xff)
      writer.requireUnsigned("a number of I/O ports", resource.size, 0xff)
      writer.demand(resource.base + resource.size <= 0x1_0000, "I/O ports end at 0xffff", resource.base)
      writer.byte(IO_PORT_DESCRIPTOR)
      writer.byte(IO_DECODE_16)
      writer.word(resource.base)
      writer.word(resource.base)
      writer.byte(resource.alignment)
      writer.byte(resource.size)
      return
    case "Interrupt":
      writer.demand(
        resource.gsis.length > 0 && resource.gsis.length <= 0xff,
        "an interrupt descriptor has 1 to 255 interrupts",
        resource.gsis.length
      )
      writer.byte(EXTENDED_INTERRUPT_DESCRIPTOR)
      writer.word(2 + 4 * resource.gsis.length)
      writer.byte(
        INTERRUPT_CONSUMER
          | (resource.trigger === "edge" ? INTERRUPT_EDGE : 0)
          | (resource.polarity === "low" ? INTERRUPT_ACTIVE_LOW : 0)
          | (resource.sharing === "shared" ? INTERRUPT_SHARED : 0)
      )
      writer.byte(resource.gsis.length & 0xff)
      for (const gsi of resource.gsis) {
        writer.requireUnsigned("an interrupt", gsi, 0xffff_ffff)
        writer.dword(gsi)
      }
      return
  }
}
