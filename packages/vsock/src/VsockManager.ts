/**
 * Who is who among the guests of a process, and who may talk to whom: assigns context IDs, and routes connections from guest to
 * guest by a policy. The protocols `GuestVsockEndpoint`, `GuestVsockAcceptor` and `HostVsockConnector` of `vsock.fidl`.
 */
import { VsockError, type VsockSocket, type VsockType } from "@troupe/core/HostVsockEndpoint"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as PubSub from "effect/PubSub"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { DEFAULT_GUEST_CID, GuestCid, isGuestCid } from "./Cid.ts"

/** A connection that a guest wants to another address. */
export interface VsockRoute {
  readonly srcCid: number
  readonly srcPort: number
  readonly cid: number
  readonly port: number
  readonly type: VsockType
}

/** A connection has ended (`OnShutdown`). */
export interface VsockShutdown {
  readonly srcCid: number
  readonly srcPort: number
  readonly dstCid: number
  readonly dstPort: number
}

/** A guest as one that can be connected to (`GuestVsockAcceptor`). */
export interface GuestVsockAcceptor {
  /** Connects to a port of the guest, in the name of another guest. The connection is closed with the scope. */
  readonly accept: (route: VsockRoute) => Effect.Effect<VsockSocket, VsockError, Scope.Scope>
}

/** What a guest reaches others by (`HostVsockConnector`). */
export interface HostVsockConnector {
  /** Whether there may be anybody at this context ID. */
  readonly reaches: (cid: number) => boolean
  /** Connects to another guest, if the policy lets it. */
  readonly connect: (route: VsockRoute) => Effect.Effect<VsockSocket, VsockError, Scope.Scope>
}

/** A guest that joins (`GuestVsockEndpoint`). */
export interface GuestVsockEndpoint {
  /** Is given its context ID and the way to others; gives the way to itself. */
  readonly setContextId: (cid: GuestCid, connector: HostVsockConnector) => GuestVsockAcceptor
}

/** Decides whether a guest may connect to another one. */
export type VsockPolicy = (route: VsockRoute) => Effect.Effect<boolean>

/** A guest's place among the others. */
export interface VsockMembership {
  readonly cid: GuestCid
  /** Reports the end of a connection. */
  readonly onShutdown: (shutdown: VsockShutdown) => void
}

/** Events that a slow reader may miss before they are lost to it. */
const SHUTDOWNS_KEPT = 1024

/** The guests of a process. */
export class VsockManager extends Context.Service<VsockManager, {
  /** Gives a guest the lowest context ID that is free, until the scope closes. Fails with `NO_RESOURCES`. */
  readonly join: (endpoint: GuestVsockEndpoint) => Effect.Effect<VsockMembership, VsockError, Scope.Scope>
  /** The context IDs that are taken, in ascending order. */
  readonly guests: Effect.Effect<ReadonlyArray<GuestCid>>
  /** Connections that end from now on, of all guests. A reader that is slow misses the oldest. */
  readonly shutdowns: Stream.Stream<VsockShutdown>
}>()("@troupe/vsock/VsockManager") {
  /** A manager with this policy. */
  static readonly layerWith = (options: { readonly policy: VsockPolicy }): Layer.Layer<VsockManager> =>
    Layer.effect(VsockManager, make(options.policy))

  /** A manager whose guests reach the host, and not each other. */
  static readonly layer: Layer.Layer<VsockManager> = Layer.suspend(() =>
    VsockManager.layerWith({ policy: () => Effect.succeed(false) })
  )
}

const make = Effect.fnUntraced(function*(policy: VsockPolicy) {
  const guests = new Map<number, GuestVsockAcceptor>()
  const shutdowns = yield* PubSub.sliding<VsockShutdown>(SHUTDOWNS_KEPT)

  const refuse = (route: VsockRoute, detail: string) =>
    new VsockError({
      operation: "connect",
      status: "CONNECTION_REFUSED",
      hostPort: route.srcPort,
      guestPort: route.port,
      detail
    })

  const connector: HostVsockConnector = {
    reaches: (cid) => guests.has(cid),
    connect: Effect.fnUntraced(function*(route) {
      const target = guests.get(route.cid)
      if (target === undefined) return yield* refuse(route, `there is no guest with the context ID ${route.cid}`)
      if (!(yield* policy(route))) {
        return yield* refuse(route, `the policy does not let ${route.srcCid} connect to ${route.cid}`)
      }
      return yield* target.accept(route)
    })
  }

  const freeCid = (): number | undefined => {
    for (let cid = DEFAULT_GUEST_CID; isGuestCid(cid); cid++) if (!guests.has(cid)) return cid
    return undefined
  }

  return VsockManager.of({
    join: (endpoint) =>
      Effect.acquireRelease(
        Effect.suspend(() => {
          const free = freeCid()
          if (free === undefined) {
            return Effect.fail(
              new VsockError({ operation: "join", status: "NO_RESOURCES", detail: "all context IDs are taken" })
            )
          }
          const cid = GuestCid.make(free)
          guests.set(cid, endpoint.setContextId(cid, connector))
          return Effect.succeed({
            cid,
            onShutdown: (shutdown: VsockShutdown) => {
              PubSub.publishUnsafe(shutdowns, shutdown)
            }
          })
        }),
        ({ cid }) => Effect.sync(() => guests.delete(cid))
      ),
    guests: Effect.sync(() => [...guests.keys()].toSorted((a, b) => a - b).map((cid) => GuestCid.make(cid))),
    shutdowns: Stream.fromPubSub(shutdowns)
  })
})
