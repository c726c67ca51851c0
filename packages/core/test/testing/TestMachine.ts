/** A machine of the fake that is put together by hand, without the loaders: for tests of the fake itself. */
import { Bus, type BusHandlers, type BusRange, type RangeBacking } from "@troupe/core/Bus"
import type { MemoryRegion } from "@troupe/core/GuestMemory"
import { Hypervisor, type InterruptLine, type Vcpu } from "@troupe/core/Hypervisor"
import { GuestProgram } from "@troupe/core/testing"
import type { SegmentState, VcpuState } from "@troupe/core/VcpuState"
import * as Effect from "effect/Effect"

const segment: SegmentState = {
  selector: 0,
  base: 0,
  limit: 0,
  type: 0,
  s: 0,
  dpl: 0,
  present: 0,
  db: 0,
  l: 0,
  g: 0,
  avl: 0,
  unusable: 1
}

/** A state that starts at `rip`. */
export const stateAt = (rip: number): VcpuState => ({
  mode: "protected",
  rip,
  rsp: 0,
  rbx: 0,
  rsi: 0,
  rflags: 2,
  cr0: 1,
  cr3: 0,
  cr4: 0,
  efer: 0,
  gdt: { base: 0, limit: 0 },
  idt: { base: 0, limit: 0 },
  cs: segment,
  ds: segment,
  es: segment,
  fs: segment,
  gs: segment,
  ss: segment,
  tr: segment,
  ldt: segment
})

/** Size of a test machine's memory in bytes. */
export const MEMORY_SIZE = 0x20_0000
const CODE = 0x10_0000

/** Handlers that take everything and answer reads with 0. */
export const quietHandlers: BusHandlers = {
  call: (_range, _offset, _size, _isWrite, _value, reply) => reply.complete(0),
  posted: () => true,
  doorbell: () => undefined
}

/** A range with the fields that a test does not care about. */
export const range = (range: Partial<BusRange> & Pick<BusRange, "space" | "base" | "size">): BusRange => ({
  read: "call",
  write: "call",
  doorbells: [],
  device: "test",
  ...range
})

export interface TestMachine {
  readonly memory: MemoryRegion
  readonly backings: ReadonlyArray<RangeBacking>
  readonly lines: ReadonlyArray<InterruptLine>
  readonly vcpus: ReadonlyArray<Vcpu>
  readonly boot: Vcpu
}

/** What a test machine may have. */
export interface TestMachineOptions {
  readonly ranges?: ReadonlyArray<BusRange>
  readonly handlers?: BusHandlers
  /** Handlers that use the machine itself. */
  readonly handlersOf?: (machine: () => TestMachine) => BusHandlers
  readonly lines?: number
  readonly vcpus?: number
}

/** Builds a machine whose boot vCPU starts the program. */
export const testMachine = Effect.fnUntraced(function*(
  program: GuestProgram.GuestProgram,
  options: TestMachineOptions = {}
) {
  const hypervisor = yield* Hypervisor
  const vm = yield* hypervisor.createVm
  const memory = yield* vm.addMemory(0, MEMORY_SIZE)
  memory.bytes.set(GuestProgram.code(program), CODE)
  const bus = Bus.make(options.ranges ?? [])
  if (!(bus instanceof Bus)) return yield* Effect.die(bus.message)
  let made: TestMachine | undefined
  const handlers = options.handlersOf?.(() => {
    if (made === undefined) throw new Error("the machine is not made yet")
    return made
  }) ?? options.handlers ?? quietHandlers
  const backings = yield* vm.attachBus(bus, handlers)
  const lines: Array<InterruptLine> = []
  for (let gsi = 0; gsi < (options.lines ?? 0); gsi++) lines.push(yield* vm.interruptLine(gsi))
  const vcpus: Array<Vcpu> = []
  for (let id = 0; id < (options.vcpus ?? 1); id++) vcpus.push(yield* vm.createVcpu(id))
  const boot = vcpus[0]
  if (boot === undefined) return yield* Effect.die("no vCPU")
  yield* boot.setState(stateAt(CODE))
  const machine: TestMachine = { memory, backings, lines, vcpus, boot }
  made = machine
  return machine
})
