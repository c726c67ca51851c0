/**
 * The socket device (virtio 1.3, section 5.10): three queues that carry the packets of a session.
 *
 * One turn takes packets from the guest, wakes the host's fibers that waited for them, and sends what there is to send: what a
 * host answers at once goes to the guest with the same interrupt.
 */
import { DescriptorChain } from "@troupe/devices/virtio/DescriptorChain"
import { hasFeature, makeFeatures } from "@troupe/devices/virtio/Features"
import type { VirtioBehaviour, VirtioContext, VirtioDevice, VirtioDriver } from "@troupe/devices/virtio/VirtioDevice"
import type { Virtqueue } from "@troupe/devices/virtio/Virtqueue"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Latch from "effect/Latch"
import type { GuestCid } from "./Cid.ts"
import { type SessionHost, VsockSession } from "./VsockSession.ts"

/** Device type of the socket device. */
export const VIRTIO_ID_VSOCK = 19
/** Streams are supported, unless this is not negotiated and seqpackets are. */
export const VIRTIO_VSOCK_F_STREAM = 0
/** Messages with boundaries are supported. */
export const VIRTIO_VSOCK_F_SEQPACKET = 1
/** The queue of packets for the guest. */
export const RX_QUEUE = 0
/** The queue of packets of the guest. */
export const TX_QUEUE = 1
/** The queue of events. */
export const EVENT_QUEUE = 2
/** The largest sizes of the queues. Linux fills the first with buffers of 4 KiB. */
export const VSOCK_QUEUE_SIZES: ReadonlyArray<number> = [256, 256, 16]
/** Event: the guest's connections are gone, and its context ID may be another one. */
export const VIRTIO_VSOCK_EVENT_TRANSPORT_RESET = 0
/** The most packets in one direction in one turn. */
export const PACKETS_PER_TURN = 128
/** The most bytes in one direction in one turn, except for the last packet. */
export const BYTES_PER_TURN = 2 ** 20

/** Signal: something is to be sent, or somebody to be woken. */
const SIGNAL_TURN = 0
/** Signal: connections have waited long enough for their guest. */
const SIGNAL_EXPIRE = 1
/** Signal: the guest is to hear of a transport reset. */
const SIGNAL_TRANSPORT_RESET = 2

/** What the device has of its endpoint: everything of a session's host that is not the device itself. */
export interface VsockDeviceHost
  extends Pick<SessionHost, "guestCid" | "hostPorts" | "listens" | "arrived" | "onShutdown">
{
  readonly guestCid: GuestCid
  /** A driver is ready, or gone. */
  readonly attach: (session: VsockSession | undefined) => void
  /** Takes what tells the guest of a transport reset. */
  readonly onTransportReset: (tell: () => void) => void
}

class Behaviour implements VirtioBehaviour {
  readonly run: Effect.Effect<never>
  readonly #host: VsockDeviceHost
  readonly #context: VirtioContext
  readonly #now: () => number
  readonly #chain = new DescriptorChain(256)
  readonly #closing = Latch.makeUnsafe(false)
  #session: VsockSession | undefined
  #rx: Virtqueue | undefined
  #tx: Virtqueue | undefined
  #event: Virtqueue | undefined
  #resetWaits = false

  constructor(host: VsockDeviceHost, context: VirtioContext, now: () => number) {
    this.#host = host
    this.#context = context
    this.#now = now
    this.run = this.#expire
    host.onTransportReset(() => context.signal(SIGNAL_TRANSPORT_RESET))
  }

  readonly activate = (driver: VirtioDriver): void => {
    this.#rx = driver.queues[RX_QUEUE]
    this.#tx = driver.queues[TX_QUEUE]
    this.#event = driver.queues[EVENT_QUEUE]
    this.#session = new VsockSession({
      guestCid: this.#host.guestCid,
      hasSeqpacket: hasFeature(driver.features, VIRTIO_VSOCK_F_SEQPACKET),
      hostPorts: this.#host.hostPorts,
      now: this.#now,
      signal: () => this.#context.signal(SIGNAL_TURN),
      listens: this.#host.listens,
      arrived: this.#host.arrived,
      onShutdown: this.#host.onShutdown,
      closing: () => {
        this.#closing.openUnsafe()
      }
    })
    this.#host.attach(this.#session)
  }

  readonly notify = (queue: number): boolean => queue === EVENT_QUEUE ? this.#sendEvent() : this.#turn()

  readonly signal = (number: number): boolean => {
    if (number === SIGNAL_EXPIRE) this.#session?.expire()
    if (number === SIGNAL_TRANSPORT_RESET) {
      this.#resetWaits = true
      this.#sendEvent()
    }
    return this.#turn()
  }

  readonly reset = (): boolean => {
    const session = this.#session
    this.#session = undefined
    this.#rx = undefined
    this.#tx = undefined
    this.#event = undefined
    this.#host.attach(undefined)
    session?.end()
    return true
  }

  #turn(): boolean {
    const session = this.#session
    if (session === undefined) return false
    let more = false
    session.turn(() => {
      more = this.#receive(session)
    })
    session.turn(() => {
      more = this.#send(session) || more
    })
    return more
  }

  /** Takes packets of the guest. Returns whether it is to be called again. */
  #receive(session: VsockSession): boolean {
    const tx = this.#tx
    if (tx === undefined) return false
    const chain = this.#chain
    tx.suppressNotifications()
    let bytes = 0
    for (let packets = 0; packets < PACKETS_PER_TURN && bytes < BYTES_PER_TURN; packets++) {
      // Without room, it goes on when the guest has taken what waits: see `#send`.
      if (!session.hasRoomForResets) return false
      if (!tx.take(chain)) return tx.resumeNotifications()
      bytes += chain.readableBytes
      session.receive(chain)
      tx.complete(chain, 0)
    }
    return true
  }

  /** Sends packets to the guest. Returns whether it is to be called again. */
  #send(session: VsockSession): boolean {
    const rx = this.#rx
    if (rx === undefined) return false
    const chain = this.#chain
    const wasFull = !session.hasRoomForResets
    rx.suppressNotifications()
    let bytes = 0
    for (let packets = 0; packets < PACKETS_PER_TURN && bytes < BYTES_PER_TURN; packets++) {
      if (!session.hasPackets) return wasFull && session.hasRoomForResets
      if (!rx.take(chain)) return rx.resumeNotifications() || (wasFull && session.hasRoomForResets)
      const written = session.send(chain)
      bytes += written
      rx.complete(chain, written)
    }
    return true
  }

  /** Tells the guest of a transport reset, once it has given a buffer for it. */
  #sendEvent(): boolean {
    const event = this.#event
    const chain = this.#chain
    if (event === undefined || !this.#resetWaits) return false
    if (!event.take(chain)) return event.resumeNotifications()
    const word = new Uint8Array(4)
    new DataView(word.buffer).setUint32(0, VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, true)
    const written = chain.writableBytes >= word.length ? chain.write(0, word) : 0
    event.complete(chain, written)
    if (written > 0) this.#resetWaits = false
    return this.#resetWaits
  }

  /** Waits for the connections that wait for their guest. */
  get #expire(): Effect.Effect<never> {
    return Effect.forever(Effect.gen({ self: this }, function*() {
      const wait = this.#session?.expiresIn
      if (wait === undefined) {
        this.#closing.closeUnsafe()
        return yield* this.#closing.await
      }
      yield* Effect.sleep(wait)
      this.#context.signal(SIGNAL_EXPIRE)
      // One round of the scheduler, in which the device takes the signal.
      yield* Effect.yieldNow
    }))
  }
}

/** The socket device of a guest, before a transport. */
export const vsockDevice = (host: VsockDeviceHost): VirtioDevice => {
  const config = new Uint8Array(8)
  new DataView(config.buffer).setUint32(0, host.guestCid, true)
  return {
    deviceId: VIRTIO_ID_VSOCK,
    features: makeFeatures(VIRTIO_VSOCK_F_STREAM, VIRTIO_VSOCK_F_SEQPACKET),
    queueSizes: VSOCK_QUEUE_SIZES,
    config,
    start: (context) =>
      Effect.gen(function*() {
        const clock = yield* Clock.Clock
        const behaviour = new Behaviour(host, context, () => clock.currentTimeMillisUnsafe())
        yield* Effect.addFinalizer(() => Effect.sync(() => behaviour.reset()))
        return behaviour
      })
  }
}
