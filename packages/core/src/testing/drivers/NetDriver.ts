/**
 * A driver of network devices (virtio 1.3, section 5.1), as a guest's kernel has it: buffers for frames in any shape, frames with
 * and without offloads, commands. It checks what the device gives it.
 */
import type { GuestCpu, GuestRoutine } from "../GuestCpu.ts"
import type { DriverBuffer } from "./SplitQueueDriver.ts"
import { startVirtioMmio, type VirtioMmioDriver, type VirtioMmioPlace } from "./VirtioMmioDriver.ts"

/** Feature bits of the device type. */
export const NetDriverFeature = {
  CSUM: 0,
  GUEST_CSUM: 1,
  CTRL_GUEST_OFFLOADS: 2,
  MTU: 3,
  MAC: 5,
  GUEST_TSO4: 7,
  GUEST_TSO6: 8,
  HOST_TSO4: 11,
  HOST_TSO6: 12,
  MRG_RXBUF: 15,
  STATUS: 16,
  CTRL_VQ: 17,
  CTRL_RX: 18,
  CTRL_RX_EXTRA: 20,
  CTRL_MAC_ADDR: 23,
  GUEST_USO4: 54,
  GUEST_USO6: 55,
  HOST_USO: 56
} as const

/** Size of `struct virtio_net_hdr`. */
export const NET_DRIVER_HEADER_SIZE = 12

const RECEIVE = 0
const TRANSMIT = 1
const CONTROL = 2

/** The header of a frame. */
export interface FrameHeader {
  readonly flags: number
  readonly gsoType: number
  readonly headerLength: number
  readonly gsoSize: number
  readonly checksumStart: number
  readonly checksumOffset: number
}

/** A header that leaves nothing to the other side. */
export const PLAIN_HEADER: FrameHeader = {
  flags: 0,
  gsoType: 0,
  headerLength: 0,
  gsoSize: 0,
  checksumStart: 0,
  checksumOffset: 0
}

/** A frame that the driver has received. */
export interface ReceivedFrame {
  readonly header: FrameHeader
  readonly bytes: Uint8Array<ArrayBuffer>
  /** The driver's buffers that it came in. */
  readonly buffers: number
}

/** What a driver wants. */
export interface NetDriverOptions {
  /** First address of guest memory for queues and frames, a multiple of 4096. */
  readonly memoryAddress: number
  /** Bytes of it. */
  readonly memorySize: number
  /** Size of the queues of frames. Default: 64. */
  readonly queueSize?: number
  /** Feature bits to accept where they are offered. Default: none. */
  readonly features?: ReadonlyArray<number>
  readonly indirect?: boolean
  readonly eventIndex?: boolean
}

const COMMAND_QUEUE_SIZE = 8
/** Room for three queues of at most 256 entries. */
const QUEUES_SIZE = 0x2_8000
const COMMAND_SIZE = 0x2000

/** Initialises the device. Throws where it refuses. */
export function* startNet(
  cpu: GuestCpu,
  place: VirtioMmioPlace,
  options: NetDriverOptions
): GuestRoutine<NetDriver> {
  const bits = options.features ?? []
  const half = (first: number) =>
    bits.reduce((sum, bit) => bit >= first && bit < first + 32 ? (sum | (1 << (bit - first))) >>> 0 : sum, 0)
  const size = options.queueSize ?? 64
  const driver = yield* startVirtioMmio(cpu, place, {
    memoryAddress: options.memoryAddress,
    queueSizes: [size, size, ...(bits.includes(NetDriverFeature.CTRL_VQ) ? [COMMAND_QUEUE_SIZE] : [])],
    features: { low: half(0), high: half(32) },
    ...(options.indirect === undefined ? {} : { indirect: options.indirect }),
    ...(options.eventIndex === undefined ? {} : { eventIndex: options.eventIndex })
  })
  return new NetDriver(cpu, driver, options.memoryAddress + QUEUES_SIZE, options.memorySize - QUEUES_SIZE)
}

/** A network device that a driver has made ready. */
export class NetDriver {
  readonly virtio: VirtioMmioDriver
  readonly #cpu: GuestCpu
  readonly #commandAddress: number
  readonly #dataAddress: number
  readonly #dataSize: number
  #next = 0
  /** The buffers of each chain that the device has for receiving, and for sending. */
  readonly #given = new Map<number, ReadonlyArray<DriverBuffer>>()
  readonly #sent = new Map<number, ReadonlyArray<DriverBuffer>>()
  #lastIsFull = false

  constructor(cpu: GuestCpu, virtio: VirtioMmioDriver, dataAddress: number, dataSize: number) {
    this.#cpu = cpu
    this.virtio = virtio
    this.#commandAddress = dataAddress
    this.#dataAddress = dataAddress + COMMAND_SIZE
    this.#dataSize = dataSize - COMMAND_SIZE
  }

  /** Whether a feature was negotiated. */
  has(bit: number): boolean {
    const { high, low } = this.virtio.features
    return ((bit < 32 ? low >>> bit : high >>> (bit - 32)) & 1) !== 0
  }

  /** Memory for a buffer. The memory is used round and round: callers keep less in flight than there is. */
  #allocate(length: number): number {
    if (this.#next + length > this.#dataSize) this.#next = 0
    const address = this.#dataAddress + this.#next
    this.#next += length
    return address
  }

  #bytes(address: number, length: number): Uint8Array<ArrayBuffer> {
    const bytes = this.#cpu.memory.slice(address, length)
    if (bytes === undefined) throw new RangeError(`no memory at ${address}`)
    return bytes
  }

  /** Gives the device a chain of buffers of these lengths to receive into. Returns `false` when the queue is full. */
  *supply(lengths: ReadonlyArray<number>, indirect = false): GuestRoutine<boolean> {
    const queue = this.virtio.queue(RECEIVE)
    const buffers = lengths.map((length) => ({ address: this.#allocate(length), length, writable: true }))
    const head = queue.add(buffers, indirect)
    if (head === undefined) return false
    this.#given.set(head, buffers)
    if (queue.publish()) yield* this.virtio.notify(this.#cpu, RECEIVE)
    return true
  }

  /**
   * Gives the device a frame, header and all in buffers of these lengths; the last takes the rest. Returns `false` when the queue is
   * full.
   */
  *send(
    frame: Uint8Array,
    header: FrameHeader = PLAIN_HEADER,
    splits: ReadonlyArray<number> = [],
    indirect = false
  ): GuestRoutine<boolean> {
    const all = new Uint8Array(NET_DRIVER_HEADER_SIZE + frame.length)
    const view = new DataView(all.buffer)
    view.setUint8(0, header.flags)
    view.setUint8(1, header.gsoType)
    view.setUint16(2, header.headerLength, true)
    view.setUint16(4, header.gsoSize, true)
    view.setUint16(6, header.checksumStart, true)
    view.setUint16(8, header.checksumOffset, true)
    all.set(frame, NET_DRIVER_HEADER_SIZE)
    return yield* this.sendRaw(all, splits, indirect)
  }

  /** As {@link send}, with whatever bytes for a header. */
  *sendRaw(all: Uint8Array, splits: ReadonlyArray<number> = [], indirect = false): GuestRoutine<boolean> {
    const queue = this.virtio.queue(TRANSMIT)
    const buffers: Array<DriverBuffer> = []
    let done = 0
    for (const length of [...splits, all.length]) {
      const amount = Math.min(length, all.length - done)
      if (amount <= 0) break
      const address = this.#allocate(amount)
      this.#bytes(address, amount).set(all.subarray(done, done + amount))
      buffers.push({ address, length: amount, writable: false })
      done += amount
    }
    const head = queue.add(buffers, indirect)
    if (head === undefined) return false
    this.#sent.set(head, buffers)
    if (queue.publish()) yield* this.virtio.notify(this.#cpu, TRANSMIT)
    return true
  }

  /** Takes back the buffers of frames that were sent. Returns how many frames. */
  reclaim(): number {
    let count = 0
    for (;;) {
      const used = this.virtio.queue(TRANSMIT).poll()
      if (used === undefined) return count
      if (used.written !== 0) throw new Error(`the device wrote ${used.written} bytes to a frame that was sent`)
      if (!this.#sent.delete(used.head)) throw new Error(`the device gave back ${used.head}, which was not sent`)
      count++
    }
  }

  /** The number of frames that the device has not yet sent. */
  get sending(): number {
    return this.#sent.size
  }

  /** The next received frame, if there is one. */
  poll(): ReceivedFrame | undefined {
    const queue = this.virtio.queue(RECEIVE)
    const first = queue.poll()
    if (first === undefined) return undefined
    const parts = [this.#take(first.head, first.written)]
    const head = parts[0] ?? new Uint8Array()
    if (head.length < NET_DRIVER_HEADER_SIZE) throw new Error(`a received frame of ${head.length} bytes has no header`)
    const view = new DataView(head.buffer)
    const buffers = view.getUint16(10, true)
    if (buffers === 0 || (buffers > 1 && !this.has(NetDriverFeature.MRG_RXBUF))) {
      throw new Error(`a received frame in ${buffers} buffers`)
    }
    while (parts.length < buffers) {
      if (!this.#lastIsFull) throw new Error("a buffer that is not the last one of its frame is not full")
      const next = queue.poll()
      if (next === undefined) throw new Error(`${buffers} buffers, of which only ${parts.length} were given back`)
      parts.push(this.#take(next.head, next.written))
    }
    const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0) - NET_DRIVER_HEADER_SIZE)
    let done = 0
    for (const [i, part] of parts.entries()) {
      const rest = i === 0 ? part.subarray(NET_DRIVER_HEADER_SIZE) : part
      bytes.set(rest, done)
      done += rest.length
    }
    return {
      header: {
        flags: view.getUint8(0),
        gsoType: view.getUint8(1),
        headerLength: view.getUint16(2, true),
        gsoSize: view.getUint16(4, true),
        checksumStart: view.getUint16(6, true),
        checksumOffset: view.getUint16(8, true)
      },
      bytes,
      buffers
    }
  }

  /** Waits by interrupts for the next frame. */
  *receive(): GuestRoutine<ReceivedFrame> {
    const queue = this.virtio.queue(RECEIVE)
    for (;;) {
      const frame = this.poll()
      if (frame !== undefined) return frame
      if (queue.enableInterrupts()) continue
      yield* this.#cpu.waitForInterrupt(this.virtio.place.gsi)
      yield* this.virtio.handleInterrupt(this.#cpu)
      queue.disableInterrupts()
    }
  }

  /** Gives the device a command and waits for its answer. */
  *command(class_: number, command: number, data: Uint8Array): GuestRoutine<number> {
    const bytes = this.#bytes(this.#commandAddress, 3 + data.length)
    bytes.set([class_, command])
    bytes.set(data, 2)
    bytes[2 + data.length] = 0xff
    const at = this.#commandAddress
    yield* this.virtio.send(this.#cpu, CONTROL, [[
      { address: at, length: 2, writable: false },
      { address: at + 2, length: data.length, writable: false },
      { address: at + 2 + data.length, length: 1, writable: true }
    ]])
    yield* this.virtio.receive(this.#cpu, CONTROL)
    return this.#bytes(at + 2 + data.length, 1)[0] ?? 0xff
  }

  /** The first bytes of a chain that the device has used. */
  #take(head: number, written: number): Uint8Array<ArrayBuffer> {
    const buffers = this.#given.get(head)
    if (buffers === undefined) throw new Error(`the device used chain ${head}, which it does not have`)
    this.#given.delete(head)
    this.#lastIsFull = written === buffers.reduce((sum, { length }) => sum + length, 0)
    const bytes = new Uint8Array(written)
    let done = 0
    for (const { address, length } of buffers) {
      const amount = Math.min(length, written - done)
      bytes.set(this.#bytes(address, amount), done)
      done += amount
    }
    return bytes
  }
}
