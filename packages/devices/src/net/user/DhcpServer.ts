/**
 * The DHCP server of a network with one guest: there is one address, and it is always that guest's.
 */
import {
  DHCP_ACK,
  DHCP_DISCOVER,
  DHCP_INFORM,
  DHCP_NAK,
  DHCP_OFFER,
  DHCP_REQUEST,
  DhcpOption,
  type DhcpReply,
  type DhcpRequest,
  dhcpU16
} from "./Dhcp.ts"
import { ipv4Mask } from "./Ipv4.ts"
import type { UserNetPlan } from "./UserNetPlan.ts"

/** How long an address is lent, in seconds. It is there as long as the machine, so this only bounds how often it is asked for. */
export const DHCP_LEASE_TIME = 86_400
/** The most bytes of a name in an option. */
const NAME_MAX = 255

const text = (value: string): Uint8Array =>
  Uint8Array.from(value.slice(0, NAME_MAX), (character) => character.charCodeAt(0))

const configuration = (plan: UserNetPlan): DhcpReply["options"] => [
  [DhcpOption.SUBNET_MASK, ipv4Mask(plan.subnet.prefix)],
  [DhcpOption.ROUTER, plan.gateway],
  [DhcpOption.DOMAIN_NAME_SERVER, plan.nameserver],
  [DhcpOption.BROADCAST_ADDRESS, plan.broadcast],
  [DhcpOption.INTERFACE_MTU, dhcpU16(plan.mtu)],
  ...(plan.hostname === "" ? [] : [[DhcpOption.HOST_NAME, text(plan.hostname)] as const]),
  ...(plan.domain === "" ? [] : [[DhcpOption.DOMAIN_NAME, text(plan.domain)] as const])
]

/** The answer to a request, or `undefined` when there is none (RFC 2131, section 4.3). */
export const answerDhcp = (request: DhcpRequest, plan: UserNetPlan): DhcpReply | undefined => {
  const base = {
    transaction: request.transaction,
    clientAddress: request.clientAddress,
    serverAddress: plan.gateway,
    hardwareAddress: request.hardwareAddress
  }
  const lease: DhcpReply["options"] = [[DhcpOption.LEASE_TIME, DHCP_LEASE_TIME], ...configuration(plan)]
  switch (request.messageType) {
    case DHCP_DISCOVER:
      return { ...base, messageType: DHCP_OFFER, yourAddress: plan.guest, options: lease }
    case DHCP_REQUEST: {
      if (request.serverIdentifier !== 0 && request.serverIdentifier !== plan.gateway) return undefined
      const wanted = request.requestedAddress === 0 ? request.clientAddress : request.requestedAddress
      return wanted === plan.guest
        ? { ...base, messageType: DHCP_ACK, yourAddress: plan.guest, options: lease }
        : { ...base, clientAddress: 0, messageType: DHCP_NAK, yourAddress: 0, options: [] }
    }
    case DHCP_INFORM:
      return { ...base, messageType: DHCP_ACK, yourAddress: 0, options: configuration(plan) }
    default:
      return undefined
  }
}
