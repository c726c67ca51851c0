/**
 * A vCPU's registers: from the boot protocol's state to KVM's structures, and from those to text for reports.
 */
import type { VcpuRegisters } from "@troupe/core/VcpuExit"
import type { DescriptorTableState, SegmentState, VcpuState } from "@troupe/core/VcpuState"
import { KvmRegs, KvmSregs } from "./KvmCpuState.ts"
import type { StructView } from "./Struct.ts"

const sregs = KvmSregs.fields
const regs = KvmRegs.fields

type SegmentFields = typeof sregs.cs

const setSegment = (view: StructView, fields: SegmentFields, segment: SegmentState): void => {
  fields.base.setNumber(view, segment.base)
  fields.limit.set(view, segment.limit)
  fields.selector.set(view, segment.selector)
  fields.type.set(view, segment.type)
  fields.present.set(view, segment.present)
  fields.dpl.set(view, segment.dpl)
  fields.db.set(view, segment.db)
  fields.s.set(view, segment.s)
  fields.l.set(view, segment.l)
  fields.g.set(view, segment.g)
  fields.avl.set(view, segment.avl)
  fields.unusable.set(view, segment.unusable)
}

const setTable = (view: StructView, fields: typeof sregs.gdt, table: DescriptorTableState): void => {
  fields.base.setNumber(view, table.base)
  fields.limit.set(view, table.limit)
}

/** Puts the state into a `kvm_sregs` that was read from the vCPU; what the state does not name (APIC base, CR8) stays. */
export const applySregs = (view: StructView, state: VcpuState): void => {
  for (const name of ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"] as const) {
    setSegment(view, sregs[name], state[name])
  }
  setTable(view, sregs.gdt, state.gdt)
  setTable(view, sregs.idt, state.idt)
  sregs.cr0.setNumber(view, state.cr0)
  sregs.cr2.setNumber(view, 0)
  sregs.cr3.setNumber(view, state.cr3)
  sregs.cr4.setNumber(view, state.cr4)
  sregs.efer.setNumber(view, state.efer)
}

/** The state's general registers as `kvm_regs`; those that it does not name are zero. */
export const encodeRegs = (state: VcpuState): StructView => {
  const view = KvmRegs.make()
  regs.rip.setNumber(view, state.rip)
  regs.rsp.setNumber(view, state.rsp)
  regs.rbx.setNumber(view, state.rbx)
  regs.rsi.setNumber(view, state.rsi)
  regs.rflags.setNumber(view, state.rflags)
  return view
}

const REPORTED_REGS = [
  "rip",
  "rsp",
  "rflags",
  "rax",
  "rbx",
  "rcx",
  "rdx",
  "rsi",
  "rdi",
  "rbp",
  "r8",
  "r9",
  "r10",
  "r11",
  "r12",
  "r13",
  "r14",
  "r15"
] as const
const REPORTED_SREGS = ["cr0", "cr2", "cr3", "cr4", "efer"] as const

const hex = (value: bigint): string => `0x${value.toString(16)}`

/** Registers as reports show them. */
export const formatRegisters = (
  general: StructView | undefined,
  special: StructView | undefined
): VcpuRegisters => {
  const result: { [name: string]: string } = {}
  if (general !== undefined) {
    for (const name of REPORTED_REGS) result[name] = hex(regs[name].get(general))
  }
  if (special !== undefined) {
    for (const name of REPORTED_SREGS) result[name] = hex(sregs[name].get(special))
    result["cs"] = hex(BigInt(sregs.cs.selector.get(special)))
  }
  return result
}
