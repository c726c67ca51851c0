/** A vsock connection as a Node stream: what Node's own servers and clients take in place of a socket. */
import type { VsockError, VsockSocket } from "@troupe/core/HostVsockEndpoint"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import * as Queue from "effect/Queue"
import { Duplex } from "node:stream"

/** What Node wants written, and whom it tells when that is done. */
interface Written {
  /** `undefined` at the end of what is written. */
  readonly bytes: Uint8Array | undefined
  readonly done: (error?: Error) => void
}

/**
 * Moves data between a connection and a Node stream, which is given to `use` first. Returns when both directions have ended, or
 * when the stream is destroyed. Both sides hold the other back when they are slow. A connection that fails destroys the stream.
 */
export const serveDuplex = (socket: VsockSocket, use: (duplex: Duplex) => void): Effect.Effect<void, VsockError> =>
  Effect.scoped(Effect.gen(function*() {
    const wanted = yield* Latch.make(false)
    const writes = yield* Queue.unbounded<Written>()
    const destroyed = yield* Latch.make(false)
    const duplex = yield* Effect.acquireRelease(
      Effect.sync(() =>
        new Duplex({
          allowHalfOpen: true,
          read: () => {
            wanted.openUnsafe()
          },
          write: (chunk: Uint8Array, _encoding, done) => {
            Queue.offerUnsafe(writes, { bytes: chunk, done })
          },
          final: (done) => {
            Queue.offerUnsafe(writes, { bytes: undefined, done })
          },
          destroy: (error, done) => {
            destroyed.openUnsafe()
            done(error)
          }
        })
      ),
      (duplex) => Effect.sync(() => duplex.destroy())
    )
    // Whoever uses the stream hears of errors by its end; one that nobody listens to must not end the process.
    duplex.on("error", () => {})
    const receive: Effect.Effect<void, VsockError> = Effect.suspend(() =>
      wanted.await.pipe(
        Effect.andThen(socket.read),
        Effect.flatMap((bytes) => {
          if (bytes === undefined) {
            duplex.push(null)
            return Effect.void
          }
          if (!duplex.push(bytes)) wanted.closeUnsafe()
          return receive
        })
      )
    )
    const send: Effect.Effect<void, VsockError> = Effect.flatMap(
      Queue.take(writes),
      ({ bytes, done }) =>
        (bytes === undefined ? socket.shutdown("send") : socket.write(bytes)).pipe(
          Effect.tapError((error) => Effect.sync(() => done(error))),
          Effect.tap(() => Effect.sync(done)),
          Effect.flatMap(() => bytes === undefined ? Effect.void : send)
        )
    )
    use(duplex)
    const moved = Effect.all([receive, send], { concurrency: 2, discard: true }).pipe(
      Effect.tapError((error) => Effect.sync(() => duplex.destroy(error)))
    )
    yield* Effect.raceFirst(moved, destroyed.await)
  }))
