/** The network interfaces of a guest as their host sees them: what they carried, what happened to them, and their cables. */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import type * as Stream from "effect/Stream"

/** Why frames were lost. */
export type NetDropReason =
  /** Guest to network: the header of virtio-net, or what it says about the frame, makes no sense. */
  | "bad-header"
  /** Either way: the frame is shorter than an Ethernet header, or larger than the interface carries. */
  | "bad-size"
  /** Either way: the link is down. */
  | "link-down"
  /** Network to guest: the guest's driver does not want frames to that address. */
  | "filtered"
  /** Network to guest: the guest's buffers are too small for the frame. */
  | "no-room"

/** What an interface has carried since its machine was built; restarts of the device and of the guest change nothing. */
export interface NetCounters {
  /** Frames and bytes (without the header of virtio-net) that the guest sent and the network took. */
  readonly sentFrames: number
  readonly sentBytes: number
  /** Frames and bytes that the guest received. */
  readonly receivedFrames: number
  readonly receivedBytes: number
  /** Lost frames, either way, by reason. What the network itself loses does not count here. */
  readonly dropped: { readonly [reason in NetDropReason]: number }
  /** Notifications of the guest that the device has worked on. */
  readonly kicks: number
  /** Turns of the device that gave buffers back: the guest was interrupted at most once for each. */
  readonly batches: number
}

/** Something that happened to an interface. */
export type NetEvent =
  /** The guest's driver is ready. `offloads` are the bits of `Offload` that it leaves to the device, and takes from it. */
  | { readonly _tag: "DriverReady"; readonly sends: number; readonly receives: number }
  /** The guest's driver has gone: it has reset the device, or the device had to stop. */
  | { readonly _tag: "DriverGone" }
  /** The link has gone up or down, by the network or by `setLink`. */
  | { readonly _tag: "LinkChanged"; readonly up: boolean }
  /** The guest has chosen another address for its interface. */
  | { readonly _tag: "MacAddressChanged"; readonly macAddress: string }
  /** Frames were lost in a turn of the device. */
  | { readonly _tag: "FramesDropped"; readonly reason: NetDropReason; readonly count: number }

/** Events that wait for a reader that is slow. */
export const NET_EVENTS_MAX = 256

/** One interface. */
export interface NetInterface {
  /** Number in `netDevices`; with `defaultNet` the last one. */
  readonly index: number
  /** Name of the device, e.g. `net0`. */
  readonly name: string
  /** The address in the configuration. */
  readonly macAddress: string
  /** The counters now. */
  readonly counters: () => NetCounters
  /** Whether the guest sees a link: the network has one, and the host has not pulled the cable. */
  readonly linkUp: () => boolean
  /** Plugs the cable in, as it is at first, or pulls it: then frames are lost either way, and the guest is told. */
  readonly setLink: (up: boolean) => Effect.Effect<void>
  /**
   * What happens from now on, until the machine is gone. At most {@link NET_EVENTS_MAX} events wait for a reader; what comes then
   * is lost to it.
   */
  readonly events: Stream.Stream<NetEvent>
}

/** The network interfaces of a guest, in the order of the configuration. Published by the network devices. */
export class NetInterfaces extends Context.Service<NetInterfaces, {
  readonly interfaces: ReadonlyArray<NetInterface>
}>()("@troupe/core/NetInterfaces") {}
