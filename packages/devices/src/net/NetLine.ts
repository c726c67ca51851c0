/** One interface as it outlives restarts of its device: its port, its cable, its counters, its events. */
import { MAC_ADDRESS_SIZE, macAddressBytes } from "@troupe/core/MacAddress"
import type { NetPort } from "@troupe/core/NetBackend"
import {
  NET_EVENTS_MAX,
  type NetCounters,
  type NetDropReason,
  type NetEvent,
  type NetInterface
} from "@troupe/core/NetInterfaces"
import * as Effect from "effect/Effect"
import * as PubSub from "effect/PubSub"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { Throttle } from "../Throttle.ts"

/** The reasons for which frames are lost, in the order of their counters. */
export const DROP_REASONS: ReadonlyArray<NetDropReason> = [
  "bad-header",
  "bad-size",
  "link-down",
  "filtered",
  "no-room"
]

/** Indices in {@link DROP_REASONS}. */
export const Drop = { BAD_HEADER: 0, BAD_SIZE: 1, LINK_DOWN: 2, FILTERED: 3, NO_ROOM: 4 } as const

/** Which interface it is. */
export interface NetLineOptions {
  readonly index: number
  readonly name: string
  readonly macAddress: string
  readonly port: NetPort
  /** The limit of what the guest receives, and of what it sends. Default: none. */
  readonly receiveThrottle?: Throttle
  readonly sendThrottle?: Throttle
}

const unlimited = (): Throttle => new Throttle(undefined, () => 0)

/** The state of an interface. */
export class NetLine {
  readonly index: number
  readonly name: string
  readonly macAddress: string
  readonly macBytes: Uint8Array<ArrayBuffer>
  readonly port: NetPort
  readonly receiveThrottle: Throttle
  readonly sendThrottle: Throttle
  sentFrames = 0
  sentBytes = 0
  receivedFrames = 0
  receivedBytes = 0
  kicks = 0
  batches = 0
  /** Lost frames, by the index of the reason. */
  readonly dropped = new Float64Array(DROP_REASONS.length)
  readonly #reported = new Float64Array(DROP_REASONS.length)
  #droppedNow = false
  /** The host has plugged the cable in. */
  #cable = true
  #device: (() => void) | undefined
  readonly #events: PubSub.PubSub<NetEvent>

  private constructor(options: NetLineOptions, events: PubSub.PubSub<NetEvent>) {
    this.index = options.index
    this.name = options.name
    this.macAddress = options.macAddress
    this.macBytes = macAddressBytes(options.macAddress).subarray(0, MAC_ADDRESS_SIZE)
    this.port = options.port
    this.receiveThrottle = options.receiveThrottle ?? unlimited()
    this.sendThrottle = options.sendThrottle ?? unlimited()
    this.#events = events
  }

  /** An interface; its streams of events end with the scope. */
  static readonly make = (options: NetLineOptions): Effect.Effect<NetLine, never, Scope.Scope> =>
    Effect.map(
      Effect.acquireRelease(PubSub.sliding<NetEvent>(NET_EVENTS_MAX), PubSub.shutdown),
      (events) => new NetLine(options, events)
    )

  /** Whether the guest has a link. */
  get linkUp(): boolean {
    return this.#cable && this.port.linkUp
  }

  /** Who is told when the link may have changed: the device that works, or nobody. */
  attach(device: (() => void) | undefined): void {
    this.#device = device
  }

  /** Counts a lost frame; {@link reportDrops} tells of it. */
  drop(reason: number): void {
    this.dropped[reason] = (this.dropped[reason] ?? 0) + 1
    this.#droppedNow = true
  }

  /** Publishes what was lost since the last time. */
  reportDrops(): void {
    if (!this.#droppedNow) return
    this.#droppedNow = false
    for (let i = 0; i < DROP_REASONS.length; i++) {
      const reason = DROP_REASONS[i]
      const count = (this.dropped[i] ?? 0) - (this.#reported[i] ?? 0)
      if (count === 0 || reason === undefined) continue
      this.#reported[i] = this.dropped[i] ?? 0
      this.publish({ _tag: "FramesDropped", reason, count })
    }
  }

  /** Publishes an event. */
  publish(event: NetEvent): void {
    PubSub.publishUnsafe(this.#events, event)
  }

  /** The interface as its host sees it. */
  get interface(): NetInterface {
    return {
      index: this.index,
      name: this.name,
      macAddress: this.macAddress,
      counters: () => this.#counters(),
      linkUp: () => this.linkUp,
      setLink: (up) =>
        Effect.sync(() => {
          if (this.#cable === up) return
          this.#cable = up
          this.#device?.()
        }),
      events: Stream.fromPubSub(this.#events)
    }
  }

  #counters(): NetCounters {
    const dropped = (reason: number): number => this.dropped[reason] ?? 0
    return {
      sentFrames: this.sentFrames,
      sentBytes: this.sentBytes,
      receivedFrames: this.receivedFrames,
      receivedBytes: this.receivedBytes,
      dropped: {
        "bad-header": dropped(Drop.BAD_HEADER),
        "bad-size": dropped(Drop.BAD_SIZE),
        "link-down": dropped(Drop.LINK_DOWN),
        filtered: dropped(Drop.FILTERED),
        "no-room": dropped(Drop.NO_ROOM)
      },
      kicks: this.kicks,
      batches: this.batches
    }
  }
}
