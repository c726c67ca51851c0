/**
 * What a virtio device is to its transport: its configuration space, its features and its queues, and nothing else.
 *
 * A device takes chains from its queues and completes them. Everything that all virtio devices have alike (registers, status,
 * negotiation, interrupts, what a broken driver leads to) is the transport's.
 */
import type { DeviceFailure, DevicePolicy, PluggableMemoryRequest } from "@troupe/core/Device"
import type { GuestMemory } from "@troupe/core/GuestMemory"
import type { PluggableMemory } from "@troupe/core/Hypervisor"
import type * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import type { Features } from "./Features.ts"
import type { Virtqueue } from "./Virtqueue.ts"

/** Signals of virtio devices are numbered below this. */
export const VIRTIO_SIGNAL_LIMIT = 31

/** What a virtio device may use of its machine and its transport. */
export interface VirtioContext {
  readonly name: string
  readonly memory: GuestMemory
  /** 0 at first; one more each time the device is started again after a failure. */
  readonly generation: number
  /** Has the device's own fiber call {@link VirtioBehaviour.signal} soon. */
  readonly signal: (number: number) => void
  /** The hot-pluggable memory that the transport's options ask for. */
  readonly pluggableMemory: PluggableMemory | undefined
  /**
   * Changes the configuration space and tells the driver, unless it is to be done quietly. The new value must be complete when
   * `change` returns.
   */
  readonly updateConfig: (change: (config: DataView) => void, options?: { readonly quietly: boolean }) => void
}

/** A driver that has negotiated its features, has set its queues up and is ready. */
export interface VirtioDriver {
  /** What was negotiated. */
  readonly features: Features
  /** The queues; `undefined` are those that the driver does not use. */
  readonly queues: ReadonlyArray<Virtqueue | undefined>
}

/**
 * The running device. All handlers are synchronous and bounded. After each of them the transport publishes what was completed,
 * interrupts the driver where it wants that, and looks for faults of the queues.
 */
export interface VirtioBehaviour {
  /** The driver is ready (DRIVER_OK). Each queue is notified once after it. */
  readonly activate: (driver: VirtioDriver) => void
  /** The driver has made chains available. Returns `true` when the turn's budget ran out: it is called again, later. */
  readonly notify: (queue: number) => boolean
  /**
   * Forgets the driver and stops all work; the queues are closed already. Returns whether the device is idle, that is,
   * nothing that was begun will touch guest memory any more. If not, it is called again after each of its signals.
   */
  readonly reset: () => boolean
  /** A signal of the device's own background work has come. Returns `true` to be called again, later. */
  readonly signal?: (number: number) => boolean
  /** The driver writes its configuration space, inside its length. Default: nothing happens. */
  readonly writeConfig?: (offset: number, size: number, value: number) => void
  /** Background work. When it fails or dies the device has failed. */
  readonly run?: Effect.Effect<never, DeviceFailure>
}

/** A virtio device before it starts. */
export interface VirtioDevice {
  /** Device type (virtio 1.3, chapter 5). */
  readonly deviceId: number
  /** The features of this type that it offers. Those of queues and transport are added by the transport. */
  readonly features: Features
  /** The largest size of each queue, each a power of two. */
  readonly queueSizes: ReadonlyArray<number>
  /** The configuration space at first, at most {@link CONFIG_SIZE_MAX} bytes. */
  readonly config: Uint8Array
  /** Whether a driver may write this field of the configuration space before the features are agreed. Default: no field. */
  readonly isWritableEarly?: (offset: number) => boolean
  /** Whether the device can work with these features, each of which was offered. Default: always. */
  readonly accepts?: (features: Features) => boolean
  /** Starts the device, or starts it again when `context.generation` is not 0. */
  readonly start: (context: VirtioContext) => Effect.Effect<VirtioBehaviour, DeviceFailure, Scope.Scope>
}

/** The most bytes of a configuration space: what a page has behind the registers of virtio-mmio. */
export const CONFIG_SIZE_MAX = 0xf00

/** What a device may choose besides its own nature, whatever its transport. */
export interface VirtioOptions {
  /** Unique in its machine, e.g. `rng0`. */
  readonly name: string
  /** What happens when the device fails. Default: the machine's policy. */
  readonly policy?: DevicePolicy
  /** Services that it publishes to clients of the guest. */
  readonly services?: Context.Context<never>
  /** Hot-pluggable memory that the device needs. Default: none. */
  readonly pluggableMemory?: PluggableMemoryRequest
}
