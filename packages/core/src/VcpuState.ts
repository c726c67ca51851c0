/**
 * The architectural state of an x86-64 vCPU that a boot protocol prescribes, in the terms of the processor manuals.
 *
 * It is plain data. A hypervisor layer copies it field by field (KVM: `kvm_sregs` and `kvm_regs`); every register that is not
 * named here is zero.
 */

/** A segment register with its hidden part (Intel SDM volume 3, sections 3.4.3 and 3.4.5). Flags are 0 or 1. */
export interface SegmentState {
  readonly selector: number
  readonly base: number
  /** Limit in bytes, whatever the granularity: a flat 4 GiB segment has `0xffff_ffff`. */
  readonly limit: number
  /** The four type bits of the descriptor. */
  readonly type: number
  /** 1: code or data, 0: system (TSS, LDT). */
  readonly s: 0 | 1
  /** Descriptor privilege level. */
  readonly dpl: 0 | 1 | 2 | 3
  readonly present: 0 | 1
  /** Default operation size: 1 for a 32-bit segment. */
  readonly db: 0 | 1
  /** 64-bit code segment. */
  readonly l: 0 | 1
  /** Granularity: 1 when the descriptor's limit counts pages. */
  readonly g: 0 | 1
  readonly avl: 0 | 1
  /** 1 when the register holds the null selector and must not be used. */
  readonly unusable: 0 | 1
}

/** The global or interrupt descriptor table register. */
export interface DescriptorTableState {
  readonly base: number
  /** Size of the table in bytes, less one. */
  readonly limit: number
}

/** The state in which a vCPU starts. Addresses are guest physical addresses, identity mapped where paging is on. */
export interface VcpuState {
  /** `long`: 64-bit mode with paging. `protected`: 32-bit protected mode without paging. */
  readonly mode: "long" | "protected"
  readonly rip: number
  readonly rsp: number
  readonly rbx: number
  readonly rsi: number
  readonly rflags: number
  readonly cr0: number
  readonly cr3: number
  readonly cr4: number
  readonly efer: number
  readonly gdt: DescriptorTableState
  readonly idt: DescriptorTableState
  readonly cs: SegmentState
  readonly ds: SegmentState
  readonly es: SegmentState
  readonly fs: SegmentState
  readonly gs: SegmentState
  readonly ss: SegmentState
  readonly tr: SegmentState
  readonly ldt: SegmentState
}

/** CR0 protection enable: protected mode. */
export const CR0_PE = 0x0000_0001
/** CR0 extension type, fixed to 1 on every 64-bit processor. */
export const CR0_ET = 0x0000_0010
/** CR0 paging. */
export const CR0_PG = 0x8000_0000
/** CR4 physical address extension, required by long mode. */
export const CR4_PAE = 0x0000_0020
/** EFER long mode enable. */
export const EFER_LME = 0x0000_0100
/** EFER long mode active. */
export const EFER_LMA = 0x0000_0400
/** The one bit of RFLAGS that is always set. */
export const RFLAGS_FIXED = 0x0000_0002
