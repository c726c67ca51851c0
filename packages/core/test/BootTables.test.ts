/** The tables that a boot processor starts with, read back by the rules of the processor manuals. */
import { assert, describe, it } from "@effect/vitest"
import { BOOT_PARAMS_SIZE } from "@troupe/core/boot/BootParams"
import { E820Type, makeE820 } from "@troupe/core/boot/E820"
import { CODE_32, CODE_64, DATA, GDT_REGISTER, GDT_SIZE, makeGdt, TSS } from "@troupe/core/boot/Gdt"
import { hexUint64, readUint64, viewOf, writeUint64 } from "@troupe/core/boot/LittleEndian"
import {
  ACPI_TABLES_ADDRESS,
  ACPI_TABLES_SIZE,
  BOOT_PARAMS_ADDRESS,
  BOOT_STACK_TOP,
  COMMAND_LINE_ADDRESS,
  COMMAND_LINE_AREA_SIZE,
  DEVICE_WINDOW_ADDRESS,
  DEVICE_WINDOW_SIZE,
  FOUR_GIB,
  GDT_ADDRESS,
  HIGH_MEMORY_ADDRESS,
  IO_APIC_ADDRESS,
  KVM_IDENTITY_MAP_ADDRESS,
  KVM_TSS_ADDRESS,
  LOCAL_APIC_ADDRESS,
  LOW_RESERVED_ADDRESS,
  MINIMUM_MEMORY_SIZE,
  PAGE_TABLES_ADDRESS,
  PVH_START_INFO_ADDRESS,
  ramRegions,
  VIRTIO_MMIO_ADDRESS
} from "@troupe/core/boot/MachineLayout"
import { PAGE_TABLES, PAGE_TABLES_SIZE } from "@troupe/core/boot/PageTables"
import * as fc from "fast-check"

describe("machine layout", () => {
  it("gives every boot table a place of its own", () => {
    const places: ReadonlyArray<[name: string, start: number, end: number]> = [
      ["gdt", GDT_ADDRESS, GDT_ADDRESS + GDT_SIZE],
      ["hvm_start_info", PVH_START_INFO_ADDRESS, PVH_START_INFO_ADDRESS + 0x1000],
      ["boot_params", BOOT_PARAMS_ADDRESS, BOOT_PARAMS_ADDRESS + BOOT_PARAMS_SIZE],
      ["boot stack", BOOT_PARAMS_ADDRESS + BOOT_PARAMS_SIZE, BOOT_STACK_TOP],
      ["page tables", PAGE_TABLES_ADDRESS, PAGE_TABLES_ADDRESS + PAGE_TABLES_SIZE],
      ["command line", COMMAND_LINE_ADDRESS, COMMAND_LINE_ADDRESS + COMMAND_LINE_AREA_SIZE],
      ["end of conventional memory", LOW_RESERVED_ADDRESS, LOW_RESERVED_ADDRESS],
      ["ACPI", ACPI_TABLES_ADDRESS, ACPI_TABLES_ADDRESS + ACPI_TABLES_SIZE],
      ["high memory", HIGH_MEMORY_ADDRESS, HIGH_MEMORY_ADDRESS]
    ]
    for (const [index, [name, start, end]] of places.entries()) {
      assert.isAtLeast(end, start, name)
      assert.isAtLeast(start, places[index - 1]?.[2] ?? 0, name)
    }
  })

  it("keeps interrupt controllers, KVM's pages and devices inside the device window", () => {
    const places = [VIRTIO_MMIO_ADDRESS, IO_APIC_ADDRESS, LOCAL_APIC_ADDRESS, KVM_IDENTITY_MAP_ADDRESS, KVM_TSS_ADDRESS]
    assert.deepStrictEqual(places, places.toSorted((a, b) => a - b))
    for (const place of places) {
      assert.isTrue(place >= DEVICE_WINDOW_ADDRESS && place + 0x3000 <= DEVICE_WINDOW_ADDRESS + DEVICE_WINDOW_SIZE)
    }
  })

  it("accounts for every byte of RAM, outside the device window, in ascending order", () => {
    const pages = fc.integer({ min: MINIMUM_MEMORY_SIZE / 4096, max: 2 ** 32 })
    fc.assert(fc.property(pages, (count) => {
      const size = count * 4096
      const ram = ramRegions(size)
      const map = makeE820(ram)
      assert.strictEqual(ram.reduce((sum, region) => sum + region.size, 0), size)
      assert.strictEqual(map.reduce((sum, entry) => sum + entry.size, 0), size)
      let end = 0
      for (const entry of map) {
        assert.isAtLeast(entry.guestAddress, end)
        assert.isAbove(entry.size, 0)
        end = entry.guestAddress + entry.size
        assert.isTrue(end <= DEVICE_WINDOW_ADDRESS || entry.guestAddress >= FOUR_GIB)
        assert.strictEqual(entry.type, entry.guestAddress === LOW_RESERVED_ADDRESS ? E820Type.RESERVED : E820Type.RAM)
      }
    }))
  })
})

/** Translates an address as a processor with 4-level paging does (Intel SDM volume 3, figure 4-9). */
const translate = (tables: DataView, address: number): number => {
  const entry = (table: number, index: number) => {
    const low = tables.getUint32(table - PAGE_TABLES_ADDRESS + 8 * index, true)
    assert.strictEqual(tables.getUint32(table - PAGE_TABLES_ADDRESS + 8 * index + 4, true), 0)
    assert.strictEqual(low & 3, 3, "present and writable")
    return low
  }
  const level = (shift: number) => Math.floor(address / 2 ** shift) % 512
  const pdpt = entry(PAGE_TABLES_ADDRESS, level(39)) & 0xffff_f000
  const directory = entry(pdpt >>> 0, level(30)) & 0xffff_f000
  const page = entry(directory >>> 0, level(21))
  assert.strictEqual(page & 0x80, 0x80, "a 2 MiB page")
  assert.strictEqual(page & 0x1f_ff78, 0, "no other attribute")
  return ((page & 0xffe0_0000) >>> 0) + (address % 0x20_0000)
}

describe("page tables", () => {
  it("map every address below 4 GiB to itself", () => {
    const tables = viewOf(PAGE_TABLES)
    fc.assert(fc.property(fc.integer({ min: 0, max: 0xffff_ffff }), (address) => {
      assert.strictEqual(translate(tables, address), address)
    }))
    for (const address of [0, DEVICE_WINDOW_ADDRESS, 0xffff_ffff]) {
      assert.strictEqual(translate(tables, address), address)
    }
  })

  it("map nothing else", () => {
    const tables = viewOf(PAGE_TABLES)
    for (let index = 1; index < 512; index++) assert.strictEqual(tables.getBigUint64(8 * index, true), 0n)
    for (let index = 4; index < 512; index++) assert.strictEqual(tables.getBigUint64(0x1000 + 8 * index, true), 0n)
  })
})

/** Decodes a descriptor (Intel SDM volume 3, figure 3-8). */
const decode = (table: DataView, selector: number) => {
  const low = table.getUint32(selector, true)
  const high = table.getUint32(selector + 4, true)
  const g = (high >>> 23) & 1
  const limit = (low & 0xffff) + (high & 0xf_0000)
  return {
    selector,
    base: ((low >>> 16) + ((high & 0xff) << 16) + (high & 0xff00_0000)) >>> 0,
    limit: g === 1 ? limit * 4096 + 4095 : limit,
    type: (high >>> 8) & 0xf,
    s: (high >>> 12) & 1,
    dpl: (high >>> 13) & 3,
    present: (high >>> 15) & 1,
    avl: (high >>> 20) & 1,
    l: (high >>> 21) & 1,
    db: (high >>> 22) & 1,
    g,
    unusable: 0
  }
}

describe("global descriptor table", () => {
  for (const [name, code] of [["64-bit", CODE_64], ["32-bit", CODE_32]] as const) {
    it(`holds the segments that a ${name} entry starts with`, () => {
      const table = viewOf(makeGdt(code))
      assert.strictEqual(table.byteLength, GDT_REGISTER.limit + 1)
      assert.strictEqual(table.getBigUint64(0, true), 0n)
      assert.strictEqual(table.getBigUint64(8, true), 0n)
      assert.strictEqual(table.getBigUint64(40, true), 0n)
      for (const segment of [code, DATA, TSS]) assert.deepStrictEqual(decode(table, segment.selector), { ...segment })
    })
  }

  it("is byte for byte the table of the boot protocols", () => {
    assert.strictEqual(viewOf(makeGdt(CODE_64)).getBigUint64(0x10, true), 0x00af_9b00_0000_ffffn)
    assert.strictEqual(viewOf(makeGdt(CODE_32)).getBigUint64(0x10, true), 0x00cf_9b00_0000_ffffn)
    assert.strictEqual(viewOf(makeGdt(CODE_64)).getBigUint64(0x18, true), 0x00cf_9300_0000_ffffn)
    assert.strictEqual(viewOf(makeGdt(CODE_64)).getBigUint64(0x20, true), 0x0000_8b00_0000_0067n)
  })
})

describe("64-bit fields", () => {
  it("hold every address, refuse every other value and never round", () => {
    const view = new DataView(new ArrayBuffer(8))
    fc.assert(fc.property(fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }), (value) => {
      view.setBigUint64(0, value, true)
      assert.strictEqual(readUint64(view, 0), value < 2n ** 52n ? Number(value) : -1)
      assert.strictEqual(hexUint64(view, 0), `0x${value.toString(16)}`)
    }))
    fc.assert(fc.property(fc.maxSafeNat(), (value) => {
      writeUint64(view, 0, value)
      assert.strictEqual(view.getBigUint64(0, true), BigInt(value))
    }))
  })
})
