/** The flag `--net`: a network and how the guest is connected to it, as one argument. */
import type { GuestConfigInput } from "@troupe/core/GuestConfig"
import { formatMacAddress } from "@troupe/core/MacAddress"
import { NetBackend } from "@troupe/core/NetBackend"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import { createHash } from "node:crypto"
import { hostname } from "node:os"
import type { FfiUnavailable } from "../FfiError.ts"
import * as Tap from "../net/Tap.ts"
import * as UserNetwork from "../net/UserNetwork.ts"
import { parseUserNet, userNetSyntax } from "./UserNetOption.ts"

/** How the argument is written, for help texts. */
export const netSyntax = `user[,mac=ADDRESS]${userNetSyntax}|tap[=NAME][,bridge=NAME][,mtu=MTU][,mac=ADDRESS]`

/** One interface of the guest. */
export interface NetChoice {
  readonly spec: NonNullable<GuestConfigInput["netDevices"]>[number]
  readonly backend:
    | { readonly kind: "user"; readonly options: UserNetwork.UserNetworkOptions }
    | { readonly kind: "tap"; readonly options: Tap.TapOptions }
}

/** An address of one's own choosing (IEEE 802c) that is the same each time on this host. */
const addressOf = (index: number, argument: string): string => {
  const digest = createHash("sha256").update(`${hostname()} ${index} ${argument}`).digest()
  digest[0] = 0x02
  return formatMacAddress(digest)
}

const TAP_OPTIONS: ReadonlySet<string> = new Set(["mac", "bridge", "mtu"])

/** The interface that the argument describes, the `index`-th of the guest; text says what is wrong with it. */
export const parseNet = (argument: string, index: number): NetChoice | string => {
  const [kind = "", ...pieces] = argument.split(",")
  const [network = "", name] = kind.split("=", 2)
  const pairs = pieces.map((piece): [string, string] => {
    const at = piece.indexOf("=")
    return at < 0 ? [piece, ""] : [piece.slice(0, at), piece.slice(at + 1)]
  })
  const options = new Map(pairs)
  if ((network !== "user" && network !== "tap") || (network === "user" && name !== undefined)) {
    return `--net ${argument}: must be ${netSyntax}`
  }
  if (network === "user") {
    const user = parseUserNet(pairs.filter(([name]) => name !== "mac"))
    if (typeof user === "string") return `--net ${argument}: ${user}`
    const spec = { macAddress: options.get("mac") ?? addressOf(index, kind), enableBridge: false }
    return { spec, backend: { kind: "user", options: user } }
  }
  const unknown = [...options.keys()].find((option) => !TAP_OPTIONS.has(option))
  if (unknown !== undefined) return `--net ${argument}: ${network} has no option ${unknown}`
  const bridge = options.get("bridge")
  const mtu = options.get("mtu")
  if (mtu !== undefined && !/^\d{1,5}$/.test(mtu)) return `--net ${argument}: mtu must be a number`
  const spec = { macAddress: options.get("mac") ?? addressOf(index, kind), enableBridge: bridge !== undefined }
  return {
    spec,
    backend: {
      kind: "tap",
      options: {
        ...(name === undefined ? {} : { name }),
        ...(bridge === undefined ? {} : { bridge }),
        ...(mtu === undefined ? {} : { mtu: Number(mtu) })
      }
    }
  }
}

/** The network of a guest whose interfaces are connected as they were chosen. */
export const layerNets = (choices: ReadonlyArray<NetChoice>): Layer.Layer<NetBackend, FfiUnavailable> =>
  Layer.effect(
    NetBackend,
    Effect.gen(function*() {
      const backends: Array<NetBackend["Service"]> = []
      for (const { backend } of choices) {
        const layer: Layer.Layer<NetBackend, FfiUnavailable> = backend.kind === "tap"
          ? Tap.layer(backend.options)
          : UserNetwork.layer(backend.options)
        backends.push(Context.get(yield* Layer.build(layer), NetBackend))
      }
      return {
        open: (request) =>
          // Each of these networks has one interface: its first.
          backends[request.index]?.open({ ...request, index: 0 }) ??
            Effect.die(new Error(`${request.name} was not chosen`))
      }
    })
  )
