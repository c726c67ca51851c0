/**
 * KVM as a whole: the open `/dev/kvm`, what it can do, and the descriptors of new virtual machines.
 */
import { HypervisorError } from "@troupe/core/Hypervisor"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import { Ffi, type ForeignBuffer, type Ioctl } from "../Ffi.ts"
import { ErrnoNumber, O_RDWR } from "../internal/ForeignFunctions.ts"
import { kvmError } from "./KvmError.ts"
import { KvmCap, type KvmCapName, KvmIoctl, KvmValue } from "./KvmIoctl.ts"
import { KvmCpuid2 } from "./KvmStructs.ts"
import type { StructView } from "./Struct.ts"

/** The character device of KVM. */
export const KVM_DEVICE = "/dev/kvm"

/** Capabilities without which no machine runs, each with what it is needed for. */
export const requiredCapabilities: { readonly [name in KvmCapName]?: string } = {
  KVM_CAP_USER_MEMORY: "guest memory",
  KVM_CAP_IRQCHIP: "interrupt controllers in the kernel",
  KVM_CAP_PIT2: "the timer in the kernel",
  KVM_CAP_IRQFD: "interrupts raised without an exit",
  KVM_CAP_IOEVENTFD: "doorbells",
  KVM_CAP_READONLY_MEM: "register pages",
  KVM_CAP_IMMEDIATE_EXIT: "taking a vCPU out of the guest",
  KVM_CAP_EXT_CPUID: "the guest's processor features",
  KVM_CAP_SET_TSS_ADDR: "real mode on Intel processors"
}

/** Capabilities that are used where they are. */
export const optionalCapabilities: { readonly [name in KvmCapName]?: string } = {
  KVM_CAP_IOEVENTFD_ANY_LENGTH: "doorbells for writes of every width",
  KVM_CAP_INTERNAL_ERROR_DATA: "the details of internal errors",
  KVM_CAP_SYNC_REGS: "a vCPU's registers without a call",
  KVM_CAP_MP_STATE: "the start-up state of vCPUs",
  KVM_CAP_VCPU_EVENTS: "a vCPU's pending events",
  KVM_CAP_SPLIT_IRQCHIP: "interrupt controllers outside the kernel",
  KVM_CAP_SIGNAL_MSI: "message signalled interrupts",
  KVM_CAP_IRQ_ROUTING: "a routing table of interrupts",
  KVM_CAP_SET_IDENTITY_MAP_ADDR: "a chosen place for the identity map on Intel processors",
  KVM_CAP_TSC_DEADLINE_TIMER: "the deadline timer of the local APIC",
  KVM_CAP_X86_DISABLE_EXITS: "HLT and PAUSE without exits",
  KVM_CAP_BINARY_STATS_FD: "statistics of a machine",
  KVM_CAP_TSC_CONTROL: "a chosen frequency of the time stamp counter",
  KVM_CAP_COALESCED_MMIO: "writes that the kernel collects",
  KVM_CAP_COALESCED_PIO: "port writes that the kernel collects",
  KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: "a log of dirty pages that is cheap to read",
  KVM_CAP_GUEST_MEMFD: "private guest memory",
  KVM_CAP_NESTED_STATE: "virtual machines inside the guest"
}

/** The largest number of CPUID entries asked for; KVM itself has 80 to 256. */
const MAX_CPUID_ENTRIES = 256

/** The system side of KVM. */
export class KvmSystem extends Context.Service<KvmSystem, {
  /** The descriptor of `/dev/kvm`. */
  readonly fd: number
  /** What `KVM_CHECK_EXTENSION` says; 0 means absent. Asked once per name. */
  readonly capability: (name: KvmCapName) => number
  /** Length of the mapping of a vCPU's descriptor, in bytes (`KVM_GET_VCPU_MMAP_SIZE`). */
  readonly vcpuMappingSize: number
  /** The largest number of vCPUs of one machine. */
  readonly maxVcpus: number
  /** The CPUID leaves that this host can give a guest: a fresh copy of a `kvm_cpuid2`, for `KVM_SET_CPUID2`. */
  readonly supportedCpuid: () => StructView
  /** Makes an empty machine (`KVM_CREATE_VM`); its descriptor is closed with the scope. */
  readonly createVm: Effect.Effect<number, HypervisorError, Scope.Scope>
  /** An `ioctl` on the system, a machine or a vCPU whose failure is a `HypervisorError`. */
  readonly ioctl: (
    fd: number,
    ioctl: Ioctl,
    argument?: number | bigint | ForeignBuffer
  ) => Effect.Effect<number, HypervisorError>
}>()("@troupe/node/KvmSystem") {}

/** Reads `KVM_GET_SUPPORTED_CPUID` into a structure that is exactly as long as its entries. */
const readSupportedCpuid = (ioctl: KvmSystem["Service"]["ioctl"], fd: number) =>
  Effect.gen(function*() {
    const { entries, nent } = KvmCpuid2.fields
    const cpuid = KvmCpuid2.make(MAX_CPUID_ENTRIES)
    nent.set(cpuid, MAX_CPUID_ENTRIES)
    yield* ioctl(fd, KvmIoctl.KVM_GET_SUPPORTED_CPUID, cpuid)
    return new DataView(cpuid.buffer.slice(0, entries.at(nent.get(cpuid))))
  })

/** Opens KVM and checks that it has what Troupe needs. */
export const make = (options: { readonly path?: string } = {}) =>
  Effect.gen(function*() {
    const ffi = yield* Ffi
    const path = options.path ?? KVM_DEVICE
    const ioctl: KvmSystem["Service"]["ioctl"] = (fd, ioctl, argument) =>
      Effect.mapError(ffi.ioctl(fd, ioctl, argument), kvmError)

    const fd = yield* Effect.mapError(ffi.open(path, O_RDWR), kvmError)
    const version = yield* ioctl(fd, KvmIoctl.KVM_GET_API_VERSION)
    if (version !== KvmValue.KVM_API_VERSION) {
      return yield* new HypervisorError({
        operation: KvmIoctl.KVM_GET_API_VERSION.name,
        detail: `${path} speaks version ${version} of the KVM interface, not ${KvmValue.KVM_API_VERSION}`
      })
    }

    const known = new Map<KvmCapName, number>()
    const capability = (name: KvmCapName): number => {
      const value = known.get(name) ??
        Math.max(0, ffi.functions.ioctlNumber(fd, KvmIoctl.KVM_CHECK_EXTENSION.request, BigInt(KvmCap[name])))
      known.set(name, value)
      return value
    }
    const missing = Object.entries(requiredCapabilities).filter(([name]) => isCapName(name) && capability(name) === 0)
    if (missing.length > 0) {
      return yield* new HypervisorError({
        operation: KvmIoctl.KVM_CHECK_EXTENSION.name,
        detail: `this KVM lacks ${missing.map(([name, purpose]) => `${name} (${purpose})`).join(", ")}`,
        hint: "Use a newer kernel on the host, or another host"
      })
    }

    const vcpuMappingSize = yield* ioctl(fd, KvmIoctl.KVM_GET_VCPU_MMAP_SIZE)
    const cpuid = yield* readSupportedCpuid(ioctl, fd)
    const createVm = ffi.ioctl(fd, KvmIoctl.KVM_CREATE_VM, 0).pipe(
      // A signal that arrives while KVM registers with the memory manager ends the call half way.
      Effect.retry({ while: (error) => error.errno.number === ErrnoNumber.EINTR, times: 100 })
    )
    return KvmSystem.of({
      fd,
      capability,
      vcpuMappingSize,
      // Documented fallbacks for kernels without the newer capability.
      maxVcpus: capability("KVM_CAP_MAX_VCPUS") || capability("KVM_CAP_NR_VCPUS") || 4,
      supportedCpuid: () => new DataView(cpuid.buffer.slice(0)),
      // The kernel waits for all that may still look at a machine before it takes the machine apart: some 20 ms.
      createVm: Effect.mapError(ffi.ownSlow(createVm), kvmError),
      ioctl
    })
  })

const isCapName = (name: string): name is KvmCapName => name in KvmCap

/** KVM on the given device, `/dev/kvm` when none is given. */
export const layerWith = (
  options: { readonly path?: string }
): Layer.Layer<KvmSystem, HypervisorError, Ffi> => Layer.effect(KvmSystem, make(options))

/** KVM on `/dev/kvm`. */
export const layer: Layer.Layer<KvmSystem, HypervisorError, Ffi> = layerWith({})
