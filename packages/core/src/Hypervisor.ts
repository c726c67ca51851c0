/**
 * The one door to hardware: a service that makes virtual machines out of memory, a bus, interrupt lines and vCPUs.
 *
 * Nothing above this boundary knows whether KVM or the deterministic fake is below it. Everything that an implementation
 * acquires belongs to the `Scope` of the call that made it and is gone when that scope closes.
 */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import type { BlockMap } from "./BlockMap.ts"
import type { Bus, BusHandlers, RangeBacking } from "./Bus.ts"
import type { MemoryRegion } from "./GuestMemory.ts"
import type { VcpuExit } from "./VcpuExit.ts"
import type { VcpuState } from "./VcpuState.ts"

/** A hypervisor operation that failed: which, on what, the errno under it and what to do about it. */
export class HypervisorError extends Schema.TaggedError<HypervisorError>()("HypervisorError", {
  /** The operation as its interface names it, e.g. `KVM_CREATE_VM`. */
  operation: Schema.String,
  /** What went wrong, in a sentence. */
  detail: Schema.String,
  /** The arguments of the operation as text, where they help. */
  arguments: Schema.optionalKey(Schema.String),
  /** The operating system's error number and name, e.g. 13 and `EACCES`. */
  errno: Schema.optionalKey(Schema.Struct({ number: Schema.Int, name: Schema.String })),
  /** What the host can do about it. */
  hint: Schema.optionalKey(Schema.String)
}) {
  override get message(): string {
    const errno = this.errno === undefined ? "" : ` (${this.errno.name})`
    const hint = this.hint === undefined ? "" : `. ${this.hint}`
    return `${this.operation}${
      this.arguments === undefined ? "" : `(${this.arguments})`
    }: ${this.detail}${errno}${hint}`
  }
}

/** An edge-triggered interrupt input of a machine. */
export interface InterruptLine {
  /** The global system interrupt number (ACPI 6.5, section 5.2.13). */
  readonly gsi: number
  /** Raises the interrupt once. Synchronous, cheap, and harmless when nobody listens. */
  readonly trigger: () => void
}

/**
 * A message-signalled interrupt: a write of `data` to an address of the processors' local APICs (Intel SDM volume 3, section
 * 11.11), which a device makes as the guest has told it.
 */
export interface MessageInterrupt {
  /**
   * Sets the message of later triggers: both halves of its address, and its data, unsigned 32-bit numbers. A message that means
   * nothing is one that nobody takes. Synchronous; does not throw.
   */
  readonly route: (addressLow: number, addressHigh: number, data: number) => void
  /** Sends the message once. Synchronous, cheap, and harmless when it has none yet. */
  readonly trigger: () => void
}

/** A virtual processor. */
export interface Vcpu {
  /** Number of the vCPU and its local APIC ID. 0 is the boot processor. */
  readonly id: number
  /** Sets the state in which the boot processor starts. Other vCPUs wait for a start-up interrupt. */
  readonly setState: (state: VcpuState) => Effect.Effect<void, HypervisorError>
  /**
   * Runs guest code until the vCPU stops for good. Accesses to devices are delivered to the bus handlers meanwhile.
   * Interruption takes the vCPU out of the guest and returns when its thread has left it.
   */
  readonly run: Effect.Effect<VcpuExit, HypervisorError>
}

/**
 * Guest memory that comes and goes in blocks while the guest runs.
 *
 * A plugged block is ordinary RAM, zero at first. A block that is not plugged is nothing: its memory is with the host, the
 * guest finds an open bus at its addresses, and `GuestMemory` refuses ranges that touch it. A block that stays plugged is never
 * away for a moment, whatever happens to its neighbours.
 */
export interface PluggableMemory {
  /** The whole region; its `blocks` say which of it there is. */
  readonly region: MemoryRegion
  /** Its `blocks`. */
  readonly blocks: BlockMap
  /**
   * Plugs all of `count` blocks from `first` on that are not plugged. When it fails nothing has changed; when it is interrupted
   * some may be plugged, and `blocks` says which.
   */
  readonly plug: (first: number, count: number) => Effect.Effect<void, HypervisorError>
  /** Unplugs all of `count` blocks from `first` on that are plugged, with the same promise. */
  readonly unplug: (first: number, count: number) => Effect.Effect<void, HypervisorError>
}

/** One virtual machine, empty at first. Make it in this order: memory, bus, interrupt lines, vCPUs. */
export interface Vm {
  /** Adds zeroed RAM at `guestAddress`. Both numbers, in bytes, are multiples of the page size. */
  readonly addMemory: (
    guestAddress: number,
    size: number
  ) => Effect.Effect<MemoryRegion, HypervisorError, Scope.Scope>
  /**
   * Adds a region of which nothing is plugged. All numbers are in bytes: `blockSize` is a power of two of at least one page,
   * the others are multiples of it, and there are at most `PLUGGABLE_BLOCKS_MAX` blocks.
   */
  readonly addPluggableMemory: (
    guestAddress: number,
    size: number,
    blockSize: number
  ) => Effect.Effect<PluggableMemory, HypervisorError, Scope.Scope>
  /** Puts the bus in place, once; returns what backs each of its ranges, in their order. */
  readonly attachBus: (
    bus: Bus,
    handlers: BusHandlers
  ) => Effect.Effect<ReadonlyArray<RangeBacking>, HypervisorError, Scope.Scope>
  /** Makes the interrupt input with this number. */
  readonly interruptLine: (gsi: number) => Effect.Effect<InterruptLine, HypervisorError, Scope.Scope>
  /** Makes a message-signalled interrupt, without a message at first. */
  readonly messageInterrupt: Effect.Effect<MessageInterrupt, HypervisorError, Scope.Scope>
  /** Makes a vCPU. All vCPUs of a machine are made before the first of them runs. */
  readonly createVcpu: (id: number) => Effect.Effect<Vcpu, HypervisorError, Scope.Scope>
}

/** What a hypervisor can do at most. */
export interface HypervisorLimits {
  /** The largest number of vCPUs of one machine. */
  readonly maxVcpus: number
  /** One past the highest interrupt line number. */
  readonly interruptLines: number
}

/** Makes virtual machines. */
export class Hypervisor extends Context.Service<Hypervisor, {
  /** A short name for reports: `kvm` or `fake`. */
  readonly name: string
  readonly limits: HypervisorLimits
  /** Makes an empty virtual machine. */
  readonly createVm: Effect.Effect<Vm, HypervisorError, Scope.Scope>
}>()("@troupe/core/Hypervisor") {}
