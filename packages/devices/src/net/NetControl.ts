/**
 * The control queue (virtio 1.3, section 5.1.6.5): receive modes, addresses, and which offloads received frames may have. A
 * command is copied, checked and carried out in one turn; what is not understood is answered with VIRTIO_NET_ERR.
 */
import { isStationAddress, MAC_ADDRESS_SIZE } from "@troupe/core/MacAddress"
import { DescriptorChain } from "../virtio/DescriptorChain.ts"
import type { Virtqueue } from "../virtio/Virtqueue.ts"
import { ControlClass, MacCommand, OffloadsCommand, RxCommand, VIRTIO_NET_ERR, VIRTIO_NET_OK } from "./NetLayout.ts"
import type { ReceiveFilter } from "./ReceiveFilter.ts"

/** Size of the control queue. */
export const CONTROL_QUEUE_SIZE = 64
/** The most commands of one turn. */
export const COMMANDS_PER_TURN = 16

const COMMAND_HEADER_SIZE = 2
const COUNT_SIZE = 4
const OFFLOADS_SIZE = 8
/** The most addresses in a command that is taken: no driver can have more interfaces behind it than this. */
const TABLE_ENTRIES_MAX = 1024
/** Two full tables, the largest command that is taken. */
const COMMAND_SIZE_MAX = COMMAND_HEADER_SIZE + 2 * (COUNT_SIZE + TABLE_ENTRIES_MAX * MAC_ADDRESS_SIZE)

/** What commands change besides the filter. */
export interface NetControlPorts {
  /** The driver gives its interface an address. */
  readonly setAddress: (address: Uint8Array) => void
  /** The driver allows these offloads, feature bits 0 to 31 and 32 to 63, in frames that it receives. Returns whether it may. */
  readonly setOffloads: (low: number, high: number) => boolean
}

/** Which classes were negotiated. */
export interface NetControlFeatures {
  readonly rx: boolean
  readonly rxExtra: boolean
  readonly address: boolean
  readonly offloads: boolean
}

/** The device's side of the control queue. */
export class NetControl {
  readonly #filter: ReceiveFilter
  readonly #ports: NetControlPorts
  readonly #chain = new DescriptorChain(CONTROL_QUEUE_SIZE)
  readonly #bytes = new Uint8Array(COMMAND_SIZE_MAX)
  readonly #view = new DataView(this.#bytes.buffer)
  readonly #answer = new Uint8Array(1)
  #queue: Virtqueue | undefined
  #features: NetControlFeatures = { rx: false, rxExtra: false, address: false, offloads: false }

  constructor(filter: ReceiveFilter, ports: NetControlPorts) {
    this.#filter = filter
    this.#ports = ports
  }

  /** A driver is ready. */
  start(queue: Virtqueue | undefined, features: NetControlFeatures): void {
    this.#queue = queue
    this.#features = features
  }

  /** The driver has gone. */
  stop(): void {
    this.#queue = undefined
  }

  /** Carries commands out. Returns `true` when there are more. */
  turn(): boolean {
    const queue = this.#queue
    if (queue === undefined) return false
    const chain = this.#chain
    for (let commands = COMMANDS_PER_TURN; commands > 0; commands--) {
      if (!queue.take(chain)) return queue.resumeNotifications()
      const size = chain.readableBytes
      if (size < COMMAND_HEADER_SIZE || chain.writableBytes === 0) {
        queue.reject("a command is a class, a command and a byte for the answer")
        return false
      }
      const read = size > COMMAND_SIZE_MAX ? 0 : chain.read(0, this.#bytes)
      this.#answer[0] = read === size && this.#command(read) ? VIRTIO_NET_OK : VIRTIO_NET_ERR
      chain.write(0, this.#answer)
      queue.complete(chain, 1)
    }
    return true
  }

  /** Carries out the command in the first `size` bytes. Returns whether it could. */
  #command(size: number): boolean {
    const [class_, command] = this.#bytes
    const length = size - COMMAND_HEADER_SIZE
    switch (class_) {
      case ControlClass.RX:
        return length === 1 && this.#mode(command, (this.#bytes[COMMAND_HEADER_SIZE] ?? 0) !== 0)
      case ControlClass.MAC:
        if (command === MacCommand.TABLE_SET) return this.#features.rx && this.#tables(size)
        return command === MacCommand.ADDR_SET && length === MAC_ADDRESS_SIZE && this.#address()
      case ControlClass.GUEST_OFFLOADS:
        return this.#features.offloads && command === OffloadsCommand.SET && length === OFFLOADS_SIZE &&
          this.#ports.setOffloads(
            this.#view.getUint32(COMMAND_HEADER_SIZE, true),
            this.#view.getUint32(COMMAND_HEADER_SIZE + 4, true)
          )
      default:
        return false
    }
  }

  #mode(command: number | undefined, on: boolean): boolean {
    const filter = this.#filter
    if (!this.#features.rx) return false
    switch (command) {
      case RxCommand.PROMISC:
        filter.promiscuous = on
        return true
      case RxCommand.ALLMULTI:
        filter.allMulticast = on
        return true
    }
    if (!this.#features.rxExtra) return false
    switch (command) {
      case RxCommand.ALLUNI:
        filter.allUnicast = on
        return true
      case RxCommand.NOMULTI:
        filter.noMulticast = on
        return true
      case RxCommand.NOUNI:
        filter.noUnicast = on
        return true
      case RxCommand.NOBCAST:
        filter.noBroadcast = on
        return true
      default:
        return false
    }
  }

  /** Two tables, each a number of entries and the entries: single stations, then groups. */
  #tables(size: number): boolean {
    const first = this.#table(COMMAND_HEADER_SIZE, size)
    if (first < 0) return false
    const secondAt = COMMAND_HEADER_SIZE + COUNT_SIZE + first * MAC_ADDRESS_SIZE
    const second = this.#table(secondAt, size)
    if (second < 0 || secondAt + COUNT_SIZE + second * MAC_ADDRESS_SIZE !== size) return false
    this.#filter.unicast.set(this.#bytes, COMMAND_HEADER_SIZE + COUNT_SIZE, first)
    this.#filter.multicast.set(this.#bytes, secondAt + COUNT_SIZE, second)
    return true
  }

  /** The number of entries of the table at `at`, or -1 when it is not all there. */
  #table(at: number, size: number): number {
    if (at + COUNT_SIZE > size) return -1
    const count = this.#view.getUint32(at, true)
    return count <= TABLE_ENTRIES_MAX && at + COUNT_SIZE + count * MAC_ADDRESS_SIZE <= size ? count : -1
  }

  #address(): boolean {
    const address = this.#bytes.subarray(COMMAND_HEADER_SIZE, COMMAND_HEADER_SIZE + MAC_ADDRESS_SIZE)
    if (!this.#features.address || !isStationAddress(address)) return false
    this.#filter.address.set(address)
    this.#ports.setAddress(address)
    return true
  }
}
