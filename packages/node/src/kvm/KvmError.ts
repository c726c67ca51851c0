/**
 * Failures of KVM's interface as `HypervisorError`s: the errno, the `ioctl` and its arguments, and what the host can do.
 */
import { HypervisorError } from "@troupe/core/Hypervisor"
import { type FfiError, ffiError } from "../FfiError.ts"

const NO_DEVICE =
  "Load the kernel module (modprobe kvm_intel or kvm_amd); in a virtual machine or container, the host must pass KVM on"

/** What people meet, by operation. */
const hints: { readonly [operation: string]: { readonly [errno: string]: string } } = {
  open: {
    ENOENT: NO_DEVICE,
    ENODEV: NO_DEVICE,
    ENXIO: NO_DEVICE,
    EACCES: "Give this user access to KVM, usually by membership of the group kvm (sudo usermod -aG kvm USER)",
    EPERM: "Give this process access to KVM; a container needs the device passed to it"
  },
  KVM_CREATE_VM: { EBUSY: "Another hypervisor holds the processor's virtualisation" },
  KVM_CREATE_VCPU: { EINVAL: "The number of the vCPU is above what this host's KVM allows" },
  mmap: { ENOMEM: "The host is out of memory, or a limit on address space (ulimit -v) is in the way" },
  sigaction: { EBUSY: "Another part of this process handles SIGRTMIN+1, which takes vCPU threads out of the guest" }
}

/** What an `ioctl` of any name most often fails with. */
const ioctlHints: { readonly [errno: string]: string } = {
  ENOTTY: "This kernel's KVM does not know the request, or the file is not a KVM device",
  EBUSY: "What it needs is in use already",
  EEXIST: "It exists already: the same slot, address, line or vCPU number was used before",
  EINVAL: "The kernel rejects an argument, or this KVM lacks the feature",
  ENOMEM: "The host is out of memory",
  ENOSPC: "A fixed table of the kernel is full, for example its devices per bus",
  EFAULT: "A memory range of this process is not mapped as the request needs it"
}

const DESCRIPTORS = "This process, or the host, is out of file descriptors; raise the limit (ulimit -n)"

const hintOf = (operation: string, errno: string): string | undefined => {
  if (errno === "EMFILE" || errno === "ENFILE") return DESCRIPTORS
  return hints[operation]?.[errno] ?? (operation.startsWith("KVM_") ? ioctlHints[errno] : undefined)
}

/** A failed system call on KVM's behalf, as the hypervisor boundary reports it. */
export const kvmError = (error: FfiError): HypervisorError => {
  const hint = error.hint ?? hintOf(error.operation, error.errno.name)
  return new HypervisorError({
    operation: error.operation,
    detail: error.detail,
    arguments: error.arguments,
    errno: error.errno,
    ...(hint === undefined ? {} : { hint })
  })
}

/** A negative result of a synchronous foreign call, as the hypervisor boundary reports it. */
export const kvmFailure = (operation: string, args: string, result: number): HypervisorError =>
  kvmError(ffiError(operation, args, result))
