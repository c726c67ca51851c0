/**
 * The structures of `linux/kvm.h` and `asm/kvm.h` (x86-64) that hold the state of a vCPU. Member names are those of the header.
 * Imports nothing of Effect. A test compares every layout with the system's header.
 */
import { array, bytes, embed, group, struct, u16, u32, u64, u8 } from "./Struct.ts"

/** `KVM_GET_REGS`, `KVM_SET_REGS` */
export const KvmRegs = struct("kvm_regs", {
  rax: u64,
  rbx: u64,
  rcx: u64,
  rdx: u64,
  rsi: u64,
  rdi: u64,
  rsp: u64,
  rbp: u64,
  r8: u64,
  r9: u64,
  r10: u64,
  r11: u64,
  r12: u64,
  r13: u64,
  r14: u64,
  r15: u64,
  rip: u64,
  rflags: u64
})

/** A segment register with its hidden part. `limit` is in bytes whatever `g` says. */
export const KvmSegment = struct("kvm_segment", {
  base: u64,
  limit: u32,
  selector: u16,
  type: u8,
  present: u8,
  dpl: u8,
  db: u8,
  s: u8,
  l: u8,
  g: u8,
  avl: u8,
  unusable: u8,
  padding: u8
})

/** The global or interrupt descriptor table register. */
export const KvmDtable = struct("kvm_dtable", { base: u64, limit: u16, padding: array(u16, 3) })

/** `KVM_GET_SREGS`, `KVM_SET_SREGS` */
export const KvmSregs = struct("kvm_sregs", {
  cs: embed(KvmSegment),
  ds: embed(KvmSegment),
  es: embed(KvmSegment),
  fs: embed(KvmSegment),
  gs: embed(KvmSegment),
  ss: embed(KvmSegment),
  tr: embed(KvmSegment),
  ldt: embed(KvmSegment),
  gdt: embed(KvmDtable),
  idt: embed(KvmDtable),
  cr0: u64,
  cr2: u64,
  cr3: u64,
  cr4: u64,
  cr8: u64,
  efer: u64,
  apic_base: u64,
  interrupt_bitmap: array(u64, 4)
})

/** `KVM_GET_VCPU_EVENTS`, `KVM_SET_VCPU_EVENTS` */
export const KvmVcpuEvents = struct("kvm_vcpu_events", {
  exception: group({ injected: u8, nr: u8, has_error_code: u8, pending: u8, error_code: u32 }),
  interrupt: group({ injected: u8, nr: u8, soft: u8, shadow: u8 }),
  nmi: group({ injected: u8, pending: u8, masked: u8, pad: u8 }),
  sipi_vector: u32,
  flags: u32,
  smi: group({ smm: u8, pending: u8, smm_inside_nmi: u8, latched_init: u8 }),
  triple_fault: group({ pending: u8 }, "KVM_CAP_X86_TRIPLE_FAULT_EVENT"),
  reserved: bytes(26),
  exception_has_payload: u8,
  exception_payload: u64
})

/** `KVM_GET_FPU`, `KVM_SET_FPU` */
export const KvmFpu = struct("kvm_fpu", {
  fpr: bytes(128),
  fcw: u16,
  fsw: u16,
  ftwx: u8,
  pad1: u8,
  last_opcode: u16,
  last_ip: u64,
  last_dp: u64,
  xmm: bytes(256),
  mxcsr: u32,
  pad2: u32
})

/** `KVM_GET_LAPIC`, `KVM_SET_LAPIC`: the local APIC's registers at their xAPIC offsets. */
export const KvmLapicState = struct("kvm_lapic_state", { regs: bytes(0x400) })

/** `KVM_GET_MP_STATE`, `KVM_SET_MP_STATE` */
export const KvmMpState = struct("kvm_mp_state", { mp_state: u32 })

/** `KVM_TRANSLATE`: a guest virtual address through the vCPU's page tables. */
export const KvmTranslation = struct("kvm_translation", {
  linear_address: u64,
  physical_address: u64,
  valid: u8,
  writeable: u8,
  usermode: u8,
  pad: bytes(5)
})
