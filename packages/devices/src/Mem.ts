/**
 * The memory device (virtio 1.3, section 5.15): RAM that the guest plugs and unplugs in blocks, up to what its host asks for.
 *
 * The device checks what the driver wants and answers; the plugging itself is the hypervisor's, takes a while, and is done in
 * the background, one request at a time. Memory belongs to the life of the guest: neither a reset of the device nor a restart
 * after a failure changes what is plugged.
 */
import type { DevicePolicy } from "@troupe/core/Device"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { addressFromHalves, INVALID_ADDRESS } from "@troupe/core/GuestAddress"
import { BadConfig, GuestError } from "@troupe/core/GuestError"
import type { PluggableMemory } from "@troupe/core/Hypervisor"
import { MemController, type MemSize } from "@troupe/core/MemController"
import { restartPolicy } from "@troupe/core/RestartSchedule"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"
import * as PubSub from "effect/PubSub"
import * as Queue from "effect/Queue"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { DescriptorChain } from "./virtio/DescriptorChain.ts"
import { hasFeature, makeFeatures } from "./virtio/Features.ts"
import type { VirtioBehaviour, VirtioContext, VirtioDevice } from "./virtio/VirtioDevice.ts"
import { virtioOn } from "./virtio/VirtioTransport.ts"
import type { Virtqueue } from "./virtio/Virtqueue.ts"

/** Device type of the memory device. */
export const VIRTIO_ID_MEM = 24
/** The driver does not access what is not plugged. */
export const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE = 1
/** The largest size of its queue. */
export const MEM_QUEUE_SIZE = 64
/** The most requests answered in one turn. */
export const MEM_CHAINS_PER_TURN = 64

/** Types of a request (section 5.15.6). */
export const MemRequest = { PLUG: 0, UNPLUG: 1, UNPLUG_ALL: 2, STATE: 3 } as const
/** Types of a response. */
export const MemResponse = { ACK: 0, NACK: 1, BUSY: 2, ERROR: 3 } as const
/** What a STATE request is told. */
export const MemBlockState = { PLUGGED: 0, UNPLUGGED: 1, MIXED: 2 } as const
/** Size of `struct virtio_mem_req` in bytes. */
export const MEM_REQUEST_SIZE = 24
/** Size of `struct virtio_mem_resp` in bytes. */
export const MEM_RESPONSE_SIZE = 10

// Offsets in `struct virtio_mem_req` and `struct virtio_mem_resp`.
const REQUEST_TYPE = 0
const REQUEST_ADDR = 8
const REQUEST_NB_BLOCKS = 16
const RESPONSE_TYPE = 0
const RESPONSE_STATE = 8

/** Offsets of the fields of `struct virtio_mem_config` (section 5.15.4). */
export const MemConfig = {
  block_size: 0,
  node_id: 8,
  addr: 16,
  region_size: 24,
  usable_region_size: 32,
  plugged_size: 40,
  requested_size: 48
} as const
/** Size of `struct virtio_mem_config` in bytes. */
export const MEM_CONFIG_SIZE = 56

/** The work in the background is done. */
const SIGNAL_DONE = 0
/** The host asks for another size. */
const SIGNAL_REQUESTED = 1

/** Sizes that a reader of `MemController.changes` may be behind. */
const CHANGES_KEPT = 16

/** A memory device that is started again a few times, at growing intervals, when it fails. */
export const memPolicy: DevicePolicy = restartPolicy({ delay: "100 millis" })

/** What the host and the device share, as long as the machine. */
class MemState {
  readonly blockSize: number
  readonly regionSize: number
  requestedSize = 0
  /** The memory of this life of the guest. */
  memory: PluggableMemory | undefined
  /** Tells the running device that the host asks for another size. */
  requested: () => void = () => {}
  readonly #changes: PubSub.PubSub<MemSize>

  constructor(blockSize: number, regionSize: number, changes: PubSub.PubSub<MemSize>) {
    this.blockSize = blockSize
    this.regionSize = regionSize
    this.#changes = changes
    this.publish()
  }

  get size(): MemSize {
    return {
      blockSize: this.blockSize,
      regionSize: this.regionSize,
      usableRegionSize: this.regionSize,
      pluggedSize: (this.memory?.blocks.plugged ?? 0) * this.blockSize,
      requestedSize: this.requestedSize
    }
  }

  publish(): void {
    PubSub.publishUnsafe(this.#changes, this.size)
  }

  get controller(): MemController["Service"] {
    return {
      getMemSize: Effect.sync(() => this.size),
      requestSize: (requestedSize) =>
        Effect.suspend(() => {
          const rule = !Number.isSafeInteger(requestedSize) || requestedSize < 0 || requestedSize > this.regionSize
            ? `must be a number of bytes from 0 to usableRegionSize (${this.regionSize})`
            : requestedSize % this.blockSize !== 0
            ? `must be a multiple of blockSize (${this.blockSize})`
            : undefined
          if (rule !== undefined) {
            return Effect.fail(
              new GuestError({
                reason: new BadConfig({
                  operation: "requestSize",
                  detail: "the requested size is wrong",
                  device: "mem",
                  issues: [{ field: "requestedSize", rule, value: String(requestedSize) }]
                })
              })
            )
          }
          this.requestedSize = requestedSize
          this.requested()
          this.publish()
          return Effect.void
        }),
      changes: Stream.fromPubSub(this.#changes)
    }
  }
}

/** Something to do for the driver's request in hand. */
interface Job {
  readonly plug: boolean
  readonly first: number
  readonly count: number
}

const setSize = (config: DataView, offset: number, bytes: number): void =>
  config.setBigUint64(offset, BigInt(bytes), true)

/** The running device. */
class MemBehaviour implements VirtioBehaviour {
  readonly #state: MemState
  readonly #memory: PluggableMemory
  readonly #context: VirtioContext
  readonly #jobs: Queue.Queue<Job>
  readonly #chain = new DescriptorChain(MEM_QUEUE_SIZE)
  readonly #request = new DataView(new ArrayBuffer(MEM_REQUEST_SIZE))
  readonly #requestBytes = new Uint8Array(this.#request.buffer)
  readonly #response = new DataView(new ArrayBuffer(MEM_RESPONSE_SIZE))
  readonly #responseBytes = new Uint8Array(this.#response.buffer)
  #queue: Virtqueue | undefined
  /** The hypervisor is at work, for the request in {@link #chain}. */
  #working = false
  /** Has it stop, after the block in hand. */
  #stop: (() => void) | undefined
  /** The answer, once it has done that. */
  #answer: number = MemResponse.BUSY

  constructor(state: MemState, memory: PluggableMemory, context: VirtioContext, jobs: Queue.Queue<Job>) {
    this.#state = state
    this.#memory = memory
    this.#context = context
    this.#jobs = jobs
  }

  readonly activate: VirtioBehaviour["activate"] = ({ queues }) => {
    this.#queue = queues[0]
  }

  readonly reset = (): boolean => {
    this.#queue = undefined
    this.#stop?.()
    return !this.#working
  }

  readonly notify = (): boolean => {
    const queue = this.#queue
    if (queue === undefined || this.#working) return false
    queue.suppressNotifications()
    for (let chains = 0; chains < MEM_CHAINS_PER_TURN; chains++) {
      if (!queue.take(this.#chain)) return queue.resumeNotifications()
      if (this.#chain.writableBytes < MEM_RESPONSE_SIZE) {
        queue.reject("a request has room for its response")
        return false
      }
      const response = this.#handle()
      if (response === undefined) return false
      this.#respond(queue, response)
    }
    return true
  }

  readonly signal = (number: number): boolean => {
    if (number === SIGNAL_REQUESTED) {
      this.#context.updateConfig((config) => setSize(config, MemConfig.requested_size, this.#state.requestedSize))
      return false
    }
    if (!this.#working) return false
    this.#working = false
    // A driver that looks at the size when it has the answer sees the new one; the specification wants no interrupt for it.
    this.#context.updateConfig(
      (config) => setSize(config, MemConfig.plugged_size, this.#state.size.pluggedSize),
      { quietly: true }
    )
    const queue = this.#queue
    if (queue === undefined) return false
    this.#respond(queue, this.#answer)
    return this.notify()
  }

  /**
   * Plugs and unplugs, one job after the other. What cannot be done now is not done at all, and the driver may ask again. A reset
   * waits for one block: a job may have thousands, and what has become of them is for the next driver to ask.
   */
  get run(): Effect.Effect<never> {
    const stopped = Effect.callback<number>((resume) => {
      this.#stop = () => resume(Effect.succeed(MemResponse.BUSY))
      // It was reset before the job began.
      if (this.#queue === undefined) this.#stop()
      return Effect.sync(() => {
        this.#stop = undefined
      })
    })
    return Effect.forever(
      Effect.gen({ self: this }, function*() {
        const { count, first, plug } = yield* Queue.take(this.#jobs)
        const work = plug ? this.#memory.plug(first, count) : this.#memory.unplug(first, count)
        const answer = Effect.matchEffect(work, {
          onFailure: (error) =>
            Effect.as(Effect.logWarning(`${this.#context.name}: ${error.message}`), MemResponse.BUSY),
          onSuccess: () => Effect.succeed(MemResponse.ACK)
        })
        this.#answer = yield* Effect.raceFirst(stopped, answer)
        this.#state.publish()
        this.#context.signal(SIGNAL_DONE)
      })
    )
  }

  #respond(queue: Virtqueue, type: number): void {
    this.#response.setUint16(RESPONSE_TYPE, type, true)
    this.#chain.write(0, this.#responseBytes)
    queue.complete(this.#chain, MEM_RESPONSE_SIZE)
  }

  /** The type of the response to the request in hand; `undefined` when that is known later. */
  #handle(): number | undefined {
    const { blocks } = this.#memory
    const request = this.#request
    this.#response.setUint16(RESPONSE_STATE, 0, true)
    if (this.#chain.read(0, this.#requestBytes) < MEM_REQUEST_SIZE) return MemResponse.ERROR
    const type = request.getUint16(REQUEST_TYPE, true)
    if (type === MemRequest.UNPLUG_ALL) {
      return blocks.plugged === 0 ? MemResponse.ACK : this.#begin({ plug: false, first: 0, count: blocks.count })
    }
    const address = addressFromHalves(
      request.getUint32(REQUEST_ADDR, true),
      request.getUint32(REQUEST_ADDR + 4, true)
    )
    const count = request.getUint16(REQUEST_NB_BLOCKS, true)
    const first = (address - this.#memory.region.guestAddress) / blocks.blockSize
    if (
      address === INVALID_ADDRESS || !Number.isInteger(first) || first < 0 || count === 0 ||
      first + count > blocks.count
    ) return MemResponse.ERROR
    const plugged = blocks.pluggedAmong(first, count)
    switch (type) {
      case MemRequest.PLUG:
        if (plugged > 0) return MemResponse.ERROR
        // The host decides how much; a driver that wants more, perhaps because the request has changed meanwhile, looks again.
        if ((blocks.plugged + count) * blocks.blockSize > this.#state.requestedSize) return MemResponse.NACK
        return this.#begin({ plug: true, first, count })
      case MemRequest.UNPLUG:
        return plugged < count ? MemResponse.ERROR : this.#begin({ plug: false, first, count })
      case MemRequest.STATE:
        this.#response.setUint16(
          RESPONSE_STATE,
          plugged === count ? MemBlockState.PLUGGED : plugged === 0 ? MemBlockState.UNPLUGGED : MemBlockState.MIXED,
          true
        )
        return MemResponse.ACK
      default:
        return MemResponse.ERROR
    }
  }

  #begin(job: Job): undefined {
    this.#working = true
    Queue.offerUnsafe(this.#jobs, job)
  }
}

const startMem = Effect.fnUntraced(function*(state: MemState, context: VirtioContext) {
  const memory = context.pluggableMemory
  if (memory === undefined) return yield* Effect.die(new Error(`${context.name} was given no memory`))
  const jobs = yield* Queue.bounded<Job>(1)
  const behaviour = new MemBehaviour(state, memory, context, jobs)
  state.memory = memory
  state.requested = () => context.signal(SIGNAL_REQUESTED)
  yield* Effect.addFinalizer(() =>
    Effect.sync(() => {
      state.requested = () => {}
      state.publish()
    })
  )
  context.updateConfig((config) => {
    setSize(config, MemConfig.addr, memory.region.guestAddress)
    setSize(config, MemConfig.plugged_size, state.size.pluggedSize)
    setSize(config, MemConfig.requested_size, state.requestedSize)
  })
  return behaviour
})

/** The memory device before a transport, and its host's side. */
export interface Mem {
  readonly device: VirtioDevice
  readonly controller: MemController["Service"]
}

/**
 * A memory device for a region of `regionSize` bytes in blocks of `blockSize`, which its machine has to give it
 * (`pluggableMemory` of the transport's options).
 */
export const makeMem: (blockSize: number, regionSize: number) => Effect.Effect<Mem, never, Scope.Scope> = Effect
  .fnUntraced(function*(blockSize, regionSize) {
    const changes = yield* Effect.acquireRelease(
      PubSub.sliding<MemSize>({ capacity: CHANGES_KEPT, replay: 1 }),
      PubSub.shutdown
    )
    const state = new MemState(blockSize, regionSize, changes)
    const config = new Uint8Array(MEM_CONFIG_SIZE)
    const view = new DataView(config.buffer)
    setSize(view, MemConfig.block_size, blockSize)
    setSize(view, MemConfig.region_size, regionSize)
    setSize(view, MemConfig.usable_region_size, regionSize)
    return {
      device: {
        deviceId: VIRTIO_ID_MEM,
        features: makeFeatures(VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE),
        queueSizes: [MEM_QUEUE_SIZE],
        config,
        // Without it a driver may read what is not plugged, and there is nothing to read.
        accepts: (features) => hasFeature(features, VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE),
        start: (context) => startMem(state, context)
      },
      controller: state.controller
    }
  })

/** What the region begins at a multiple of, unless the configuration says more: Linux hot-plugs memory in pieces of 128 MiB. */
export const MEM_REGION_ALIGNMENT = 2 ** 27

/** Adds the memory device, which a machine has when `virtioMem` is set. */
export const layerMem: Layer.Layer<DeviceCatalog, never, DeviceCatalog> = DeviceCatalog.layerAdd(
  Effect.succeed({
    provides: "virtioMem" as const,
    devices: Effect.fnUntraced(function*(config) {
      const { virtioMemBlockSize: blockSize, virtioMemRegionSize: size } = config
      if (!config.virtioMem || blockSize === undefined || size === undefined) return []
      const mem = yield* makeMem(blockSize, size)
      return [virtioOn(config, mem.device, {
        name: "mem0",
        policy: memPolicy,
        services: Context.make(MemController, mem.controller),
        pluggableMemory: {
          size,
          blockSize,
          alignment: Math.max(blockSize, config.virtioMemRegionAlignment ?? MEM_REGION_ALIGNMENT)
        }
      })]
    })
  })
)
