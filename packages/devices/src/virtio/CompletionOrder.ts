/**
 * Holds completions back until their turn (`VIRTIO_F_IN_ORDER`, virtio 1.3, sections 2.7.9 and 2.8.9): a driver that has negotiated
 * it gets its buffers back in the order in which it made them available, in whatever order a device completes them.
 *
 * Everything is in arrays as long as the queue: nothing is allocated for a chain.
 */

/** The value of `written` of a chain that is not completed. */
const AT_WORK = -1

/** The chains that were taken and not yet given back, oldest first. */
export class CompletionOrder {
  readonly #ids: Uint16Array
  readonly #descriptors: Uint16Array
  readonly #written: Float64Array
  readonly #size: number
  #oldest = 0
  #next = 0

  constructor(size: number) {
    this.#size = size
    this.#ids = new Uint16Array(size)
    this.#descriptors = new Uint16Array(size)
    this.#written = new Float64Array(size).fill(AT_WORK)
  }

  /** A chain was taken. Returns its place, which {@link complete} wants. There are at most as many as the queue has entries. */
  enter(id: number, descriptors: number): number {
    const place = this.#next
    this.#ids[place] = id
    this.#descriptors[place] = descriptors
    this.#written[place] = AT_WORK
    this.#next = place + 1 === this.#size ? 0 : place + 1
    return place
  }

  /** The device has completed the chain at a place. */
  complete(place: number, written: number): void {
    this.#written[place] = written
  }

  /** Whether the oldest chain, if there is one, is completed. The caller counts the chains. */
  get ready(): boolean {
    return (this.#written[this.#oldest] ?? AT_WORK) !== AT_WORK
  }

  /** The oldest chain's buffer id. */
  get id(): number {
    return this.#ids[this.#oldest] ?? 0
  }

  /** How many entries of the ring the oldest chain takes. */
  get descriptors(): number {
    return this.#descriptors[this.#oldest] ?? 0
  }

  /** How many bytes were written to the oldest chain. */
  get written(): number {
    return this.#written[this.#oldest] ?? 0
  }

  /** The oldest chain is given back. */
  shift(): void {
    this.#written[this.#oldest] = AT_WORK
    this.#oldest = this.#oldest + 1 === this.#size ? 0 : this.#oldest + 1
  }
}
