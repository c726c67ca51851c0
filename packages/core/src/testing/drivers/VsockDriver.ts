/**
 * A driver of the socket device (virtio 1.3, section 5.10), as a guest's kernel has it: packets, and stream connections that keep to
 * their credit.
 */
import type { GuestCpu, GuestRoutine } from "../GuestCpu.ts"
import { startVirtioMmio, type VirtioMmioDriver, type VirtioMmioPlace } from "./VirtioMmioDriver.ts"

/** Size of the header of a packet. */
export const VSOCK_DRIVER_HEADER_SIZE = 44
/** `op` of packets. */
export const VsockDriverOp = {
  REQUEST: 1,
  RESPONSE: 2,
  RST: 3,
  SHUTDOWN: 4,
  RW: 5,
  CREDIT_UPDATE: 6,
  CREDIT_REQUEST: 7
} as const

const RECEIVE = 0
const TRANSMIT = 1
const HOST_CID = 2
const STREAM = 1
const SHUTDOWN_BOTH = 3
const SEQPACKET_FEATURE = 2
/** Room for three queues of at most 64 entries. */
const QUEUES_SIZE = 0x8000

/** A packet without its data. */
export interface VsockDriverPacket {
  readonly srcCid: number
  readonly dstCid: number
  readonly srcPort: number
  readonly dstPort: number
  readonly type: number
  readonly op: number
  readonly flags: number
  readonly bufAlloc: number
  readonly fwdCnt: number
  readonly data: Uint8Array
}

/** What a driver wants. */
export interface VsockDriverOptions {
  /** First address of guest memory for queues and packets, a multiple of 4096. */
  readonly memoryAddress: number
  /** Buffers for packets in each direction. Default: 8. */
  readonly buffers?: number
  /** Bytes of each buffer. Default: 4096. */
  readonly bufferSize?: number
}

/** Initialises the device. Throws where it refuses. */
export function* startVsock(
  cpu: GuestCpu,
  place: VirtioMmioPlace,
  options: VsockDriverOptions
): GuestRoutine<VsockDriver> {
  const buffers = options.buffers ?? 8
  const driver = yield* startVirtioMmio(cpu, place, {
    memoryAddress: options.memoryAddress,
    queueSizes: [Math.min(64, 2 * buffers), Math.min(64, 2 * buffers), 4],
    features: { low: SEQPACKET_FEATURE, high: 0 }
  })
  const [cid = 0] = yield* driver.configuration(cpu, [{ offset: 0, size: 4 }])
  const vsock = new VsockDriver(driver, cid, options.memoryAddress + QUEUES_SIZE, buffers, options.bufferSize ?? 4096)
  yield* vsock.refill(cpu)
  return vsock
}

/** A socket device that a driver has made ready. */
export class VsockDriver {
  readonly device: VirtioMmioDriver
  /** The guest's context ID. */
  readonly cid: number
  readonly #bufferSize: number
  readonly #receiveAddress: number
  readonly #transmitAddress: number
  /** Buffers that are not the device's, by number. */
  readonly #freeReceive: Array<number>
  readonly #freeTransmit: Array<number>
  /** Which buffer a chain is, by the head of the chain. */
  readonly #receiving = new Map<number, number>()
  readonly #transmitting = new Map<number, number>()

  constructor(device: VirtioMmioDriver, cid: number, address: number, buffers: number, bufferSize: number) {
    this.device = device
    this.cid = cid
    this.#bufferSize = bufferSize
    this.#receiveAddress = address
    this.#transmitAddress = address + buffers * bufferSize
    this.#freeReceive = Array.from({ length: buffers }, (_, index) => index)
    this.#freeTransmit = this.#freeReceive.slice()
  }

  /** Gives the device all buffers for packets that it does not have. */
  *refill(cpu: GuestCpu): GuestRoutine {
    const queue = this.device.queue(RECEIVE)
    for (let buffer = this.#freeReceive.pop(); buffer !== undefined; buffer = this.#freeReceive.pop()) {
      const address = this.#receiveAddress + buffer * this.#bufferSize
      const head = queue.add([{ address, length: this.#bufferSize, writable: true }])
      if (head === undefined) {
        this.#freeReceive.push(buffer)
        break
      }
      this.#receiving.set(head, buffer)
    }
    if (queue.publish()) yield* this.device.notify(cpu, RECEIVE)
  }

  /** Sends a packet. Waits for a buffer when the device has all of them. */
  *send(cpu: GuestCpu, packet: Partial<VsockDriverPacket> & { readonly op: number }): GuestRoutine {
    const data = packet.data ?? new Uint8Array(0)
    if (VSOCK_DRIVER_HEADER_SIZE + data.length > this.#bufferSize) throw new RangeError("a packet larger than a buffer")
    let buffer = this.#freeTransmit.pop()
    while (buffer === undefined) {
      const used = yield* this.device.receive(cpu, TRANSMIT)
      buffer = this.#transmitting.get(used.head)
      this.#transmitting.delete(used.head)
    }
    const address = this.#transmitAddress + buffer * this.#bufferSize
    const bytes = cpu.memory.slice(address, VSOCK_DRIVER_HEADER_SIZE + data.length)
    if (bytes === undefined) throw new RangeError("a buffer outside memory")
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
    bytes.fill(0, 0, VSOCK_DRIVER_HEADER_SIZE)
    view.setUint32(0, packet.srcCid ?? this.cid, true)
    view.setUint32(8, packet.dstCid ?? HOST_CID, true)
    view.setUint32(16, packet.srcPort ?? 0, true)
    view.setUint32(20, packet.dstPort ?? 0, true)
    view.setUint32(24, data.length, true)
    view.setUint16(28, packet.type ?? STREAM, true)
    view.setUint16(30, packet.op, true)
    view.setUint32(32, packet.flags ?? 0, true)
    view.setUint32(36, packet.bufAlloc ?? 0, true)
    view.setUint32(40, packet.fwdCnt ?? 0, true)
    bytes.set(data, VSOCK_DRIVER_HEADER_SIZE)
    const queue = this.device.queue(TRANSMIT)
    const head = queue.add([{ address, length: bytes.length, writable: false }])
    if (head === undefined) throw new Error("the queue has no room for a buffer")
    this.#transmitting.set(head, buffer)
    if (queue.publish()) yield* this.device.notify(cpu, TRANSMIT)
    for (let used = queue.poll(); used !== undefined; used = queue.poll()) {
      const done = this.#transmitting.get(used.head)
      this.#transmitting.delete(used.head)
      if (done !== undefined) this.#freeTransmit.push(done)
    }
  }

  /** Waits for a packet of the host. */
  *receive(cpu: GuestCpu): GuestRoutine<VsockDriverPacket> {
    const used = yield* this.device.receive(cpu, RECEIVE)
    const buffer = this.#receiving.get(used.head)
    if (buffer === undefined) throw new Error(`chain ${used.head} was not given to the device`)
    this.#receiving.delete(used.head)
    const bytes = cpu.memory.slice(this.#receiveAddress + buffer * this.#bufferSize, used.written)?.slice()
    if (bytes === undefined || bytes.length < VSOCK_DRIVER_HEADER_SIZE) throw new Error("a packet without its header")
    const view = new DataView(bytes.buffer)
    const length = view.getUint32(24, true)
    if (bytes.length !== VSOCK_DRIVER_HEADER_SIZE + length) {
      throw new Error(`${length} bytes in a chain of ${bytes.length}`)
    }
    this.#freeReceive.push(buffer)
    yield* this.refill(cpu)
    return {
      srcCid: view.getUint32(0, true),
      dstCid: view.getUint32(8, true),
      srcPort: view.getUint32(16, true),
      dstPort: view.getUint32(20, true),
      type: view.getUint16(28, true),
      op: view.getUint16(30, true),
      flags: view.getUint32(32, true),
      bufAlloc: view.getUint32(36, true),
      fwdCnt: view.getUint32(40, true),
      data: bytes.subarray(VSOCK_DRIVER_HEADER_SIZE)
    }
  }
}

/** Bytes that a connection of {@link VsockStream} buffers. */
export const STREAM_BUFFER_SIZE = 0x1_0000

/** One stream connection of a guest that has no other: packets of others are an error. */
export class VsockStream {
  readonly driver: VsockDriver
  readonly port: number
  readonly hostPort: number
  readonly #cid: number
  #hostBufAlloc = 0
  #hostFwdCnt = 0
  #sent = 0
  #received = 0
  #isEnded = false
  /** Data that came while the stream waited for something else. */
  #waiting: Array<Uint8Array> = []

  private constructor(driver: VsockDriver, port: number, hostPort: number, cid: number) {
    this.driver = driver
    this.#cid = cid
    this.port = port
    this.hostPort = hostPort
  }

  /** Connects to a port of the host, or of another guest. `undefined` when it refuses. */
  static *connect(
    cpu: GuestCpu,
    driver: VsockDriver,
    port: number,
    hostPort: number,
    cid: number = HOST_CID
  ): GuestRoutine<VsockStream | undefined> {
    const stream = new VsockStream(driver, port, hostPort, cid)
    yield* stream.#send(cpu, VsockDriverOp.REQUEST)
    return (yield* stream.#next(cpu)) === VsockDriverOp.RESPONSE ? stream : undefined
  }

  /** Waits for the host to connect to a port, and accepts. */
  static *accept(cpu: GuestCpu, driver: VsockDriver, port: number): GuestRoutine<VsockStream> {
    const request = yield* driver.receive(cpu)
    if (request.op !== VsockDriverOp.REQUEST || request.dstPort !== port) throw new Error(`operation ${request.op}`)
    const stream = new VsockStream(driver, port, request.srcPort, request.srcCid)
    stream.#takeCredit(request)
    yield* stream.#send(cpu, VsockDriverOp.RESPONSE)
    return stream
  }

  /** Sends bytes, as the host has room for them. */
  *write(cpu: GuestCpu, bytes: Uint8Array, packetSize = 2048): GuestRoutine {
    for (let done = 0; done < bytes.length;) {
      const room = this.#hostBufAlloc - ((this.#sent - this.#hostFwdCnt) >>> 0)
      if (room <= 0) {
        yield* this.#next(cpu)
        if (this.#isEnded) throw new Error("the host has ended the connection")
        continue
      }
      const part = bytes.subarray(done, done + Math.min(room, packetSize))
      yield* this.#send(cpu, VsockDriverOp.RW, 0, part)
      this.#sent = (this.#sent + part.length) >>> 0
      done += part.length
    }
  }

  /** Waits for bytes. `undefined` when the host sends no more. */
  *read(cpu: GuestCpu): GuestRoutine<Uint8Array | undefined> {
    while (this.#waiting.length === 0) {
      if (this.#isEnded) return undefined
      yield* this.#next(cpu)
    }
    const bytes = this.#waiting.shift()
    if (bytes !== undefined) {
      this.#received = (this.#received + bytes.length) >>> 0
      yield* this.#send(cpu, VsockDriverOp.CREDIT_UPDATE)
    }
    return bytes
  }

  /** Ends the connection, and waits until the host has confirmed it. */
  *close(cpu: GuestCpu): GuestRoutine {
    if (this.#isEnded) return
    yield* this.#send(cpu, VsockDriverOp.SHUTDOWN, SHUTDOWN_BOTH)
    while (!this.#isEnded) yield* this.#next(cpu)
  }

  *#send(cpu: GuestCpu, op: number, flags = 0, data?: Uint8Array): GuestRoutine {
    yield* this.driver.send(cpu, {
      op,
      flags,
      dstCid: this.#cid,
      srcPort: this.port,
      dstPort: this.hostPort,
      bufAlloc: STREAM_BUFFER_SIZE,
      fwdCnt: this.#received,
      ...(data === undefined ? {} : { data })
    })
  }

  #takeCredit(packet: VsockDriverPacket): void {
    this.#hostBufAlloc = packet.bufAlloc
    this.#hostFwdCnt = packet.fwdCnt
  }

  /** Handles the next packet. Returns its operation. */
  *#next(cpu: GuestCpu): GuestRoutine<number> {
    const packet = yield* this.driver.receive(cpu)
    if (packet.srcPort !== this.hostPort || packet.dstPort !== this.port) throw new Error("a packet of no connection")
    switch (packet.op) {
      case VsockDriverOp.RST:
        this.#isEnded = true
        break
      case VsockDriverOp.SHUTDOWN:
        this.#takeCredit(packet)
        if (packet.flags === SHUTDOWN_BOTH) {
          this.#isEnded = true
          yield* this.#send(cpu, VsockDriverOp.RST)
        } else if ((packet.flags & 2) !== 0) {
          this.#isEnded = true
        }
        break
      case VsockDriverOp.CREDIT_REQUEST:
        yield* this.#send(cpu, VsockDriverOp.CREDIT_UPDATE)
        break
      default:
        this.#takeCredit(packet)
        if (packet.op === VsockDriverOp.RW) this.#waiting.push(packet.data)
    }
    return packet.op
  }
}
