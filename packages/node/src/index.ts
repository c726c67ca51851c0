/**
 * Troupe on Linux: guests on this host's KVM.
 *
 * `KvmGuestLifecycle.layer` is the one layer with everything wired; `fromPath` makes guest files of paths, and
 * `BlockFile.fromPath` disks. The parts, for hosts
 * that wire them differently, can be imported by module: `@troupe/node/Ffi`, `@troupe/node/kvm/KvmHypervisor`.
 */
export * as BlockFile from "./BlockFile.ts"
export { FfiError, FfiUnavailable } from "./FfiError.ts"
export { fromPath } from "./HostFile.ts"
export * as KvmGuestLifecycle from "./KvmGuestLifecycle.ts"
export * as Tap from "./net/Tap.ts"
export * as UserNetwork from "./net/UserNetwork.ts"
