/** The protocol `HostVsockEndpoint` of `vsock.fidl`: the host's side of a guest's sockets. */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import type * as Stream from "effect/Stream"

/**
 * Why a vsock operation failed, by the name of its status.
 *
 * - `ALREADY_BOUND`: somebody listens on this port already
 * - `NO_RESOURCES`: there is no unused host port, no free context ID, or no room for another connection
 * - `CONNECTION_REFUSED`: the other side refused, or went away before it answered
 * - `ALREADY_EXISTS`: these two ports are connected, or were until a moment ago
 * - `PEER_CLOSED`: the connection was reset, or its guest is gone
 * - `BAD_STATE`: this direction of the connection was shut down
 * - `INVALID_ARGS`: a port that is no port, or a message that is larger than the receiver's buffer
 */
export const VsockStatus = Schema.Literals([
  "ALREADY_BOUND",
  "NO_RESOURCES",
  "CONNECTION_REFUSED",
  "ALREADY_EXISTS",
  "PEER_CLOSED",
  "BAD_STATE",
  "INVALID_ARGS"
])
/** Why a vsock operation failed. */
export type VsockStatus = typeof VsockStatus.Type

/** A vsock operation failed. */
export class VsockError extends Schema.TaggedError<VsockError>()("VsockError", {
  status: VsockStatus,
  /** The operation as its protocol names it, e.g. `listen`. */
  operation: Schema.String,
  /** What went wrong, in a sentence. */
  detail: Schema.String,
  /** The port on this side, where there is one. */
  hostPort: Schema.optionalKey(Schema.Int),
  /** The port on the guest's side, where there is one. */
  guestPort: Schema.optionalKey(Schema.Int)
}) {
  override get message(): string {
    const host = this.hostPort === undefined ? "" : ` host port ${this.hostPort}`
    const guest = this.guestPort === undefined ? "" : ` guest port ${this.guestPort}`
    return `${this.operation}:${host}${host !== "" && guest !== "" ? "," : ""}${guest}${
      host + guest === "" ? "" : ":"
    } ${this.detail} (${this.status})`
  }
}

/** An acceptor does not want this connection. The guest sees a reset. */
export class VsockRefused extends Schema.TaggedError<VsockRefused>()("VsockRefused", {
  reason: Schema.optionalKey(Schema.String)
}) {}

/** Bytes in order, or messages with boundaries (virtio 1.3, section 5.10.6). */
export type VsockType = "stream" | "seqpacket"

/** One end of a connection. */
export interface VsockAddress {
  /** Context ID: 2 is the host. */
  readonly cid: number
  /** 0 to 2^32 - 1. */
  readonly port: number
}

/** The host's end of a connection. */
export interface VsockSocket {
  readonly type: VsockType
  /** This end. */
  readonly local: VsockAddress
  /** The guest's end. */
  readonly peer: VsockAddress
  /**
   * Waits for what the guest sends: bytes as they come, or one whole message. `undefined` when the guest sends no more. Fails
   * with `PEER_CLOSED` once the connection was reset and what had come before was read.
   */
  readonly read: Effect.Effect<Uint8Array | undefined, VsockError>
  /** Everything that {@link read} gives, until the guest sends no more. */
  readonly input: Stream.Stream<Uint8Array, VsockError>
  /**
   * Sends bytes, or one message. Returns when the guest has been given all of them; until then they must not change. Writes are
   * done in the order of their calls. Fails with `BAD_STATE` when the guest does not receive any more, or this end has shut
   * down, and with `PEER_CLOSED` when the connection was reset.
   */
  readonly write: (bytes: Uint8Array) => Effect.Effect<void, VsockError>
  /** Tells the guest that nothing more is sent (`send`), or that nothing more is read. What is in flight then still arrives. */
  readonly shutdown: (direction: "send" | "receive") => Effect.Effect<void>
  /** Returns when the connection is over, in good order or not. What the guest has sent before can still be read. */
  readonly closed: Effect.Effect<void>
  /** Ends the connection in good order; what was not read is lost. The same happens when the socket's scope closes. */
  readonly close: Effect.Effect<void>
}

/** A connection that a guest asks for (`HostVsockAcceptor.Accept`). */
export interface VsockConnectionRequest {
  readonly srcCid: number
  readonly srcPort: number
  readonly port: number
  readonly type: VsockType
}

/** Serves one connection. It ends in good order when the effect succeeds, and is reset when it fails or dies. */
export type VsockHandler<R = never> = (socket: VsockSocket) => Effect.Effect<void, unknown, R | Scope.Scope>

/** Decides about a connection (`HostVsockAcceptor`): what serves it, or a refusal. */
export type HostVsockAcceptor<R = never> = (
  request: VsockConnectionRequest
) => Effect.Effect<VsockHandler<R>, VsockRefused, R | Scope.Scope>

/** Listens on every port that nobody else listens on. */
export const VSOCK_PORT_ANY = 0xffff_ffff

/** The vsock endpoint of a guest. Published by the socket device. */
export class HostVsockEndpoint extends Context.Service<HostVsockEndpoint, {
  /** The guest's context ID. */
  readonly guestCid: number
  /**
   * Serves connections of the guest to a host port until the scope closes; connections that exist then go on. Each is served by
   * a fiber of its own. The port {@link VSOCK_PORT_ANY} stands for all that nobody else listens on. Fails with `ALREADY_BOUND`.
   */
  readonly listen: <R = never>(
    port: number,
    acceptor: HostVsockAcceptor<R>
  ) => Effect.Effect<void, VsockError, Scope.Scope | R>
  /**
   * The connections of the guest to a host port, while the stream runs. Each is open until it is closed or the stream ends.
   * Fails with `ALREADY_BOUND`.
   */
  readonly connections: (port: number) => Stream.Stream<VsockSocket, VsockError>
  /**
   * Connects to a guest port from a dynamically chosen host port; waits until a driver is ready, and then until the guest
   * answers, as long as the caller does not set a time-out. The connection is closed with the scope. Fails with `NO_RESOURCES`
   * or `CONNECTION_REFUSED`.
   */
  readonly connect2: (
    guestPort: number,
    options?: { readonly type?: VsockType }
  ) => Effect.Effect<VsockSocket, VsockError, Scope.Scope>
}>()("@troupe/core/HostVsockEndpoint") {}
