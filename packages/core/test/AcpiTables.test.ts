/** ACPI tables, read back as an operating system would: from the root pointer, by address, checking every sum. */
import { assert, describe, it } from "@effect/vitest"
import {
  pciHostBridgeDevices,
  serialPortDevice,
  systemPortsDevice,
  virtioMmioDevice
} from "@troupe/core/acpi/AcpiDevices"
import {
  ACPI_MAXIMUM_CPUS,
  type AcpiInput,
  type AcpiPlan,
  type AcpiRegister,
  buildAcpi,
  SLEEP_CONTROL_S5
} from "@troupe/core/acpi/AcpiTables"
import { Aml, type AmlTerm } from "@troupe/core/acpi/Aml"
import {
  ACPI_TABLES_ADDRESS,
  ACPI_TABLES_SIZE,
  IO_APIC_ADDRESS,
  LOCAL_APIC_ADDRESS
} from "@troupe/core/boot/MachineLayout"
import * as fc from "fast-check"
import { spawnSync } from "node:child_process"
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { readAml, readResources } from "./AmlReader.ts"

const pio = (address: number): AcpiRegister => ({ space: "pio", address })

const input = (more: Partial<AcpiInput> = {}): AcpiInput => ({
  cpus: 2,
  devices: [serialPortDevice(), virtioMmioDevice(0, 0xd000_0000, 5)],
  sleepControl: pio(0x600),
  sleepStatus: pio(0x601),
  reset: { register: pio(0x602), value: 6 },
  ...more
})

const PCI = { address: 0xe000_0000, firstBus: 0, lastBus: 0 }

const built = (description: AcpiInput): AcpiPlan => {
  const result = buildAcpi(description)
  if (result._tag === "Failure") throw new Error(result.failure.message)
  return result.success
}

const ascii = (bytes: Uint8Array): string => String.fromCharCode(...bytes)
const sum = (bytes: Uint8Array): number => bytes.reduce((total, byte) => (total + byte) & 0xff, 0)

/** The machine's memory as the tables' area: an address is all that one needs to find a table. */
class Memory {
  readonly bytes = new Uint8Array(ACPI_TABLES_SIZE)
  constructor(plan: AcpiPlan) {
    for (const block of plan.blocks) {
      const offset = block.guestAddress - ACPI_TABLES_ADDRESS
      assert.isTrue(offset >= 0 && offset + block.bytes.length <= ACPI_TABLES_SIZE, block.name)
      assert.isTrue(this.bytes.subarray(offset, offset + block.bytes.length).every((byte) => byte === 0), block.name)
      this.bytes.set(block.bytes, offset)
    }
  }
  at(address: number): DataView {
    return new DataView(this.bytes.buffer, address - ACPI_TABLES_ADDRESS)
  }
  address(view: DataView, offset: number): number {
    return Number(view.getBigUint64(offset, true))
  }
  /** A table with this signature, its header and its sum checked. */
  table(address: number, signature: string): DataView {
    const header = this.at(address)
    const length = header.getUint32(4, true)
    const bytes = new Uint8Array(this.bytes.buffer, header.byteOffset, length)
    assert.strictEqual(ascii(bytes.subarray(0, 4)), signature)
    assert.strictEqual(sum(bytes), 0, signature)
    assert.strictEqual(ascii(bytes.subarray(10, 16)), "TROUPE")
    return new DataView(this.bytes.buffer, header.byteOffset, length)
  }
}

const bytesOf = (view: DataView): Uint8Array => new Uint8Array(view.buffer, view.byteOffset, view.byteLength)

/** Follows the pointers from the root to every table. */
const readTables = (plan: AcpiPlan) => {
  const memory = new Memory(plan)
  assert.strictEqual(plan.rsdpAddress % 16, 0)
  const rsdp = memory.at(plan.rsdpAddress)
  const root = new Uint8Array(rsdp.buffer, rsdp.byteOffset, 36)
  assert.strictEqual(ascii(root.subarray(0, 8)), "RSD PTR ")
  assert.strictEqual(sum(root.subarray(0, 20)), 0, "the sum of ACPI 1.0")
  assert.strictEqual(sum(root), 0, "the extended sum")
  assert.strictEqual(root[15], 2)
  const xsdt = memory.table(memory.address(rsdp, 24), "XSDT")
  const tables = Array.from({ length: (xsdt.byteLength - 36) / 8 }, (_, i) => memory.address(xsdt, 36 + 8 * i))
  const find = (signature: string) => {
    const found = tables.filter((address) =>
      ascii(new Uint8Array(memory.at(address).buffer, address - ACPI_TABLES_ADDRESS, 4)) === signature
    )
    assert.strictEqual(found.length, 1, signature)
    return memory.table(found[0]!, signature)
  }
  const fadt = find("FACP")
  assert.strictEqual(fadt.getUint32(40, true), memory.address(fadt, 140), "DSDT and X_DSDT agree")
  const dsdt = memory.table(memory.address(fadt, 140), "DSDT")
  const mcfg = plan.blocks.some(({ name }) => name === "MCFG") ? find("MCFG") : undefined
  return { fadt, madt: find("APIC"), mcfg, dsdt, terms: readAml(bytesOf(dsdt).subarray(36)) }
}

const register = (view: DataView, offset: number) => ({
  space: view.getUint8(offset),
  width: view.getUint8(offset + 1),
  shift: view.getUint8(offset + 2),
  access: view.getUint8(offset + 3),
  address: Number(view.getBigUint64(offset + 4, true))
})

/** The structures of a MADT, each as its bytes. */
const structures = (madt: DataView): ReadonlyArray<DataView> => {
  const found: Array<DataView> = []
  let offset = 44
  while (offset < madt.byteLength) {
    const size = madt.getUint8(offset + 1)
    assert.isAtLeast(size, 6)
    found.push(new DataView(madt.buffer, madt.byteOffset + offset, size))
    offset += size
  }
  assert.strictEqual(offset, madt.byteLength)
  return found
}

const refusal = (more: Partial<AcpiInput>) => {
  const result = buildAcpi(input(more))
  if (result._tag === "Success") throw new Error("the tables were built")
  assert.strictEqual(result.failure._tag, "AcpiError")
  return result.failure.message
}

describe("buildAcpi", () => {
  it("describes power by sleep and reset registers of a hardware-reduced machine", () => {
    const { fadt, terms } = readTables(built(input()))
    assert.strictEqual(fadt.byteLength, 276)
    assert.strictEqual(fadt.getUint8(8), 6)
    const flags = fadt.getUint32(112, true)
    assert.strictEqual((flags >>> 20) & 1, 1, "HW_REDUCED_ACPI")
    assert.strictEqual((flags >>> 10) & 1, 1, "RESET_REG_SUP")
    assert.strictEqual(fadt.getUint16(109, true), 0x24, "no VGA, no CMOS clock, no keyboard controller")
    const byte = { space: 1, width: 8, shift: 0, access: 1 }
    assert.deepStrictEqual(register(fadt, 116), { ...byte, address: 0x602 })
    assert.strictEqual(fadt.getUint8(128), 6)
    assert.deepStrictEqual(register(fadt, 244), { ...byte, address: 0x600 })
    assert.deepStrictEqual(register(fadt, 256), { ...byte, address: 0x601 })
    const s5 = terms.find((term) => term._tag === "Name" && term.path === "_S5_")
    if (s5?._tag !== "Name" || s5.value._tag !== "Package") throw new Error("there is no \\_S5")
    const [type] = s5.value.elements
    assert.deepStrictEqual(type, { _tag: "Integer", value: 5 })
    assert.strictEqual(SLEEP_CONTROL_S5, (5 << 2) | 0x20)
  })

  it("takes registers in memory as well", () => {
    const address = 0xd00f_0000
    const { fadt } = readTables(built(input({ sleepControl: { space: "mmio", address } })))
    assert.deepStrictEqual(register(fadt, 244), { space: 0, width: 8, shift: 0, access: 1, address })
  })

  it("lists every processor once, the I/O APIC, the overrides and NMI", () => {
    const overrides = [{ source: 0, gsi: 2, polarity: "high", trigger: "edge" }, {
      source: 9,
      gsi: 9,
      polarity: "low",
      trigger: "level"
    }] as const
    fc.assert(
      fc.property(fc.oneof(fc.constantFrom(1, 254, 255, 256), fc.integer({ min: 1, max: 300 })), (cpus) => {
        const { madt } = readTables(built(input({ cpus, interruptOverrides: overrides })))
        assert.strictEqual(madt.getUint32(36, true), LOCAL_APIC_ADDRESS)
        const all = structures(madt)
        const of = (type: number) => all.filter((structure) => structure.getUint8(0) === type)
        const ids = [
          ...of(0).map((s) => {
            assert.strictEqual(s.getUint32(4, true), 1)
            assert.strictEqual(s.getUint8(2), s.getUint8(3))
            return s.getUint8(3)
          }),
          ...of(9).map((s) => {
            assert.strictEqual(s.getUint32(8, true), 1)
            assert.strictEqual(s.getUint32(4, true), s.getUint32(12, true))
            return s.getUint32(4, true)
          })
        ]
        assert.deepStrictEqual(ids, Array.from({ length: cpus }, (_, i) => i))
        assert.deepStrictEqual(of(1).map((s) => [s.getUint32(4, true), s.getUint32(8, true)]), [[IO_APIC_ADDRESS, 0]])
        assert.deepStrictEqual(
          of(2).map((s) => [s.getUint8(2), s.getUint8(3), s.getUint32(4, true), s.getUint16(8, true)]),
          [[0, 0, 2, 5], [0, 9, 9, 15]]
        )
        assert.deepStrictEqual(of(4).map((s) => [s.getUint8(2), s.getUint8(5)]), [[0xff, 1]])
        assert.strictEqual(of(10).length, cpus > 255 ? 1 : 0)
      }),
      { numRuns: 30 }
    )
  })

  it("puts exactly the given devices under \\_SB", () => {
    const device = fc.record({ page: fc.nat(0x2000), gsi: fc.nat(23) })
    fc.assert(fc.property(fc.array(device, { maxLength: 40 }), (devices) => {
      const nodes = devices.map(({ gsi, page }, i) => virtioMmioDevice(i, 0xd000_0000 + page * 0x1000, gsi))
      const { terms } = readTables(built(input({ devices: [serialPortDevice(), ...nodes] })))
      const bus = terms.find((term) => term._tag === "Scope")
      if (bus?._tag !== "Scope") throw new Error("there is no \\_SB")
      assert.strictEqual(bus.path, "\\_SB_")
      const [serial, ...virtio] = bus.terms.map(describeDevice)
      assert.deepStrictEqual(serial, {
        _HID: 0x0105_d041,
        _UID: 0,
        _CRS: [
          { _tag: "Io", base: 0x3f8, size: 8, alignment: 1 },
          { _tag: "Interrupt", gsis: [4], trigger: "edge", polarity: "high", sharing: "exclusive" }
        ]
      })
      assert.deepStrictEqual(
        virtio,
        devices.map(({ gsi, page }, i) => ({
          _HID: "LNRO0005",
          _UID: i,
          _CCA: 1,
          _CRS: [
            { _tag: "Memory32Fixed", base: 0xd000_0000 + page * 0x1000, size: 0x1000, writable: true },
            { _tag: "Interrupt", gsis: [gsi], trigger: "edge", polarity: "high", sharing: "exclusive" }
          ]
        }))
      )
    }))
  })

  it("describes PCI's configuration pages, reserves them, and says which addresses and buses the bridge has", () => {
    const plan = built(input({ devices: pciHostBridgeDevices, pci: PCI }))
    const { mcfg, terms } = readTables(plan)
    if (mcfg === undefined) throw new Error("there is no MCFG")
    assert.strictEqual(mcfg.byteLength, 60)
    assert.deepStrictEqual(
      [mcfg.getBigUint64(36, true), mcfg.getBigUint64(44, true), mcfg.getUint16(52, true)],
      [0n, 0xe000_0000n, 0]
    )
    assert.deepStrictEqual([mcfg.getUint8(54), mcfg.getUint8(55), mcfg.getUint32(56, true)], [0, 0, 0])
    const bus = terms.find((term) => term._tag === "Scope")
    if (bus?._tag !== "Scope") throw new Error("there is no \\_SB")
    assert.deepStrictEqual(bus.terms.map(describeDevice).map(({ _CRS }) => _CRS), [
      [
        { _tag: "BusNumbers", first: 0, count: 1 },
        { _tag: "MemoryWindow", base: 0xe100_0000, size: 0x0200_0000 }
      ],
      [{ _tag: "Memory32Fixed", base: 0xe000_0000, size: 0x10_0000, writable: true }]
    ])
    assert.isUndefined(readTables(built(input())).mcfg)
  })

  it("says what cannot be described", () => {
    for (const cpus of [0, -1, 1.5, Number.NaN, ACPI_MAXIMUM_CPUS + 1]) {
      assert.include(refusal({ cpus }), `vCPUs, found ${cpus}`)
    }
    assert.include(refusal({ sleepControl: pio(0x1_0000) }), "address in its space")
    assert.include(refusal({ reset: { register: pio(1), value: 256 } }), "RESET_VALUE")
    assert.include(
      refusal({ interruptOverrides: [{ source: 16, gsi: 2, polarity: "high", trigger: "edge" }] }),
      "0 to 15"
    )
    assert.include(refusal({ devices: [Aml.device("lower", [])] }), "\"lower\"")
    assert.include(refusal({ devices: [serialPortDevice(), serialPortDevice()] }), "different names")
    const huge = Aml.device("HUGE", [Aml.name("BUF", Aml.buffer(new Uint8Array(ACPI_TABLES_SIZE)))])
    assert.include(refusal({ devices: [huge] }), `at most ${ACPI_TABLES_SIZE}`)
  })

  it("has room for the largest machine", () => {
    const devices = Array.from({ length: 256 }, (_, i) => virtioMmioDevice(i, 0xd000_0000 + i * 0x1000, 5))
    readTables(built(input({ cpus: ACPI_MAXIMUM_CPUS, devices })))
  })
})

/** A device node as a record of its names, with its resources decoded. */
const describeDevice = (term: AmlTerm): Record<string, unknown> => {
  if (term._tag !== "Device") throw new Error(`${term._tag} is not a device`)
  return Object.fromEntries(term.terms.map((child) => {
    if (child._tag !== "Name") throw new Error(`${child._tag} is not a name`)
    const { path, value } = child
    if (value._tag === "Buffer") return [path, readResources(value.bytes)]
    return [path, value._tag === "Integer" || value._tag === "String" ? value.value : value]
  }))
}

/** ACPICA's compiler and disassembler, the reference implementation. */
const iasl = spawnSync("iasl", ["-v"], { encoding: "utf8" })
const missing = iasl.status === 0 ? undefined : "iasl is not installed (Debian package acpica-tools)"

describe(missing === undefined ? "ACPICA" : `ACPICA, skipped: ${missing}`, () => {
  it.skipIf(missing !== undefined)("disassembles every table and compiles it back without a remark", () => {
    const directory = mkdtempSync(join(tmpdir(), "troupe-acpi-"))
    const run = (...parameters: ReadonlyArray<string>): string => {
      const result = spawnSync("iasl", parameters, { cwd: directory, encoding: "utf8", timeout: 30_000 })
      const output = result.stdout + result.stderr
      assert.strictEqual(result.status, 0, output)
      assert.notMatch(output, /^(?!Compilation successful).*\b(error|warning|invalid|checksum)/im, output)
      return output
    }
    try {
      const devices = [
        serialPortDevice(),
        virtioMmioDevice(0, 0xd000_0000, 5),
        virtioMmioDevice(1, 0xd000_1000, 6),
        systemPortsDevice(0, [{ base: 0x600, size: 3 }]),
        ...pciHostBridgeDevices
      ]
      const overrides = [{ source: 0, gsi: 2, polarity: "high", trigger: "edge" }] as const
      for (const cpus of [2, 260]) {
        const plan = built(input({ cpus, devices, interruptOverrides: overrides, pci: PCI }))
        for (const name of ["DSDT", "FADT", "MADT", "MCFG", "XSDT"]) {
          const block = plan.blocks.find((candidate) => candidate.name === name)
          writeFileSync(join(directory, `${name}.dat`), block!.bytes)
          run("-d", `${name}.dat`)
          if (name !== "DSDT") assert.notMatch(readFileSync(join(directory, `${name}.dsl`), "utf8"), /\*\*\*|unknown/i)
          assert.match(run("-oa", "-p", `${name}-again`, `${name}.dsl`), /0 Errors, 0 Warnings/)
          const again = readFileSync(join(directory, `${name}-again.aml`))
          // ACPICA puts its own name and version into the header; everything behind it must be the same bytes.
          assert.deepStrictEqual(again.subarray(36), Buffer.from(block!.bytes.subarray(36)), name)
        }
      }
    } finally {
      rmSync(directory, { recursive: true, force: true })
    }
  })
})
