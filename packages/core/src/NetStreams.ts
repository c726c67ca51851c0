/**
 * A network out of streams: for hosts that want to serve the frames of a guest by whatever they like.
 *
 * ```ts
 * const wire = NetStreams.layer(({ fromGuest, toGuest }) => Stream.run(fromGuest, toGuest)) // each guest hears itself
 * ```
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Queue from "effect/Queue"
import * as Sink from "effect/Sink"
import * as Stream from "effect/Stream"
import { MTU_DEFAULT, NetBackend, type NetPort, type NetPortListener, type NetPortRequest } from "./NetBackend.ts"
import type { NetFrame } from "./NetFrame.ts"

/** Frames that wait each way, unless the host chooses another number. */
export const FRAMES_WAITING_MAX = 1024

/** An interface of a guest as streams of Ethernet frames, each one `Uint8Array` of its own. */
export interface FrameStreams {
  readonly request: NetPortRequest
  /** What the guest sends. To be run once. When frames wait that nobody takes, the guest's driver waits in turn. */
  readonly fromGuest: Stream.Stream<Uint8Array<ArrayBuffer>>
  /** What the guest is to receive; it takes no more while too many frames wait for the guest. */
  readonly toGuest: Sink.Sink<void, Uint8Array<ArrayBuffer>>
  /** As {@link toGuest}, one frame at a time. */
  readonly send: (frame: Uint8Array<ArrayBuffer>) => Effect.Effect<void>
  /** Tells the guest whether there is a link; there is one at first. */
  readonly setLink: (up: boolean) => Effect.Effect<void>
}

/** What a host may choose. */
export interface NetStreamsOptions {
  /** The largest IP packet in bytes. Default: {@link MTU_DEFAULT}. */
  readonly mtu?: number
  /** Frames that wait each way. Default: {@link FRAMES_WAITING_MAX}. */
  readonly framesWaiting?: number
}

/** Frames that wait for the guest: a ring, and the senders that wait for room in it. */
class FrameQueue {
  readonly #frames: Array<Uint8Array<ArrayBuffer>> = []
  readonly #limit: number
  #first = 0
  #waiting: Array<() => void> = []
  #closed = false

  constructor(limit: number) {
    this.#limit = limit
  }

  get empty(): boolean {
    return this.#first === this.#frames.length
  }

  get next(): Uint8Array<ArrayBuffer> | undefined {
    return this.#frames[this.#first]
  }

  /** Adds a frame, or says that there is no room. A closed queue takes everything and keeps nothing. */
  offer(frame: Uint8Array<ArrayBuffer>): boolean {
    if (this.#closed) return true
    if (this.#frames.length - this.#first >= this.#limit) return false
    this.#frames.push(frame)
    return true
  }

  /** Drops the next frame. */
  shift(): void {
    this.#first++
    if (this.#first * 2 >= this.#frames.length) {
      this.#frames.splice(0, this.#first)
      this.#first = 0
    }
    this.#wake()
  }

  close(): void {
    this.#closed = true
    this.#frames.length = 0
    this.#first = 0
    this.#wake()
  }

  /** Returns when there may be room. */
  readonly room: Effect.Effect<void> = Effect.callback<void>((resume) => {
    if (this.#closed || this.#frames.length - this.#first < this.#limit) return resume(Effect.void)
    const wake = () => resume(Effect.void)
    this.#waiting.push(wake)
    return Effect.sync(() => {
      this.#waiting = this.#waiting.filter((other) => other !== wake)
    })
  })

  #wake(): void {
    if (this.#waiting.length === 0) return
    const waiting = this.#waiting
    this.#waiting = []
    for (const wake of waiting) wake()
  }
}

const openPort = Effect.fnUntraced(function*<E, R>(
  request: NetPortRequest,
  serve: (streams: FrameStreams) => Effect.Effect<unknown, E, R>,
  options: NetStreamsOptions
) {
  const limit = options.framesWaiting ?? FRAMES_WAITING_MAX
  const outgoing = yield* Queue.dropping<Uint8Array<ArrayBuffer>>(limit)
  const incoming = new FrameQueue(limit)
  let listener: NetPortListener | undefined
  let linkUp = true
  let open = true
  let drained = false
  let full = false
  yield* Effect.addFinalizer(() =>
    Effect.suspend(() => {
      open = false
      linkUp = false
      incoming.close()
      return Queue.shutdown(outgoing)
    })
  )
  const send = (frame: Uint8Array<ArrayBuffer>): Effect.Effect<void> =>
    Effect.suspend(() => {
      if (!linkUp) return Effect.void
      if (!incoming.offer(frame)) return Effect.andThen(incoming.room, send(frame))
      if (drained) {
        drained = false
        listener?.readable()
      }
      return Effect.void
    })
  const streams: FrameStreams = {
    request,
    fromGuest: Stream.fromQueue(outgoing).pipe(
      Stream.tap(() =>
        Effect.sync(() => {
          if (!full) return
          full = false
          listener?.writable()
        })
      )
    ),
    toGuest: Sink.forEach(send),
    send,
    setLink: (up) =>
      Effect.sync(() => {
        if (linkUp === up || !open) return
        linkUp = up
        listener?.linkChanged()
      })
  }
  const port: NetPort = {
    mtu: options.mtu ?? MTU_DEFAULT,
    accepts: 0,
    delivers: 0,
    get linkUp() {
      return linkUp
    },
    listen: (next) => {
      listener = next
    },
    allowOffloads: () => undefined,
    send: (frame: NetFrame) => {
      if (!linkUp) return true
      if (Queue.isFullUnsafe(outgoing)) {
        full = true
        return false
      }
      const bytes = new Uint8Array(frame.size)
      frame.read(0, bytes)
      Queue.offerUnsafe(outgoing, bytes)
      return true
    },
    receive: (frame) => {
      const next = incoming.next
      if (next === undefined) {
        drained = true
        return 0
      }
      if (next.length > frame.size) return -next.length
      frame.clearOffloads()
      frame.write(0, next)
      incoming.shift()
      return next.length
    },
    discard: () => {
      if (!incoming.empty) incoming.shift()
    }
  }
  yield* Effect.forkScoped(
    Effect.tapCause(serve(streams), (cause) =>
      Cause.hasInterruptsOnly(cause)
        ? Effect.void
        : Effect.andThen(
          Effect.logWarning(`${request.name}: its network has failed: ${Cause.pretty(cause)}`),
          streams.setLink(false)
        ))
  )
  return port
})

/**
 * A back end whose ports are served by an effect, one run for each interface, which is interrupted when the machine is gone. A
 * network that ends by itself leaves its interface open, with nobody there; for one that fails, a line is logged and the link goes down.
 */
export const make = <E, R>(
  serve: (streams: FrameStreams) => Effect.Effect<unknown, E, R>,
  options: NetStreamsOptions = {}
): Effect.Effect<NetBackend["Service"], never, R> =>
  Effect.map(Effect.context<R>(), (context) => ({
    open: (request) => openPort(request, (streams) => Effect.provideContext(serve(streams), context), options)
  }))

/** As {@link make}, as a layer. */
export const layer = <E, R>(
  serve: (streams: FrameStreams) => Effect.Effect<unknown, E, R>,
  options: NetStreamsOptions = {}
): Layer.Layer<NetBackend, never, R> => Layer.effect(NetBackend, make(serve, options))
