/** The protocol `HostVsockEndpoint` of `vsock.fidl`: the host's side of a guest's sockets. */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import type * as Stream from "effect/Stream"
import type { VsockPort } from "./GuestConfig.ts"

/** A vsock operation failed, by the name of its status in the protocol file. */
export class VsockError extends Schema.TaggedError<VsockError>()("VsockError", {
  status: Schema.Literals(["ALREADY_BOUND", "NO_RESOURCES", "CONNECTION_REFUSED", "ALREADY_EXISTS"]),
  port: Schema.Int
}) {}

/** One end of a connection. */
export interface VsockSocket {
  readonly input: Stream.Stream<Uint8Array>
  readonly write: (bytes: Uint8Array) => Effect.Effect<void, VsockError>
}

/** A connection that a guest asks for (`HostVsockAcceptor.Accept`). */
export interface VsockConnectionRequest {
  readonly srcCid: number
  readonly srcPort: VsockPort
  readonly port: VsockPort
}

/** The vsock endpoint of a guest. Published by the socket device. */
export class HostVsockEndpoint extends Context.Service<HostVsockEndpoint, {
  /** Accepts connections to a host port until the scope closes. */
  readonly listen: (
    port: VsockPort,
    acceptor: (request: VsockConnectionRequest, socket: VsockSocket) => Effect.Effect<void>
  ) => Effect.Effect<void, VsockError, Scope.Scope>
  /** Connects to a guest port from a dynamically chosen host port. */
  readonly connect2: (guestPort: VsockPort) => Effect.Effect<VsockSocket, VsockError, Scope.Scope>
}>()("@troupe/core/HostVsockEndpoint") {}
