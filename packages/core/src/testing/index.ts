/** The deterministic fake: a hypervisor, guest programs, faults, traces and simulations for tests. See `docs/testing.md`. */
export * as FakeHypervisor from "./FakeHypervisor.ts"
export * as FaultPlan from "./FaultPlan.ts"
export * as GuestAcpi from "./GuestAcpi.ts"
export * as GuestBoot from "./GuestBoot.ts"
export * as GuestProgram from "./GuestProgram.ts"
export * as Simulation from "./Simulation.ts"
export * as Trace from "./Trace.ts"
