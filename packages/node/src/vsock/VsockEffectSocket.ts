/** A vsock connection as Effect's `Socket`, and the ports of a guest's host as Effect's `SocketServer`. */
import {
  type HostVsockAcceptor,
  HostVsockEndpoint,
  type VsockError,
  type VsockHandler,
  VsockRefused,
  type VsockSocket
} from "@troupe/core/HostVsockEndpoint"
import { HOST_CID } from "@troupe/vsock/Cid"
import type * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import * as Layer from "effect/Layer"
import { unixPathAddress } from "effect/net/NetAddress"
import type * as Scope from "effect/Scope"
import * as Socket from "effect/socket/Socket"
import * as SocketServer from "effect/socket/SocketServer"

/** Close codes of RFC 6455 that Effect's sockets use: a normal end. */
const CLOSE_NORMAL = 1000

const encoder = new TextEncoder()

const bytesOf = (chunk: Uint8Array | string): Uint8Array => typeof chunk === "string" ? encoder.encode(chunk) : chunk

/** Whether a handler has failed because the guest ended the connection in good order. */
const isGoodEnd = (error: unknown): boolean =>
  Socket.isSocketError(error) && error.reason._tag === "SocketCloseError" && error.reason.code === CLOSE_NORMAL

const writeError = (cause: VsockError): Socket.SocketError =>
  new Socket.SocketError({ reason: new Socket.SocketWriteError({ cause }) })

/** The connection as Effect's `Socket`. A `CloseEvent` that is written ends sending. */
export const toSocket = (socket: VsockSocket): Socket.Socket => {
  const pull = Effect.matchEffect(socket.read, {
    onFailure: (cause) => Effect.fail(new Socket.SocketError({ reason: new Socket.SocketReadError({ cause }) })),
    onSuccess: (bytes) =>
      bytes === undefined
        ? Effect.fail(new Socket.SocketError({ reason: new Socket.SocketCloseError({ code: CLOSE_NORMAL }) }))
        : Effect.succeed([bytes] as const)
  })
  const write = (chunk: Uint8Array | string | Socket.CloseEvent): Effect.Effect<void, Socket.SocketError> =>
    Socket.isCloseEvent(chunk)
      ? socket.shutdown("send")
      : Effect.mapError(socket.write(bytesOf(chunk)), writeError)
  return Socket.make({
    reader: Effect.succeed({ pull, upgrade: Socket.SocketUpgradeError.unsupported }),
    writer: Effect.succeed({ write, writeAll: (chunks) => Effect.forEach(chunks, write, { discard: true }) })
  })
}

/** Connects to a guest's port, as Effect's `Socket`. The connection is closed with the scope. */
export const connect = (
  endpoint: HostVsockEndpoint["Service"],
  guestPort: number
): Effect.Effect<Socket.Socket, VsockError, Scope.Scope> => Effect.map(endpoint.connect2(guestPort), toSocket)

/** What Effect calls the address of a host port: `vsock:CID:PORT`. */
export const vsockAddress = (port: number) => unixPathAddress(`vsock:${HOST_CID}:${port}`)

/**
 * Effect's `SocketServer` on a host port of a guest. The port listens from now on, and its connections wait until the server
 * runs; each is served by a fiber of its own, and a handler that fails resets its connection alone. Fails with `ALREADY_BOUND`.
 */
export const makeServer = Effect.fnUntraced(function*(endpoint: HostVsockEndpoint["Service"], port: number) {
  const running = yield* Latch.make(false)
  let handle: VsockHandler | undefined
  const acceptor: HostVsockAcceptor = () =>
    Effect.andThen(
      running.await,
      Effect.suspend(() => handle === undefined ? Effect.fail(new VsockRefused({})) : Effect.succeed(handle))
    )
  yield* endpoint.listen(port, acceptor)
  return SocketServer.SocketServer.of({
    address: vsockAddress(port),
    run: <R, E, A>(handler: (socket: Socket.Socket) => Effect.Effect<A, E, R>) =>
      Effect.contextWith((context: Context.Context<R>) => {
        handle = (socket) =>
          handler(toSocket(socket)).pipe(
            Effect.provideContext(context),
            Effect.catchIf(isGoodEnd, () => Effect.void),
            Effect.asVoid
          )
        return Effect.ensuring(Effect.andThen(running.open, Effect.never), running.close)
      })
  })
})

/** The server as a layer, on a port of the endpoint that the layer below provides. */
export const layerServer = (
  port: number
): Layer.Layer<SocketServer.SocketServer, VsockError, HostVsockEndpoint> =>
  Layer.effect(SocketServer.SocketServer, Effect.flatMap(HostVsockEndpoint, (endpoint) => makeServer(endpoint, port)))
