/** A connection as the host's programs have it: its data between turns as effects and streams. */
import type { VsockAddress, VsockError, VsockSocket, VsockType } from "@troupe/core/HostVsockEndpoint"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import type { VsockConnection } from "./VsockConnection.ts"

/** The host's end of a connection. */
export class ConnectionSocket implements VsockSocket {
  readonly #connection: VsockConnection

  constructor(connection: VsockConnection) {
    this.#connection = connection
  }

  get type(): VsockType {
    return this.#connection.type
  }

  get local(): VsockAddress {
    return this.#connection.local
  }

  get peer(): VsockAddress {
    return this.#connection.peer
  }

  get read(): Effect.Effect<Uint8Array | undefined, VsockError> {
    const connection = this.#connection
    const take: Effect.Effect<Uint8Array | undefined, VsockError> = Effect.suspend(() => {
      const bytes = connection.take()
      if (bytes !== undefined) return Effect.succeed(bytes)
      if (connection.end === "ended") return Effect.succeed(undefined)
      if (connection.end === "reset") {
        return Effect.fail(connection.error("read", "PEER_CLOSED", "the connection was reset"))
      }
      return Effect.flatMap(awaitInput(connection), () => take)
    })
    return take
  }

  get input(): Stream.Stream<Uint8Array, VsockError> {
    const pull = Effect.flatMap(
      this.read,
      (bytes) => bytes === undefined ? Cause.done() : Effect.succeed([bytes] as const)
    )
    return Stream.fromPull(Effect.succeed(pull))
  }

  write(bytes: Uint8Array): Effect.Effect<void, VsockError> {
    return Effect.callback<void, VsockError>((resume) => {
      const takeBack = this.#connection.write(bytes, resume)
      return Effect.sync(takeBack)
    })
  }

  shutdown(direction: "send" | "receive"): Effect.Effect<void> {
    return Effect.sync(() => this.#connection.shutdown(direction))
  }

  get closed(): Effect.Effect<void> {
    return awaitOver(this.#connection)
  }

  get close(): Effect.Effect<void> {
    return Effect.sync(() => this.#connection.close())
  }
}

const awaitInput = (connection: VsockConnection): Effect.Effect<void> =>
  Effect.callback<void>((resume) => {
    const takeBack = connection.awaitInput(() => resume(Effect.void))
    return Effect.sync(takeBack)
  })

/** Returns when a connection is over. */
export const awaitOver = (connection: VsockConnection): Effect.Effect<void> =>
  Effect.callback<void>((resume) => {
    const takeBack = connection.awaitOver(() => resume(Exit.void))
    return Effect.sync(takeBack)
  })

/**
 * Moves data both ways between two connections until both have ended sending. An end that is closed receives no more, and the
 * other one is told so. Fails when one is reset.
 */
export const join = (a: VsockSocket, b: VsockSocket): Effect.Effect<void, VsockError, Scope.Scope> => {
  const move = (from: VsockSocket, to: VsockSocket): Effect.Effect<void, VsockError, Scope.Scope> =>
    Effect.suspend(() =>
      Effect.flatMap(
        from.read,
        (bytes) => bytes === undefined ? ended(from, to) : Effect.andThen(to.write(bytes), move(from, to))
      )
    )
  const ended = (from: VsockSocket, to: VsockSocket): Effect.Effect<void, never, Scope.Scope> =>
    Effect.andThen(
      to.shutdown("send"),
      Effect.asVoid(Effect.forkScoped(Effect.andThen(from.closed, to.shutdown("receive"))))
    )
  return Effect.asVoid(Effect.all([move(a, b), move(b, a)], { concurrency: 2 }))
}
