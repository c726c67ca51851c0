/**
 * The ACPI tables of an x86-64 machine: RSDP, XSDT, FADT (hardware-reduced), MADT and DSDT, ready to be copied into guest
 * memory (ACPI 6.5, chapter 5).
 */
import * as Result from "effect/Result"
import { type GuestBlock, guestBlock } from "../boot/GuestBlock.ts"
import { viewOf, writeUint64 } from "../boot/LittleEndian.ts"
import { ACPI_TABLES_ADDRESS, ACPI_TABLES_SIZE, IO_APIC_ADDRESS, LOCAL_APIC_ADDRESS } from "../boot/MachineLayout.ts"
import type { AddressSpace } from "../Bus.ts"
import { AcpiError } from "./AcpiError.ts"
import { Aml, type AmlTerm, encodeAml } from "./Aml.ts"

/** A register of one byte, in I/O or memory space: an ACPI generic address. */
export interface AcpiRegister {
  readonly space: AddressSpace
  readonly address: number
}

/** An ISA interrupt that is not wired to the I/O APIC input of its own number (ACPI 6.5, section 5.2.12.5). */
export interface InterruptOverride {
  /** The ISA interrupt. */
  readonly source: number
  readonly gsi: number
  readonly polarity: "high" | "low"
  readonly trigger: "edge" | "level"
}

/** Configuration pages of PCI functions, segment 0 (PCI Firmware Specification 3.3, section 4.1.2). */
export interface PciConfigurationPages {
  /** Address of those of bus 0. */
  readonly address: number
  readonly firstBus: number
  readonly lastBus: number
}

/** What the tables describe. */
export interface AcpiInput {
  /** Number of vCPUs. The local APIC ID of each is its number. */
  readonly cpus: number
  /** Nodes of the machine's devices, under `\_SB`. */
  readonly devices: ReadonlyArray<AmlTerm>
  /** `SLEEP_CONTROL_REG`: writing {@link SLEEP_CONTROL_S5} turns the machine off. */
  readonly sleepControl: AcpiRegister
  /** `SLEEP_STATUS_REG`. */
  readonly sleepStatus: AcpiRegister
  /** `RESET_REG` and `RESET_VALUE`: writing the value resets the machine. */
  readonly reset: { readonly register: AcpiRegister; readonly value: number }
  /** Default: none, every ISA interrupt has the I/O APIC input of its own number. */
  readonly interruptOverrides?: ReadonlyArray<InterruptOverride> | undefined
  /** Default: none, there is no PCI. */
  readonly pci?: PciConfigurationPages | undefined
}

/** The tables in their places. */
export interface AcpiPlan {
  /** Where the RSDP is. */
  readonly rsdpAddress: number
  readonly blocks: ReadonlyArray<GuestBlock>
}

/** `SLP_TYP` of the soft-off state, as the `\_S5` package announces it. */
export const SLEEP_TYPE_S5 = 5
/** `SLP_TYP` in the sleep control register (ACPI 6.5, table 4.19). */
export const SLEEP_TYPE_MASK = 0x1c
/** Position of `SLP_TYP`. */
export const SLEEP_TYPE_SHIFT = 2
/** `SLP_EN` in the sleep control register. */
export const SLEEP_ENABLE = 0x20
/** What an operating system writes to the sleep control register to turn this machine off. */
export const SLEEP_CONTROL_S5 = (SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT) | SLEEP_ENABLE
/** The most vCPUs that the tables can list with room to spare for devices. */
export const ACPI_MAXIMUM_CPUS = 1024

const HEADER_SIZE = 36
const OEM_ID = "TROUPE"
const OEM_TABLE_ID = "TROUPEVM"
const OEM_REVISION = 1
const CREATOR_ID = "TRPE"
const CREATOR_REVISION = 1
/** Tables start at multiples of this, which the RSDP must (section 5.2.5.1). */
const TABLE_ALIGNMENT = 16

/** Builds the tables, or says what cannot be described. */
export const buildAcpi = (input: AcpiInput): Result.Result<AcpiPlan, AcpiError> =>
  Result.gen(function*() {
    yield* checkInput(input)
    const aml = yield* encodeAml([
      Aml.name("_S5", Aml.package([SLEEP_TYPE_S5, SLEEP_TYPE_S5, 0, 0].map(Aml.integer))),
      Aml.scope("\\_SB", input.devices)
    ])
    // From the leaves to the root: a table can only point at one whose place is known.
    let next = ACPI_TABLES_ADDRESS
    const place = (bytes: Uint8Array): number => {
      const address = next
      next = Math.ceil((next + bytes.length) / TABLE_ALIGNMENT) * TABLE_ALIGNMENT
      return address
    }
    const rsdpAddress = place(new Uint8Array(RSDP_SIZE))
    const dsdt = makeDsdt(aml)
    const dsdtAddress = place(dsdt)
    const fadt = makeFadt(input, dsdtAddress)
    const fadtAddress = place(fadt)
    const madt = makeMadt(input)
    const madtAddress = place(madt)
    const mcfg = input.pci === undefined ? undefined : makeMcfg(input.pci)
    const mcfgAddress = mcfg === undefined ? undefined : place(mcfg)
    const xsdt = makeXsdt([fadtAddress, madtAddress, ...(mcfgAddress === undefined ? [] : [mcfgAddress])])
    const xsdtAddress = place(xsdt)
    const used = next - ACPI_TABLES_ADDRESS
    if (used > ACPI_TABLES_SIZE) {
      return yield* invalid(`all tables together take at most ${ACPI_TABLES_SIZE} bytes`, used)
    }
    return {
      rsdpAddress,
      blocks: [
        guestBlock("RSDP", rsdpAddress, makeRsdp(xsdtAddress)),
        guestBlock("DSDT", dsdtAddress, dsdt),
        guestBlock("FADT", fadtAddress, fadt),
        guestBlock("MADT", madtAddress, madt),
        ...(mcfg === undefined || mcfgAddress === undefined ? [] : [guestBlock("MCFG", mcfgAddress, mcfg)]),
        guestBlock("XSDT", xsdtAddress, xsdt)
      ]
    }
  })

const invalid = (rule: string, value: number): Result.Result<never, AcpiError> =>
  Result.fail(new AcpiError({ rule, value: String(value) }))

const isUnsigned = (value: number, limit: number): boolean => Number.isInteger(value) && value >= 0 && value <= limit

const checkInput = (input: AcpiInput): Result.Result<void, AcpiError> => {
  if (input.cpus < 1 || !isUnsigned(input.cpus, ACPI_MAXIMUM_CPUS)) {
    return invalid(`a machine has 1 to ${ACPI_MAXIMUM_CPUS} vCPUs`, input.cpus)
  }
  for (const register of [input.sleepControl, input.sleepStatus, input.reset.register]) {
    if (!isUnsigned(register.address, register.space === "pio" ? 0xffff : Number.MAX_SAFE_INTEGER)) {
      return invalid("a register has an address in its space", register.address)
    }
  }
  if (!isUnsigned(input.reset.value, 0xff)) return invalid("RESET_VALUE is a byte", input.reset.value)
  for (const override of input.interruptOverrides ?? []) {
    if (!isUnsigned(override.source, 15)) return invalid("an ISA interrupt is 0 to 15", override.source)
    if (!isUnsigned(override.gsi, 0xffff_ffff)) return invalid("an interrupt has 32 bits", override.gsi)
  }
  return Result.succeed(undefined)
}

/** The byte that makes the sum of all bytes 0 modulo 256. */
const checksum = (bytes: Uint8Array): number => {
  let sum = 0
  for (const byte of bytes) sum = (sum + byte) & 0xff
  return (0x100 - sum) & 0xff
}

const writeAscii = (bytes: Uint8Array, offset: number, text: string): void => {
  for (let index = 0; index < text.length; index++) bytes[offset + index] = text.charCodeAt(index)
}

/** A table of `size` bytes with its header; `fill` writes the rest, then the checksum is set (section 5.2.6). */
const makeTable = (
  signature: string,
  revision: number,
  size: number,
  fill: (bytes: Uint8Array, view: DataView) => void
): Uint8Array => {
  const bytes = new Uint8Array(size)
  const view = viewOf(bytes)
  writeAscii(bytes, 0, signature)
  view.setUint32(4, size, true)
  view.setUint8(8, revision)
  writeAscii(bytes, 10, OEM_ID)
  writeAscii(bytes, 16, OEM_TABLE_ID)
  view.setUint32(24, OEM_REVISION, true)
  writeAscii(bytes, 28, CREATOR_ID)
  view.setUint32(32, CREATOR_REVISION, true)
  fill(bytes, view)
  view.setUint8(9, checksum(bytes))
  return bytes
}

const RSDP_SIZE = 36
/** The part of the RSDP that its first checksum covers, which is all that ACPI 1.0 knows. */
const RSDP_V1_SIZE = 20
const RSDP_REVISION = 2

/** The root pointer (section 5.2.5.3). It names no RSDT: every 64-bit operating system reads the XSDT. */
const makeRsdp = (xsdtAddress: number): Uint8Array => {
  const bytes = new Uint8Array(RSDP_SIZE)
  const view = viewOf(bytes)
  writeAscii(bytes, 0, "RSD PTR ")
  writeAscii(bytes, 9, OEM_ID)
  view.setUint8(15, RSDP_REVISION)
  view.setUint32(20, RSDP_SIZE, true)
  writeUint64(view, 24, xsdtAddress)
  view.setUint8(8, checksum(bytes.subarray(0, RSDP_V1_SIZE)))
  view.setUint8(32, checksum(bytes))
  return bytes
}

const XSDT_REVISION = 1

/** The list of tables (section 5.2.8). */
const makeXsdt = (tables: ReadonlyArray<number>): Uint8Array =>
  makeTable("XSDT", XSDT_REVISION, HEADER_SIZE + 8 * tables.length, (_, view) => {
    for (const [index, address] of tables.entries()) writeUint64(view, HEADER_SIZE + 8 * index, address)
  })

/** Revision 2 and above: integers have 64 bits. */
const DSDT_REVISION = 2

const makeDsdt = (aml: Uint8Array): Uint8Array =>
  makeTable("DSDT", DSDT_REVISION, HEADER_SIZE + aml.length, (bytes) => bytes.set(aml, HEADER_SIZE))

/** Offsets in the FADT (section 5.2.9). */
const FadtOffset = {
  DSDT: 40,
  IAPC_BOOT_ARCH: 109,
  Flags: 112,
  RESET_REG: 116,
  RESET_VALUE: 128,
  FADT_Minor_Version: 131,
  X_DSDT: 140,
  SLEEP_CONTROL_REG: 244,
  SLEEP_STATUS_REG: 256
} as const
const FADT_SIZE = 276
const FADT_REVISION = 6
const FADT_MINOR_VERSION = 5

/** Fixed feature flags (table 5.10). */
const FADT_WBINVD = 1 << 0
/** There is no fixed power button, and no fixed sleep button. */
const FADT_PWR_BUTTON = 1 << 4
const FADT_SLP_BUTTON = 1 << 5
const FADT_RESET_REG_SUP = 1 << 10
const FADT_HW_REDUCED_ACPI = 1 << 20

/** IA-PC boot architecture flags (table 5.11). The flag that would announce a keyboard controller stays clear. */
const IAPC_VGA_NOT_PRESENT = 1 << 2
const IAPC_CMOS_RTC_NOT_PRESENT = 1 << 5

const makeFadt = (input: AcpiInput, dsdtAddress: number): Uint8Array =>
  makeTable("FACP", FADT_REVISION, FADT_SIZE, (_, view) => {
    const at = FadtOffset
    view.setUint32(at.DSDT, dsdtAddress, true)
    view.setUint16(at.IAPC_BOOT_ARCH, IAPC_VGA_NOT_PRESENT | IAPC_CMOS_RTC_NOT_PRESENT, true)
    view.setUint32(
      at.Flags,
      FADT_WBINVD | FADT_PWR_BUTTON | FADT_SLP_BUTTON | FADT_RESET_REG_SUP | FADT_HW_REDUCED_ACPI,
      true
    )
    writeRegister(view, at.RESET_REG, input.reset.register)
    view.setUint8(at.RESET_VALUE, input.reset.value)
    view.setUint8(at.FADT_Minor_Version, FADT_MINOR_VERSION)
    writeUint64(view, at.X_DSDT, dsdtAddress)
    writeRegister(view, at.SLEEP_CONTROL_REG, input.sleepControl)
    writeRegister(view, at.SLEEP_STATUS_REG, input.sleepStatus)
  })

/** Address space identifiers and access size of a generic address (section 5.2.3.2). */
const GAS_SYSTEM_MEMORY = 0
const GAS_SYSTEM_IO = 1
const GAS_BYTE_ACCESS = 1

const writeRegister = (view: DataView, offset: number, register: AcpiRegister): void => {
  view.setUint8(offset, register.space === "pio" ? GAS_SYSTEM_IO : GAS_SYSTEM_MEMORY)
  view.setUint8(offset + 1, 8)
  view.setUint8(offset + 2, 0)
  view.setUint8(offset + 3, GAS_BYTE_ACCESS)
  writeUint64(view, offset + 4, register.address)
}

const MCFG_REVISION = 1
/** Bytes of the MCFG before its entries, and of one entry. */
const MCFG_FIXED_SIZE = HEADER_SIZE + 8
const MCFG_ENTRY_SIZE = 16

const makeMcfg = (pci: PciConfigurationPages): Uint8Array =>
  makeTable("MCFG", MCFG_REVISION, MCFG_FIXED_SIZE + MCFG_ENTRY_SIZE, (_, view) => {
    writeUint64(view, MCFG_FIXED_SIZE, pci.address)
    view.setUint8(MCFG_FIXED_SIZE + 10, pci.firstBus)
    view.setUint8(MCFG_FIXED_SIZE + 11, pci.lastBus)
  })

const MADT_REVISION = 5
/** Interrupt controller structures (table 5.20): type and length in bytes. */
const MADT_LOCAL_APIC = { type: 0, size: 8 } as const
const MADT_IO_APIC = { type: 1, size: 12 } as const
const MADT_INTERRUPT_OVERRIDE = { type: 2, size: 10 } as const
const MADT_LOCAL_APIC_NMI = { type: 4, size: 6 } as const
const MADT_LOCAL_X2APIC = { type: 9, size: 16 } as const
const MADT_LOCAL_X2APIC_NMI = { type: 10, size: 12 } as const
/** A processor that is ready to be started. */
const MADT_ENABLED = 1
/** From this local APIC ID on, a processor is described by an x2APIC structure. */
const X2APIC_FIRST_ID = 255
/** In an NMI structure: all processors. */
const ALL_PROCESSORS = 0xff
const ALL_X2APIC_PROCESSORS = 0xffff_ffff
/** The local APIC input that NMI is wired to. */
const NMI_LINT = 1
/** MPS INTI flags (table 5.26). */
const INTI_ACTIVE_HIGH = 0x1
const INTI_ACTIVE_LOW = 0x3
const INTI_EDGE = 0x4
const INTI_LEVEL = 0xc

/** Bytes of the MADT before its structures: header, local APIC address, flags. */
const MADT_FIXED_SIZE = HEADER_SIZE + 8

const makeMadt = (input: AcpiInput): Uint8Array => {
  const overrides = input.interruptOverrides ?? []
  const x2apics = Math.max(input.cpus - X2APIC_FIRST_ID, 0)
  const size = MADT_FIXED_SIZE
    + (input.cpus - x2apics) * MADT_LOCAL_APIC.size
    + x2apics * MADT_LOCAL_X2APIC.size
    + MADT_IO_APIC.size
    + overrides.length * MADT_INTERRUPT_OVERRIDE.size
    + MADT_LOCAL_APIC_NMI.size
    + (x2apics > 0 ? MADT_LOCAL_X2APIC_NMI.size : 0)
  return makeTable("APIC", MADT_REVISION, size, (_, view) => {
    view.setUint32(HEADER_SIZE, LOCAL_APIC_ADDRESS, true)
    // Flags stay 0: a hardware-reduced machine has no pair of 8259 controllers for an operating system to turn off.
    let offset = MADT_FIXED_SIZE
    const structure = (kind: { readonly type: number; readonly size: number }): number => {
      const start = offset
      view.setUint8(start, kind.type)
      view.setUint8(start + 1, kind.size)
      offset += kind.size
      return start
    }
    for (let id = 0; id < input.cpus; id++) {
      if (id < X2APIC_FIRST_ID) {
        const start = structure(MADT_LOCAL_APIC)
        view.setUint8(start + 2, id)
        view.setUint8(start + 3, id)
        view.setUint32(start + 4, MADT_ENABLED, true)
      } else {
        const start = structure(MADT_LOCAL_X2APIC)
        view.setUint32(start + 4, id, true)
        view.setUint32(start + 8, MADT_ENABLED, true)
        view.setUint32(start + 12, id, true)
      }
    }
    const ioApic = structure(MADT_IO_APIC)
    view.setUint32(ioApic + 4, IO_APIC_ADDRESS, true)
    for (const override of overrides) {
      const start = structure(MADT_INTERRUPT_OVERRIDE)
      view.setUint8(start + 3, override.source)
      view.setUint32(start + 4, override.gsi, true)
      view.setUint16(
        start + 8,
        (override.polarity === "high" ? INTI_ACTIVE_HIGH : INTI_ACTIVE_LOW)
          | (override.trigger === "edge" ? INTI_EDGE : INTI_LEVEL),
        true
      )
    }
    const nmi = structure(MADT_LOCAL_APIC_NMI)
    view.setUint8(nmi + 2, ALL_PROCESSORS)
    view.setUint8(nmi + 5, NMI_LINT)
    if (x2apics > 0) {
      const start = structure(MADT_LOCAL_X2APIC_NMI)
      view.setUint32(start + 4, ALL_X2APIC_PROCESSORS, true)
      view.setUint8(start + 8, NMI_LINT)
    }
  })
}
