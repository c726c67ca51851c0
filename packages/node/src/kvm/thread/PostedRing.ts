/**
 * The ring that carries posted writes from the vCPU threads of a machine to its host: many producers, one consumer, in
 * shared memory. Imports nothing, so that a vCPU thread can load it cheaply.
 *
 * A slot is reserved by moving the tail with a compare-and-exchange and published by its sequence number. Reservation is one
 * total order, and a vCPU that learns of another's write (through memory, or by an interrupt) reserves after it, so the order
 * of delivery respects causality over vCPUs. A producer never holds a reservation while it waits: a full ring refuses, and the
 * caller waits and tries again.
 *
 * A post is three atomic operations (an atomic costs five plain accesses and its code is far away): room is judged by the
 * head as this thread last saw it, and the consumer writes nothing but the head, so the slots stay in the producers' caches.
 */

/** Word of the header: what the host does. See `HostState` in `VcpuControl.ts`. */
export const RING_HOST_STATE = 0
/** Word of the header: how many vCPU threads wait for room. */
export const RING_WAITERS = 1
const TAIL = 2
// The consumer's word has a cache line of its own: producers read it only for `used`.
const HEAD = 16
const HEADER_WORDS = 32

const SLOT_WORDS = 4
const SEQUENCE = 0
const TARGET = 1
const OFFSET = 2
const VALUE = 3

/** Bits of the target word below the range's index: the size of the write as a power of two. */
const SIZE_BITS = 2

/** One thread's face of a ring. The last entry that {@link PostedRing.peek} found is in its fields. */
export class PostedRing {
  readonly words: Int32Array<SharedArrayBuffer>
  /** Number of entries, a power of two. */
  readonly capacity: number
  /** Index of the range in its bus. */
  range = 0
  /** Width of the write in bytes: 1, 2 or 4. */
  size = 0
  /** Offset in the range, in bytes. */
  offset = 0
  /** The value written, unsigned. */
  value = 0

  /** The head as this thread last saw it. */
  #head: number

  constructor(buffer: SharedArrayBuffer) {
    this.words = new Int32Array(buffer)
    this.#head = Atomics.load(this.words, HEAD)
    this.capacity = (this.words.length - HEADER_WORDS) / SLOT_WORDS
  }

  /** Shared memory for an empty ring; `capacity` is a power of two. `start` is the first entry's number. */
  static allocate(capacity: number, start = 0): SharedArrayBuffer {
    const buffer = new SharedArrayBuffer((HEADER_WORDS + capacity * SLOT_WORDS) * 4)
    const words = new Int32Array(buffer)
    words[TAIL] = start
    words[HEAD] = start
    // A slot is published when it has the number after its ticket. Zeros are no such number in the first round from 0, and pages
    // that nobody has touched cost nothing.
    const untouched = start === 0 ? capacity : 0
    for (let i = untouched; i < capacity; i++) {
      const ticket = (start + i) | 0
      words[HEADER_WORDS + (ticket & (capacity - 1)) * SLOT_WORDS] = ticket
    }
    return buffer
  }

  /** The shared memory. */
  get buffer(): SharedArrayBuffer {
    return this.words.buffer
  }

  /** The number of the next entry to be reserved, modulo 2^32. */
  get tail(): number {
    return Atomics.load(this.words, TAIL)
  }

  /** Reserved entries that have not been consumed. */
  get used(): number {
    return (Atomics.load(this.words, TAIL) - Atomics.load(this.words, HEAD)) | 0
  }

  /** Whether more than half of the ring is used, as far as this thread knows: a hint that costs no synchronisation. */
  get isFilling(): boolean {
    return (((this.words[TAIL] ?? 0) - (this.words[HEAD] ?? 0)) | 0) > this.capacity >>> 1
  }

  /** Whether the next entry would be refused now. */
  get full(): boolean {
    return this.used >= this.capacity
  }

  /** Producers: appends an entry. `false`, and nothing is changed, when the ring is full. */
  post(range: number, size: number, offset: number, value: number): boolean {
    const words = this.words
    let ticket = words[TAIL] ?? 0
    for (;;) {
      if (((ticket - this.#head) >>> 0) >= this.capacity) {
        this.#head = Atomics.load(words, HEAD)
        ticket = Atomics.load(words, TAIL)
        if (((ticket - this.#head) >>> 0) >= this.capacity) return false
      }
      const found = Atomics.compareExchange(words, TAIL, ticket, (ticket + 1) | 0)
      if (found === ticket) break
      ticket = found
    }
    const slot = HEADER_WORDS + (ticket & (this.capacity - 1)) * SLOT_WORDS
    words[slot + TARGET] = (range << SIZE_BITS) | (size >>> 1)
    words[slot + OFFSET] = offset
    words[slot + VALUE] = value
    Atomics.store(words, slot + SEQUENCE, (ticket + 1) | 0)
    return true
  }

  /** Consumer: loads the oldest entry into the fields, or says that there is none published. */
  peek(): boolean {
    const words = this.words
    const ticket = Atomics.load(words, HEAD)
    const slot = HEADER_WORDS + (ticket & (this.capacity - 1)) * SLOT_WORDS
    if (Atomics.load(words, slot + SEQUENCE) !== ((ticket + 1) | 0)) return false
    const target = words[slot + TARGET] ?? 0
    this.range = target >>> SIZE_BITS
    this.size = 1 << (target & 3)
    this.offset = (words[slot + OFFSET] ?? 0) >>> 0
    this.value = (words[slot + VALUE] ?? 0) >>> 0
    return true
  }

  /** Consumer: removes the entry that {@link PostedRing.peek} found. */
  advance(): void {
    Atomics.store(this.words, HEAD, (Atomics.load(this.words, HEAD) + 1) | 0)
  }

  /** Consumer: whether every entry reserved before `tail` was read (as a ticket number) has been consumed. */
  reached(tail: number): boolean {
    return ((Atomics.load(this.words, HEAD) - tail) | 0) >= 0
  }
}
