/**
 * Failures of KVM: a failed call as a `HypervisorError`, with a hint for the causes that people meet.
 */
import { HypervisorError } from "@troupe/core/Hypervisor"
import { type FfiError, ffiError } from "../FfiError.ts"

const openHints: { readonly [errno: string]: string } = {
  ENOENT:
    "KVM is not there: load the module kvm_intel or kvm_amd, or switch virtualisation on in the firmware; inside a virtual machine or container, the host must pass /dev/kvm on",
  EACCES: "This user may not use KVM: add the user to the group kvm (`sudo usermod -aG kvm $USER`, then log in again)",
  EPERM: "This process is forbidden to use KVM: the container or its seccomp or device rules must allow /dev/kvm",
  ENXIO: "The device exists and nothing is behind it: load the module kvm_intel or kvm_amd",
  ENODEV: "The device exists and nothing is behind it: load the module kvm_intel or kvm_amd",
  EBUSY: "Something else holds the processor's virtualisation, for example another hypervisor"
}

const ioctlHints: { readonly [errno: string]: string } = {
  ENOTTY: "This kernel's KVM does not know the request, or the file is not a KVM device",
  EBUSY: "The processor's virtualisation, or the thing that was to be made, is in use already",
  EEXIST: "It exists already: the same slot, address, line or vCPU number was used before",
  EINVAL: "The kernel rejects an argument, or this KVM lacks the feature",
  ENOMEM: "The host is out of memory or of lockable memory",
  EMFILE: "This process has too many open files: raise `ulimit -n`",
  ENFILE: "The host has too many open files",
  ENOSPC: "A fixed table of the kernel is full, for example its devices per bus",
  EFAULT: "A memory range of this process is not mapped as the request needs it"
}

/** A failed system call on KVM's behalf, as the hypervisor boundary reports it. */
export const kvmError = (error: FfiError): HypervisorError => {
  const hint = error.hint ?? (error.operation === "open" ? openHints : ioctlHints)[error.errno.name]
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
