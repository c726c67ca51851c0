/**
 * The contract between a device and its machine.
 *
 * A device is its registers, its queues and nothing else: plain synchronous handlers over private state, called one at a
 * time by the device's own fiber (see `DeviceActor.ts`). What it needs of the machine comes in through its context; when a
 * handler throws, the machine restarts the device or ends, by its policy, and no other device notices.
 */
import type * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import type * as Schedule from "effect/Schedule"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import type { AmlTerm } from "./acpi/Aml.ts"
import type { AddressSpace, Doorbell, RangeBacking, ReadAccess, WriteAccess } from "./Bus.ts"
import type { GuestMemory } from "./GuestMemory.ts"
import type { GuestStop } from "./GuestStop.ts"
import type { InterruptLine, MessageInterrupt, PluggableMemory } from "./Hypervisor.ts"
import type { GuestFailure } from "./VcpuExit.ts"

/** A device could not start, or its background work failed. */
export class DeviceFailure extends Schema.TaggedError<DeviceFailure>()("DeviceFailure", {
  device: Schema.String,
  detail: Schema.String,
  hint: Schema.optionalKey(Schema.String)
}) {
  override get message(): string {
    return `${this.device}: ${this.detail}${this.hint === undefined ? "" : `. ${this.hint}`}`
  }
}

/**
 * Where a memory-mapped range without a base is placed.
 *
 * - `device-window`: whole pages of their own
 * - `pci-function`: the configuration page of the next free PCI function; the range is one page long
 * - `pci-memory`: the memory behind a base address register, at a multiple of its size, which is a power of two
 */
export type RangeWindow = "device-window" | "pci-function" | "pci-memory"

/** A range that a device asks for. */
export interface RangeRequest {
  readonly space: AddressSpace
  /** The first address, or absent when the machine chooses it (memory-mapped ranges only). */
  readonly base?: number
  /** Where the machine chooses it. Default: `device-window`. */
  readonly window?: RangeWindow
  /** Length in bytes. */
  readonly size: number
  readonly read: ReadAccess
  readonly write: WriteAccess
  readonly doorbells?: ReadonlyArray<Doorbell>
  /**
   * Which registers of the range no reset of the device takes back and no driver writes again, such as those of a PCI function.
   * When the device breaks over a write to one of them, the write is not lost: the device that is started again takes it
   * anew, before anything else, and a vCPU that waits for it waits until then. So two such writes have to be as good as one.
   * Default: none.
   */
  readonly repeats?: (offset: number) => boolean
}

/** An interrupt that a device asks for: this number, or any free one. */
export type InterruptRequest = number | "any"

/** Hot-pluggable memory that a device asks for. All numbers are in bytes and powers of two, or multiples of one. */
export interface PluggableMemoryRequest {
  /** Length of the region; a multiple of the block size. */
  readonly size: number
  /** What can be plugged and unplugged on its own: a power of two of at least one page. */
  readonly blockSize: number
  /** The region begins at a multiple of this power of two; the block size or more. */
  readonly alignment: number
}

/** Where a device was placed. */
export interface DevicePlacement {
  /** First address of each range, in the order of the requests. */
  readonly bases: ReadonlyArray<number>
  /** Global system interrupt of each interrupt, in the order of the requests. */
  readonly gsis: ReadonlyArray<number>
  /** Guest physical address of its hot-pluggable memory, where it asked for some. */
  readonly pluggableMemory?: number
}

/** What a device may use of its machine. Valid from `start` until the scope of `start` closes. */
export interface DeviceContext {
  readonly name: string
  readonly memory: GuestMemory
  /** First address of each range, in the order of the requests. */
  readonly bases: ReadonlyArray<number>
  /** What backs each range, in the order of the requests. */
  readonly ranges: ReadonlyArray<RangeBacking>
  /** One line for each interrupt request. */
  readonly interrupts: ReadonlyArray<InterruptLine>
  /** The message-signalled interrupts that the device asked for. What they are routed to outlives restarts. */
  readonly messages: ReadonlyArray<MessageInterrupt>
  /** The device's hot-pluggable memory. It outlives restarts of the device, and ends with this life of the guest. */
  readonly pluggableMemory?: PluggableMemory | undefined
  /** 0 at first; one more each time the device is started again after a failure. */
  readonly generation: number
  /** Has the device's own fiber call {@link DeviceBehaviour.signal} soon. Signals of one number that wait are one. */
  readonly signal: (number: number) => void
  /**
   * Called inside {@link DeviceBehaviour.write}: the vCPU whose write this is goes on only when the function that comes back
   * is called, or when this generation of the device has ended. Meanwhile the device does everything else. Calling it again
   * changes nothing; neither does it hold up anybody when nobody waits for the write.
   */
  readonly hold: () => () => void
  /** Ends the machine: the guest has turned it off, has asked for a reset, or has said that it failed. */
  readonly stop: (reason: GuestStop | GuestFailure) => void
}

/**
 * The running device. All handlers are synchronous and bounded; `range` is the index of the request, sizes are 1, 2 or 4,
 * values are unsigned. A handler that throws is a defect of the device and ends this generation of it.
 */
export interface DeviceBehaviour {
  /** Answers a read that is a call. */
  readonly read: (range: number, offset: number, size: number) => number
  /** Takes a write, posted or called. */
  readonly write: (range: number, offset: number, size: number, value: number) => void
  /** A doorbell was rung. Returns `true` when the turn's budget ran out before the work: it is called again, later. */
  readonly doorbell?: (range: number, doorbell: number) => boolean
  /** A signal of the device's own background work has come. Returns `true` to be called again, later. */
  readonly signal?: (number: number) => boolean
  /** Background work. When it fails or dies the device has failed. */
  readonly run?: Effect.Effect<never, DeviceFailure>
}

/**
 * What happens when a device fails.
 *
 * - `escalate`: the machine ends with a typed error
 * - `restart`: the device is started again, at the pace of the schedule; when the schedule ends, the failure escalates
 */
export type DevicePolicy =
  | { readonly _tag: "escalate" }
  | { readonly _tag: "restart"; readonly schedule: Schedule.Schedule<unknown, unknown> }

/** A device of one machine before it is placed: what it asks for, and how it starts. */
export interface Device {
  /** Unique in its machine: `serial0`, `rng0`. */
  readonly name: string
  readonly ranges: ReadonlyArray<RangeRequest>
  readonly interrupts: ReadonlyArray<InterruptRequest>
  /** How many message-signalled interrupts it needs. Default: 0. */
  readonly messages?: number
  /** Hot-pluggable memory, above all RAM. Default: none. */
  readonly pluggableMemory?: PluggableMemoryRequest
  /** The device's nodes under `\_SB` in the DSDT, once it is placed. */
  readonly acpi?: (placement: DevicePlacement) => ReadonlyArray<AmlTerm>
  /** Services that it publishes to clients of the guest (`Guest.ts`). They outlive restarts. */
  readonly services?: Context.Context<never>
  /** Overrides the machine's policy. */
  readonly policy?: DevicePolicy
  /** Starts the device, or starts it again when `context.generation` is not 0. */
  readonly start: (context: DeviceContext) => Effect.Effect<DeviceBehaviour, DeviceFailure, Scope.Scope>
}
