/** The options of `--net user`: who the guest may talk to, and ports of the host that lead to it. */
import { allowNetworks, allowNothing, allowPublic, type NetPolicy } from "@troupe/devices/net/user/NetPolicy"
import type { PortForward } from "@troupe/devices/net/user/UserNetPlan"
import { isIPv4 } from "node:net"
import type { UserNetworkOptions } from "../net/UserNetwork.ts"

/** How the options are written, for help texts. */
export const userNetSyntax = "[,allow=networks|public|nothing][,forward=[tcp|udp:][ADDRESS:]PORT:GUEST-PORT]..."

/** Where the host listens when the argument names no address: only this host reaches it. */
const FORWARD_ADDRESS = "127.0.0.1"

const policies: ReadonlyMap<string, NetPolicy> = new Map([
  ["networks", allowNetworks],
  ["public", allowPublic],
  ["nothing", allowNothing]
])

const portOf = (text: string | undefined, least: number): number | undefined => {
  const port = text !== undefined && /^\d{1,5}$/.test(text) ? Number(text) : -1
  return port >= least && port <= 0xffff ? port : undefined
}

/** `tcp:127.0.0.1:8080:80` as a forwarded port; `undefined` when it is none. */
const parseForward = (text: string): PortForward | undefined => {
  const pieces = text.split(":")
  const protocol = pieces[0] === "udp" ? "udp" : "tcp"
  if (pieces[0] === "udp" || pieces[0] === "tcp") pieces.shift()
  const guestPort = portOf(pieces.pop(), 1)
  const port = portOf(pieces.pop(), 0)
  const address = pieces.length === 0 ? FORWARD_ADDRESS : pieces[0] ?? ""
  if (guestPort === undefined || port === undefined || pieces.length > 1 || !isIPv4(address)) return undefined
  return { protocol, host: { address, port }, guestPort }
}

/** The network that options describe, each as `name=value`; text says what is wrong with them. */
export const parseUserNet = (
  options: ReadonlyArray<readonly [name: string, value: string]>
): UserNetworkOptions | string => {
  const forwards: Array<PortForward> = []
  let policy: NetPolicy | undefined
  for (const [name, value] of options) {
    if (name === "forward") {
      const forward = parseForward(value)
      if (forward === undefined) return `${value} is not a port to forward: [tcp|udp:][ADDRESS:]PORT:GUEST-PORT`
      forwards.push(forward)
    } else if (name === "allow") {
      policy = policies.get(value)
      if (policy === undefined) return `allow is one of ${[...policies.keys()].join(", ")}`
    } else {
      return `user has no option ${name}`
    }
  }
  return { ...(policy === undefined ? {} : { policy }), ...(forwards.length === 0 ? {} : { forwards }) }
}
