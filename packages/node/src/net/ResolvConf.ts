/**
 * The name servers of this host: the list in `/etc/resolv.conf` (resolv.conf(5)), read again when the file has changed.
 */
import type { HostEndpoint } from "@troupe/devices/net/user/HostSockets"
import { readFileSync, statSync } from "node:fs"
import { isIP } from "node:net"

/** Where the list is. */
export const RESOLV_CONF = "/etc/resolv.conf"
/** The port of name servers. */
const DNS_PORT = 53
/** As many as the C library asks. */
const NAMESERVERS_MAX = 3

/** The name servers that a file lists. */
export const parseResolvConf = (text: string): ReadonlyArray<HostEndpoint> =>
  text.split("\n").flatMap((line) => {
    const [keyword, address] = line.trim().split(/\s+/)
    return keyword === "nameserver" && address !== undefined && isIP(address.split("%")[0] ?? "") !== 0
      ? [{ address, port: DNS_PORT }]
      : []
  }).slice(0, NAMESERVERS_MAX)

/** Gives the name servers that a file lists now. A file that cannot be read lists none. */
export const makeResolvConf = (path: string): () => ReadonlyArray<HostEndpoint> => {
  let read: { readonly changed: number; readonly servers: ReadonlyArray<HostEndpoint> } | undefined
  return () => {
    try {
      const changed = statSync(path).mtimeMs
      if (read === undefined || read.changed !== changed) {
        read = { changed, servers: parseResolvConf(readFileSync(path, "utf8")) }
      }
      return read.servers
    } catch {
      return []
    }
  }
}
