/**
 * What a user-mode network needs of the world around it, as plain calls: time, chance, sockets, and somebody who decides.
 */
import type { HostSockets } from "./HostSockets.ts"
import type { NetConnection, NetDecision } from "./NetPolicy.ts"

/** The world around a network. Everything that is asked is answered by a call into the network, at any later moment. */
export interface UserNetHost {
  /** Milliseconds that only grow. */
  readonly now: () => number
  /** 32 bits that nobody can foretell. */
  readonly random32: () => number
  readonly sockets: HostSockets["Service"]
  /** Has a connection decided. `answer` is called once, perhaps at once. Returns what gives the question up. */
  readonly decide: (connection: NetConnection, answer: (decision: NetDecision) => void) => () => void
  /** `tick` is to be called at this time or earlier, in milliseconds of {@link now}. */
  readonly wakeAt: (time: number) => void
}
