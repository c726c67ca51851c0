/**
 * Which frames a driver wants, by their destination (virtio 1.3, section 5.1.6.5): what it says in commands of the classes RX
 * and MAC. Until it says anything it gets everything.
 */
import { isGroupAddress, MAC_ADDRESS_SIZE } from "@troupe/core/MacAddress"

/** The most addresses that are told apart; with more, all frames of their kind pass, as the specification allows. */
export const FILTER_ADDRESSES_MAX = 64

const isBroadcast = (frame: Uint8Array): boolean => {
  for (let i = 0; i < MAC_ADDRESS_SIZE; i++) if (frame[i] !== 0xff) return false
  return true
}

/** A list of addresses. */
class AddressTable {
  readonly #bytes = new Uint8Array(FILTER_ADDRESSES_MAX * MAC_ADDRESS_SIZE)
  #count = 0
  /** There were more than fit: everything is in the table. */
  #overflow = false

  /** Takes `count` addresses of `source` at `from`, of which there is as much as fits. */
  set(source: Uint8Array, from: number, count: number): void {
    this.#overflow = count > FILTER_ADDRESSES_MAX
    this.#count = this.#overflow ? 0 : count
    this.#bytes.set(source.subarray(from, from + this.#count * MAC_ADDRESS_SIZE))
  }

  clear(): void {
    this.#count = 0
    this.#overflow = false
  }

  has(frame: Uint8Array): boolean {
    if (this.#overflow) return true
    for (let entry = 0; entry < this.#count; entry++) {
      let equal = 0
      while (equal < MAC_ADDRESS_SIZE && this.#bytes[entry * MAC_ADDRESS_SIZE + equal] === frame[equal]) equal++
      if (equal === MAC_ADDRESS_SIZE) return true
    }
    return false
  }
}

/** What a driver wants to receive. */
export class ReceiveFilter {
  /** Everything. */
  promiscuous = true
  /** All frames to groups. */
  allMulticast = false
  /** All frames to single stations. */
  allUnicast = false
  noMulticast = false
  noUnicast = false
  noBroadcast = false
  /** The driver's own address. */
  readonly address = new Uint8Array(MAC_ADDRESS_SIZE)
  readonly unicast = new AddressTable()
  readonly multicast = new AddressTable()

  constructor(address: Uint8Array) {
    this.reset(address)
  }

  /** As it is before the first command. */
  reset(address: Uint8Array): void {
    this.promiscuous = true
    this.allMulticast = false
    this.allUnicast = false
    this.noMulticast = false
    this.noUnicast = false
    this.noBroadcast = false
    this.address.set(address)
    this.unicast.clear()
    this.multicast.clear()
  }

  /** Whether no frame needs to be looked at. */
  get takesAll(): boolean {
    return this.promiscuous
  }

  /** Whether the driver wants a frame that begins with these bytes, six at least. */
  takes(frame: Uint8Array): boolean {
    if (this.promiscuous) return true
    if (isBroadcast(frame)) return !this.noBroadcast
    if (isGroupAddress(frame)) return !this.noMulticast && (this.allMulticast || this.multicast.has(frame))
    if (this.noUnicast) return false
    if (this.allUnicast) return true
    for (let i = 0; i < MAC_ADDRESS_SIZE; i++) if (this.address[i] !== frame[i]) return this.unicast.has(frame)
    return true
  }
}
