/**
 * The user-mode network as a back end: every interface of a guest gets a network of its own, without any right on the host.
 *
 * This is where plain code meets fibers: the policy's questions run as fibers of the port's scope, and one fiber of it waits for
 * the next deadline.
 *
 * ```ts
 * const network = layerUserNet({ forwards: [{ protocol: "tcp", host: { address: "127.0.0.1", port: 8022 }, guestPort: 22 }] })
 * ```
 */
import { NetBackend, NetBackendError, type NetPort, type NetPortRequest } from "@troupe/core/NetBackend"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FiberSet from "effect/FiberSet"
import * as Latch from "effect/Latch"
import * as Layer from "effect/Layer"
import * as Result from "effect/Result"
import type * as Scope from "effect/Scope"
import { EntropySource } from "../../EntropySource.ts"
import { parseMac } from "./Ethernet.ts"
import { type HostEndpoint, HostSockets, type HostUdpServer } from "./HostSockets.ts"
import { allowNetworks, type NetConnection, type NetDecision, type NetPolicy, reset } from "./NetPolicy.ts"
import { getU32 } from "./Octets.ts"
import { UserNet } from "./UserNet.ts"
import type { UserNetHost } from "./UserNetHost.ts"
import { planUserNet, type PortForward, type UserNetOptions } from "./UserNetPlan.ts"
import type { UdpClients } from "./UserUdp.ts"

/** What a host may choose of a user-mode network. */
export interface UserNetBackendOptions extends UserNetOptions {
  /** Who the guest may talk to. Default: {@link allowNetworks}. */
  readonly policy?: NetPolicy
  /** Hears where each forwarded port listens, once it does. Default: nobody does. */
  readonly onForward?: (forward: PortForward, at: HostEndpoint) => void
}

/** Milliseconds that only grow, whatever is done to the time of day. */
const milliseconds = (clock: Clock.Clock): number => Number(clock.monotonicTimeNanosUnsafe()) / 1e6

/** Deadlines closer together than this share one look at all connections, in milliseconds. */
const TICK_MIN = 5

/** Keeps a network's deadlines: runs `tick` when one has come. */
const makeTimer = (clock: Clock.Clock) => {
  const latch = Latch.makeUnsafe(false)
  let next = Number.POSITIVE_INFINITY
  /** Something is due at `time`, or earlier. */
  const wakeAt = (time: number): void => {
    if (time >= next) return
    next = time
    latch.openUnsafe()
  }
  const run = (tick: (now: number) => number): Effect.Effect<never> =>
    Effect.gen(function*() {
      const now = milliseconds(clock)
      if (now >= next) {
        next = Number.POSITIVE_INFINITY
        next = Math.min(next, tick(now))
        return
      }
      latch.closeUnsafe()
      if (next === Number.POSITIVE_INFINITY) yield* latch.await
      else yield* Effect.timeoutOption(latch.await, Math.max(TICK_MIN, Math.ceil(next - now)))
    }).pipe(Effect.forever)
  return { wakeAt, run }
}

/** The most failures of a policy that a network logs: a guest may cause them as often as it likes. */
const FAILURES_LOGGED = 16

/** Asks a policy. One that throws, fails or dies refuses. */
const makeAsk = (policy: NetPolicy, name: string) => {
  let failures = 0
  return (connection: NetConnection): Effect.Effect<NetDecision> =>
    Effect.suspend(() => policy(connection)).pipe(
      Effect.catchCause((cause) => {
        if (failures++ >= FAILURES_LOGGED) return Effect.succeed(reset)
        const log = Effect.logWarning(`${name}: the network policy has failed, the connection is refused`, cause)
        return Effect.as(log, reset)
      })
    )
}

const forwardTcp = (network: UserNet, sockets: HostSockets["Service"], forward: PortForward) =>
  sockets.listenTcp(forward.host, (socket, from) => network.acceptTcp(socket, from, forward.guestPort))

const forwardUdp = (network: UserNet, sockets: HostSockets["Service"], forward: PortForward) =>
  Effect.gen(function*() {
    const clients: UdpClients = new Map()
    let server: HostUdpServer | undefined
    server = yield* sockets.bindUdp(forward.host, (bytes, from) => {
      const reply = { send: (answer: Uint8Array) => server?.send(from, answer), close: () => {} }
      network.acceptUdp(bytes, from, forward.guestPort, clients, reply)
    })
    return server.address
  })

const open = (
  options: UserNetBackendOptions,
  sockets: HostSockets["Service"],
  entropy: EntropySource["Service"],
  request: NetPortRequest
): Effect.Effect<NetPort, NetBackendError, Scope.Scope> =>
  Effect.gen(function*() {
    const operation = `open a user-mode network for ${request.name}`
    const planned = planUserNet(options)
    if (Result.isFailure(planned)) return yield* new NetBackendError({ operation, detail: planned.failure })
    if (request.enableBridge) {
      return yield* new NetBackendError({
        operation,
        detail: "it cannot be bridged with the host's network",
        hint: "Turn enableBridge off, or use a TAP interface"
      })
    }
    const mac = parseMac(request.macAddress)
    if (mac === undefined) {
      return yield* new NetBackendError({ operation, detail: `${request.macAddress} is not a MAC address` })
    }
    const ask = makeAsk(options.policy ?? allowNetworks, request.name)
    const clock = yield* Clock.Clock
    const fork = yield* FiberSet.makeRuntime<never, NetDecision>()
    const timer = makeTimer(clock)
    const random = new Uint8Array(4)
    const { fill } = entropy
    const host: UserNetHost = {
      now: () => milliseconds(clock),
      random32: () => {
        fill(random)
        return getU32(random, 0)
      },
      sockets,
      decide: (connection, answer) => {
        const fiber = fork(ask(connection))
        fiber.addObserver((exit) => {
          if (Exit.isSuccess(exit)) answer(exit.value)
        })
        return () => fiber.interruptUnsafe()
      },
      wakeAt: timer.wakeAt
    }
    const network = yield* Effect.acquireRelease(
      Effect.sync(() => new UserNet(planned.success, mac, host)),
      (network) => Effect.sync(() => network.close())
    )
    yield* Effect.forkScoped(timer.run((now) => network.tick(now)))
    for (const forward of request.index === 0 ? options.forwards ?? [] : []) {
      const listening = forward.protocol === "tcp"
        ? forwardTcp(network, sockets, forward)
        : forwardUdp(network, sockets, forward)
      const at = yield* Effect.mapError(
        listening,
        (error) =>
          new NetBackendError({
            operation,
            detail: error.message,
            hint: "Choose another port of the host, or 0 for any that is free"
          })
      )
      options.onForward?.(forward, at)
    }
    return network
  })

/**
 * User-mode networks, one for each interface of a guest. Forwarded ports lead to the first interface.
 *
 * A port keeps nothing of the host open once its scope is closed, however that comes.
 */
export const layerUserNet = (
  options: UserNetBackendOptions = {}
): Layer.Layer<NetBackend, never, HostSockets | EntropySource> =>
  Layer.effect(
    NetBackend,
    Effect.gen(function*() {
      const sockets = yield* HostSockets
      const entropy = yield* EntropySource
      return { open: (request) => open(options, sockets, entropy, request) }
    })
  )
