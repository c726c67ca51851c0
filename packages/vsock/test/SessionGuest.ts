/** A session without a device, and the guest's side of it packet by packet: what a test says is what the wire has. */
import type { VsockConnection } from "../src/VsockConnection.ts"
import { HEADER_SIZE, Op, VIRTIO_VSOCK_TYPE_STREAM, VsockHeader } from "../src/VsockPacket.ts"
import { VsockPorts } from "../src/VsockPorts.ts"
import { VsockSession } from "../src/VsockSession.ts"

export const GUEST_CID = 3

export interface Packet {
  readonly srcCid: number
  readonly srcPort: number
  readonly dstCid: number
  readonly dstPort: number
  readonly type: number
  readonly op: number
  readonly flags: number
  readonly len: number
  readonly bufAlloc: number
  readonly fwdCnt: number
  readonly data: Uint8Array
}

/** What of a packet a test says; the rest is that of a well-behaved guest, from its port 1000 to the host's port 1. */
export type PacketInput = Partial<Packet> & { readonly op: number }

export class SessionGuest {
  time = 0
  /** Ports with a listener. */
  readonly listening = new Set([1])
  readonly arrived: Array<VsockConnection> = []
  readonly hostPorts = new VsockPorts()
  readonly shutdowns: Array<{ readonly srcPort: number; readonly dstPort: number }> = []
  readonly session: VsockSession
  /** Bytes that each of the guest's receive buffers takes. */
  bufferSize = 4096
  readonly #header = new VsockHeader()
  #buffer = new Uint8Array(0)

  constructor(options: { readonly hasSeqpacket?: boolean } = {}) {
    this.session = new VsockSession({
      guestCid: GUEST_CID,
      hasSeqpacket: options.hasSeqpacket ?? true,
      hostPorts: this.hostPorts,
      now: () => this.time,
      signal: () => {},
      listens: (cid, port) => cid === 2 && this.listening.has(port),
      arrived: (connection) => void this.arrived.push(connection),
      closing: () => {},
      onShutdown: (shutdown) => void this.shutdowns.push(shutdown)
    })
  }

  /** The guest sends a packet. */
  send(packet: PacketInput): void {
    const data = packet.data ?? new Uint8Array(0)
    const header = this.#header
    header.set(
      packet.srcCid ?? GUEST_CID,
      packet.srcPort ?? 1000,
      packet.dstCid ?? 2,
      packet.dstPort ?? 1,
      packet.type ?? VIRTIO_VSOCK_TYPE_STREAM,
      packet.op,
      packet.flags ?? 0
    )
    header.len = packet.len ?? data.length
    header.setCredit(packet.bufAlloc ?? 0x4_0000, packet.fwdCnt ?? 0)
    const bytes = new Uint8Array(HEADER_SIZE + data.length)
    bytes.set(header.bytes)
    bytes.set(data, HEADER_SIZE)
    this.sendBytes(bytes)
  }

  /** The guest sends a chain with these bytes. */
  sendBytes(bytes: Uint8Array): void {
    this.session.turn(() =>
      this.session.receive({
        readableBytes: bytes.length,
        read: (position, target) => {
          const part = bytes.subarray(position, position + target.length)
          target.set(part)
          return part.length
        }
      })
    )
  }

  /** Takes what the host sends, at most so many packets. */
  receive(limit = Number.POSITIVE_INFINITY): ReadonlyArray<Packet> {
    const packets: Array<Packet> = []
    this.session.turn(() => {
      const buffer = this.#buffer.length === this.bufferSize ? this.#buffer : new Uint8Array(this.bufferSize)
      this.#buffer = buffer
      while (packets.length < limit && this.session.hasPackets) {
        const written = this.session.send({
          readableBytes: 0,
          writableBytes: buffer.length,
          write: (position, source) => {
            const part = source.subarray(0, buffer.length - position)
            buffer.set(part, position)
            return part.length
          }
        })
        if (written === 0) throw new Error("a buffer came back empty")
        packets.push(parse(buffer.subarray(0, written)))
      }
    })
    return packets
  }

  /** Opens a connection of the guest, as its host accepts it. */
  open(packet: Partial<Packet> = {}): VsockConnection {
    this.send({ ...packet, op: Op.REQUEST })
    const connection = this.arrived.at(-1)
    if (connection === undefined || !connection.accept()) throw new Error("the connection was not opened")
    const [response] = this.receive()
    if (response?.op !== Op.RESPONSE) throw new Error("the connection was not answered")
    return connection
  }
}

const header = new VsockHeader()

const parse = (bytes: Uint8Array): Packet => {
  header.bytes.set(bytes.subarray(0, HEADER_SIZE))
  return {
    srcCid: header.srcCid,
    srcPort: header.srcPort,
    dstCid: header.dstCid,
    dstPort: header.dstPort,
    type: header.type,
    op: header.op,
    flags: header.flags,
    len: header.len,
    bufAlloc: header.bufAlloc,
    fwdCnt: header.fwdCnt,
    data: bytes.slice(HEADER_SIZE)
  }
}
