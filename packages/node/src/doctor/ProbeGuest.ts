/**
 * A guest of a few instructions in 64-bit mode, with which a host finds out what its hypervisor can run.
 *
 * It is machine code in a page, so it needs no compiler and no file. It reports through one I/O port and ends in a fault
 * handler when an instruction raises an exception.
 */
import type { SegmentState, VcpuState } from "@troupe/core/VcpuState"
import { CR0_ET, CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME, RFLAGS_FIXED } from "@troupe/core/VcpuState"

/** Memory of the probe guest: one large page. */
export const PROBE_MEMORY_SIZE = 0x20_0000
/** The port that the guest reports to. */
export const PROBE_PORT = 0x80
/** Reported by an instruction that ran, or whose own exception was delivered. */
export const PROBE_RAN = 0x01
/** Reported with the vector in its low bits by an exception. */
export const PROBE_FAULT = 0x80

const PML4 = 0x1000
const PDPT = 0x2000
const PD = 0x3000
const GDT = 0x4000
const TSS = 0x4100
const IDT = 0x5000
const HANDLERS = 0x6000
const CODE = 0x8000
const USER_CODE = 0x9000
const SCRATCH = 0xa000
const STACK = 0x1_0000
const USER_STACK = 0x1_8000

const HANDLER_SIZE = 16
const KERNEL_CS = 0x10
const KERNEL_DS = 0x18
const TSS_SELECTOR = 0x20
const USER_DS = 0x33
const USER_CS = 0x3b
/** A software interrupt vector outside those of the processor. */
const SOFTWARE_VECTOR = 0x40
const BREAKPOINT_VECTOR = 3
const VECTORS = SOFTWARE_VECTOR + 1

/** An instruction to try in kernel mode: its name, its bytes, and what kernels use it for. */
export interface ProbedInstruction {
  readonly name: string
  readonly code: ReadonlyArray<number>
  /** The CPU feature under which guests find it, when it can be hidden from them. */
  readonly feature?: "cx16" | "popcnt"
}

/** The instructions that kernels need and that emulating hypervisors are known to lack. RDI points at scratch memory. */
export const PROBED_INSTRUCTIONS: ReadonlyArray<ProbedInstruction> = [
  { name: "cmpxchg16b", code: [0x48, 0x0f, 0xc7, 0x0f], feature: "cx16" },
  { name: "popcnt", code: [0xf3, 0x48, 0x0f, 0xb8, 0xc0], feature: "popcnt" },
  // mov rax, cr4; bts rax, 18 (OSXSAVE); mov cr4, rax; mov eax, 1; xor edx, edx; xrstor [rdi]
  {
    name: "xrstor",
    code: [
      0x0f,
      0x20,
      0xe0,
      0x48,
      0x0f,
      0xba,
      0xe8,
      0x12,
      0x0f,
      0x22,
      0xe0,
      0xb8,
      0x01,
      0x00,
      0x00,
      0x00,
      0x31,
      0xd2,
      0x0f,
      0xae,
      0x2f
    ]
  },
  { name: "fxsave", code: [0x0f, 0xae, 0x07] },
  { name: "int3", code: [0xcc] },
  { name: "int n", code: [0xcd, SOFTWARE_VECTOR] },
  { name: "clac", code: [0x0f, 0x01, 0xca] },
  { name: "stac", code: [0x0f, 0x01, 0xcb] },
  { name: "cpuid", code: [0x31, 0xc0, 0x31, 0xc9, 0x0f, 0xa2] },
  // mov ecx, IA32_EFER; rdmsr; wrmsr
  { name: "rdmsr, wrmsr", code: [0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x0f, 0x30] }
]

/** mov al, value; out PROBE_PORT, al */
const report = (value: number): ReadonlyArray<number> => [0xb0, value, 0xe6, PROBE_PORT]
/** hlt; jmp back to it */
const STOP: ReadonlyArray<number> = [0xf4, 0xeb, 0xfd]

const uint32 = (value: number): ReadonlyArray<number> => [
  value & 0xff,
  (value >>> 8) & 0xff,
  (value >>> 16) & 0xff,
  (value >>> 24) & 0xff
]

/** mov rdi, SCRATCH (64-bit form with a sign-extended 32-bit immediate) */
const POINT_AT_SCRATCH: ReadonlyArray<number> = [0x48, 0xc7, 0xc7, ...uint32(SCRATCH)]

/** Code that tries one instruction and reports that it ran. */
export const tryInstruction = (instruction: ProbedInstruction): ReadonlyArray<number> => [
  ...POINT_AT_SCRATCH,
  ...instruction.code,
  ...report(PROBE_RAN),
  ...STOP
]

/** mov ecx, iterations; dec ecx; jnz back: two instructions a round. */
const countDown = (iterations: number): ReadonlyArray<number> => [0xb9, ...uint32(iterations), 0xff, 0xc9, 0x75, 0xfc]

/** Code that reports, counts down in kernel mode, and reports again. */
export const timeKernelMode = (iterations: number): ReadonlyArray<number> => [
  ...report(PROBE_RAN),
  ...countDown(iterations),
  ...report(PROBE_RAN),
  ...STOP
]

/** push imm32 (sign-extended to 64 bits) */
const push = (value: number): ReadonlyArray<number> => [0x68, ...uint32(value)]
/** RFLAGS of user mode: the fixed bit, and I/O privilege level 3 so that user code may report. */
const USER_RFLAGS = RFLAGS_FIXED | 0x3000
/** iretq to the user code with {@link USER_RFLAGS}. */
export const ENTER_USER_MODE: ReadonlyArray<number> = [
  ...push(USER_DS),
  ...push(USER_STACK),
  ...push(USER_RFLAGS),
  ...push(USER_CS),
  ...push(USER_CODE),
  0x48,
  0xcf
]

/** User code that reports, counts down, reports again, and spins. */
export const timeUserMode = (iterations: number): ReadonlyArray<number> => [
  ...report(PROBE_RAN),
  ...countDown(iterations),
  ...report(PROBE_RAN),
  0xeb,
  0xfe
]

const writeGate = (view: DataView, vector: number): void => {
  const at = IDT + vector * 16
  const handler = HANDLERS + vector * HANDLER_SIZE
  view.setUint16(at, handler & 0xffff, true)
  view.setUint16(at + 2, KERNEL_CS, true)
  view.setUint16(at + 4, 0x8e00, true) // present, 64-bit interrupt gate
  view.setUint16(at + 6, handler >>> 16, true)
}

/** Fills the guest's memory: tables, fault handlers, and the given kernel and user code. */
export const writeProbeGuest = (
  memory: Uint8Array<ArrayBuffer>,
  kernelCode: ReadonlyArray<number>,
  userCode: ReadonlyArray<number> = []
): void => {
  const view = new DataView(memory.buffer, memory.byteOffset, memory.byteLength)
  const USER_WRITABLE_PRESENT = 7
  const LARGE_PAGE = 0x80
  view.setUint32(PML4, PDPT | USER_WRITABLE_PRESENT, true)
  view.setUint32(PDPT, PD | USER_WRITABLE_PRESENT, true)
  view.setUint32(PD, LARGE_PAGE | USER_WRITABLE_PRESENT, true)
  const descriptor = (selector: number, high: number) => {
    view.setUint32(GDT + (selector & ~7), 0x0000_ffff, true)
    view.setUint32(GDT + (selector & ~7) + 4, high, true)
  }
  descriptor(KERNEL_CS, 0x00af_9b00)
  descriptor(KERNEL_DS, 0x00cf_9300)
  descriptor(USER_DS, 0x00cf_f300)
  descriptor(USER_CS, 0x00af_fb00)
  view.setUint32(GDT + TSS_SELECTOR, ((TSS & 0xffff) << 16) | 0x67, true)
  view.setUint32(GDT + TSS_SELECTOR + 4, 0x0000_8b00 | (TSS >>> 16), true)
  view.setUint32(TSS + 4, STACK, true) // RSP0
  for (let vector = 0; vector < VECTORS; vector++) {
    writeGate(view, vector)
    const expected = vector === BREAKPOINT_VECTOR || vector === SOFTWARE_VECTOR
    memory.set([...report(expected ? PROBE_RAN : PROBE_FAULT | vector), ...STOP], HANDLERS + vector * HANDLER_SIZE)
  }
  memory.set(kernelCode, CODE)
  memory.set(userCode, USER_CODE)
}

const segment = (selector: number, type: number, dpl: 0 | 3, long: 0 | 1): SegmentState => ({
  selector,
  base: 0,
  limit: 0xffff_ffff,
  type,
  s: 1,
  dpl,
  present: 1,
  db: long === 1 ? 0 : 1,
  l: long,
  g: 1,
  avl: 0,
  unusable: 0
})

const DATA_SEGMENT = segment(KERNEL_DS, 0x3, 0, 0)

/** The state in which the probe guest starts: long mode, privilege level 0, interrupts off. */
export const PROBE_STATE: VcpuState = {
  mode: "long",
  rip: CODE,
  rsp: STACK,
  rbx: 0,
  rsi: 0,
  rflags: RFLAGS_FIXED,
  cr0: CR0_PE + CR0_ET + CR0_PG,
  cr3: PML4,
  cr4: CR4_PAE | 0x600, // OSFXSR, OSXMMEXCPT: fxsave and its like need them
  efer: EFER_LME | EFER_LMA,
  gdt: { base: GDT, limit: 0x3f },
  idt: { base: IDT, limit: VECTORS * 16 - 1 },
  cs: segment(KERNEL_CS, 0xb, 0, 1),
  ds: DATA_SEGMENT,
  es: DATA_SEGMENT,
  fs: DATA_SEGMENT,
  gs: DATA_SEGMENT,
  ss: DATA_SEGMENT,
  tr: { ...segment(TSS_SELECTOR, 0xb, 0, 0), s: 0, base: TSS, limit: 0x67, db: 0, g: 0 },
  ldt: { ...segment(0, 0x2, 0, 0), s: 0, limit: 0, db: 0, g: 0, present: 0, unusable: 1 }
}
