/**
 * The structures of `linux/kvm.h` (x86-64) that describe a machine and its parts. Member names are those of the header. Imports
 * nothing of Effect. A test compares every layout with the system's header.
 */
import { array, bytes, embed, flexible, group, s16, s32, s64, struct, u16, u32, u64, u8, union } from "./Struct.ts"

/** `KVM_SET_USER_MEMORY_REGION` */
export const KvmUserspaceMemoryRegion = struct("kvm_userspace_memory_region", {
  slot: u32,
  flags: u32,
  guest_phys_addr: u64,
  memory_size: u64,
  userspace_addr: u64
})

/** `KVM_ENABLE_CAP` */
export const KvmEnableCap = struct("kvm_enable_cap", {
  cap: u32,
  flags: u32,
  args: array(u64, 4),
  pad: bytes(64)
})

/** `KVM_IRQFD` */
export const KvmIrqfd = struct("kvm_irqfd", {
  fd: u32,
  gsi: u32,
  flags: u32,
  resamplefd: u32,
  pad: bytes(16)
})

/** `KVM_IOEVENTFD` */
export const KvmIoeventfd = struct("kvm_ioeventfd", {
  datamatch: u64,
  addr: u64,
  len: u32,
  fd: s32,
  flags: u32,
  pad: bytes(36)
})

/** `KVM_IRQ_LINE` */
export const KvmIrqLevel = struct("kvm_irq_level", { irq: u32, level: u32 })

/** One entry of {@link KvmIrqRouting}. */
export const KvmIrqRoutingEntry = struct("kvm_irq_routing_entry", {
  gsi: u32,
  type: u32,
  flags: u32,
  pad: u32,
  u: union({
    irqchip: group({ irqchip: u32, pin: u32 }),
    msi: group({ address_lo: u32, address_hi: u32, data: u32, devid: u32 }),
    pad: array(u32, 8)
  })
})

/** `KVM_SET_GSI_ROUTING` */
export const KvmIrqRouting = struct("kvm_irq_routing", {
  nr: u32,
  flags: u32,
  entries: flexible(embed(KvmIrqRoutingEntry))
})

/** `KVM_CREATE_PIT2` */
export const KvmPitConfig = struct("kvm_pit_config", { flags: u32, pad: array(u32, 15) })

/** One 8259 in {@link KvmIrqchip}. */
export const KvmPicState = struct("kvm_pic_state", {
  last_irr: u8,
  irr: u8,
  imr: u8,
  isr: u8,
  priority_add: u8,
  irq_base: u8,
  read_reg_select: u8,
  poll: u8,
  special_mask: u8,
  init_state: u8,
  auto_eoi: u8,
  rotate_on_auto_eoi: u8,
  special_fully_nested_mode: u8,
  init4: u8,
  elcr: u8,
  elcr_mask: u8
})

/** The I/O APIC in {@link KvmIrqchip}. A redirection entry is one 64-bit value as the register has it. */
export const KvmIoapicState = struct("kvm_ioapic_state", {
  base_address: u64,
  ioregsel: u32,
  id: u32,
  irr: u32,
  pad: u32,
  redirtbl: array(u64, 24)
})

/** `KVM_GET_IRQCHIP`, `KVM_SET_IRQCHIP` */
export const KvmIrqchip = struct("kvm_irqchip", {
  chip_id: u32,
  pad: u32,
  chip: union({
    dummy: bytes(512),
    pic: embed(KvmPicState),
    ioapic: embed(KvmIoapicState)
  })
})

/** `KVM_GET_CLOCK`, `KVM_SET_CLOCK` */
export const KvmClockData = struct("kvm_clock_data", {
  clock: u64,
  flags: u32,
  pad0: u32,
  realtime: u64,
  host_tsc: u64,
  pad: array(u32, 4)
})

/** `KVM_REGISTER_COALESCED_MMIO`, `KVM_UNREGISTER_COALESCED_MMIO` */
export const KvmCoalescedMmioZone = struct("kvm_coalesced_mmio_zone", { addr: u64, size: u32, pio: u32 })

/** One write in {@link KvmCoalescedMmioRing}. */
export const KvmCoalescedMmio = struct("kvm_coalesced_mmio", { phys_addr: u64, len: u32, pio: u32, data: bytes(8) })

/** The ring of coalesced writes, on its own page of a vCPU's mapping. */
export const KvmCoalescedMmioRing = struct("kvm_coalesced_mmio_ring", {
  first: u32,
  last: u32,
  coalesced_mmio: flexible(embed(KvmCoalescedMmio))
})

/** One leaf of {@link KvmCpuid2}. */
export const KvmCpuidEntry2 = struct("kvm_cpuid_entry2", {
  function: u32,
  index: u32,
  flags: u32,
  eax: u32,
  ebx: u32,
  ecx: u32,
  edx: u32,
  padding: array(u32, 3)
})

/** `KVM_GET_SUPPORTED_CPUID`, `KVM_SET_CPUID2`, `KVM_GET_CPUID2` */
export const KvmCpuid2 = struct("kvm_cpuid2", {
  nent: u32,
  padding: u32,
  entries: flexible(embed(KvmCpuidEntry2))
})

/** One register of {@link KvmMsrs}. */
export const KvmMsrEntry = struct("kvm_msr_entry", { index: u32, reserved: u32, data: u64 })

/** `KVM_GET_MSRS`, `KVM_SET_MSRS` */
export const KvmMsrs = struct("kvm_msrs", { nmsrs: u32, pad: u32, entries: flexible(embed(KvmMsrEntry)) })

/** `KVM_GET_MSR_INDEX_LIST` */
export const KvmMsrList = struct("kvm_msr_list", { nmsrs: u32, indices: flexible(u32) })

/** The beginning of what `KVM_GET_STATS_FD`'s descriptor reads as. */
export const KvmStatsHeader = struct("kvm_stats_header", {
  flags: u32,
  name_size: u32,
  num_desc: u32,
  id_offset: u32,
  desc_offset: u32,
  data_offset: u32
})

/** The description of one statistic. `name` is `name_size` bytes long. */
export const KvmStatsDesc = struct("kvm_stats_desc", {
  flags: u32,
  exponent: s16,
  size: u16,
  offset: u32,
  bucket_size: u32,
  name: bytes(0)
})

/** One PIT channel in {@link KvmPitState2}. */
export const KvmPitChannelState = struct("kvm_pit_channel_state", {
  count: u32,
  latched_count: u16,
  count_latched: u8,
  status_latched: u8,
  status: u8,
  read_state: u8,
  write_state: u8,
  write_latch: u8,
  rw_mode: u8,
  mode: u8,
  bcd: u8,
  gate: u8,
  count_load_time: s64
})

/** `KVM_GET_PIT2`, `KVM_SET_PIT2` */
export const KvmPitState2 = struct("kvm_pit_state2", {
  channels: array(embed(KvmPitChannelState), 3),
  flags: u32,
  reserved: array(u32, 9)
})
