/** Machines for tests of the KVM layer: a few bytes of guest code, a bus that records what happens, and a vCPU. */
import { Bus, type BusHandlers, type BusRange } from "@troupe/core/Bus"
import { Hypervisor } from "@troupe/core/Hypervisor"
import type { SegmentState, VcpuState } from "@troupe/core/VcpuState"
import * as Ffi from "@troupe/node/Ffi"
import * as KvmHypervisor from "@troupe/node/kvm/KvmHypervisor"
import * as KvmSystem from "@troupe/node/kvm/KvmSystem"
import * as VcpuThreads from "@troupe/node/kvm/VcpuThreads"
import { Effect, Latch, Layer } from "effect"

/** Where guest code lies and starts. */
export const ENTRY = 0x1000
/** Bytes of RAM. */
export const MEMORY_SIZE = 0x10_0000
/** First port of the serial-like range: posted writes, shadowed reads. */
export const SERIAL = 0x3f8
/** First port of the range whose reads and writes are calls. */
export const CONTROL = 0x500
/** First address of the device window of memory-mapped ranges. */
export const WINDOW = 0xd000_0000

/** Page tables of `longMode`: they map the first 4 GiB to themselves with pages of 2 MiB. */
const PML4 = 0x1_0000
const PDPT = 0x1_1000
const PAGE_DIRECTORIES = 0x1_2000

const segment = (type: number, bits: Partial<SegmentState> = {}): SegmentState => ({
  selector: 0,
  base: 0,
  limit: 0xffff,
  type,
  s: 1,
  dpl: 0,
  present: 1,
  db: 0,
  l: 0,
  g: 0,
  avl: 0,
  unusable: 0,
  ...bits
})

const CODE = 0xb
const DATA = 0x3

const state = (code: SegmentState, data: SegmentState, control: Partial<VcpuState>): VcpuState => ({
  mode: "protected",
  rip: ENTRY,
  rsp: 0x8000,
  rbx: 0,
  rsi: 0,
  rflags: 0x2,
  cr0: 0x10,
  cr3: 0,
  cr4: 0,
  efer: 0,
  gdt: { base: 0, limit: 0 },
  idt: { base: 0, limit: 0 },
  cs: code,
  ds: data,
  es: data,
  fs: data,
  gs: data,
  ss: data,
  tr: segment(0xb, { s: 0 }),
  ldt: segment(0x2, { s: 0, unusable: 1 }),
  ...control
})

/** 16-bit code, no interrupt table. */
export const realMode = state(segment(CODE), segment(DATA), {})
/** 16-bit code, interrupt vectors at 0. */
export const realModeWithVectors: VcpuState = { ...realMode, idt: { base: 0, limit: 0x3ff } }
/** 32-bit code, flat segments, no paging, no interrupt table. */
export const flatMode = state(
  segment(CODE, { selector: 0x8, limit: 0xffff_ffff, db: 1, g: 1 }),
  segment(DATA, { selector: 0x10, limit: 0xffff_ffff, db: 1, g: 1 }),
  { cr0: 0x11 }
)
/** 64-bit code, the first 4 GiB mapped to themselves, no interrupt table. */
export const longMode = state(
  segment(CODE, { selector: 0x8, limit: 0xffff_ffff, l: 1, g: 1 }),
  segment(DATA, { selector: 0x10, limit: 0xffff_ffff, db: 1, g: 1 }),
  { mode: "long", cr0: 0x8000_0011, cr3: PML4, cr4: 0x20, efer: 0x500 }
)

/** Writes the page tables of {@link longMode}. */
const writePageTables = (view: DataView): void => {
  view.setBigUint64(PML4, BigInt(PDPT | 0x3), true)
  for (let gib = 0; gib < 4; gib++) {
    view.setBigUint64(PDPT + gib * 8, BigInt((PAGE_DIRECTORIES + gib * 0x1000) | 0x3), true)
  }
  for (let page = 0; page < 4 * 512; page++) {
    view.setBigUint64(PAGE_DIRECTORIES + page * 8, BigInt(page) * 0x20_0000n | 0x83n, true)
  }
}

/** Instructions, one after the other. */
export const asm = (...instructions: ReadonlyArray<ReadonlyArray<number>>): ReadonlyArray<number> => instructions.flat()
/** The low and the high byte of a 16-bit number, for instructions. */
export const word = (value: number): ReadonlyArray<number> => [value & 0xff, value >>> 8]
/** The four bytes of a 32-bit number, for instructions. */
export const dword = (value: number): ReadonlyArray<number> => [
  value & 0xff,
  (value >>> 8) & 0xff,
  (value >>> 16) & 0xff,
  value >>> 24
]

/** `cli; hlt`: ends a guest within two seconds, with its registers as they were. */
export const HALT = [0xfa, 0xf4]
/** The port of {@link END}. */
const END_PORT = 0xe0
/** `out END_PORT, al; jmp $`: tells the test that the guest is done. See `TinyMachine.runToEnd`. */
export const END = [0xe6, END_PORT, 0xeb, 0xfe]

/** A range with nothing special about it. */
export const range = (options: Partial<BusRange> & { readonly base: number }): BusRange => ({
  space: "pio",
  size: 8,
  read: "call",
  write: "call",
  doorbells: [],
  device: `device at 0x${options.base.toString(16)}`,
  ...options
})

/** The two ranges of ports that most tests use. */
export const PORTS: ReadonlyArray<BusRange> = [
  range({ base: SERIAL, read: "shadowed", write: "posted" }),
  range({ base: CONTROL })
]

/** What to build. */
export interface TinyOptions {
  readonly code: ReadonlyArray<number>
  readonly state?: VcpuState
  readonly ranges?: ReadonlyArray<BusRange>
  readonly handlers?: Partial<BusHandlers>
  readonly vcpus?: number
  /** Interrupt inputs to make. */
  readonly lines?: ReadonlyArray<number>
}

/** A machine with one region of RAM, the code, a bus and vCPUs that have not run. Unhandled calls are answered with 0. */
export const tinyMachine = Effect.fnUntraced(function*(options: TinyOptions) {
  const hypervisor = yield* Hypervisor
  const vm = yield* hypervisor.createVm
  const memory = yield* vm.addMemory(0, MEMORY_SIZE)
  memory.bytes.set(options.code, ENTRY)
  writePageTables(memory.view)
  const ranges = options.ranges ?? PORTS
  const bus = Bus.make([...ranges, range({ base: END_PORT, size: 1, write: "posted" })])
  if (!(bus instanceof Bus)) return yield* Effect.die(new Error(bus.message))
  const events: Array<string> = []
  const bytes: Array<number> = []
  const ended = Latch.makeUnsafe()
  const handlers = options.handlers ?? {}
  const backings = yield* vm.attachBus(bus, {
    call: (range, offset, size, isWrite, value, reply) => {
      events.push(
        `${isWrite ? "write" : "read"} ${range}+${offset}/${size}${isWrite ? ` 0x${value.toString(16)}` : ""}`
      )
      reply.complete(0)
    },
    doorbell: (range, doorbell) => events.push(`doorbell ${range}#${doorbell}`),
    ...handlers,
    posted: (range, offset, size, value) => {
      if (range === ranges.length) {
        ended.openUnsafe()
        return true
      }
      if (handlers.posted !== undefined) return handlers.posted(range, offset, size, value)
      events.push(`posted ${range}+${offset}/${size} 0x${value.toString(16)}`)
      bytes.push(value)
      return true
    }
  })
  const lines = yield* Effect.forEach(options.lines ?? [], vm.interruptLine)
  const vcpus = []
  for (let id = 0; id < (options.vcpus ?? 1); id++) vcpus.push(yield* vm.createVcpu(id))
  const vcpu = vcpus[0]
  if (vcpu === undefined) return yield* Effect.die(new Error("a tiny machine has at least one vCPU"))
  yield* vcpu.setState(options.state ?? realMode)
  return {
    vm,
    memory,
    backings,
    lines,
    vcpu,
    vcpus,
    /** What the handlers saw, in order. */
    events,
    /** The values of posted writes, as text. */
    text: () => String.fromCharCode(...bytes),
    /** Runs the first vCPU until its guest is done ({@link END}). */
    runToEnd: Effect.raceFirst(
      Effect.flatMap(vcpu.run, (exit) => Effect.die(new Error(`the guest ended too early: ${exit._tag}`))),
      ended.await
    )
  }
})

/** Everything under the hypervisor, on the named FFI back end, with the pool and the FFI visible to tests. */
export const kvmLayer = (backEnd: Ffi.ForeignFunctionsName = "node:ffi") =>
  KvmHypervisor.layer.pipe(
    Layer.provideMerge(VcpuThreads.layer),
    Layer.provideMerge(KvmSystem.layer),
    Layer.provideMerge(Ffi.layerWith({ backEnds: [backEnd], quiet: true }))
  )
