/** The state machine of a connection, as data: what each operation of the guest leads to in each state. */
import { Op } from "./VsockPacket.ts"

/**
 * - `GuestInitiated`: the guest has asked, and an acceptor decides
 * - `ClientInitiated`: the host has asked, and the guest decides
 * - `ReadWrite`: open, in both directions or one
 * - `ClientInitiatedShutdown`: the host has ended it, and waits for the guest's RST
 * - `GuestInitiatedShutdown`: the guest has ended it, and waits for the host's RST
 * - `ShutdownClean`: over, and both sides know
 * - `ShutdownForced`: over, and the guest is told by a RST
 */
export type ConnectionState =
  | "GuestInitiated"
  | "ClientInitiated"
  | "ReadWrite"
  | "ClientInitiatedShutdown"
  | "GuestInitiatedShutdown"
  | "ShutdownClean"
  | "ShutdownForced"

/** What an operation leads to; what is not in the table leads to `ShutdownForced`. */
const TRANSITIONS: { readonly [state in ConnectionState]: { readonly [op: number]: ConnectionState } } = {
  GuestInitiated: {
    [Op.SHUTDOWN]: "GuestInitiatedShutdown"
  },
  ClientInitiated: {
    [Op.RESPONSE]: "ReadWrite",
    [Op.SHUTDOWN]: "GuestInitiatedShutdown"
  },
  ReadWrite: {
    [Op.RW]: "ReadWrite",
    [Op.CREDIT_UPDATE]: "ReadWrite",
    [Op.CREDIT_REQUEST]: "ReadWrite",
    // Or to GuestInitiatedShutdown, once both directions are shut down: see `afterShutdown`.
    [Op.SHUTDOWN]: "ReadWrite"
  },
  ClientInitiatedShutdown: {
    [Op.RST]: "ShutdownClean",
    // What the guest sent before it heard of the end.
    [Op.RW]: "ClientInitiatedShutdown",
    [Op.CREDIT_UPDATE]: "ClientInitiatedShutdown",
    [Op.CREDIT_REQUEST]: "ClientInitiatedShutdown"
  },
  GuestInitiatedShutdown: {
    [Op.SHUTDOWN]: "GuestInitiatedShutdown"
  },
  ShutdownClean: {},
  ShutdownForced: {}
}

/** The state after an operation of the guest. The two last states stay what they are. */
export const afterOp = (state: ConnectionState, op: number): ConnectionState =>
  state === "ShutdownClean" || state === "ShutdownForced" ? state : TRANSITIONS[state][op] ?? "ShutdownForced"
