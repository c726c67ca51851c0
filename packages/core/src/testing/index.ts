/** The deterministic fake: a hypervisor, guest programs, faults, traces and simulations for tests. */
export * as FakeHypervisor from "./FakeHypervisor.ts"
export * as FaultPlan from "./FaultPlan.ts"
export * as GuestProgram from "./GuestProgram.ts"
export * as Trace from "./Trace.ts"
