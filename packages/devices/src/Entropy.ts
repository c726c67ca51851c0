/**
 * The entropy device (virtio 1.3, section 5.4): one queue of buffers, which it fills with random bytes of the host.
 *
 * A turn has a budget, and a buffer that is larger than a turn may fill is given back partly filled, as the specification
 * allows, so no request of a guest holds the other devices up. With a rate limit, a request waits until its bytes are there.
 */
import type { DevicePolicy } from "@troupe/core/Device"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { restartPolicy } from "@troupe/core/RestartSchedule"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"
import { EntropySource } from "./EntropySource.ts"
import { makeThrottle, Throttle } from "./Throttle.ts"
import { DescriptorChain } from "./virtio/DescriptorChain.ts"
import { makeFeatures, VIRTIO_F_IN_ORDER } from "./virtio/Features.ts"
import type { VirtioBehaviour, VirtioContext, VirtioDevice } from "./virtio/VirtioDevice.ts"
import { virtioOn } from "./virtio/VirtioTransport.ts"
import type { Virtqueue } from "./virtio/Virtqueue.ts"

/** Device type of the entropy device. */
export const VIRTIO_ID_ENTROPY = 4
/** The largest size of its queue. */
export const ENTROPY_QUEUE_SIZE = 64
/** The most bytes made in one turn. */
export const ENTROPY_BYTES_PER_TURN = 0x1_0000
/** The most requests answered in one turn. */
export const ENTROPY_CHAINS_PER_TURN = 64

/** An entropy device that is started again a few times, at growing intervals, when its source fails. */
export const entropyPolicy: DevicePolicy = restartPolicy({ delay: "100 millis" })

/** The signal that there are tokens for the request that waits. */
const SIGNAL_TOKENS = 0

const makeBehaviour = (
  source: EntropySource["Service"],
  throttle: Throttle,
  context: VirtioContext
): VirtioBehaviour => {
  const chain = new DescriptorChain(ENTROPY_QUEUE_SIZE)
  let requests: Virtqueue | undefined
  /** Whether the chain holds a request that waits for tokens. */
  let waiting = false

  /** Fills the chain's buffers, at most `limit` bytes. Returns how many. */
  const fill = (limit: number): number => {
    let done = 0
    for (let i = chain.readableCount; i < chain.count && done < limit; i++) {
      const view = chain.view(i, limit - done)
      source.fill(view)
      done += view.length
    }
    return done
  }

  /** Answers requests. Returns `true` when there may be more for another turn. */
  const work = (queue: Virtqueue): boolean => {
    queue.suppressNotifications()
    let left = ENTROPY_BYTES_PER_TURN
    for (let chains = 0; chains < ENTROPY_CHAINS_PER_TURN && left > 0; chains++) {
      if (!waiting) {
        if (!queue.take(chain)) return queue.resumeNotifications()
        if (chain.readableCount > 0 || chain.writableBytes === 0) {
          queue.reject("a request for random bytes is one or more writable buffers")
          return false
        }
      }
      const bytes = Math.min(chain.writableBytes, left)
      waiting = !throttle.admit(bytes)
      if (waiting) return false
      left -= bytes
      queue.complete(chain, fill(bytes))
    }
    return true
  }

  return {
    activate: ({ queues }) => {
      requests = queues[0]
    },
    notify: () => requests !== undefined && !waiting && work(requests),
    signal: () => requests !== undefined && work(requests),
    reset: () => {
      requests = undefined
      waiting = false
      throttle.reset()
      return true
    },
    run: throttle.run(() => context.signal(SIGNAL_TOKENS))
  }
}

/** The entropy device, before a transport. Its throttle, if it has one, outlives resets and restarts. */
export const entropy = (
  source: EntropySource["Service"],
  throttle: Throttle = new Throttle(undefined, () => 0)
): VirtioDevice => ({
  deviceId: VIRTIO_ID_ENTROPY,
  features: makeFeatures(VIRTIO_F_IN_ORDER),
  queueSizes: [ENTROPY_QUEUE_SIZE],
  config: new Uint8Array(0),
  start: (context) => Effect.sync(() => makeBehaviour(source, throttle, context))
})

/** Adds the entropy device, which a machine has when `virtioRng` is set. */
export const layerEntropy: Layer.Layer<DeviceCatalog, never, DeviceCatalog | EntropySource> = DeviceCatalog.layerAdd(
  Effect.map(EntropySource, (source) => ({
    provides: "virtioRng" as const,
    devices: (config) =>
      Effect.map(makeThrottle(config.entropyRateLimit), (throttle) =>
        config.virtioRng
          ? [virtioOn(config, entropy(source, throttle), { name: "rng0", policy: entropyPolicy })]
          : [])
  }))
)
