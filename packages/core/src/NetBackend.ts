/**
 * The network behind a guest's interfaces, as a service: a TAP interface of the host, a user-mode network, or whatever else
 * takes Ethernet frames and gives them.
 *
 * The machine's network device opens a port for each interface of its guest, for as long as the machine lives. A port is plain
 * synchronous code, called from the device's turns, and works on one {@link NetFrame} at a time without allocating; what it has to
 * tell the device it tells by its listener. `NetStreams.ts` makes a back end out of streams of frames for hosts that would
 * rather have that.
 */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import type { NetFrame } from "./NetFrame.ts"

/** A port could not be opened. */
export class NetBackendError extends Schema.TaggedError<NetBackendError>()("NetBackendError", {
  /** What was being done, e.g. `open /dev/net/tun`. */
  operation: Schema.String,
  /** What went wrong. */
  detail: Schema.String,
  /** What the host can do about it. */
  hint: Schema.optionalKey(Schema.String)
}) {
  override get message(): string {
    return `${this.operation}: ${this.detail}${this.hint === undefined ? "" : `. ${this.hint}`}`
  }
}

/**
 * Offloads, as bits of a number: what one side leaves for the other to do. The segmentation bits mean anything only together with
 * {@link Offload.CHECKSUM}.
 */
export const Offload = {
  /** Partial checksums (`FRAME_NEEDS_CHECKSUM`). */
  CHECKSUM: 1,
  /** Frames of TCP over IPv4 larger than the MTU (`GSO_TCPV4`). */
  TSO4: 2,
  /** Frames of TCP over IPv6 larger than the MTU (`GSO_TCPV6`). */
  TSO6: 4,
  /** Several datagrams of UDP under one header (`GSO_UDP_L4`). */
  USO: 8
} as const

/** All offloads. */
export const OFFLOADS_ALL = Offload.CHECKSUM | Offload.TSO4 | Offload.TSO6 | Offload.USO

/** The least MTU of a port: what virtio-net allows (virtio 1.3, section 5.1.4). */
export const MTU_MIN = 68
/** The largest MTU of a port. */
export const MTU_MAX = 65535
/** The MTU of Ethernet. */
export const MTU_DEFAULT = 1500

/** An interface of a guest that wants to be connected. */
export interface NetPortRequest {
  /** Number of the interface in its guest, from 0. Names and addresses that a back end makes up should depend on it. */
  readonly index: number
  /** Name of the device in its machine, e.g. `net0`: for messages. */
  readonly name: string
  /** The guest's own address: six pairs of lower-case hexadecimal digits with colons. */
  readonly macAddress: string
  /** Whether the guest asks to be bridged with the host's network. A back end that cannot fails with a typed error. */
  readonly enableBridge: boolean
}

/** What a port tells the device. Each may be called at any moment outside of the port's own `send` and `receive`, and is cheap. */
export interface NetPortListener {
  /** Frames wait, after `receive` had found none. */
  readonly readable: () => void
  /** There is room, after `send` had found none. */
  readonly writable: () => void
  /** {@link NetPort.linkUp} has changed. */
  readonly linkChanged: () => void
}

/** A port of a network, open until its scope closes. After that `send` takes all frames and loses them, and none come. */
export interface NetPort {
  /** The largest IP packet in bytes, {@link MTU_MIN} to {@link MTU_MAX}. */
  readonly mtu: number
  /** The offloads that `send` takes, bits of {@link Offload}. For a port with none the device does the work itself. */
  readonly accepts: number
  /** The offloads that `receive` could make use of, bits of {@link Offload}. */
  readonly delivers: number
  /** Whether the link is up. While it is down, frames that are sent are lost and none come. */
  readonly linkUp: boolean
  /** Who is told of changes from now on: one listener, or nobody, which is how a port begins. */
  readonly listen: (listener: NetPortListener | undefined) => void
  /**
   * Which of the offloads in {@link delivers} frames may come with from now on; none at first. Frames that were on their way
   * already must be put right by the port, or be lost.
   */
  readonly allowOffloads: (offloads: number) => void
  /**
   * Sends a frame: `frame.size` bytes, from an Ethernet header of 14 bytes to the end of the payload (no frame check sequence),
   * at most `FRAME_SIZE_MAX`, and without a `gsoType` at most `mtu` plus headers. The device has checked that offsets lie in the
   * frame and that offloads are among {@link accepts}, and nothing else: the rest is what a guest wrote, and may change while it
   * is read. The frame's pieces must not be kept after the call.
   *
   * Returns `false`, and takes nothing, when there is no room now; `writable` tells when to try again. A frame that cannot be
   * sent for another reason is taken and lost.
   */
  readonly send: (frame: NetFrame) => boolean
  /**
   * Puts the next frame that waits into the frame's pieces, from the first byte on, and sets all offload fields. Returns its
   * length. 0 when none waits; `readable` tells when to try again. `-length` when the next frame is larger than `frame.size`: it
   * stays the next one, for a call with more room or for {@link discard}. What the pieces hold then means nothing.
   *
   * A device that has no buffers does not call this: the port keeps what comes, up to a bound of its own, and then loses frames.
   */
  readonly receive: (frame: NetFrame) => number
  /** Loses the next frame, of which `receive` has said that there is no room for it. */
  readonly discard: () => void
  /** The device has sent all that it has for now: a port that gathers frames passes them on. */
  readonly flush?: () => void
}

/** The network behind the interfaces of guests. */
export class NetBackend extends Context.Service<NetBackend, {
  /** Connects an interface of a guest. */
  readonly open: (request: NetPortRequest) => Effect.Effect<NetPort, NetBackendError, Scope.Scope>
}>()("@troupe/core/NetBackend") {}
