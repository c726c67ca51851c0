/**
 * Troupe's core: create, run and stop virtual machines as Effects.
 *
 * A host needs `GuestLifecycle`, `GuestConfig` and `GuestError`; authors of devices need `Device`, `DeviceCatalog` and `Bus`;
 * authors of hypervisor layers need `Hypervisor`. Tests find the deterministic fake in `@troupe/core/testing`.
 */
export * from "./BalloonController.ts"
export * from "./Bus.ts"
export * from "./Console.ts"
export * from "./Device.ts"
export * from "./DeviceCatalog.ts"
export * from "./Guest.ts"
export * from "./GuestAddress.ts"
export * from "./GuestConfig.ts"
export * from "./GuestError.ts"
export * from "./GuestFile.ts"
export * from "./GuestLifecycle.ts"
export * from "./GuestMemory.ts"
export * from "./GuestStop.ts"
export * from "./HostVsockEndpoint.ts"
export * from "./Hypervisor.ts"
export * from "./LifecycleTable.ts"
export * from "./MachinePolicy.ts"
export * from "./MemController.ts"
export * from "./RateLimit.ts"
export * from "./SerialPort.ts"
export * from "./VcpuExit.ts"
export * from "./VcpuState.ts"
