/**
 * Who a guest may talk to: a function that is asked about every connection of a user-mode network before the host is.
 *
 * ```ts
 * const onlyTheMirror: NetPolicy = (connection) =>
 *   Effect.succeed(connection.destination.port === 443 && connection.hostname === "deb.example.org" ? allow : reset)
 * ```
 */
import * as Effect from "effect/Effect"
import type { HostEndpoint } from "./HostSockets.ts"
import { type Ipv4Block, isInBlock, parseIpv4, parseIpv4Block } from "./Ipv4.ts"

/** A connection that is about to be made. */
export interface NetConnection {
  readonly protocol: "tcp" | "udp"
  /** Who asks: the guest (`outgoing`), or somebody who has come to a port of the host that is forwarded (`incoming`). */
  readonly direction: "outgoing" | "incoming"
  readonly source: HostEndpoint
  readonly destination: HostEndpoint
  /**
   * The last name whose lookup by the guest has given this destination. A hint, and the guest chooses what it looks up: good for
   * naming what is allowed, useless for naming what is not.
   */
  readonly hostname?: string
  /** What the network does with it by itself: `dns` is a query to the network's name server, which goes to the host's. */
  readonly service?: "dns"
}

/** What becomes of a connection. */
export type NetDecision =
  /** It is made. */
  | { readonly _tag: "allow" }
  /** It is refused: the guest is told at once (TCP: a RST; UDP: "port unreachable"). */
  | { readonly _tag: "reset" }
  /** The guest hears nothing. */
  | { readonly _tag: "drop" }
  /** It is made to another address of the host's world, which may be the host itself. */
  | { readonly _tag: "redirect"; readonly to: HostEndpoint }

/** Decides on each connection. A policy that fails or throws refuses that one connection. */
export type NetPolicy = (connection: NetConnection) => Effect.Effect<NetDecision>

/** The connection is made. */
export const allow: NetDecision = { _tag: "allow" }
/** The connection is refused, and the guest is told. */
export const reset: NetDecision = { _tag: "reset" }
/** The connection is refused in silence. */
export const drop: NetDecision = { _tag: "drop" }
/** The connection is made to somewhere else. */
export const redirect = (address: string, port: number): NetDecision => ({ _tag: "redirect", to: { address, port } })

const blocks = (texts: ReadonlyArray<string>): ReadonlyArray<Ipv4Block> =>
  texts.flatMap((text) => parseIpv4Block(text) ?? [])

/** This host, "this network", link-local (where clouds have their metadata), multicast, reserved, broadcast (RFC 6890). */
const NOT_THE_NETWORK = blocks(["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"])
/** Private networks, carrier-grade NAT, protocol assignments, benchmarking (RFC 6890). */
const NOT_PUBLIC = blocks([
  "10.0.0.0/8",
  "172.16.0.0/12",
  "192.168.0.0/16",
  "100.64.0.0/10",
  "192.0.0.0/24",
  "198.18.0.0/15"
])

const isIn = (list: ReadonlyArray<Ipv4Block>, connection: NetConnection): boolean => {
  const address = parseIpv4(connection.destination.address)
  return address === undefined || list.some((block) => isInBlock(address, block))
}

const isGranted = (connection: NetConnection): boolean =>
  connection.direction === "incoming" || connection.service === "dns"

/**
 * The default: what a program of the host could reach on its networks, except for what trusts the host alone: not the host's
 * loopback, not link-local addresses. Name lookups and forwarded ports are allowed.
 */
export const allowNetworks: NetPolicy = (connection) =>
  Effect.succeed(isGranted(connection) || !isIn(NOT_THE_NETWORK, connection) ? allow : reset)

/** Public addresses only: nothing of the host's own networks either. Name lookups and forwarded ports are allowed. */
export const allowPublic: NetPolicy = (connection) =>
  Effect.succeed(
    isGranted(connection) || !(isIn(NOT_THE_NETWORK, connection) || isIn(NOT_PUBLIC, connection)) ? allow : reset
  )

/** Nothing but forwarded ports. */
export const allowNothing: NetPolicy = (connection) =>
  Effect.succeed(connection.direction === "incoming" ? allow : reset)
