/**
 * A hypervisor that is no hypervisor: machines whose guests are programs in TypeScript, for tests.
 *
 * It serves the same `Hypervisor` service as KVM does and honours every declaration of the bus, so the same devices and the
 * same lifecycle run on it. It also checks what KVM cannot: an answer given twice, a shadow that is no byte, memory that is
 * released under a running vCPU and the like are {@link FakeHypervisor.violations}.
 */
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import { Hypervisor, type HypervisorError, type HypervisorLimits, type Vm } from "../Hypervisor.ts"
import { FakeVm } from "./FakeVm.ts"
import { FakeWorld } from "./FakeWorld.ts"
import { type FaultPlan, type HypervisorOperation, none } from "./FaultPlan.ts"
import { SimulationControl } from "./SimulationControl.ts"
import { Trace } from "./Trace.ts"

/** What a fake hypervisor may choose. */
export interface FakeHypervisorOptions {
  /** The largest number of vCPUs of one machine. Default: 64. */
  readonly maxVcpus?: number
  /** One past the highest interrupt line number. Default: 24, as on one I/O APIC. */
  readonly interruptLines?: number
  /** Which operations go wrong. Default: none. */
  readonly faults?: FaultPlan
}

/** A test's view of the fake hypervisor below it. */
export class FakeHypervisor extends Context.Service<FakeHypervisor, {
  /** Everything that happened at the boundary. Inside a simulation it is the simulation's trace. */
  readonly trace: Trace
  /** What is open now, oldest first: machines, memory, buses, interrupt lines, vCPUs. Empty after a clean end. */
  readonly openResources: Effect.Effect<ReadonlyArray<string>>
  /** The rules of the boundary that were broken so far. */
  readonly violations: Effect.Effect<ReadonlyArray<string>>
  /** Number of operations begun so far: the indices that a fault plan sees. */
  readonly operationCount: Effect.Effect<number>
  /** Names of the operations begun so far, in order; the first 1024. */
  readonly operations: Effect.Effect<ReadonlyArray<HypervisorOperation>>
}>()("@troupe/core/testing/FakeHypervisor") {}

const DEFAULT_MAX_VCPUS = 64
const DEFAULT_INTERRUPT_LINES = 24

const make = (options: FakeHypervisorOptions) =>
  Effect.gen(function*() {
    const control = yield* SimulationControl
    const world = new FakeWorld(options.faults ?? none, control?.trace ?? new Trace(), control)
    const limits: HypervisorLimits = {
      maxVcpus: options.maxVcpus ?? DEFAULT_MAX_VCPUS,
      interruptLines: options.interruptLines ?? DEFAULT_INTERRUPT_LINES
    }
    const createVm: Effect.Effect<Vm, HypervisorError, Scope.Scope> = world.operation(
      "createVm",
      "",
      Effect.withFiber((fiber) =>
        world.resource("machine", () => new FakeVm(world, limits, fiber), (vm) => vm.release())
      )
    )
    const fake: FakeHypervisor["Service"] = {
      trace: world.trace,
      openResources: Effect.sync(() => world.open),
      violations: Effect.sync(() => Array.from(world.broken)),
      operationCount: Effect.sync(() => world.operationCount),
      operations: Effect.sync(() => Array.from(world.operations))
    }
    return Context.make(Hypervisor, { name: "fake", limits, createVm }).pipe(Context.add(FakeHypervisor, fake))
  })

/** A fake hypervisor, and the view of it for tests. */
export const layer = (options: FakeHypervisorOptions = {}): Layer.Layer<Hypervisor | FakeHypervisor> =>
  Layer.effectContext(make(options))
