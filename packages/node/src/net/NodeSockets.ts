/**
 * The host's sockets for user-mode networks, on Node's own TCP and UDP.
 */
import {
  type HostEndpoint,
  HostSocketError,
  type HostSocketFailure,
  HostSockets,
  type HostTcp,
  type HostTcpEvents,
  type HostUdp,
  type HostUdpEvents
} from "@troupe/devices/net/user/HostSockets"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import { createSocket, type Socket as UdpSocket } from "node:dgram"
import { createServer, isIPv6, Socket } from "node:net"
import { makeResolvConf, RESOLV_CONF } from "./ResolvConf.ts"

/** What may be chosen, mostly by tests. */
export interface NodeSocketsOptions {
  /** Where the host's name servers are listed. Default: `/etc/resolv.conf`. */
  readonly resolvConf?: string
  /** Name servers instead of the listed ones. */
  readonly nameservers?: ReadonlyArray<HostEndpoint>
}

/** Connections that wait to be accepted. */
const BACKLOG = 128
/** Datagrams that wait until their socket is connected. */
const EARLY_MAX = 16
/** Bytes of datagrams that wait for the system, of one socket; what is more is lost. */
const PENDING_MAX = 0x4_0000

const failureOf = (error: unknown): HostSocketFailure => {
  const code = typeof error === "object" && error !== null && "code" in error ? error.code : undefined
  switch (code) {
    case "ECONNREFUSED":
      return "refused"
    case "ECONNRESET":
    case "EPIPE":
    case "ECONNABORTED":
      return "reset"
    case "ENETUNREACH":
    case "EHOSTUNREACH":
    case "ENETDOWN":
    case "EADDRNOTAVAIL":
    case "EACCES":
    case "EPERM":
      return "unreachable"
    case "ETIMEDOUT":
      return "timedOut"
    default:
      return "other"
  }
}

const messageOf = (error: unknown): string => error instanceof Error ? error.message : String(error)

const show = ({ address, port }: HostEndpoint): string =>
  isIPv6(address) ? `[${address}]:${port}` : `${address}:${port}`

/** What is open, to be closed with the service. */
interface Open {
  readonly close: () => void
}

/** Makes a socket of Node's into one of the contract. */
class NodeTcp implements HostTcp {
  readonly #socket: Socket
  readonly #all: Set<Open>
  #events: HostTcpEvents | undefined
  /** Why it ends, when that is known before Node says that it is closed. */
  #failure: HostSocketFailure | undefined

  constructor(socket: Socket, all: Set<Open>) {
    this.#socket = socket
    this.#all = all
    all.add(this)
    socket.setNoDelay(true)
    socket.on("data", (bytes: Uint8Array) => this.#events?.data(bytes))
    socket.on("end", () => this.#events?.end())
    socket.on("error", (error) => {
      this.#failure = failureOf(error)
    })
    socket.on("close", (hadError) => {
      all.delete(this)
      const events = this.#events
      this.#events = undefined
      if (hadError || this.#failure !== undefined) events?.failed(this.#failure ?? "other")
      else events?.closed()
    })
  }

  /** Has somebody hear of it. */
  attach(events: HostTcpEvents): void {
    this.#events = events
  }

  /** Begins to connect. A place that makes no sense, such as a port that is none, is a failure like others. */
  connect(to: HostEndpoint): void {
    this.#socket.once("connect", () => this.#events?.connected())
    try {
      this.#socket.connect({ host: to.address, port: to.port })
    } catch (error) {
      this.#socket.destroy(error instanceof Error ? error : new Error(String(error)))
    }
  }

  write(bytes: Uint8Array): void {
    this.#socket.write(bytes, (error) => {
      if (error === undefined || error === null) this.#events?.written(bytes.length)
    })
  }

  end(): void {
    this.#socket.end()
  }

  reset(): void {
    this.close()
  }

  pause(): void {
    this.#socket.pause()
  }

  resume(): void {
    this.#socket.resume()
  }

  close(): void {
    this.#events = undefined
    this.#all.delete(this)
    // A socket that is not connected yet has nobody to tell.
    if (this.#socket.connecting) this.#socket.destroy()
    else this.#socket.resetAndDestroy()
  }
}

const udpTypeOf = (address: string): "udp4" | "udp6" => isIPv6(address) ? "udp6" : "udp4"

/** A UDP socket with one peer. */
class NodeUdp implements HostUdp {
  readonly #socket: UdpSocket
  readonly #all: Set<Open>
  #events: HostUdpEvents | undefined
  /** What is sent before the socket is connected. */
  #early: Array<Uint8Array> | undefined = []
  /** Bytes that the system has not taken yet. */
  #pending = 0

  constructor(to: HostEndpoint, events: HostUdpEvents, all: Set<Open>) {
    this.#all = all
    this.#events = events
    all.add(this)
    const socket = createSocket(udpTypeOf(to.address))
    this.#socket = socket
    socket.on("error", (error) => this.#events?.failed(failureOf(error)))
    socket.on("message", (bytes) => this.#events?.message(bytes))
    // A callback would hear of failures alone; the event tells of success.
    socket.once("connect", () => {
      const early = this.#early
      this.#early = undefined
      if (early !== undefined) { for (const bytes of early) this.send(bytes) }
    })
    try {
      socket.connect(to.port, to.address)
    } catch (error) {
      queueMicrotask(() => this.#events?.failed(failureOf(error)))
    }
  }

  send(bytes: Uint8Array): void {
    if (this.#early !== undefined) {
      if (this.#early.length < EARLY_MAX) this.#early.push(bytes)
      return
    }
    if (this.#events === undefined || this.#pending + bytes.length > PENDING_MAX) return
    this.#pending += bytes.length
    this.#socket.send(bytes, (error) => {
      this.#pending -= bytes.length
      if (error !== null) this.#events?.failed(failureOf(error))
    })
  }

  close(): void {
    if (!this.#all.delete(this)) return
    this.#events = undefined
    this.#socket.close()
  }
}

const listenTcp = (
  all: Set<Open>,
  at: HostEndpoint,
  accept: (socket: HostTcp, from: HostEndpoint) => HostTcpEvents | undefined
): Effect.Effect<HostEndpoint, HostSocketError, Scope.Scope> =>
  Effect.gen(function*() {
    const server = yield* Effect.acquireRelease(
      Effect.sync(() => createServer({ allowHalfOpen: true, pauseOnConnect: true })),
      (server) =>
        // Also before it listens: it is about to, and does not any more then.
        Effect.callback<void>((resume) => {
          server.close(() => resume(Effect.void))
        })
    )
    const mine = new Set<NodeTcp>()
    // Before the server's own finalizer, which waits for its connections.
    yield* Effect.addFinalizer(() =>
      Effect.sync(() => {
        for (const socket of mine) socket.close()
      })
    )
    server.on("connection", (socket) => {
      // Before anybody listens to its data, which would make it flow.
      socket.pause()
      const tcp = new NodeTcp(socket, all)
      mine.add(tcp)
      socket.once("close", () => mine.delete(tcp))
      const events = accept(tcp, { address: socket.remoteAddress ?? "", port: socket.remotePort ?? 0 })
      if (events === undefined) tcp.close()
      else tcp.attach(events)
    })
    return yield* Effect.callback<HostEndpoint, HostSocketError>((resume) => {
      const failed = (error: Error): void =>
        resume(
          Effect.fail(new HostSocketError({ operation: `listen on ${show(at)}`, detail: messageOf(error) }))
        )
      server.once("error", failed)
      server.listen({ host: at.address, port: at.port, backlog: BACKLOG }, () => {
        server.off("error", failed)
        server.on("error", () => {})
        const address = server.address()
        resume(Effect.succeed({
          address: at.address,
          port: typeof address === "object" && address !== null ? address.port : at.port
        }))
      })
    })
  })

const bindUdp = (
  all: Set<Open>,
  at: HostEndpoint,
  message: (bytes: Uint8Array, from: HostEndpoint) => void
) =>
  Effect.gen(function*() {
    const socket = createSocket(udpTypeOf(at.address))
    const entry: Open = {
      close: () => {
        if (all.delete(entry)) socket.close()
      }
    }
    yield* Effect.acquireRelease(
      Effect.sync(() => {
        all.add(entry)
        // What goes wrong with one datagram is that datagram's end.
        socket.on("error", () => {})
      }),
      () => Effect.sync(entry.close)
    )
    socket.on("message", (bytes, from) => message(bytes, { address: from.address, port: from.port }))
    const address = yield* Effect.callback<HostEndpoint, HostSocketError>((resume) => {
      const failed = (error: Error): void =>
        resume(
          Effect.fail(new HostSocketError({ operation: `listen on UDP ${show(at)}`, detail: messageOf(error) }))
        )
      socket.once("error", failed)
      socket.bind({ address: at.address, port: at.port, exclusive: true }, () => {
        socket.off("error", failed)
        resume(Effect.succeed({ address: at.address, port: socket.address().port }))
      })
    })
    const send = (to: HostEndpoint, bytes: Uint8Array): void => {
      // A datagram may come from port 0, to which there is no way back.
      if (to.port !== 0 && all.has(entry)) socket.send(bytes, to.port, to.address, () => {})
    }
    return { address, send }
  })

/** Sockets of this host. */
export const layerWith = (options: NodeSocketsOptions): Layer.Layer<HostSockets> =>
  Layer.effect(
    HostSockets,
    Effect.gen(function*() {
      const all = new Set<Open>()
      yield* Effect.addFinalizer(() =>
        Effect.sync(() => {
          for (const open of all) open.close()
        })
      )
      const listed = makeResolvConf(options.resolvConf ?? RESOLV_CONF)
      return {
        connectTcp: (to, events) => {
          const socket = new Socket({ allowHalfOpen: true })
          const tcp = new NodeTcp(socket, all)
          tcp.attach(events)
          tcp.connect(to)
          return tcp
        },
        connectUdp: (to, events) => new NodeUdp(to, events, all),
        listenTcp: (at, accept) => listenTcp(all, at, accept),
        bindUdp: (at, message) => bindUdp(all, at, message),
        nameservers: () => options.nameservers ?? listed()
      }
    })
  )

/** Sockets of this host, with the name servers of `/etc/resolv.conf`. */
export const layer: Layer.Layer<HostSockets> = layerWith({})
