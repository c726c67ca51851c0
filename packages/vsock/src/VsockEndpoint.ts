/**
 * The vsock endpoint of one machine: its listeners, the fibers that serve connections, and the session of its present driver.
 *
 * It lives as long as the machine. When the guest is started again, or the device is, listeners stay, and connections end.
 */
import {
  type HostVsockAcceptor,
  type HostVsockEndpoint,
  VSOCK_PORT_ANY,
  VsockError,
  type VsockHandler,
  VsockRefused,
  type VsockSocket,
  type VsockType
} from "@troupe/core/HostVsockEndpoint"
import * as Cause from "effect/Cause"
import * as Context from "effect/Context"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Queue from "effect/Queue"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { HOST_CID } from "./Cid.ts"
import { awaitOver, ConnectionSocket, join } from "./ConnectionSocket.ts"
import type { VsockConnection } from "./VsockConnection.ts"
import type { VsockDeviceHost } from "./VsockDevice.ts"
import type { GuestVsockEndpoint, HostVsockConnector, VsockManager } from "./VsockManager.ts"
import { VsockPorts } from "./VsockPorts.ts"
import type { VsockSession } from "./VsockSession.ts"

/** Connections that wait to be taken from a stream of them. */
export const BACKLOG = 128

/** Rounds of the scheduler in which handlers may read what the guest sent before the machine's end. Then they are interrupted. */
export const LAST_ROUNDS = 1024

/** A port of the configuration, and who listens there from the guest's first instruction on. */
export interface InitialListener {
  readonly port: number
  /** Without one, connections wait until somebody listens. */
  readonly acceptor?: HostVsockAcceptor | undefined
}

interface Listener {
  /** Who decides. Waits until somebody does. */
  acceptor: Effect.Effect<HostVsockAcceptor>
  /** Whether the configuration has the port, and nobody listens there now. */
  isReserved: boolean
}

/** Makes the endpoint of a machine. What it serves ends with the scope. */
export const makeVsockEndpoint = Effect.fnUntraced(function*(
  manager: VsockManager["Service"],
  initial: ReadonlyArray<InitialListener>
) {
  const hostPorts = new VsockPorts()
  const listeners = new Map<number, Listener>()
  const arrivals = yield* Queue.unbounded<VsockConnection>()
  let serving = 0
  const settled = (rounds: number): Effect.Effect<void> =>
    Effect.suspend(() =>
      serving === 0 || rounds === 0 ? Effect.void : Effect.andThen(Effect.yieldNow, settled(rounds - 1))
    )
  const handlers = yield* Effect.acquireRelease(
    Scope.make(),
    (handlers, exit) => Effect.andThen(settled(LAST_ROUNDS), Scope.close(handlers, exit))
  )
  let session: VsockSession | undefined
  let sessionWaiters: Array<() => void> = []
  let isGone = false
  let tellTransportReset = () => {}
  let connector: HostVsockConnector = { reaches: () => false, connect: () => Effect.die(new Error("not joined")) }

  // --- Listening ---------------------------------------------------------------------------------------------------------

  const reserve = (port: number): void => {
    const adopted = Deferred.makeUnsafe<HostVsockAcceptor>()
    const listener: Listener = { acceptor: Deferred.await(adopted), isReserved: true }
    listeners.set(port, listener)
    reservations.set(port, adopted)
  }
  const reservations = new Map<number, Deferred.Deferred<HostVsockAcceptor>>()

  const add = (port: number, acceptor: HostVsockAcceptor): boolean => {
    const existing = listeners.get(port)
    if (existing !== undefined && !existing.isReserved) return false
    const reservation = reservations.get(port)
    listeners.set(port, { acceptor: Effect.succeed(acceptor), isReserved: false })
    hostPorts.addListener(port)
    if (reservation !== undefined) Deferred.doneUnsafe(reservation, Exit.succeed(acceptor))
    return true
  }

  const remove = (port: number): void => {
    if (reservations.has(port)) return reserve(port)
    listeners.delete(port)
    hostPorts.removeListener(port)
  }

  const listenerOf = (port: number): Listener | undefined => listeners.get(port) ?? listeners.get(VSOCK_PORT_ANY)

  const isPort = (port: number): boolean => Number.isInteger(port) && port >= 0 && port <= 0xffff_ffff

  const listen = <R>(
    port: number,
    acceptor: HostVsockAcceptor<R>
  ): Effect.Effect<void, VsockError, Scope.Scope | R> =>
    Effect.contextWith((context: Context.Context<R>) => {
      const provide = <A, E>(effect: Effect.Effect<A, E, R | Scope.Scope>): Effect.Effect<A, E, Scope.Scope> =>
        Effect.updateContext(effect, (own: Context.Context<Scope.Scope>) => Context.merge(context, own))
      const provided: HostVsockAcceptor = (request) =>
        Effect.map(provide(acceptor(request)), (handler): VsockHandler => (socket) => provide(handler(socket)))
      return Effect.asVoid(Effect.acquireRelease(
        Effect.suspend(() => {
          if (!isPort(port)) {
            return Effect.fail(
              new VsockError({
                operation: "listen",
                status: "INVALID_ARGS",
                hostPort: port,
                detail: "a port is from 0 to 4294967295"
              })
            )
          }
          return add(port, provided) ? Effect.void : Effect.fail(
            new VsockError({
              operation: "listen",
              status: "ALREADY_BOUND",
              hostPort: port,
              detail: "somebody listens on this port already"
            })
          )
        }),
        () => Effect.sync(() => remove(port))
      ))
    })

  for (const { acceptor, port } of initial) {
    if (acceptor !== undefined) {
      if (!add(port, acceptor)) {
        return yield* new VsockError({
          operation: "listen",
          status: "ALREADY_BOUND",
          hostPort: port,
          detail: "the configuration has two listeners on this port"
        })
      }
      continue
    }
    hostPorts.addListener(port)
    reserve(port)
  }

  // --- Connections of the guest ----------------------------------------------------------------------------------------------

  const refuse: HostVsockAcceptor = () => Effect.fail(new VsockRefused({ reason: "nobody listens any more" }))

  /** Connects through to another guest, and moves data between the two connections. */
  const routeTo = (cid: number): HostVsockAcceptor => (request) =>
    connector.connect({ ...request, cid }).pipe(
      Effect.mapError((error) => new VsockRefused({ reason: error.message })),
      Effect.map((other): VsockHandler => (socket) => join(socket, other))
    )

  const decide = (connection: VsockConnection): Effect.Effect<HostVsockAcceptor> =>
    connection.local.cid === HOST_CID
      ? listenerOf(connection.local.port)?.acceptor ?? Effect.succeed(refuse)
      : Effect.succeed(routeTo(connection.local.cid))

  /** What serves a connection, as its acceptor says. Nothing of it is kept once the handler runs. */
  const handlerOf = (connection: VsockConnection): Effect.Effect<VsockHandler, VsockRefused, Scope.Scope> => {
    const gone = Effect.flatMap(awaitOver(connection), () => new VsockRefused({ reason: "the guest has given up" }))
    const accepted = Effect.flatMap(decide(connection), (acceptor) => acceptor(connection.request))
    return Effect.raceFirst(accepted, gone)
  }

  // There are many of these that wait: each closure and each frame of the stack is paid for every one of them.
  const serve = (connection: VsockConnection): Effect.Effect<void> => {
    serving++
    return Effect.flatMap(
      handlerOf(connection),
      (handler) => connection.accept() ? handler(new ConnectionSocket(connection)) : Effect.void
    ).pipe(
      Effect.scoped,
      Effect.onExit((exit) =>
        Effect.sync(() => {
          serving--
          if (Exit.isSuccess(exit)) connection.close()
          else connection.reset()
        })
      ),
      Effect.catchCause((cause) => logFailure(connection, cause))
    )
  }

  const serveArrivals = Effect.forever(
    Effect.flatMap(Queue.take(arrivals), (connection) => Effect.forkIn(serve(connection), handlers)),
    { disableYield: true }
  )

  // --- Connections of the host ------------------------------------------------------------------------------------------------

  /** The session of the driver, when it is ready. `undefined` when the machine is gone. */
  const awaitSession: Effect.Effect<VsockSession | undefined> = Effect.suspend(() => {
    if (session !== undefined || isGone) return Effect.succeed(session)
    return Effect.callback<void>((resume) => {
      // A driver may have come since: the fiber can have been preempted in between.
      if (session !== undefined || isGone) return resume(Effect.void)
      const wake = () => resume(Effect.void)
      sessionWaiters.push(wake)
      return Effect.sync(() => {
        sessionWaiters = sessionWaiters.filter((waiter) => waiter !== wake)
      })
    }).pipe(Effect.andThen(awaitSession))
  })

  const wakeSessionWaiters = (): void => {
    const waiters = sessionWaiters
    sessionWaiters = []
    for (const wake of waiters) wake()
  }
  yield* Effect.addFinalizer(() =>
    Effect.sync(() => {
      isGone = true
      wakeSessionWaiters()
    })
  )

  const connect = (
    operation: string,
    type: VsockType,
    localCid: number,
    localPort: number | undefined,
    guestPort: number
  ): Effect.Effect<VsockSocket, VsockError, Scope.Scope> => {
    const fail = (status: VsockError["status"], detail: string) =>
      Effect.fail(
        new VsockError({
          operation,
          status,
          guestPort,
          ...(localPort === undefined ? {} : { hostPort: localPort }),
          detail
        })
      )
    if (!isPort(guestPort)) return fail("INVALID_ARGS", "a port is from 0 to 4294967295")
    return Effect.uninterruptibleMask((restore) => {
      let mine: VsockConnection | undefined
      const open = (session: VsockSession): Effect.Effect<VsockConnection, VsockError> => {
        const connection = session.connect(type, localCid, localPort, guestPort)
        switch (connection) {
          case "NO_RESOURCES":
            return fail("NO_RESOURCES", "there is no unused host port, or there are too many connections")
          case "ALREADY_EXISTS":
            return fail("ALREADY_EXISTS", "these ports are connected, or were until a moment ago")
          case "CONNECTION_REFUSED":
            return fail("CONNECTION_REFUSED", `the guest's driver has no ${type} connections`)
        }
        mine = connection
        return Effect.callback((resume) => {
          connection.ask((exit) => resume(Exit.map(exit, () => connection)))
        })
      }
      const opened = Effect.flatMap(
        awaitSession,
        (session) => session === undefined ? fail("CONNECTION_REFUSED", "the machine is gone") : open(session)
      )
      return restore(opened).pipe(
        Effect.onExit((exit) => Effect.sync(() => Exit.isFailure(exit) ? mine?.close() : undefined)),
        Effect.tap((connection) =>
          Effect.addFinalizer((exit) =>
            // Cut off, where its user has failed: the guest must not take what it has for all there is.
            Effect.sync(() => Exit.isSuccess(exit) ? connection.close() : connection.reset())
          )
        ),
        Effect.map((connection) => new ConnectionSocket(connection))
      )
    })
  }

  const guest: GuestVsockEndpoint = {
    setContextId: (_, given) => {
      connector = given
      return {
        accept: ({ port, srcCid, srcPort, type }) => connect("accept", type, srcCid, srcPort, port)
      }
    }
  }
  const membership = yield* manager.join(guest)
  yield* Effect.forkScoped(serveArrivals)

  const service: HostVsockEndpoint["Service"] = {
    guestCid: membership.cid,
    listen,
    connections: (port) =>
      Stream.callback<VsockSocket, VsockError>(
        Effect.fnUntraced(function*(queue) {
          const ended = yield* Deferred.make<void>()
          yield* Effect.addFinalizer(() => Deferred.succeed(ended, undefined))
          yield* listen(port, () =>
            Effect.succeed((socket) =>
              Effect.andThen(Queue.offer(queue, socket), Effect.raceFirst(socket.closed, Deferred.await(ended)))
            ))
        }),
        { bufferSize: BACKLOG }
      ),
    connect2: (guestPort, options) => connect("connect2", options?.type ?? "stream", HOST_CID, undefined, guestPort)
  }

  const deviceHost: VsockDeviceHost = {
    guestCid: membership.cid,
    hostPorts,
    listens: (cid, port) => cid === HOST_CID ? listenerOf(port) !== undefined : connector.reaches(cid),
    arrived: (connection) => {
      Queue.offerUnsafe(arrivals, connection)
    },
    attach: (present) => {
      session = present
      if (present !== undefined) wakeSessionWaiters()
    },
    onTransportReset: (tell) => {
      tellTransportReset = tell
    },
    onShutdown: membership.onShutdown
  }
  return { service, deviceHost, transportReset: () => tellTransportReset() }
})

const logFailure = (connection: VsockConnection, cause: Cause.Cause<unknown>): Effect.Effect<void> => {
  if (Cause.hasInterruptsOnly(cause)) return Effect.void
  const error = Cause.squash(cause)
  if (error instanceof VsockRefused || (error instanceof VsockError && error.status === "PEER_CLOSED")) {
    return Effect.void
  }
  return Effect.logWarning(
    `vsock: the connection of guest port ${connection.peer.port} to host port ${connection.local.port} was reset: ${
      error instanceof Error ? error.message : String(error)
    }`
  )
}
