/**
 * The `ioctl` numbers and constants of `linux/kvm.h` (x86-64), by the header's names. Imports nothing of Effect. A test compares
 * every number with the system's header.
 */
import type { Ioctl } from "../internal/ForeignFunctions.ts"
import { KvmFpu, KvmLapicState, KvmMpState, KvmRegs, KvmSregs, KvmTranslation, KvmVcpuEvents } from "./KvmCpuState.ts"
import {
  KvmClockData,
  KvmCoalescedMmioZone,
  KvmCpuid2,
  KvmEnableCap,
  KvmIoeventfd,
  KvmIrqchip,
  KvmIrqfd,
  KvmIrqLevel,
  KvmIrqRouting,
  KvmMsrList,
  KvmMsrs,
  KvmPitConfig,
  KvmPitState2,
  KvmUserspaceMemoryRegion
} from "./KvmStructs.ts"

/** `KVMIO`, the type byte of every KVM `ioctl`. */
const KVMIO = 0xae

const IOC_NONE = 0
const IOC_WRITE = 1
const IOC_READ = 2

/** `_IOC` of `asm-generic/ioctl.h`: direction, size of the argument in bytes, type and number in one unsigned 32-bit value. */
const ioc = (direction: number, number: number, size: number): number =>
  ((direction << 30) | (size << 16) | (KVMIO << 8) | number) >>> 0

/** `_IO`: no argument, or a number. */
const io = (name: string, number: number): Ioctl => ({ name, request: ioc(IOC_NONE, number, 0) })
/** `_IOW`: the kernel reads a structure. */
const iow = (name: string, number: number, size: number): Ioctl => ({ name, request: ioc(IOC_WRITE, number, size) })
/** `_IOR`: the kernel writes a structure. */
const ior = (name: string, number: number, size: number): Ioctl => ({ name, request: ioc(IOC_READ, number, size) })
/** `_IOWR`: both. */
const iowr = (name: string, number: number, size: number): Ioctl => ({
  name,
  request: ioc(IOC_READ | IOC_WRITE, number, size)
})

/** Every `ioctl` that Troupe uses, by name: what `Ffi.ioctl` takes. */
export const KvmIoctl = {
  // /dev/kvm
  KVM_GET_API_VERSION: io("KVM_GET_API_VERSION", 0x00),
  KVM_CREATE_VM: io("KVM_CREATE_VM", 0x01),
  KVM_GET_MSR_INDEX_LIST: iowr("KVM_GET_MSR_INDEX_LIST", 0x02, KvmMsrList.size),
  KVM_CHECK_EXTENSION: io("KVM_CHECK_EXTENSION", 0x03),
  KVM_GET_VCPU_MMAP_SIZE: io("KVM_GET_VCPU_MMAP_SIZE", 0x04),
  KVM_GET_SUPPORTED_CPUID: iowr("KVM_GET_SUPPORTED_CPUID", 0x05, KvmCpuid2.size),
  // a VM
  KVM_CREATE_VCPU: io("KVM_CREATE_VCPU", 0x41),
  KVM_SET_USER_MEMORY_REGION: iow("KVM_SET_USER_MEMORY_REGION", 0x46, KvmUserspaceMemoryRegion.size),
  KVM_SET_TSS_ADDR: io("KVM_SET_TSS_ADDR", 0x47),
  KVM_SET_IDENTITY_MAP_ADDR: iow("KVM_SET_IDENTITY_MAP_ADDR", 0x48, 8),
  KVM_CREATE_IRQCHIP: io("KVM_CREATE_IRQCHIP", 0x60),
  KVM_IRQ_LINE: iow("KVM_IRQ_LINE", 0x61, KvmIrqLevel.size),
  KVM_GET_IRQCHIP: iowr("KVM_GET_IRQCHIP", 0x62, KvmIrqchip.size),
  KVM_SET_IRQCHIP: ior("KVM_SET_IRQCHIP", 0x63, KvmIrqchip.size),
  KVM_REGISTER_COALESCED_MMIO: iow("KVM_REGISTER_COALESCED_MMIO", 0x67, KvmCoalescedMmioZone.size),
  KVM_UNREGISTER_COALESCED_MMIO: iow("KVM_UNREGISTER_COALESCED_MMIO", 0x68, KvmCoalescedMmioZone.size),
  KVM_SET_GSI_ROUTING: iow("KVM_SET_GSI_ROUTING", 0x6a, KvmIrqRouting.size),
  KVM_IRQFD: iow("KVM_IRQFD", 0x76, KvmIrqfd.size),
  KVM_CREATE_PIT2: iow("KVM_CREATE_PIT2", 0x77, KvmPitConfig.size),
  KVM_SET_BOOT_CPU_ID: io("KVM_SET_BOOT_CPU_ID", 0x78),
  KVM_IOEVENTFD: iow("KVM_IOEVENTFD", 0x79, KvmIoeventfd.size),
  KVM_SET_CLOCK: iow("KVM_SET_CLOCK", 0x7b, KvmClockData.size),
  KVM_GET_CLOCK: ior("KVM_GET_CLOCK", 0x7c, KvmClockData.size),
  KVM_GET_PIT2: ior("KVM_GET_PIT2", 0x9f, KvmPitState2.size),
  KVM_SET_PIT2: iow("KVM_SET_PIT2", 0xa0, KvmPitState2.size),
  KVM_ENABLE_CAP: iow("KVM_ENABLE_CAP", 0xa3, KvmEnableCap.size),
  // a vCPU
  KVM_RUN: io("KVM_RUN", 0x80),
  KVM_GET_REGS: ior("KVM_GET_REGS", 0x81, KvmRegs.size),
  KVM_SET_REGS: iow("KVM_SET_REGS", 0x82, KvmRegs.size),
  KVM_GET_SREGS: ior("KVM_GET_SREGS", 0x83, KvmSregs.size),
  KVM_SET_SREGS: iow("KVM_SET_SREGS", 0x84, KvmSregs.size),
  KVM_TRANSLATE: iowr("KVM_TRANSLATE", 0x85, KvmTranslation.size),
  KVM_GET_MSRS: iowr("KVM_GET_MSRS", 0x88, KvmMsrs.size),
  KVM_SET_MSRS: iow("KVM_SET_MSRS", 0x89, KvmMsrs.size),
  KVM_GET_FPU: ior("KVM_GET_FPU", 0x8c, KvmFpu.size),
  KVM_SET_FPU: iow("KVM_SET_FPU", 0x8d, KvmFpu.size),
  KVM_GET_LAPIC: ior("KVM_GET_LAPIC", 0x8e, KvmLapicState.size),
  KVM_SET_LAPIC: iow("KVM_SET_LAPIC", 0x8f, KvmLapicState.size),
  KVM_SET_CPUID2: iow("KVM_SET_CPUID2", 0x90, KvmCpuid2.size),
  KVM_GET_CPUID2: iowr("KVM_GET_CPUID2", 0x91, KvmCpuid2.size),
  KVM_GET_MP_STATE: ior("KVM_GET_MP_STATE", 0x98, KvmMpState.size),
  KVM_SET_MP_STATE: iow("KVM_SET_MP_STATE", 0x99, KvmMpState.size),
  KVM_NMI: io("KVM_NMI", 0x9a),
  KVM_GET_VCPU_EVENTS: ior("KVM_GET_VCPU_EVENTS", 0x9f, KvmVcpuEvents.size),
  KVM_SET_VCPU_EVENTS: iow("KVM_SET_VCPU_EVENTS", 0xa0, KvmVcpuEvents.size),
  KVM_GET_TSC_KHZ: io("KVM_GET_TSC_KHZ", 0xa3),
  KVM_KVMCLOCK_CTRL: io("KVM_KVMCLOCK_CTRL", 0xad),
  KVM_GET_STATS_FD: io("KVM_GET_STATS_FD", 0xce)
} as const

/** Capabilities, for `KVM_CHECK_EXTENSION`. */
export const KvmCap = {
  KVM_CAP_IRQCHIP: 0,
  KVM_CAP_HLT: 1,
  KVM_CAP_USER_MEMORY: 3,
  KVM_CAP_SET_TSS_ADDR: 4,
  KVM_CAP_EXT_CPUID: 7,
  KVM_CAP_NR_VCPUS: 9,
  KVM_CAP_NR_MEMSLOTS: 10,
  KVM_CAP_MP_STATE: 14,
  KVM_CAP_COALESCED_MMIO: 15,
  KVM_CAP_IRQ_ROUTING: 25,
  KVM_CAP_IRQFD: 32,
  KVM_CAP_PIT2: 33,
  KVM_CAP_IOEVENTFD: 36,
  KVM_CAP_SET_IDENTITY_MAP_ADDR: 37,
  KVM_CAP_ADJUST_CLOCK: 39,
  KVM_CAP_INTERNAL_ERROR_DATA: 40,
  KVM_CAP_VCPU_EVENTS: 41,
  KVM_CAP_XSAVE: 55,
  KVM_CAP_TSC_CONTROL: 60,
  KVM_CAP_GET_TSC_KHZ: 61,
  KVM_CAP_MAX_VCPUS: 66,
  KVM_CAP_TSC_DEADLINE_TIMER: 72,
  KVM_CAP_SYNC_REGS: 74,
  KVM_CAP_SIGNAL_MSI: 77,
  KVM_CAP_READONLY_MEM: 81,
  KVM_CAP_ENABLE_CAP_VM: 98,
  KVM_CAP_IOEVENTFD_NO_LENGTH: 100,
  KVM_CAP_CHECK_EXTENSION_VM: 105,
  KVM_CAP_SPLIT_IRQCHIP: 121,
  KVM_CAP_IOEVENTFD_ANY_LENGTH: 122,
  KVM_CAP_MAX_VCPU_ID: 128,
  KVM_CAP_X2APIC_API: 129,
  KVM_CAP_IMMEDIATE_EXIT: 136,
  KVM_CAP_X86_DISABLE_EXITS: 143,
  KVM_CAP_NESTED_STATE: 157,
  KVM_CAP_COALESCED_PIO: 162,
  KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 168,
  KVM_CAP_HALT_POLL: 182,
  KVM_CAP_X86_USER_SPACE_MSR: 188,
  KVM_CAP_X86_MSR_FILTER: 189,
  KVM_CAP_DIRTY_LOG_RING: 192,
  KVM_CAP_BINARY_STATS_FD: 203,
  KVM_CAP_EXIT_ON_EMULATION_FAILURE: 204,
  KVM_CAP_X86_TRIPLE_FAULT_EVENT: 218,
  KVM_CAP_MEMORY_FAULT_INFO: 232,
  KVM_CAP_GUEST_MEMFD: 234
} as const

/** The names of {@link KvmCap}. */
export type KvmCapName = keyof typeof KvmCap

/** Flags and values of the structures. */
export const KvmValue = {
  /** The only version of the interface that there has ever been. */
  KVM_API_VERSION: 12,
  /** `kvm_userspace_memory_region.flags`: keep a log of dirty pages. */
  KVM_MEM_LOG_DIRTY_PAGES: 1,
  /** `kvm_userspace_memory_region.flags`: guest writes exit as MMIO. */
  KVM_MEM_READONLY: 2,
  KVM_IRQFD_FLAG_DEASSIGN: 1,
  KVM_IRQFD_FLAG_RESAMPLE: 2,
  KVM_IOEVENTFD_FLAG_DATAMATCH: 1,
  KVM_IOEVENTFD_FLAG_PIO: 2,
  KVM_IOEVENTFD_FLAG_DEASSIGN: 4,
  KVM_PIT_SPEAKER_DUMMY: 1,
  KVM_IRQCHIP_PIC_MASTER: 0,
  KVM_IRQCHIP_PIC_SLAVE: 1,
  KVM_IRQCHIP_IOAPIC: 2,
  KVM_IOAPIC_NUM_PINS: 24,
  KVM_IRQ_ROUTING_IRQCHIP: 1,
  KVM_IRQ_ROUTING_MSI: 2,
  KVM_CPUID_FLAG_SIGNIFCANT_INDEX: 1,
  KVM_MP_STATE_RUNNABLE: 0,
  KVM_MP_STATE_UNINITIALIZED: 1,
  KVM_MP_STATE_INIT_RECEIVED: 2,
  KVM_MP_STATE_HALTED: 3,
  KVM_MP_STATE_SIPI_RECEIVED: 4,
  KVM_MP_STATE_STOPPED: 5,
  KVM_VCPUEVENT_VALID_NMI_PENDING: 1,
  KVM_VCPUEVENT_VALID_SIPI_VECTOR: 2,
  KVM_VCPUEVENT_VALID_SHADOW: 4,
  KVM_VCPUEVENT_VALID_SMM: 8,
  KVM_VCPUEVENT_VALID_TRIPLE_FAULT: 32,
  KVM_X86_SHADOW_INT_MOV_SS: 1,
  KVM_X86_SHADOW_INT_STI: 2,
  KVM_X86_DISABLE_EXITS_MWAIT: 1,
  KVM_X86_DISABLE_EXITS_HLT: 2,
  KVM_X86_DISABLE_EXITS_PAUSE: 4,
  KVM_X86_DISABLE_EXITS_CSTATE: 8,
  KVM_CLOCK_TSC_STABLE: 2,
  KVM_CLOCK_REALTIME: 4,
  KVM_CLOCK_HOST_TSC: 8,
  KVM_STATS_TYPE_MASK: 0xf,
  KVM_STATS_TYPE_CUMULATIVE: 0x0,
  KVM_STATS_TYPE_INSTANT: 0x1,
  KVM_STATS_TYPE_PEAK: 0x2,
  KVM_STATS_TYPE_LINEAR_HIST: 0x3,
  KVM_STATS_TYPE_LOG_HIST: 0x4,
  KVM_STATS_UNIT_MASK: 0xf0,
  KVM_STATS_BASE_MASK: 0xf00
} as const
