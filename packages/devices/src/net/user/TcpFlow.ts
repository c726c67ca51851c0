/**
 * A TCP connection of the guest together with its ends and its socket, and the table that finds it by its ends.
 */
import type { HostSocketFailure, HostTcp, HostTcpEvents } from "./HostSockets.ts"
import type { TcpConnection } from "./TcpConnection.ts"
import type { TcpPeer } from "./TcpState.ts"
import type { Ends } from "./UserLink.ts"

/** Who looks after connections. */
export interface TcpFlowOwner {
  /** Milliseconds that only grow. */
  readonly now: () => number
  /** Something has happened to a connection. */
  readonly changed: (flow: TcpFlow) => void
  /** Its socket has failed. */
  readonly failed: (flow: TcpFlow, failure: HostSocketFailure) => void
}

/** A connection with its two ends. */
export class TcpFlow implements Ends, HostTcpEvents {
  readonly guestMac: Uint8Array
  readonly guestAddress: number
  readonly guestPort: number
  readonly remoteAddress: number
  readonly remotePort: number
  readonly connection: TcpConnection
  /** The next flow of the same hash. */
  next: TcpFlow | undefined
  /** The next flow that has something for the guest; the flow itself when it is the last. */
  nextReady: TcpFlow | undefined
  socket: HostTcp | undefined
  /** Whether the policy has answered. */
  decided = false
  /** Gives up the question to the policy. */
  giveUp: (() => void) | undefined
  /** When the socket is closed in any case, once the connection is over. */
  lingerUntil = Number.POSITIVE_INFINITY
  readonly #owner: TcpFlowOwner

  constructor(owner: TcpFlowOwner, ends: Ends, connection: TcpConnection) {
    this.#owner = owner
    this.guestMac = ends.guestMac
    this.guestAddress = ends.guestAddress
    this.guestPort = ends.guestPort
    this.remoteAddress = ends.remoteAddress
    this.remotePort = ends.remotePort
    this.connection = connection
  }

  readonly connected = (): void => {
    this.connection.opened(this.#owner.now())
    this.#owner.changed(this)
  }
  readonly data = (bytes: Uint8Array): void => {
    this.connection.hostData(bytes, this.#owner.now())
    this.#owner.changed(this)
  }
  readonly end = (): void => {
    this.connection.hostEnd()
    this.#owner.changed(this)
  }
  readonly written = (bytes: number): void => {
    this.connection.hostWritten(bytes)
    this.#owner.changed(this)
  }
  readonly failed = (failure: HostSocketFailure): void => {
    this.socket = undefined
    this.#owner.failed(this, failure)
  }
  readonly closed = (): void => {
    this.socket = undefined
    this.#owner.changed(this)
  }
}

/** The socket of a flow as its connection sees it, for as long as there is one. */
export const peerOf = (flow: TcpFlow): TcpPeer => ({
  write: (bytes) => flow.socket?.write(bytes),
  end: () => flow.socket?.end(),
  reset: () => {
    flow.socket?.reset()
    flow.socket = undefined
  },
  pause: () => flow.socket?.pause(),
  resume: () => flow.socket?.resume()
})

const hashOf = (guestAddress: number, guestPort: number, remoteAddress: number, remotePort: number): number =>
  Math.imul(remoteAddress, 0x9e37_79b1) ^ Math.imul((guestPort << 16) | remotePort, 0x85eb_ca6b) ^ guestAddress

const isSame = (a: Ends, b: Ends): boolean =>
  a.remotePort === b.remotePort && a.guestPort === b.guestPort && a.remoteAddress === b.remoteAddress &&
  a.guestAddress === b.guestAddress

/** Connections by their ends. The guest chooses the ends, so what has the same hash is a list, as long as there are connections. */
export class TcpFlowTable {
  readonly #flows = new Map<number, TcpFlow>()

  /** The connection with these ends. */
  find(ends: Ends): TcpFlow | undefined {
    let flow = this.#flows.get(hashOf(ends.guestAddress, ends.guestPort, ends.remoteAddress, ends.remotePort))
    while (flow !== undefined && !isSame(flow, ends)) flow = flow.next
    return flow
  }

  /** Puts a connection in. */
  add(flow: TcpFlow): void {
    const hash = hashOf(flow.guestAddress, flow.guestPort, flow.remoteAddress, flow.remotePort)
    flow.next = this.#flows.get(hash)
    this.#flows.set(hash, flow)
  }

  /** Takes a connection out, if it is there, so that its ends can be used again. */
  remove(flow: TcpFlow): void {
    const hash = hashOf(flow.guestAddress, flow.guestPort, flow.remoteAddress, flow.remotePort)
    const first = this.#flows.get(hash)
    if (first === flow) {
      if (flow.next === undefined) this.#flows.delete(hash)
      else this.#flows.set(hash, flow.next)
    } else {
      let before = first
      while (before !== undefined && before.next !== flow) before = before.next
      if (before !== undefined) before.next = flow.next
    }
    flow.next = undefined
  }

  /** Takes all out. */
  clear(): void {
    this.#flows.clear()
  }
}
