/** HTTP for guests: Effect's `HttpServer` on a host port of a guest. */
import * as NodeHttpServer from "@effect/platform-node/NodeHttpServer"
import { HostVsockEndpoint, type VsockError } from "@troupe/core/HostVsockEndpoint"
import * as Effect from "effect/Effect"
import * as HttpServer from "effect/http/HttpServer"
import type { ServeError } from "effect/http/HttpServerError"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import { createServer, type Server } from "node:http"
import { serveDuplex } from "./VsockDuplex.ts"
import { vsockAddress } from "./VsockEffectSocket.ts"

/** A server of Node that is given its connections, and binds nothing itself. */
const unbound = (port: number): Server => {
  const server = createServer()
  const address = vsockAddress(port).path
  return Object.assign(server, {
    address: () => address,
    listen: (_options: unknown, listening: () => void) => {
      queueMicrotask(listening)
      return server
    }
  })
}

/** An HTTP server on a host port of a guest, until the scope closes. */
export const make = (
  endpoint: HostVsockEndpoint["Service"],
  port: number
): Effect.Effect<HttpServer.HttpServer["Service"], VsockError | ServeError, Scope.Scope> =>
  Effect.gen(function*() {
    const server = unbound(port)
    const http = yield* NodeHttpServer.make(() => server, { disablePreemptiveShutdown: true })
    yield* endpoint.listen(port, () =>
      Effect.succeed((socket) => serveDuplex(socket, (duplex) => void server.emit("connection", duplex))))
    return http
  })

/** The server as a layer, on a port of the endpoint that the layer below provides. */
export const layer = (
  port: number
): Layer.Layer<HttpServer.HttpServer, VsockError | ServeError, HostVsockEndpoint> =>
  Layer.effect(HttpServer.HttpServer, Effect.flatMap(HostVsockEndpoint, (endpoint) => make(endpoint, port)))
