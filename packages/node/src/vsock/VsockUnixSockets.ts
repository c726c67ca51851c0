/**
 * A guest's ports as Unix sockets, for programs that are not in this process, with the convention of Firecracker and Cloud
 * Hypervisor:
 *
 * - to reach a guest's port: connect to PATH, send `CONNECT port` and a newline, read `OK hostport` and a newline
 * - to be reached by the guest on a host port: listen on PATH_port
 */
import { type HostVsockEndpoint, VSOCK_PORT_ANY, type VsockError, VsockRefused } from "@troupe/core/HostVsockEndpoint"
import * as Effect from "effect/Effect"
import * as FiberSet from "effect/FiberSet"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import { rmSync } from "node:fs"
import { connect as connectTo, createServer, type Socket } from "node:net"
import type { Duplex } from "node:stream"
import { serveDuplex } from "./VsockDuplex.ts"

/** The most bytes of the line that a client sends first. */
const LINE_MAX = 32

/** The Unix socket could not be listened on. */
export class VsockUnixSocketError extends Schema.TaggedError<VsockUnixSocketError>()("VsockUnixSocketError", {
  path: Schema.String,
  detail: Schema.String
}) {
  override get message(): string {
    return `${this.path}: ${this.detail}`
  }
}

/** The port of a line `CONNECT port`, or `undefined` when it is none. */
export const parseConnect = (line: string): number | undefined => {
  const match = /^CONNECT (\d{1,10})$/i.exec(line.trimEnd())
  const port = Number(match?.[1] ?? Number.NaN)
  return port <= 0xffff_ffff ? port : undefined
}

/** Reads the first line of a client. What comes after it stays in the socket. */
const firstLine = (client: Socket): Effect.Effect<string | undefined> =>
  Effect.callback<string | undefined>((resume) => {
    let line = ""
    const finish = (result: string | undefined) => {
      client.off("readable", read)
      client.off("close", closed)
      resume(Effect.succeed(result))
    }
    const closed = () => finish(undefined)
    const read = () => {
      for (let byte: unknown = client.read(1); byte !== null; byte = client.read(1)) {
        if (!(byte instanceof Uint8Array)) return finish(undefined)
        const character = String.fromCodePoint(byte[0] ?? 0)
        if (character === "\n") return finish(line)
        line += character
        if (line.length > LINE_MAX) return finish(undefined)
      }
    }
    client.on("readable", read)
    client.on("close", closed)
    read()
    return Effect.sync(() => {
      client.off("readable", read)
      client.off("close", closed)
    })
  })

/** Moves data both ways between a Unix socket and a connection's stream until both have ended. */
const pipe = (client: Socket, duplex: Duplex): void => {
  client.on("error", () => duplex.destroy())
  duplex.on("error", () => client.destroy())
  duplex.on("close", () => {
    if (!duplex.readableEnded) client.destroy()
  })
  client.on("close", (hadError) => {
    if (hadError) duplex.destroy()
  })
  client.pipe(duplex)
  duplex.pipe(client)
}

const serveClient = (endpoint: HostVsockEndpoint["Service"], client: Socket): Effect.Effect<void> =>
  Effect.scoped(Effect.gen(function*() {
    yield* Effect.addFinalizer(() => Effect.sync(() => client.destroy()))
    client.on("error", () => {})
    const line = yield* firstLine(client)
    const port = line === undefined ? undefined : parseConnect(line)
    if (port === undefined) return
    const socket = yield* endpoint.connect2(port)
    client.write(`OK ${socket.local.port}\n`)
    yield* serveDuplex(socket, (duplex) => pipe(client, duplex))
    yield* flushed(client)
  })).pipe(Effect.ignore)

/** Returns when what was written to a client has left, or cannot. */
const flushed = (client: Socket): Effect.Effect<void> =>
  Effect.callback<void>((resume) => {
    if (client.destroyed || client.closed || client.writableFinished) return resume(Effect.void)
    const done = () => resume(Effect.void)
    client.once("finish", done)
    client.once("close", done)
  })

const reach = (path: string): Effect.Effect<Socket, VsockRefused, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.callback<Socket, VsockRefused>((resume) => {
      const client = connectTo({ path, allowHalfOpen: true })
      client.once("connect", () => resume(Effect.succeed(client)))
      client.once("error", (error) => resume(Effect.fail(new VsockRefused({ reason: `${path}: ${error.message}` }))))
      return Effect.sync(() => client.destroy())
    }),
    (client) => Effect.sync(() => client.destroy()),
    { interruptible: true }
  )

/**
 * Exposes the ports of a guest at `path` until the scope closes. Host ports of the guest that nobody else listens on are looked
 * for at `path_port`. Fails with `ALREADY_BOUND` when something else serves those ports already.
 */
export const serve = Effect.fnUntraced(function*(
  endpoint: HostVsockEndpoint["Service"],
  path: string
): Effect.fn.Return<void, VsockError | VsockUnixSocketError, Scope.Scope> {
  const fibers = yield* FiberSet.make<void>()
  const run = yield* FiberSet.runtime(fibers)<never>()
  yield* Effect.acquireRelease(
    Effect.callback<ReturnType<typeof createServer>, VsockUnixSocketError>((resume) => {
      const server = createServer({ allowHalfOpen: true }, (client) => void run(serveClient(endpoint, client)))
      server.once("error", (error) => resume(Effect.fail(new VsockUnixSocketError({ path, detail: error.message }))))
      server.listen(path, () => resume(Effect.succeed(server)))
    }),
    (server) =>
      Effect.callback<void>((resume) => {
        server.close(() => resume(Effect.void))
        rmSync(path, { force: true })
      })
  )
  yield* endpoint.listen(
    VSOCK_PORT_ANY,
    (request) =>
      Effect.map(
        reach(`${path}_${request.port}`),
        (client) => (socket) => Effect.andThen(serveDuplex(socket, (duplex) => pipe(client, duplex)), flushed(client))
      )
  )
})
