/**
 * The addresses and limits of a user-mode network: what a host chooses, checked, and what follows from it.
 */
import { MTU_DEFAULT, MTU_MAX } from "@troupe/core/NetBackend"
import * as Result from "effect/Result"
import type { HostEndpoint } from "./HostSockets.ts"
import { type Ipv4Block, ipv4Mask, parseIpv4Block } from "./Ipv4.ts"
import { TCP_BUFFER_DEFAULT } from "./TcpState.ts"

/** The addresses of the network when the host does not choose: QEMU's, so that habits fit. */
export const USER_NET_SUBNET = "10.0.2.0/24"
/** The bytes in which all TCP connections may have something wait when the host does not choose. */
export const TCP_MEMORY_DEFAULT = 0x400_0000
/** The least bytes that each direction of a connection gets, however many there are. */
export const TCP_BUFFER_MIN = 0x4000
/** The least MTU: what every IPv4 host takes (RFC 791). */
export const USER_NET_MTU_MIN = 576

/** A port of the host whose connections go to the guest. */
export interface PortForward {
  readonly protocol: "tcp" | "udp"
  /** Where the host listens. A port of 0 is any free one. */
  readonly host: HostEndpoint
  readonly guestPort: number
}

/** What a host may choose. */
export interface UserNetOptions {
  /** The network, at most 29 bits: the second address is the gateway, the third the name server, the fifteenth or last the guest. */
  readonly subnet?: string
  /** The largest IP packet in bytes, {@link USER_NET_MTU_MIN} to 65535. Default: 1500. */
  readonly mtu?: number
  /** The name that the guest is told. Default: none. */
  readonly hostname?: string
  /** The domain that the guest is told. Default: none. */
  readonly domain?: string
  /** Ports of the host that lead to the guest. Default: none. */
  readonly forwards?: ReadonlyArray<PortForward>
  /** The most TCP connections at once. Default: 1024. */
  readonly tcpConnections?: number
  /** The most pairs of UDP ports that talk at once. Default: 512. */
  readonly udpFlows?: number
  /** The most bytes that wait in each direction of a TCP connection. Default: 512 KiB. */
  readonly tcpBuffer?: number
  /**
   * The bytes that all TCP connections together are given to wait in: the more there are, the less each gets, down to
   * {@link TCP_BUFFER_MIN}. Default: 64 MiB.
   */
  readonly tcpMemory?: number
}

/** A network. Addresses are 32-bit numbers. */
export interface UserNetPlan {
  readonly subnet: Ipv4Block
  readonly gateway: number
  readonly nameserver: number
  readonly guest: number
  readonly broadcast: number
  readonly mtu: number
  readonly hostname: string
  readonly domain: string
  readonly tcpConnections: number
  readonly udpFlows: number
  readonly tcpBuffer: number
  readonly tcpMemory: number
}

const isCount = (value: number, from: number, to: number): boolean =>
  Number.isInteger(value) && value >= from && value <= to

/** Checks what a host has chosen. Fails with what is wrong. */
export const planUserNet = (options: UserNetOptions): Result.Result<UserNetPlan, string> => {
  const text = options.subnet ?? USER_NET_SUBNET
  const subnet = parseIpv4Block(text)
  if (subnet === undefined || subnet.prefix < 8 || subnet.prefix > 29) {
    return Result.fail(`the subnet ${JSON.stringify(text)} is not a network of 8 to 29 bits, such as 10.0.2.0/24`)
  }
  const mtu = options.mtu ?? MTU_DEFAULT
  if (!isCount(mtu, USER_NET_MTU_MIN, MTU_MAX)) {
    return Result.fail(`an MTU of ${mtu} is not from ${USER_NET_MTU_MIN} to ${MTU_MAX}`)
  }
  const tcpConnections = options.tcpConnections ?? 1024
  const udpFlows = options.udpFlows ?? 512
  const tcpBuffer = options.tcpBuffer ?? TCP_BUFFER_DEFAULT
  const tcpMemory = options.tcpMemory ?? TCP_MEMORY_DEFAULT
  if (!isCount(tcpConnections, 1, 65_536)) return Result.fail("tcpConnections is not from 1 to 65536")
  if (!isCount(udpFlows, 1, 65_536)) return Result.fail("udpFlows is not from 1 to 65536")
  if (!isCount(tcpBuffer, 0x1000, 0x100_0000)) return Result.fail("tcpBuffer is not from 4 KiB to 16 MiB")
  if (!isCount(tcpMemory, 0, Number.MAX_SAFE_INTEGER)) return Result.fail("tcpMemory is not a number of bytes")
  for (const forward of options.forwards ?? []) {
    if (!isCount(forward.guestPort, 1, 65_535)) {
      return Result.fail(`there is no port ${forward.guestPort} to forward to`)
    }
    if (!isCount(forward.host.port, 0, 65_535)) return Result.fail(`there is no port ${forward.host.port} to listen on`)
  }
  const broadcast = (subnet.base | ~ipv4Mask(subnet.prefix)) >>> 0
  return Result.succeed({
    subnet,
    gateway: subnet.base + 2,
    nameserver: subnet.base + 3,
    guest: Math.min(subnet.base + 15, broadcast - 1),
    broadcast,
    mtu,
    hostname: options.hostname ?? "",
    domain: options.domain ?? "",
    tcpConnections,
    udpFlows,
    tcpBuffer,
    tcpMemory
  })
}
