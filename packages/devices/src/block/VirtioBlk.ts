/**
 * The block device (virtio 1.3, section 5.2): one queue of requests to a disk, which a back end serves.
 *
 * A request costs no fiber. The back end gets guest memory itself and calls back; what it has done when a turn ends is shown to
 * the driver at once, with one interrupt. Requests run at the same time, up to {@link BLOCK_REQUESTS_MAX}, and end in any
 * order; those beyond wait in the queue.
 */
import { type BlockBackend, SECTOR_SIZE } from "@troupe/core/BlockBackend"
import type { BlockEvent, BlockStatistics } from "@troupe/core/BlockDevices"
import * as Effect from "effect/Effect"
import type { Throttle } from "../Throttle.ts"
import { type Features, hasFeature, makeFeatures } from "../virtio/Features.ts"
import type { VirtioBehaviour, VirtioContext, VirtioDevice } from "../virtio/VirtioDevice.ts"
import type { Virtqueue } from "../virtio/Virtqueue.ts"
import { BlockRequest, type RequestPorts } from "./BlockRequest.ts"
import {
  BLOCK_BYTES_MAX,
  BLOCK_BYTES_PER_TURN,
  BLOCK_QUEUE_SIZE,
  BLOCK_RANGE_SECTORS_MAX,
  BLOCK_RANGES_MAX,
  BLOCK_REQUESTS_MAX,
  BLOCK_REQUESTS_PER_TURN,
  BLOCK_SEGMENT_BYTES_MAX,
  BLOCK_SEGMENTS_MAX,
  CONFIG_SIZE,
  ID_SIZE,
  VIRTIO_BLK_F_BLK_SIZE,
  VIRTIO_BLK_F_DISCARD,
  VIRTIO_BLK_F_FLUSH,
  VIRTIO_BLK_F_RO,
  VIRTIO_BLK_F_SEG_MAX,
  VIRTIO_BLK_F_SIZE_MAX,
  VIRTIO_BLK_F_WRITE_ZEROES,
  VIRTIO_ID_BLOCK,
  VirtioBlkConfig,
  VirtioBlkStatus,
  VirtioBlkType
} from "./VirtioBlkLayout.ts"

/** A back end has ended requests. */
const SIGNAL_DONE = 0
/** There are tokens for a request that waits for them. */
const SIGNAL_TOKENS = 1

/** What a disk is made of. */
export interface VirtioBlkOptions {
  /** What GET_ID answers: at most 20 characters of ASCII. */
  readonly id: string
  readonly backend: BlockBackend
  /** Takes what the host is to know. Default: nobody. */
  readonly onEvent?: (event: BlockEvent) => void
  /** How fast the guest may go. It outlives resets and restarts. Default: no limit. */
  readonly throttle?: Throttle
}

/** A block device, before a transport, and what it counts. */
export interface VirtioBlk {
  readonly device: VirtioDevice
  readonly statistics: () => BlockStatistics
}

interface Counters {
  requests: number
  bytesRead: number
  bytesWritten: number
  failures: number
}

const sectorsOf = (backend: BlockBackend): number => Math.floor(backend.capacity / SECTOR_SIZE)

const featuresOf = (backend: BlockBackend): Features =>
  makeFeatures(
    VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_FLUSH,
    ...(backend.readOnly ? [VIRTIO_BLK_F_RO] : []),
    ...(backend.readOnly || backend.discard === undefined ? [] : [VIRTIO_BLK_F_DISCARD]),
    ...(backend.readOnly || backend.writeZeroes === undefined ? [] : [VIRTIO_BLK_F_WRITE_ZEROES])
  )

const configOf = (backend: BlockBackend): Uint8Array => {
  const config = new DataView(new ArrayBuffer(CONFIG_SIZE))
  const sectors = sectorsOf(backend)
  config.setUint32(VirtioBlkConfig.capacity, sectors % 2 ** 32, true)
  config.setUint32(VirtioBlkConfig.capacity + 4, Math.floor(sectors / 2 ** 32), true)
  config.setUint32(VirtioBlkConfig.sizeMax, BLOCK_SEGMENT_BYTES_MAX, true)
  config.setUint32(VirtioBlkConfig.segMax, BLOCK_SEGMENTS_MAX, true)
  config.setUint32(VirtioBlkConfig.blkSize, backend.blockSize, true)
  if (!backend.readOnly && backend.discard !== undefined) {
    config.setUint32(VirtioBlkConfig.maxDiscardSectors, BLOCK_RANGE_SECTORS_MAX, true)
    config.setUint32(VirtioBlkConfig.maxDiscardSeg, BLOCK_RANGES_MAX, true)
    config.setUint32(VirtioBlkConfig.discardSectorAlignment, backend.blockSize / SECTOR_SIZE, true)
  }
  if (!backend.readOnly && backend.writeZeroes !== undefined) {
    config.setUint32(VirtioBlkConfig.maxWriteZeroesSectors, BLOCK_RANGE_SECTORS_MAX, true)
    config.setUint32(VirtioBlkConfig.maxWriteZeroesSeg, BLOCK_RANGES_MAX, true)
    config.setUint8(VirtioBlkConfig.writeZeroesMayUnmap, 1)
  }
  return new Uint8Array(config.buffer)
}

/** The disk at work: one generation of it. */
class Disk implements VirtioBehaviour {
  /** Wakes the disk when there are tokens. */
  run?: Effect.Effect<never>
  readonly #ports: RequestPorts
  readonly #options: VirtioBlkOptions
  readonly #counters: Counters
  readonly #signal: () => void

  readonly #free: Array<BlockRequest> = []
  /** Requests that a back end has ended and that are not answered yet. */
  readonly #ended: Array<BlockRequest> = []
  /** Requests that were taken from the queue and not answered. */
  #busy = 0
  /** Requests that a back end has. */
  #pending = 0
  /** Bytes of their data. */
  #bytes = 0
  /** A request that waits for tokens. */
  #waiting: BlockRequest | undefined
  #queue: Virtqueue | undefined
  /** A turn is being done, and answers what ends in it. */
  #inTurn = false
  #signalled = false
  /** Called when the last request has ended. */
  #onIdle: (() => void) | undefined

  constructor(options: VirtioBlkOptions, counters: Counters, signal: () => void) {
    this.#options = options
    this.#counters = counters
    this.#signal = signal
    const id = new Uint8Array(ID_SIZE)
    for (let i = 0; i < Math.min(options.id.length, ID_SIZE); i++) id[i] = options.id.charCodeAt(i)
    this.#ports = {
      backend: options.backend,
      id,
      capacity: sectorsOf(options.backend) * SECTOR_SIZE,
      discard: false,
      writeZeroes: false,
      writeThrough: false,
      onDone: (request) => this.#onDone(request)
    }
  }

  /** Returns when no back end uses guest memory any more. */
  readonly idle: Effect.Effect<void> = Effect.callback<void>((resume) => {
    this.#queue = undefined
    if (this.#pending === 0) return resume(Effect.void)
    this.#onIdle = () => resume(Effect.void)
  })

  activate({ features, queues }: Parameters<VirtioBehaviour["activate"]>[0]): void {
    this.#queue = queues[0]
    this.#ports.discard = hasFeature(features, VIRTIO_BLK_F_DISCARD)
    this.#ports.writeZeroes = hasFeature(features, VIRTIO_BLK_F_WRITE_ZEROES)
    this.#ports.writeThrough = !hasFeature(features, VIRTIO_BLK_F_FLUSH)
  }

  notify(): boolean {
    this.#inTurn = true
    try {
      const more = this.#begin()
      this.#answer()
      return more
    } finally {
      this.#inTurn = false
    }
  }

  signal(number: number): boolean {
    if (number === SIGNAL_DONE) this.#signalled = false
    this.#inTurn = true
    try {
      this.#answer()
      const more = this.#begin()
      this.#answer()
      // The queue is looked at again by another signal.
      return more
    } finally {
      this.#inTurn = false
    }
  }

  reset(): boolean {
    this.#queue = undefined
    const waiting = this.#waiting
    if (waiting !== undefined) {
      this.#waiting = undefined
      this.#busy--
      waiting.release()
      this.#free.push(waiting)
    }
    this.#options.throttle?.reset()
    if (!this.#inTurn) this.#answer()
    return this.#busy === 0
  }

  /** Begins requests that wait in the queue, within the turn's budget. Returns whether there may be more to begin now. */
  #begin(): boolean {
    const queue = this.#queue
    if (queue === undefined) return false
    queue.suppressNotifications()
    const { throttle } = this.#options
    let bytes = 0
    for (let count = 0; count < BLOCK_REQUESTS_PER_TURN && bytes < BLOCK_BYTES_PER_TURN; count++) {
      // Those that ended in this turn are answered before more is begun than there is room for.
      if (this.#busy === BLOCK_REQUESTS_MAX) {
        if (this.#ended.length === 0) return false
        this.#answer()
      }
      // The next one that ends leads back here.
      if (this.#bytes >= BLOCK_BYTES_MAX) return false
      const waiting = this.#waiting
      const request: BlockRequest | undefined = waiting ?? this.#take(queue)
      if (request === undefined) return queue.fault === undefined && queue.resumeNotifications()
      if (request !== waiting && !request.read(queue)) {
        // What is refused costs the time that it takes to blank its buffers.
        bytes += request.chain.writableBytes
        this.#ended.push(request)
        continue
      }
      if (throttle?.admit(request.cost) === false) {
        this.#waiting = request
        return false
      }
      this.#waiting = undefined
      this.#pending++
      this.#bytes += request.moved
      try {
        request.begin()
      } catch (error) {
        if (request.pending) {
          request.pending = false
          this.#pending--
        }
        throw error
      }
      bytes += request.cost
    }
    return true
  }

  /** Takes the next chain, which has room for a status. */
  #take(queue: Virtqueue): BlockRequest | undefined {
    const request = this.#free.pop() ?? new BlockRequest(this.#ports)
    if (queue.take(request.chain)) {
      if (request.chain.writableBytes > 0) {
        this.#busy++
        return request
      }
      queue.reject("a request to a disk has no room for its status")
    }
    this.#free.push(request)
    return undefined
  }

  #onDone(request: BlockRequest): void {
    this.#pending--
    this.#bytes -= request.moved
    this.#ended.push(request)
    if (this.#inTurn) return
    if (this.#pending === 0) {
      const onIdle = this.#onIdle
      if (onIdle !== undefined) return onIdle()
    }
    if (this.#signalled) return
    this.#signalled = true
    this.#signal()
  }

  /** Answers all requests that have ended. */
  #answer(): void {
    for (let i = 0; i < this.#ended.length; i++) {
      const request = this.#ended[i]
      if (request === undefined) continue
      this.#busy--
      const { queue } = request
      this.#count(request)
      // After a reset the memory is not the device's any more.
      if (queue !== undefined && queue === this.#queue) queue.complete(request.chain, request.end())
      request.release()
      this.#free.push(request)
    }
    this.#ended.length = 0
  }

  #count(request: BlockRequest): void {
    const counters = this.#counters
    counters.requests++
    if (request.status === VirtioBlkStatus.OK) {
      if (request.type === VirtioBlkType.IN) counters.bytesRead += request.length
      else if (request.type === VirtioBlkType.OUT) counters.bytesWritten += request.length
      return
    }
    if (request.error === undefined) return
    counters.failures++
    this.#options.onEvent?.({
      _tag: "RequestFailed",
      disk: this.#options.id,
      operation: request.operation,
      offset: request.offset,
      length: request.length,
      error: request.error
    })
  }
}

const start = (options: VirtioBlkOptions, counters: Counters) =>
  Effect.fnUntraced(function*(context: VirtioContext) {
    const dispatcher = yield* Effect.withFiber((fiber) => Effect.succeed(fiber.currentDispatcher))
    // Back ends end many requests one after the other: the device works when they have all been told of.
    const disk = new Disk(options, counters, () => dispatcher.scheduleTask(() => context.signal(SIGNAL_DONE), 0))
    yield* Effect.addFinalizer(() => disk.idle)
    const { throttle } = options
    if (throttle !== undefined) disk.run = throttle.run(() => context.signal(SIGNAL_TOKENS))
    return disk
  })

/** A disk as a block device. Its counters go on when it is started again. */
export const virtioBlk = (options: VirtioBlkOptions): VirtioBlk => {
  const counters: Counters = { requests: 0, bytesRead: 0, bytesWritten: 0, failures: 0 }
  return {
    device: {
      deviceId: VIRTIO_ID_BLOCK,
      features: featuresOf(options.backend),
      queueSizes: [BLOCK_QUEUE_SIZE],
      config: configOf(options.backend),
      start: start(options, counters)
    },
    statistics: () => ({ disk: options.id, ...counters })
  }
}
