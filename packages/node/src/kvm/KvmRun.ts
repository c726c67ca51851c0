/**
 * `struct kvm_run`: the page that a vCPU shares with the kernel, with its exit reasons. Imports nothing of Effect. A test compares
 * the layout with the system's header.
 */
import { KvmRegs, KvmSregs, KvmVcpuEvents } from "./KvmCpuState.ts"
import { anonymousUnion, array, bytes, embed, group, struct, u16, u32, u64, u8, union } from "./Struct.ts"

/** `exit_reason` of {@link KvmRun}. */
export const KvmExit = {
  KVM_EXIT_UNKNOWN: 0,
  KVM_EXIT_EXCEPTION: 1,
  KVM_EXIT_IO: 2,
  KVM_EXIT_HYPERCALL: 3,
  KVM_EXIT_DEBUG: 4,
  KVM_EXIT_HLT: 5,
  KVM_EXIT_MMIO: 6,
  KVM_EXIT_IRQ_WINDOW_OPEN: 7,
  KVM_EXIT_SHUTDOWN: 8,
  KVM_EXIT_FAIL_ENTRY: 9,
  KVM_EXIT_INTR: 10,
  KVM_EXIT_SET_TPR: 11,
  KVM_EXIT_TPR_ACCESS: 12,
  KVM_EXIT_NMI: 16,
  KVM_EXIT_INTERNAL_ERROR: 17,
  KVM_EXIT_SYSTEM_EVENT: 24,
  KVM_EXIT_IOAPIC_EOI: 26,
  KVM_EXIT_HYPERV: 27,
  KVM_EXIT_X86_RDMSR: 29,
  KVM_EXIT_X86_WRMSR: 30,
  KVM_EXIT_DIRTY_RING_FULL: 31,
  KVM_EXIT_AP_RESET_HOLD: 32,
  KVM_EXIT_X86_BUS_LOCK: 33,
  KVM_EXIT_XEN: 34,
  KVM_EXIT_NOTIFY: 37,
  KVM_EXIT_MEMORY_FAULT: 39
} as const

/** Values and flags inside {@link KvmRun}. */
export const KvmRunValue = {
  KVM_EXIT_IO_IN: 0,
  KVM_EXIT_IO_OUT: 1,
  KVM_INTERNAL_ERROR_EMULATION: 1,
  KVM_INTERNAL_ERROR_SIMUL_EX: 2,
  KVM_INTERNAL_ERROR_DELIVERY_EV: 3,
  KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: 4,
  KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: 1,
  KVM_SYSTEM_EVENT_SHUTDOWN: 1,
  KVM_SYSTEM_EVENT_RESET: 2,
  KVM_SYSTEM_EVENT_CRASH: 3,
  KVM_SYSTEM_EVENT_WAKEUP: 4,
  KVM_SYSTEM_EVENT_SUSPEND: 5,
  KVM_MSR_EXIT_REASON_INVAL: 1,
  KVM_MSR_EXIT_REASON_UNKNOWN: 2,
  KVM_MSR_EXIT_REASON_FILTER: 4,
  KVM_RUN_X86_SMM: 1,
  KVM_RUN_X86_BUS_LOCK: 2,
  KVM_SYNC_X86_REGS: 1,
  KVM_SYNC_X86_SREGS: 2,
  KVM_SYNC_X86_EVENTS: 4,
  /** The page of a vCPU's mapping that port data lies on. */
  KVM_PIO_PAGE_OFFSET: 1,
  /** The page of a vCPU's mapping that the ring of coalesced writes lies on. */
  KVM_COALESCED_MMIO_PAGE_OFFSET: 2
} as const

/** The beginning of a vCPU's mapping. `exit` is the union that `exit_reason` selects from. */
export const KvmRun = struct("kvm_run", {
  request_interrupt_window: u8,
  immediate_exit: u8,
  padding1: bytes(6),
  exit_reason: u32,
  ready_for_interrupt_injection: u8,
  if_flag: u8,
  flags: u16,
  cr8: u64,
  apic_base: u64,
  exit: anonymousUnion({
    /** `KVM_EXIT_UNKNOWN` */
    hw: group({ hardware_exit_reason: u64 }),
    /** `KVM_EXIT_FAIL_ENTRY` */
    fail_entry: group({ hardware_entry_failure_reason: u64, cpu: u32 }),
    /** `KVM_EXIT_EXCEPTION` */
    ex: group({ exception: u32, error_code: u32 }),
    /** `KVM_EXIT_IO`. `data_offset` is relative to the beginning of the mapping. */
    io: group({ direction: u8, size: u8, port: u16, count: u32, data_offset: u64 }),
    /** `KVM_EXIT_MMIO` */
    mmio: group({ phys_addr: u64, data: bytes(8), len: u32, is_write: u8 }),
    /** `KVM_EXIT_HYPERCALL` */
    hypercall: group({ nr: u64, args: array(u64, 6), ret: u64 }),
    /** `KVM_EXIT_TPR_ACCESS` */
    tpr_access: group({ rip: u64, is_write: u32 }),
    /** `KVM_EXIT_INTERNAL_ERROR` */
    internal: group({ suberror: u32, ndata: u32, data: array(u64, 16) }),
    /** `KVM_EXIT_INTERNAL_ERROR` with suberror `KVM_INTERNAL_ERROR_EMULATION`; the bytes count if `ndata` and `flags` say so. */
    emulation_failure: group({ suberror: u32, ndata: u32, flags: u64, insn_size: u8, insn_bytes: bytes(15) }),
    /** `KVM_EXIT_SYSTEM_EVENT` */
    system_event: group({ type: u32, ndata: u32, data: array(u64, 16) }),
    /** `KVM_EXIT_IOAPIC_EOI` */
    eoi: group({ vector: u8 }),
    /** `KVM_EXIT_X86_RDMSR`, `KVM_EXIT_X86_WRMSR` */
    msr: group({ error: u8, pad: bytes(7), reason: u32, index: u32, data: u64 }),
    /** `KVM_EXIT_NOTIFY` */
    notify: group({ flags: u32 }),
    /** `KVM_EXIT_MEMORY_FAULT` */
    memory_fault: group({ flags: u64, gpa: u64, size: u64 }, "KVM_EXIT_MEMORY_FAULT"),
    padding: bytes(256)
  }),
  kvm_valid_regs: u64,
  kvm_dirty_regs: u64,
  s: union({
    regs: group({ regs: embed(KvmRegs), sregs: embed(KvmSregs), events: embed(KvmVcpuEvents) }),
    padding: bytes(2048)
  })
})
