/**
 * The host's sockets as a user-mode network needs them: a service, so that the network runs anywhere and tests have sockets of
 * their own.
 *
 * Sockets are plain objects with events instead of effects for each piece of data: a piece costs a call. No event comes from inside
 * of a call to the socket, and none comes after `reset`, `close`, or an event `failed` or `closed`.
 */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"

/** An address and a port. */
export interface HostEndpoint {
  /** An IPv4 or IPv6 address as text. */
  readonly address: string
  readonly port: number
}

/** Why a socket has failed: what a guest can be told of it. */
export type HostSocketFailure = "refused" | "reset" | "unreachable" | "timedOut" | "other"

/** A socket of the host could not be made to listen. */
export class HostSocketError extends Schema.TaggedError<HostSocketError>()("HostSocketError", {
  /** What was being done, e.g. `listen on 127.0.0.1:8080`. */
  operation: Schema.String,
  detail: Schema.String
}) {
  override get message(): string {
    return `${this.operation}: ${this.detail}`
  }
}

/** What a TCP socket tells. */
export interface HostTcpEvents {
  /** It is connected. Sockets that were accepted are so from the beginning and do not say it. */
  readonly connected: () => void
  /** Bytes have come, which do not change any more. */
  readonly data: (bytes: Uint8Array) => void
  /** The other side will send no more. */
  readonly end: () => void
  /** The system has taken `bytes` of what was written. */
  readonly written: (bytes: number) => void
  /** It is over for good, at once. */
  readonly failed: (failure: HostSocketFailure) => void
  /** Both directions have ended, and everything was passed on. */
  readonly closed: () => void
}

/** A TCP socket. */
export interface HostTcp {
  /** Writes bytes, which must not change any more. They wait in memory until the system takes them. */
  readonly write: (bytes: Uint8Array) => void
  /** Ends this direction behind what was written. */
  readonly end: () => void
  /** Closes at once; the other side gets a RST where the host can do that. */
  readonly reset: () => void
  /** No more `data` for now. A little may still come. */
  readonly pause: () => void
  readonly resume: () => void
}

/** What a UDP socket tells. */
export interface HostUdpEvents {
  readonly message: (bytes: Uint8Array) => void
  /** The other side said that nobody is there, or the socket has failed. It may work again later. */
  readonly failed: (failure: HostSocketFailure) => void
}

/** A UDP socket with one peer: datagrams of others do not come. */
export interface HostUdp {
  /** Sends a datagram, or loses it. The bytes must not change any more. */
  readonly send: (bytes: Uint8Array) => void
  readonly close: () => void
}

/** A UDP socket that anybody may send to. */
export interface HostUdpServer {
  readonly address: HostEndpoint
  readonly send: (to: HostEndpoint, bytes: Uint8Array) => void
}

/** The host's sockets. Those that are open when the service's scope closes are closed with it. */
export class HostSockets extends Context.Service<HostSockets, {
  /** Begins to connect. */
  readonly connectTcp: (to: HostEndpoint, events: HostTcpEvents) => HostTcp
  /** A socket for one peer. */
  readonly connectUdp: (to: HostEndpoint, events: HostUdpEvents) => HostUdp
  /**
   * Listens until the scope closes. `accept` is called with each connection, which is paused, and returns who hears of it; `undefined`
   * refuses it. Returns where it listens: a port of 0 is replaced by one that is free.
   */
  readonly listenTcp: (
    at: HostEndpoint,
    accept: (socket: HostTcp, from: HostEndpoint) => HostTcpEvents | undefined
  ) => Effect.Effect<HostEndpoint, HostSocketError, Scope.Scope>
  /** Receives datagrams until the scope closes. */
  readonly bindUdp: (
    at: HostEndpoint,
    message: (bytes: Uint8Array, from: HostEndpoint) => void
  ) => Effect.Effect<HostUdpServer, HostSocketError, Scope.Scope>
  /** The name servers that the host uses now. May be empty. */
  readonly nameservers: () => ReadonlyArray<HostEndpoint>
}>()("@troupe/devices/HostSockets") {}
