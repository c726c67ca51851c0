/**
 * Failures of KVM's interface as `HypervisorError`s: the errno, the `ioctl` and its arguments, and what the host can do.
 */
import { HypervisorError } from "@troupe/core/Hypervisor"
import * as Effect from "effect/Effect"
import type { FfiError } from "../FfiError.ts"

/** The device file of KVM. */
export const KVM_DEVICE = "/dev/kvm"

const NO_DEVICE =
  "Load the kernel module (modprobe kvm_intel or kvm_amd). In a virtual machine, its host must allow nested virtualisation"

const hints: { readonly [operation: string]: { readonly [errno: string]: string } } = {
  open: {
    ENOENT: NO_DEVICE,
    ENODEV: NO_DEVICE,
    ENXIO: NO_DEVICE,
    EACCES: `Give this user access to ${KVM_DEVICE}, usually by membership of the group kvm`,
    EPERM: `Give this process access to ${KVM_DEVICE}; a container needs the device passed to it`
  },
  KVM_CREATE_VM: {
    EBUSY: "Another hypervisor holds the processor's virtualisation",
    ENOMEM: "The host is out of memory"
  },
  KVM_CREATE_VCPU: { EINVAL: "The number of the vCPU is above what this host's KVM allows" },
  mmap: { ENOMEM: "The host is out of memory, or a limit on address space (ulimit -v) is in the way" },
  sigaction: { EBUSY: "Another part of this process handles SIGRTMIN+1, which takes vCPU threads out of the guest" }
}

/** What an `ioctl` of any name most often fails with. */
const ioctlHints: { readonly [errno: string]: string } = {
  ENOTTY: "This kernel's KVM does not know the request, or the file is not a KVM device",
  EEXIST: "It exists already: the same slot, address, line or vCPU number was used before",
  EINVAL: "The kernel rejects an argument, or this KVM lacks the feature",
  ENOMEM: "The host is out of memory",
  ENOSPC: "A fixed table of the kernel is full, for example its devices per bus",
  EFAULT: "A memory range of this process is not mapped as the request needs it"
}

const DESCRIPTORS = "This process, or the host, is out of file descriptors; raise the limit (ulimit -n)"

/** The same failure as the boundary names it. */
export const hypervisorError = (error: FfiError): HypervisorError => {
  const hint = error.hint ??
    (error.errno.name === "EMFILE" || error.errno.name === "ENFILE"
      ? DESCRIPTORS
      : hints[error.operation]?.[error.errno.name] ??
        (error.operation.startsWith("KVM_") ? ioctlHints[error.errno.name] : undefined))
  return new HypervisorError({
    operation: error.operation,
    detail: error.detail,
    arguments: error.arguments,
    errno: error.errno,
    ...(hint === undefined ? {} : { hint })
  })
}

/** Turns the FFI failures of an effect into the boundary's. */
export const asHypervisorError = <A, R>(effect: Effect.Effect<A, FfiError, R>): Effect.Effect<A, HypervisorError, R> =>
  Effect.mapError(effect, hypervisorError)

/** A mistake of the caller that never reached the kernel. */
export const misuse = (operation: string, args: string, detail: string): HypervisorError =>
  new HypervisorError({ operation, arguments: args, detail })
