/**
 * All connections of one driver, from DRIVER_OK to its reset: which packet belongs to which connection, and whose turn it is to
 * send. Plain data that changes in turns of the device.
 *
 * What is sent goes in this order: RSTs that answer packets of no connection, control packets, data; data one packet from each
 * connection in turn, so that none waits longer than one packet of each other.
 */
import { HOST_CID } from "./Cid.ts"
import { Deque } from "./Deque.ts"
import { type ConnectionOwner, VsockConnection } from "./VsockConnection.ts"
import type { VsockShutdown } from "./VsockManager.ts"
import {
  HEADER_SIZE,
  Op,
  OP_MAX,
  VIRTIO_VSOCK_TYPE_SEQPACKET,
  VIRTIO_VSOCK_TYPE_STREAM,
  VsockHeader
} from "./VsockPacket.ts"
import { VsockPorts } from "./VsockPorts.ts"

/** The most connections of one guest. */
export const CONNECTIONS_MAX = 65_536
/** RSTs that wait for the guest's buffers. When there are more, no packets are taken from the guest until there is room. */
export const RESETS_WAITING_MAX = 1024
/** The most credit beyond each connection's first that all connections of a guest have together, in bytes. */
export const GROWTH_MAX = 64 * 2 ** 20
/** Connections that are over may fill a queue by this much beyond twice the number of those that are not. */
const QUEUE_SLACK = 64
/** How long a guest may take to confirm the end of a connection, in milliseconds. */
export const CLOSE_TIMEOUT_MILLIS = 5000

/** A chain of the guest that holds a packet. */
export interface IncomingPacket {
  readonly readableBytes: number
  readonly read: (position: number, target: Uint8Array) => number
}

/** A chain of the guest that takes a packet. */
export interface OutgoingPacket {
  readonly readableBytes: number
  readonly writableBytes: number
  readonly write: (position: number, source: Uint8Array) => number
}

/** What a session needs of its device. */
export interface SessionHost {
  readonly guestCid: number
  readonly hasSeqpacket: boolean
  /** The ports of the host. They outlive the session, as listeners do. */
  readonly hostPorts: VsockPorts
  readonly now: () => number
  /** Asks for a turn. */
  readonly signal: () => void
  /** Whether anybody decides about connections of the guest to this address. */
  readonly listens: (cid: number, port: number) => boolean
  /** The guest asks for a connection; somebody accepts, closes or resets it, later. */
  readonly arrived: (connection: VsockConnection) => void
  /** A connection waits until {@link CLOSE_TIMEOUT_MILLIS} from now for the guest's RST. */
  readonly closing: () => void
  /** A connection has ended. */
  readonly onShutdown: (shutdown: VsockShutdown) => void
}

/** Counters of one session. */
export interface SessionCounters {
  /** Chains of the guest that did not hold a whole header. */
  malformed: number
  /** Packets of the guest that were answered by a RST because they belong to no connection. */
  stray: number
}

/** The connections of one driver. */
export class VsockSession {
  readonly #host: SessionHost
  readonly #owner: ConnectionOwner
  /** By the local context ID, the local port, the guest's port. */
  readonly #connections = new Map<number, Map<number, Map<number, VsockConnection>>>()
  readonly #peerPorts = new Map<number, VsockPorts>()
  readonly #urgent = new Deque<VsockConnection>()
  readonly #ready = new Deque<VsockConnection>()
  readonly #resets = new Deque<Uint8Array>()
  /** Connections that wait for the guest's RST, those that wait longest first. */
  readonly #closing = new Deque<{ readonly connection: VsockConnection; readonly until: number }>()
  readonly #incoming = new VsockHeader()
  readonly #outgoing = new VsockHeader()
  #tasks: Array<() => void> = []
  #inTurn = false
  #growth = 0
  #ended = false
  /** The number of connections. */
  size = 0
  readonly counters: SessionCounters = { malformed: 0, stray: 0 }

  constructor(host: SessionHost) {
    this.#host = host
    this.#owner = {
      now: host.now,
      attention: (connection, urgent) => this.#attention(connection, urgent),
      later: (task) => {
        this.#tasks.push(task)
        if (!this.#inTurn) host.signal()
      },
      grow: (bytes) => {
        if (this.#growth + bytes > GROWTH_MAX) return false
        this.#growth += bytes
        return true
      },
      over: (connection, clean, reset) => this.#over(connection, clean, reset),
      closing: (connection) => {
        if (this.#closing.length > 2 * this.size + QUEUE_SLACK) {
          this.#closing.keep(({ connection }) => !connection.isOver)
        }
        this.#closing.push({ connection, until: host.now() + CLOSE_TIMEOUT_MILLIS })
        host.closing()
      }
    }
  }

  /** All connections. */
  connections(): ReadonlyArray<VsockConnection> {
    const all: Array<VsockConnection> = []
    for (const ports of this.#connections.values()) {
      for (const connections of ports.values()) all.push(...connections.values())
    }
    return all
  }

  /** The number of packets and of connections that wait for the guest's buffers. */
  get waiting(): number {
    return this.#resets.length + this.#urgent.length + this.#ready.length
  }

  /** The number of entries for connections that wait for the guest's RST, or have. */
  get closing(): number {
    return this.#closing.length
  }

  /** Whether packets of the guest can be taken: each may need a RST as its answer. */
  get hasRoomForResets(): boolean {
    return this.#resets.length < RESETS_WAITING_MAX
  }

  /** Whether anything waits to be sent. */
  get hasPackets(): boolean {
    return this.#resets.length > 0 || this.#first(this.#urgent) !== undefined || this.#first(this.#ready) !== undefined
  }

  /** A turn: what happens inside it wakes those who wait at its end. */
  turn(work: () => void): void {
    this.#inTurn = true
    try {
      work()
    } finally {
      this.#inTurn = false
      this.runTasks()
    }
  }

  /** Wakes those who wait. */
  runTasks(): void {
    while (this.#tasks.length > 0) {
      const tasks = this.#tasks
      this.#tasks = []
      for (const task of tasks) task()
    }
  }

  /** A connection to a guest's port, or why there is none. `localPort` undefined chooses one. */
  connect(
    type: "stream" | "seqpacket",
    localCid: number,
    localPort: number | undefined,
    guestPort: number
  ): VsockConnection | "NO_RESOURCES" | "ALREADY_EXISTS" | "CONNECTION_REFUSED" {
    if (this.#ended || (type === "seqpacket" && !this.#host.hasSeqpacket)) return "CONNECTION_REFUSED"
    if (this.size >= CONNECTIONS_MAX) return "NO_RESOURCES"
    const ports = this.#portsOf(localCid)
    const now = this.#host.now()
    const port = localPort ?? ports.findEphemeral(now)
    if (port === undefined) return "NO_RESOURCES"
    if (!ports.addConnection(port, guestPort, now)) return "ALREADY_EXISTS"
    const connection = new VsockConnection(
      this.#owner,
      type,
      { cid: localCid, port },
      { cid: this.#host.guestCid, port: guestPort },
      "ClientInitiated"
    )
    this.#add(connection)
    return connection
  }

  /** Takes a packet of the guest. */
  receive(chain: IncomingPacket): void {
    const header = this.#incoming
    if (chain.readableBytes < HEADER_SIZE || chain.read(0, header.bytes) < HEADER_SIZE) {
      this.counters.malformed++
      return
    }
    const { op } = header
    const type = header.type === VIRTIO_VSOCK_TYPE_STREAM
      ? "stream"
      : header.type === VIRTIO_VSOCK_TYPE_SEQPACKET && this.#host.hasSeqpacket
      ? "seqpacket"
      : undefined
    if (!header.hasShortCids || header.srcCid !== this.#host.guestCid || type === undefined) return this.#stray()
    const connection = this.#find(header.dstCid, header.dstPort, header.srcPort)
    if (op < Op.REQUEST || op > OP_MAX) {
      if (connection !== undefined) connection.reset()
      else this.#stray()
      return
    }
    if (connection === undefined) {
      if (op === Op.REQUEST && chain.readableBytes === HEADER_SIZE && header.len === 0) this.#open(type)
      else this.#stray()
      return
    }
    if (connection.type !== type) return connection.reset()
    connection.receive(header, chain.readableBytes - HEADER_SIZE, (place) => chain.read(HEADER_SIZE, place))
  }

  /**
   * Writes the next packet to a chain of the guest. Returns its length in bytes, or 0 when there is none, or the chain has no
   * room for it: the packet stays the next one then.
   */
  send(chain: OutgoingPacket): number {
    if (chain.readableBytes > 0 || chain.writableBytes < HEADER_SIZE) return 0
    const reset = this.#resets.shift()
    if (reset !== undefined) {
      chain.write(0, reset)
      return HEADER_SIZE
    }
    return this.#sendOf(this.#urgent, chain) || this.#sendOf(this.#ready, chain)
  }

  /** The number of milliseconds until {@link expire} has something to do, or `undefined` when nobody waits. */
  get expiresIn(): number | undefined {
    for (let first = this.#closing.peek(); first !== undefined; first = this.#closing.peek()) {
      if (!first.connection.isOver) return Math.max(0, first.until - this.#host.now())
      this.#closing.shift()
    }
    return undefined
  }

  /** Ends what has waited long enough for the guest. */
  expire(): void {
    while (this.expiresIn === 0) this.#closing.shift()?.connection.reset()
  }

  /** The driver is gone. */
  end(): void {
    this.#ended = true
    for (const connection of this.connections()) connection.lose()
    // No packet of this driver's connections can come any more.
    this.#host.hostPorts.releaseQuarantined()
    this.runTasks()
  }

  #portsOf(cid: number): VsockPorts {
    if (cid === HOST_CID) return this.#host.hostPorts
    const known = this.#peerPorts.get(cid)
    if (known !== undefined) return known
    const ports = new VsockPorts()
    this.#peerPorts.set(cid, ports)
    return ports
  }

  #find(localCid: number, localPort: number, guestPort: number): VsockConnection | undefined {
    return this.#connections.get(localCid)?.get(localPort)?.get(guestPort)
  }

  #add(connection: VsockConnection): void {
    const { cid, port } = connection.local
    let ports = this.#connections.get(cid)
    if (ports === undefined) {
      ports = new Map()
      this.#connections.set(cid, ports)
    }
    let connections = ports.get(port)
    if (connections === undefined) {
      connections = new Map()
      ports.set(port, connections)
    }
    connections.set(connection.peer.port, connection)
    this.size++
  }

  #over(connection: VsockConnection, clean: boolean, reset: boolean): void {
    const { local, peer } = connection
    const ports = this.#connections.get(local.cid)
    const connections = ports?.get(local.port)
    if (connections?.delete(peer.port) === true) this.size--
    if (connections?.size === 0) ports?.delete(local.port)
    if (ports?.size === 0) this.#connections.delete(local.cid)
    this.#growth -= connection.grown
    this.#host.onShutdown({ srcCid: local.cid, srcPort: local.port, dstCid: peer.cid, dstPort: peer.port })
    this.#portsOf(local.cid).removeConnection(local.port, peer.port, clean, this.#host.now())
    if (reset && !this.#ended) {
      const type = connection.type === "stream" ? VIRTIO_VSOCK_TYPE_STREAM : VIRTIO_VSOCK_TYPE_SEQPACKET
      this.#outgoing.set(local.cid, local.port, peer.cid, peer.port, type, Op.RST, 0)
      this.#queueReset()
    }
  }

  /** The guest asks for a connection. */
  #open(type: "stream" | "seqpacket"): void {
    const header = this.#incoming
    const local = { cid: header.dstCid, port: header.dstPort }
    const peer = { cid: header.srcCid, port: header.srcPort }
    if (this.size >= CONNECTIONS_MAX || !this.#host.listens(local.cid, local.port)) return this.#stray()
    if (!this.#portsOf(local.cid).addConnection(local.port, peer.port, this.#host.now())) return this.#stray()
    const connection = new VsockConnection(this.#owner, type, local, peer, "GuestInitiated")
    connection.openCredit(header)
    this.#add(connection)
    this.#host.arrived(connection)
  }

  /** Answers the packet that was read last by a RST, unless it is one. */
  #stray(): void {
    const header = this.#incoming
    if (header.op === Op.RST) return
    this.counters.stray++
    this.#outgoing.set(header.dstCid, header.dstPort, header.srcCid, header.srcPort, header.type, Op.RST, 0)
    this.#queueReset()
  }

  #queueReset(): void {
    this.#resets.push(this.#outgoing.bytes.slice())
    if (!this.#inTurn) this.#host.signal()
  }

  #attention(connection: VsockConnection, urgent: boolean): void {
    if (urgent ? connection.isUrgent : connection.isReady) return
    const queue = urgent ? this.#urgent : this.#ready
    // A guest that gives no buffers, and opens and resets connections, must not fill the queues with those that are over.
    if (queue.length > 2 * this.size + QUEUE_SLACK) queue.keep((waiting) => !waiting.isOver)
    if (urgent) {
      connection.isUrgent = true
      this.#urgent.push(connection)
    } else {
      connection.isReady = true
      this.#ready.push(connection)
    }
    if (!this.#inTurn) this.#host.signal()
  }

  /** The first connection of a queue that has something to send. Those before it leave the queue. */
  #first(queue: Deque<VsockConnection>): VsockConnection | undefined {
    for (let connection = queue.peek(); connection !== undefined; connection = queue.peek()) {
      if (connection.wants !== undefined) return connection
      this.#leave(queue)
    }
    return undefined
  }

  #leave(queue: Deque<VsockConnection>): void {
    const connection = queue.shift()
    if (connection === undefined) return
    if (queue === this.#urgent) connection.isUrgent = false
    else connection.isReady = false
  }

  #sendOf(queue: Deque<VsockConnection>, chain: OutgoingPacket): number {
    const header = this.#outgoing
    const connection = this.#first(queue)
    const length = connection?.next(header, chain.writableBytes - HEADER_SIZE) ?? -1
    if (connection === undefined || length < 0) return 0
    this.#leave(queue)
    chain.write(0, header.bytes)
    if (header.op === Op.RW) {
      const data = connection.nextData(length)
      if (data !== undefined && length > 0) chain.write(HEADER_SIZE, data)
      connection.sentData(length)
    }
    const { wants } = connection
    if (wants !== undefined) this.#attention(connection, wants === "control")
    return HEADER_SIZE + length
  }
}
