/** Which blocks of a region of guest memory are plugged: the one place that knows, and that everything else asks. */

/** The most blocks of a pluggable region: each is a memory slot of its own, and a machine has some ten thousand at most. */
export const PLUGGABLE_BLOCKS_MAX = 16384

/** The state of the blocks of a pluggable region. All are unplugged at first. */
export class BlockMap {
  /** Length of a block in bytes. */
  readonly blockSize: number
  /** The number of blocks. */
  readonly count: number
  /** For each block one past the end of the run of plugged blocks that it is in, or 0: any range is one comparison. */
  readonly #runEnd: Uint32Array
  #plugged = 0

  constructor(count: number, blockSize: number) {
    this.count = count
    this.blockSize = blockSize
    this.#runEnd = new Uint32Array(count + 1)
  }

  /** The number of plugged blocks. */
  get plugged(): number {
    return this.#plugged
  }

  /** Whether a block is plugged. One that the region does not have is not. */
  isPlugged(block: number): boolean {
    return block < this.count && (this.#runEnd[block] ?? 0) !== 0
  }

  /** Whether all bytes of `[offset, offset + length)` of the region are in plugged blocks. */
  covers(offset: number, length: number): boolean {
    const end = this.#runEnd[Math.floor(offset / this.blockSize)] ?? 0
    return end !== 0 && offset + length <= end * this.blockSize
  }

  /** The number of plugged blocks among `count` from `first` on. */
  pluggedAmong(first: number, count: number): number {
    let plugged = 0
    for (let block = first; block < first + count; block++) if (this.isPlugged(block)) plugged++
    return plugged
  }

  /** Notes a block as plugged, or as unplugged. Many are best plugged from the last one on, and unplugged from the first one on. */
  set(block: number, plugged: boolean): void {
    if (block < 0 || block >= this.count) throw new RangeError(`block ${block} of ${this.count}`)
    if (this.isPlugged(block) === plugged) return
    const runEnd = this.#runEnd
    this.#plugged += plugged ? 1 : -1
    // The last entry has no block and stays 0, so a run that begins here has an end.
    const end = plugged ? (runEnd[block + 1] ?? 0) || block + 1 : block
    runEnd[block] = plugged ? end : 0
    for (let before = block - 1; before >= 0 && runEnd[before] !== 0; before--) runEnd[before] = end
  }
}
