/**
 * The memory balloon (virtio 1.3, section 5.5): memory that the guest does not use goes back to the host, for real.
 *
 * What the guest gives to the balloon, or reports as free, is discarded: it costs the host nothing until the guest touches it
 * again, and then reads as zero. So pages that leave the balloon need nothing to be done, and it does not matter whether the
 * guest says so before it uses them. Every turn is bounded in pages and in calls to the host.
 */
import { BALLOON_PAGE_SIZE, BalloonController, type MemStat } from "@troupe/core/BalloonController"
import type { DevicePolicy } from "@troupe/core/Device"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { PAGE_SIZE } from "@troupe/core/GuestMemory"
import { restartPolicy } from "@troupe/core/RestartSchedule"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import { type BalloonState, makeBalloonState } from "./balloon/BalloonState.ts"
import { PageRun } from "./balloon/PageRun.ts"
import { DescriptorChain } from "./virtio/DescriptorChain.ts"
import { hasFeature, makeFeatures } from "./virtio/Features.ts"
import type { VirtioBehaviour, VirtioContext, VirtioDevice } from "./virtio/VirtioDevice.ts"
import { virtioOn } from "./virtio/VirtioTransport.ts"
import type { Virtqueue } from "./virtio/Virtqueue.ts"

/** Device type of the memory balloon. */
export const VIRTIO_ID_BALLOON = 5
/** The driver gives statistics in a queue. */
export const VIRTIO_BALLOON_F_STATS_VQ = 1
/** The driver takes pages out of the balloon before it lets the guest run out of memory. */
export const VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 2
/** The driver says what free pages hold. */
export const VIRTIO_BALLOON_F_PAGE_POISON = 4
/** The driver reports free pages in a queue. */
export const VIRTIO_BALLOON_F_PAGE_REPORTING = 5

/** The largest size of each queue. */
export const BALLOON_QUEUE_SIZE = 128
/** The most pages that go back to the host in one turn: 16 MiB, a millisecond or two of the host's time. */
export const BALLOON_PAGES_PER_TURN = 4096
/** The most calls to the host in one turn. */
export const BALLOON_DISCARDS_PER_TURN = 512
/** The most chains worked on in one turn. */
export const BALLOON_CHAINS_PER_TURN = 128
/** The most statistics that are taken from a driver at a time; it has sent what comes after them in vain. */
export const MEM_STATS_MAX = 128

/** Offsets of the fields of `struct virtio_balloon_config` (section 5.5.4). */
export const BalloonConfig = { num_pages: 0, actual: 4, free_page_hint_cmd_id: 8, poison_val: 12 } as const
/** Size of `struct virtio_balloon_config` in bytes. */
export const BALLOON_CONFIG_SIZE = 16

/** Size of a page frame number in bytes. */
const PFN_SIZE = 4
/** Page frame numbers that are copied at a time. */
const PFNS_AT_A_TIME = 256
/** Size of `struct virtio_balloon_stat` in bytes. */
const STAT_SIZE = 10

const QUEUE_INFLATE = 0
const QUEUE_DEFLATE = 1
const QUEUE_STATS = 2
const QUEUE_COUNT = 5

const SIGNAL_REQUESTED = 0
const SIGNAL_ASKED = 1

/** A balloon that is started again a few times, at growing intervals, when it fails. */
export const balloonPolicy: DevicePolicy = restartPolicy({ delay: "100 millis" })

/** A queue, and the chain of it that is in hand, perhaps for more than one turn. */
class Hand {
  readonly chain = new DescriptorChain(BALLOON_QUEUE_SIZE)
  queue: Virtqueue | undefined
  /** Whether the chain is in hand, and how far it is done: in bytes, and for reports in buffers before them. */
  busy = false
  position = 0
  buffer = 0

  /** Takes a chain, if none is in hand. */
  take(queue: Virtqueue): boolean {
    if (this.busy) return true
    this.busy = queue.take(this.chain)
    this.position = 0
    this.buffer = this.chain.readableCount
    return this.busy
  }

  /** Gives the chain back. */
  complete(queue: Virtqueue): void {
    this.busy = false
    queue.complete(this.chain, 0)
  }

  /** The driver is gone. */
  clear(): void {
    this.queue = undefined
    this.busy = false
    this.chain.clear()
  }
}

/** The running device. */
class BalloonBehaviour implements VirtioBehaviour {
  readonly #state: BalloonState
  readonly #context: VirtioContext
  /** What the driver reads, and the fields that it has written. */
  readonly #config: DataView
  readonly #inflate = new Hand()
  readonly #deflate = new Hand()
  readonly #stats = new Hand()
  readonly #reports: ReadonlyArray<Hand> = Array.from({ length: QUEUE_COUNT }, () => new Hand())
  readonly #run = new PageRun()
  readonly #numbers = new DataView(new ArrayBuffer(PFNS_AT_A_TIME * PFN_SIZE))
  readonly #numberBytes = new Uint8Array(this.#numbers.buffer)
  #active = false
  /** What reported pages hold must stay, because it is not zero. */
  #poisoned = false

  constructor(state: BalloonState, context: VirtioContext) {
    this.#state = state
    this.#context = context
    this.#config = new DataView(configOf(state).buffer)
  }

  readonly activate: VirtioBehaviour["activate"] = ({ features, queues }) => {
    const statistics = hasFeature(features, VIRTIO_BALLOON_F_STATS_VQ)
    this.#active = true
    this.#poisoned = hasFeature(features, VIRTIO_BALLOON_F_PAGE_POISON) &&
      this.#config.getUint32(BalloonConfig.poison_val, true) !== 0
    this.#inflate.queue = queues[QUEUE_INFLATE]
    this.#deflate.queue = queues[QUEUE_DEFLATE]
    if (statistics) this.#stats.queue = queues[QUEUE_STATS]
    // The specification numbers all queues, and Linux only those in use, so reports come in the second, third or last.
    if (hasFeature(features, VIRTIO_BALLOON_F_PAGE_REPORTING)) {
      this.#reports.forEach((hand, index) => {
        if (index >= QUEUE_STATS && !(statistics && index === QUEUE_STATS)) hand.queue = queues[index]
      })
    }
    this.#state.driver(statistics && this.#stats.queue !== undefined)
  }

  readonly notify = (queue: number): boolean => {
    if (queue === QUEUE_INFLATE) return this.#inflateTurn(this.#inflate)
    if (queue === QUEUE_DEFLATE) return this.#deflateTurn(this.#deflate)
    if (queue === QUEUE_STATS && this.#stats.queue !== undefined) return this.#statsTurn(this.#stats)
    const hand = this.#reports[queue]
    return hand !== undefined && this.#reportTurn(hand)
  }

  readonly signal = (number: number): boolean => {
    if (number === SIGNAL_REQUESTED) this.#showRequested()
    else if (this.#stats.queue !== undefined) return this.#statsTurn(this.#stats)
    return false
  }

  readonly writeConfig = (offset: number, size: number, value: number): void => {
    for (let i = 0; i < size; i++) {
      const at = offset + i
      const isActual = at >= BalloonConfig.actual && at < BalloonConfig.actual + 4
      // What free pages hold is fixed when the driver is ready (section 5.5.6.6.1).
      const isPoison = at >= BalloonConfig.poison_val && !this.#active
      if (isActual || isPoison) this.#config.setUint8(at, (value >>> (8 * i)) & 0xff)
    }
    this.#showDriverFields()
  }

  readonly reset = (): boolean => {
    this.#active = false
    this.#poisoned = false
    for (const hand of [this.#inflate, this.#deflate, this.#stats, ...this.#reports]) hand.clear()
    this.#run.clear()
    // The next driver begins with all of its memory, and knows of no balloon.
    this.#config.setUint32(BalloonConfig.actual, 0, true)
    this.#config.setUint32(BalloonConfig.poison_val, 0, true)
    this.#state.driver(undefined)
    this.#showDriverFields()
    return true
  }

  #showRequested(): void {
    this.#context.updateConfig((config) => config.setUint32(BalloonConfig.num_pages, this.#state.requested, true))
  }

  #showDriverFields(): void {
    const actual = this.#config.getUint32(BalloonConfig.actual, true)
    const poison = this.#config.getUint32(BalloonConfig.poison_val, true)
    this.#state.actual = actual
    this.#context.updateConfig((config) => {
      config.setUint32(BalloonConfig.actual, actual, true)
      config.setUint32(BalloonConfig.poison_val, poison, true)
    }, { quietly: true })
  }

  /** Takes pages into the balloon. */
  #inflateTurn(hand: Hand): boolean {
    const { queue } = hand
    if (queue === undefined) return false
    const { counters } = this.#state
    const discardsMax = counters.discards + BALLOON_DISCARDS_PER_TURN
    queue.suppressNotifications()
    let pages = BALLOON_PAGES_PER_TURN
    for (let chains = 0; chains < BALLOON_CHAINS_PER_TURN;) {
      if (!hand.take(queue)) return queue.resumeNotifications()
      const count = Math.floor(hand.chain.read(hand.position, this.#numberBytes) / PFN_SIZE)
      let sane = true
      let done = 0
      for (; done < count && sane; done++) {
        if (pages === 0 || counters.discards >= discardsMax) break
        const page = this.#numbers.getUint32(done * PFN_SIZE, true)
        if (!this.#run.add(page)) {
          sane = this.#discardRun()
          this.#run.add(page)
        }
        pages--
      }
      hand.position += done * PFN_SIZE
      counters.inflatedPages += done
      const more = sane && (done < count || count === PFNS_AT_A_TIME)
      if (more && done < count) return true
      if (more) continue
      // Every page is gone before the driver is told that it is.
      if (sane) sane = this.#discardRun()
      this.#run.clear()
      if (!sane) counters.badRequests++
      hand.complete(queue)
      chains++
    }
    return true
  }

  /** Gives the run of pages back to the host. Returns whether the guest has all of them. */
  #discardRun(): boolean {
    const { count, first } = this.#run
    this.#run.clear()
    if (count === 0) return true
    const address = first * BALLOON_PAGE_SIZE
    if (this.#context.memory.discard(address, count * BALLOON_PAGE_SIZE)) {
      this.#discarded(count * BALLOON_PAGE_SIZE)
      return true
    }
    // Not in one region: there may be a hole in it, or a border.
    for (let page = 0; page < count; page++) {
      if (!this.#context.memory.discard(address + page * BALLOON_PAGE_SIZE, BALLOON_PAGE_SIZE)) return false
      this.#discarded(BALLOON_PAGE_SIZE)
    }
    return true
  }

  #discarded(bytes: number): void {
    this.#state.counters.discards++
    this.#state.counters.discardedBytes += bytes
  }

  /** Lets pages out of the balloon: they are there when they are touched. */
  #deflateTurn(hand: Hand): boolean {
    const { queue } = hand
    if (queue === undefined) return false
    queue.suppressNotifications()
    for (let chains = 0; chains < BALLOON_CHAINS_PER_TURN; chains++) {
      if (!hand.take(queue)) return queue.resumeNotifications()
      this.#state.counters.deflatedPages += Math.floor(hand.chain.readableBytes / PFN_SIZE)
      hand.complete(queue)
    }
    return true
  }

  /** Gives pages back that are free now, and may be used again without a word. */
  #reportTurn(hand: Hand): boolean {
    const { queue } = hand
    if (queue === undefined) return false
    queue.suppressNotifications()
    let bytes = BALLOON_PAGES_PER_TURN * PAGE_SIZE
    let discards = BALLOON_DISCARDS_PER_TURN
    for (let chains = 0; chains < BALLOON_CHAINS_PER_TURN; chains++) {
      if (!hand.take(queue)) return queue.resumeNotifications()
      for (; hand.buffer < hand.chain.count; hand.buffer++, hand.position = 0) {
        const offset = hand.chain.offset(hand.buffer)
        const start = Math.ceil(offset / PAGE_SIZE) * PAGE_SIZE
        const end = Math.floor((offset + hand.chain.length(hand.buffer)) / PAGE_SIZE) * PAGE_SIZE
        while (start + hand.position < end) {
          if (bytes === 0 || discards === 0) return true
          const at = start + hand.position
          const length = Math.min(end - at, bytes)
          bytes -= length
          discards--
          hand.position += length
          this.#state.counters.reportedPages += length / PAGE_SIZE
          if (this.#poisoned) continue
          hand.chain.region(hand.buffer).discard(at, length)
          this.#discarded(length)
        }
      }
      hand.complete(queue)
    }
    return true
  }

  /** Takes statistics from the driver, and asks for others by giving it its buffer back. */
  #statsTurn(hand: Hand): boolean {
    const { queue } = hand
    if (queue === undefined) return false
    for (let chains = 0; chains < BALLOON_CHAINS_PER_TURN; chains++) {
      // The chain in hand has been read: it is kept until somebody wants newer ones.
      if (hand.busy && this.#state.wanted) hand.complete(queue)
      if (hand.busy || !hand.take(queue)) return queue.resumeNotifications() && !hand.busy
      this.#state.sampled(this.#readStats(hand.chain))
    }
    return true
  }

  #readStats(chain: DescriptorChain): ReadonlyArray<MemStat> {
    const stats: Array<MemStat> = []
    const count = Math.min(Math.floor(chain.readableBytes / STAT_SIZE), MEM_STATS_MAX)
    for (let i = 0; i < count; i++) {
      chain.read(i * STAT_SIZE, this.#numberBytes.subarray(0, STAT_SIZE))
      const val = this.#numbers.getUint32(2, true) + this.#numbers.getUint32(6, true) * 2 ** 32
      stats.push({ tag: this.#numbers.getUint16(0, true), val: Math.min(val, Number.MAX_SAFE_INTEGER) })
    }
    return stats
  }
}

const configOf = (state: BalloonState): Uint8Array<ArrayBuffer> => {
  const config = new Uint8Array(BALLOON_CONFIG_SIZE)
  new DataView(config.buffer).setUint32(BalloonConfig.num_pages, state.requested, true)
  return config
}

const startBalloon = (state: BalloonState, context: VirtioContext) =>
  Effect.map(
    Effect.acquireRelease(
      Effect.sync(() =>
        state.attach({
          requested: () => context.signal(SIGNAL_REQUESTED),
          asked: () => context.signal(SIGNAL_ASKED)
        })
      ),
      () => Effect.sync(() => state.detach())
    ),
    () => {
      // What the host has asked for before, or while the device was being started.
      context.signal(SIGNAL_REQUESTED)
      return new BalloonBehaviour(state, context)
    }
  )

/** The balloon before a transport, and its host's side. */
export interface Balloon {
  readonly device: VirtioDevice
  readonly controller: BalloonController["Service"]
}

/** A balloon for a guest of `pagesMax` pages of {@link BALLOON_PAGE_SIZE} bytes. */
export const makeBalloon = (pagesMax: number): Effect.Effect<Balloon, never, Scope.Scope> =>
  Effect.map(makeBalloonState(pagesMax), (state) => ({
    device: {
      deviceId: VIRTIO_ID_BALLOON,
      features: makeFeatures(
        VIRTIO_BALLOON_F_STATS_VQ,
        VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
        VIRTIO_BALLOON_F_PAGE_POISON,
        VIRTIO_BALLOON_F_PAGE_REPORTING
      ),
      queueSizes: Array.from({ length: QUEUE_COUNT }, () => BALLOON_QUEUE_SIZE),
      config: configOf(state),
      start: (context) => startBalloon(state, context)
    },
    controller: state.controller
  }))

/** Adds the balloon, which a machine has when `virtioBalloon` is set. */
export const layerBalloon: Layer.Layer<DeviceCatalog, never, DeviceCatalog> = DeviceCatalog.layerAdd(
  Effect.succeed({
    provides: "virtioBalloon" as const,
    devices: Effect.fnUntraced(function*(config) {
      if (!config.virtioBalloon) return []
      const bytes = config.guestMemory + (config.virtioMem ? config.virtioMemRegionSize ?? 0 : 0)
      const balloon = yield* makeBalloon(bytes / BALLOON_PAGE_SIZE)
      return [virtioOn(config, balloon.device, {
        name: "balloon0",
        policy: balloonPolicy,
        services: Context.make(BalloonController, balloon.controller)
      })]
    })
  })
)
