/**
 * ACPI as a guest uses it: finds the tables from the root pointer, checks their checksums, turns the machine off, resets it,
 * and lists its processors and virtio devices. It knows nothing of the code that wrote the tables.
 */
import { addressFromHalves } from "../GuestAddress.ts"
import type { GuestMemory } from "../GuestMemory.ts"
import * as GuestBoot from "./GuestBoot.ts"
import type { AccessSize, GuestCpu, GuestRoutine } from "./GuestCpu.ts"

/** A register of the ACPI hardware (Generic Address Structure; ACPI 6.5, section 5.2.3.2). */
export interface AcpiRegister {
  readonly space: "memory" | "io"
  readonly address: number
  /** Width in bytes. */
  readonly size: AccessSize
}

/** A virtio-mmio device that the DSDT describes. */
export interface VirtioMmioDevice {
  /** Path of its node, e.g. `_SB_.V000`. */
  readonly path: string
  readonly base: number
  readonly size: number
  readonly gsi: number
}

/** The configuration pages of a PCI segment (PCI Firmware Specification 3.3, section 4.1.2). */
export interface PciConfigurationPages {
  /** Address of those of bus 0. */
  readonly address: number
  readonly firstBus: number
  readonly lastBus: number
}

/** What a guest knows of its machine through ACPI. */
export interface GuestAcpi {
  readonly sleepControl: AcpiRegister | undefined
  readonly reset: { readonly register: AcpiRegister; readonly value: number } | undefined
  /** `SLP_TYP` for S5, from the object `\_S5`. */
  readonly sleepTypeS5: number | undefined
  /** Local APIC IDs of the enabled processors. */
  readonly apicIds: ReadonlyArray<number>
  readonly virtioMmio: ReadonlyArray<VirtioMmioDevice>
  /** Where the configuration pages of PCI segment 0 are, if there is one. */
  readonly pci: PciConfigurationPages | undefined
}

/** `SLP_EN` of the sleep control register (ACPI 6.5, section 4.8.3.7). */
const SLP_EN = 0x20
const SLP_TYP_SHIFT = 2
const RESET_REG_SUP = 1 << 10
const TABLE_HEADER_SIZE = 36
const TABLE_LIMIT = 64

const Fadt = {
  DSDT: 40,
  FLAGS: 112,
  RESET_REG: 116,
  RESET_VALUE: 128,
  X_DSDT: 140,
  SLEEP_CONTROL_REG: 244
} as const

/** Reads the tables. Throws, and so ends the test, when they are not as the specification says. */
export const read = (memory: GuestMemory, rsdp: number): GuestAcpi => {
  const root = viewAt(memory, rsdp, 36)
  if (signature(root, 0, 8) !== "RSD PTR ") throw new Error("the ACPI root pointer has no signature")
  if (sum(root, 20) !== 0 || sum(root, 36) !== 0) throw new Error("a checksum of the ACPI root pointer is wrong")
  const tables = new Map<string, DataView>()
  const xsdt = tableAt(memory, uint64(root, 24), "XSDT")
  const count = Math.min((xsdt.byteLength - TABLE_HEADER_SIZE) >> 3, TABLE_LIMIT)
  for (let i = 0; i < count; i++) {
    const table = tableAt(memory, uint64(xsdt, TABLE_HEADER_SIZE + 8 * i))
    tables.set(signature(table, 0, 4), table)
  }
  const fadt = tables.get("FACP")
  if (fadt === undefined) throw new Error("the machine has no FADT")
  const x = uint64(fadt, Fadt.X_DSDT)
  const dsdt = tableAt(memory, x === 0 ? fadt.getUint32(Fadt.DSDT, true) : x, "DSDT")
  const nodes = readAml(dsdt)
  const reset = registerAt(fadt, Fadt.RESET_REG)
  return {
    sleepControl: fadt.byteLength > Fadt.SLEEP_CONTROL_REG ? registerAt(fadt, Fadt.SLEEP_CONTROL_REG) : undefined,
    reset: reset === undefined || (fadt.getUint32(Fadt.FLAGS, true) & RESET_REG_SUP) === 0
      ? undefined
      : { register: reset, value: fadt.getUint8(Fadt.RESET_VALUE) },
    sleepTypeS5: nodes.sleepTypeS5,
    apicIds: readMadt(tables.get("APIC")),
    virtioMmio: nodes.devices,
    pci: readMcfg(tables.get("MCFG"))
  }
}

/** The tables that the boot protocol of this vCPU points to. */
export const find = (cpu: GuestCpu): GuestAcpi => read(cpu.memory, GuestBoot.read(cpu).rsdp)

/** Turns the machine off: sleep state S5. Returns only when the machine does not do it. */
export function* powerOff(cpu: GuestCpu, acpi: GuestAcpi = find(cpu)): GuestRoutine {
  if (acpi.sleepControl === undefined || acpi.sleepTypeS5 === undefined) {
    throw new Error("the machine cannot be turned off")
  }
  yield* write(cpu, acpi.sleepControl, (acpi.sleepTypeS5 << SLP_TYP_SHIFT) | SLP_EN)
}

/** Resets the machine by the reset register. Returns only when the machine does not do it. */
export function* reset(cpu: GuestCpu, acpi: GuestAcpi = find(cpu)): GuestRoutine {
  if (acpi.reset === undefined) throw new Error("the machine has no reset register")
  yield* write(cpu, acpi.reset.register, acpi.reset.value)
}

function* write(cpu: GuestCpu, register: AcpiRegister, value: number): GuestRoutine {
  if (register.space === "memory") yield* cpu.store(register.address, register.size, value)
  else if (register.size === 1) yield* cpu.out8(register.address, value)
  else if (register.size === 2) yield* cpu.out16(register.address, value)
  else yield* cpu.out32(register.address, value)
}

const tableAt = (memory: GuestMemory, address: number, expected?: string): DataView => {
  const header = viewAt(memory, address, TABLE_HEADER_SIZE)
  const table = viewAt(memory, address, header.getUint32(4, true))
  const name = signature(table, 0, 4)
  if (expected !== undefined && name !== expected) throw new Error(`the ACPI table ${expected} is called ${name}`)
  if (sum(table, table.byteLength) !== 0) throw new Error(`the checksum of the ACPI table ${name} is wrong`)
  return table
}

const registerAt = (table: DataView, at: number): AcpiRegister | undefined => {
  const space = table.getUint8(at)
  const address = uint64(table, at + 4)
  if (address === 0 || space > 1) return undefined
  const bits = table.getUint8(at + 1)
  return { space: space === 0 ? "memory" : "io", address, size: bits <= 8 ? 1 : bits <= 16 ? 2 : 4 }
}

/** Enabled processors (ACPI 6.5, sections 5.2.12.2 and 5.2.12.12). */
const readMadt = (madt: DataView | undefined): ReadonlyArray<number> => {
  const ids: Array<number> = []
  if (madt === undefined) return ids
  for (let at = TABLE_HEADER_SIZE + 8; at + 2 <= madt.byteLength;) {
    const type = madt.getUint8(at)
    const length = madt.getUint8(at + 1)
    if (length < 2 || at + length > madt.byteLength) throw new Error("an entry of the MADT leaves the table")
    if (type === 0 && (madt.getUint32(at + 4, true) & 1) !== 0) ids.push(madt.getUint8(at + 3))
    if (type === 9 && (madt.getUint32(at + 8, true) & 1) !== 0) ids.push(madt.getUint32(at + 4, true))
    at += length
  }
  return ids
}

/** The first entry, of segment 0. */
const readMcfg = (mcfg: DataView | undefined): PciConfigurationPages | undefined => {
  const entry = TABLE_HEADER_SIZE + 8
  if (mcfg === undefined || mcfg.byteLength < entry + 16 || mcfg.getUint16(entry + 8, true) !== 0) return undefined
  return {
    address: uint64(mcfg, entry),
    firstBus: mcfg.getUint8(entry + 10),
    lastBus: mcfg.getUint8(entry + 11)
  }
}

// --- AML: as much of it as these tables use (ACPI 6.5, chapter 20) ------------------------------------------------------

type AmlValue = number | string | Uint8Array | ReadonlyArray<AmlValue> | undefined

class AmlReader {
  readonly view: DataView
  at: number
  readonly end: number

  constructor(view: DataView, at: number, end: number) {
    this.view = view
    this.at = at
    this.end = end
  }

  byte(): number {
    if (this.at >= this.end) throw new Error("AML ends inside a term")
    return this.view.getUint8(this.at++)
  }

  /** A package's body: from behind the length to its end. */
  body(): AmlReader {
    const start = this.at
    const lead = this.byte()
    const more = lead >> 6
    let length = more === 0 ? lead & 0x3f : lead & 0x0f
    for (let i = 0; i < more; i++) length |= this.byte() << (4 + 8 * i)
    const end = start + length
    if (end > this.end || end < this.at) throw new Error("an AML package leaves its parent")
    const body = new AmlReader(this.view, this.at, end)
    this.at = end
    return body
  }

  name(): string {
    let first = this.byte()
    while (first === 0x5c || first === 0x5e) first = this.byte() // root and parent prefixes
    let segments = 1
    if (first === 0x00) return ""
    if (first === 0x2e) segments = 2
    else if (first === 0x2f) segments = this.byte()
    else this.at--
    const parts: Array<string> = []
    for (let i = 0; i < segments; i++) {
      parts.push(String.fromCharCode(this.byte(), this.byte(), this.byte(), this.byte()))
    }
    return parts.join(".")
  }

  integer(bytes: number): number {
    let value = 0
    for (let i = 0; i < bytes; i++) value += this.byte() * 2 ** (8 * i)
    return value
  }

  value(): AmlValue {
    const opcode = this.byte()
    switch (opcode) {
      case 0x00:
        return 0
      case 0x01:
        return 1
      case 0xff:
        return 0xffff_ffff
      case 0x0a:
        return this.integer(1)
      case 0x0b:
        return this.integer(2)
      case 0x0c:
        return this.integer(4)
      case 0x0e:
        return this.integer(8)
      case 0x0d: {
        let text = ""
        for (let byte = this.byte(); byte !== 0; byte = this.byte()) text += String.fromCharCode(byte)
        return text
      }
      case 0x11: {
        const body = this.body()
        body.value()
        return new Uint8Array(this.view.buffer, this.view.byteOffset + body.at, body.end - body.at)
      }
      case 0x12: {
        const body = this.body()
        const count = body.byte()
        return Array.from({ length: count }, () => (body.at < body.end ? body.value() : undefined))
      }
      default:
        this.at-- // a reference
        return this.name()
    }
  }
}

interface AmlNodes {
  sleepTypeS5: number | undefined
  readonly devices: Array<VirtioMmioDevice>
}

const readAml = (dsdt: DataView): AmlNodes => {
  const nodes: AmlNodes = { sleepTypeS5: undefined, devices: [] }
  walk(new AmlReader(dsdt, TABLE_HEADER_SIZE, dsdt.byteLength), "", nodes)
  return nodes
}

const walk = (reader: AmlReader, path: string, nodes: AmlNodes): void => {
  const names = new Map<string, AmlValue>()
  while (reader.at < reader.end) {
    const opcode = reader.byte()
    if (opcode === 0x08) {
      const name = reader.name()
      const value = reader.value()
      names.set(name, value)
      if (name === "_S5_" && Array.isArray(value) && typeof value[0] === "number") nodes.sleepTypeS5 = value[0]
    } else if (opcode === 0x10) {
      const body = reader.body()
      walk(body, join(path, body.name()), nodes)
    } else if (opcode === 0x14) {
      reader.body() // a method: nothing is run here
    } else if (opcode === 0x5b && reader.byte() === 0x82) {
      const body = reader.body()
      walk(body, join(path, body.name()), nodes)
    } else {
      throw new Error(`AML term 0x${opcode.toString(16)} is not known here`)
    }
  }
  const resources = names.get("_CRS")
  if (names.get("_HID") !== "LNRO0005" || !(resources instanceof Uint8Array)) return
  nodes.devices.push({ path, ...readResources(resources) })
}

/** A fixed 32-bit memory range and an interrupt (ACPI 6.5, sections 6.4.3.4 and 6.4.3.6). */
const readResources = (bytes: Uint8Array): { base: number; size: number; gsi: number } => {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
  const found = { base: 0, size: 0, gsi: -1 }
  for (let at = 0; at < bytes.length;) {
    const tag = view.getUint8(at)
    const large = (tag & 0x80) !== 0
    const length = large ? view.getUint16(at + 1, true) : tag & 7
    const body = at + (large ? 3 : 1)
    if (tag === 0x86) {
      found.base = view.getUint32(body + 1, true)
      found.size = view.getUint32(body + 5, true)
    } else if (tag === 0x89) {
      found.gsi = view.getUint32(body + 2, true)
    }
    at = body + length
  }
  return found
}

const join = (path: string, name: string): string => (path === "" ? name : name === "" ? path : `${path}.${name}`)

const viewAt = (memory: GuestMemory, address: number, size: number): DataView => {
  const bytes = memory.slice(address, size)
  if (bytes === undefined) throw new Error(`an ACPI table is not in memory: 0x${address.toString(16)}`)
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
}

const uint64 = (view: DataView, at: number): number =>
  addressFromHalves(view.getUint32(at, true), view.getUint32(at + 4, true))

const signature = (view: DataView, at: number, length: number): string => {
  let text = ""
  for (let i = 0; i < length; i++) text += String.fromCharCode(view.getUint8(at + i))
  return text
}

const sum = (view: DataView, length: number): number => {
  let total = 0
  for (let i = 0; i < length; i++) total = (total + view.getUint8(i)) & 0xff
  return total
}
