/**
 * The boot processor's global descriptor table, as bytes and as segment registers.
 *
 * The selectors are those of the Linux boot protocol (`__BOOT_CS` 0x10, `__BOOT_DS` 0x18); a PVH kernel gets the same table
 * with a 32-bit code segment. Both forms come from one description, so they cannot disagree.
 */
import type { DescriptorTableState, SegmentState } from "../VcpuState.ts"
import { GDT_ADDRESS } from "./MachineLayout.ts"

/** Selector of the flat code segment. */
export const BOOT_CS = 0x10
/** Selector of the flat data segment. */
export const BOOT_DS = 0x18
/** Selector of the task state segment. */
export const BOOT_TSS = 0x20

/** Bytes of the table: null, unused, code, data, and a TSS descriptor of 16 bytes (its upper half stays zero). */
export const GDT_SIZE = 48

/** Segment types (Intel SDM volume 3, tables 3-1 and 3-2), with the accessed bit set as a loaded register has it. */
const TYPE_CODE_EXECUTE_READ_ACCESSED = 0xb
const TYPE_DATA_READ_WRITE_ACCESSED = 0x3
const TYPE_TSS_BUSY = 0xb
const TYPE_LDT = 0x2
/** Limit of a TSS without an I/O permission map (PVH: 0x67). */
const TSS_LIMIT = 0x67
const FLAT_LIMIT = 0xffff_ffff

const flat = (selector: number, type: number, size: 32 | 64): SegmentState => ({
  selector,
  base: 0,
  limit: FLAT_LIMIT,
  type,
  s: 1,
  dpl: 0,
  present: 1,
  db: size === 32 ? 1 : 0,
  l: size === 64 ? 1 : 0,
  g: 1,
  avl: 0,
  unusable: 0
})

/** The flat 64-bit code segment of the Linux 64-bit entry. */
export const CODE_64: SegmentState = flat(BOOT_CS, TYPE_CODE_EXECUTE_READ_ACCESSED, 64)
/** The flat 32-bit code segment of the PVH entry. */
export const CODE_32: SegmentState = flat(BOOT_CS, TYPE_CODE_EXECUTE_READ_ACCESSED, 32)
/** The flat data segment. */
export const DATA: SegmentState = flat(BOOT_DS, TYPE_DATA_READ_WRITE_ACCESSED, 32)
/** An active task state segment at address 0 that nothing uses; entering a guest needs one. */
export const TSS: SegmentState = {
  selector: BOOT_TSS,
  base: 0,
  limit: TSS_LIMIT,
  type: TYPE_TSS_BUSY,
  s: 0,
  dpl: 0,
  present: 1,
  db: 0,
  l: 0,
  g: 0,
  avl: 0,
  unusable: 0
}
/** No local descriptor table. */
export const NO_LDT: SegmentState = {
  selector: 0,
  base: 0,
  limit: 0,
  type: TYPE_LDT,
  s: 0,
  dpl: 0,
  present: 0,
  db: 0,
  l: 0,
  g: 0,
  avl: 0,
  unusable: 1
}

/** The register that points at the table of {@link makeGdt}. */
export const GDT_REGISTER: DescriptorTableState = { base: GDT_ADDRESS, limit: GDT_SIZE - 1 }
/** No interrupt descriptor table: interrupts are off, and a fault before the guest has one is a triple fault. */
export const NO_IDT: DescriptorTableState = { base: 0, limit: 0 }

/** Writes the 8-byte descriptor of a segment (Intel SDM volume 3, figure 3-8). */
const writeDescriptor = (view: DataView, segment: SegmentState): void => {
  const limit = segment.g === 1 ? segment.limit >>> 12 : segment.limit
  const low = ((segment.base & 0xffff) << 16) | (limit & 0xffff)
  const high = (segment.base & 0xff00_0000)
    | (segment.g << 23) | (segment.db << 22) | (segment.l << 21) | (segment.avl << 20)
    | (limit & 0xf_0000)
    | (segment.present << 15) | (segment.dpl << 13) | (segment.s << 12) | (segment.type << 8)
    | ((segment.base >>> 16) & 0xff)
  view.setUint32(segment.selector, low >>> 0, true)
  view.setUint32(segment.selector + 4, high >>> 0, true)
}

/** The table for a boot processor with this code segment. */
export const makeGdt = (code: SegmentState): Uint8Array => {
  const bytes = new Uint8Array(GDT_SIZE)
  const view = new DataView(bytes.buffer)
  for (const segment of [code, DATA, TSS]) writeDescriptor(view, segment)
  return bytes
}
