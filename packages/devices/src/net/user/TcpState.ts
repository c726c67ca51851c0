/**
 * What a TCP connection of the guest is told about and tells: its states, its limits, its peer, and the next segment to send.
 */

/** Bytes of each direction of a connection that may wait. */
export const TCP_BUFFER_DEFAULT = 0x8_0000
/** The window scale that is offered. */
export const TCP_WINDOW_SCALE = 7
/** The least segment size that is used, whatever a peer says. */
export const TCP_MSS_MIN = 64
/** How long a connection that is over is remembered, in milliseconds. */
export const TCP_TIME_WAIT = 10_000
/** How long a connection is left in peace before the guest is asked whether it is still there, in milliseconds. */
export const TCP_KEEPALIVE = 120_000
/** How long the host may take to connect, in milliseconds. */
export const TCP_OPENING_MAX = 130_000
/** Repetitions without an answer after which a connection is given up. */
export const TCP_RETRIES_MAX = 12
/** Repetitions of a segment with SYN after which a connection is given up. */
export const TCP_SYN_RETRIES_MAX = 5

/** Where a connection is. Its end is told by what has been sent and received. */
export const TcpState = {
  /** The guest has asked; the host has not connected yet. Nothing was sent. */
  OPENING: 0,
  /** A segment with SYN and ACK is to be sent, or was. */
  SYN_RECEIVED: 1,
  /** A segment with SYN is to be sent, or was: the host asks. */
  SYN_SENT: 2,
  /** Connected, in one direction at least. */
  OPEN: 3,
  /** Over; late segments are still answered. */
  TIME_WAIT: 4,
  /** Over and to be forgotten. */
  CLOSED: 5
} as const

/** The host's end of a connection. None of it calls back at once. */
export interface TcpPeer {
  /** Takes bytes, which do not change any more. */
  readonly write: (bytes: Uint8Array) => void
  /** No more bytes will be written. */
  readonly end: () => void
  /** The connection is over at once, in both directions. */
  readonly reset: () => void
  /** No more bytes are wanted for now; a few that are on their way may still come. */
  readonly pause: () => void
  readonly resume: () => void
}

/** What to send. One object is used again and again. */
export class TcpPlan {
  flags = 0
  sequence = 0
  acknowledgment = 0
  window = 0
  /** Where in the connection's queue the payload begins. */
  offset = 0
  length = 0
  /** For a segment with SYN: the window scale to offer, or -1. */
  windowScale = -1
}

/** Limits of one connection. */
export interface TcpLimits {
  /** Bytes of each direction that may wait. May change; what was promised to the guest holds all the same. */
  readonly buffer: number
  /** The largest segment that fits the link. */
  readonly mss: number
}
