/** A virtio device for tests of transports. */
import * as Effect from "effect/Effect"
import { DescriptorChain } from "../src/virtio/DescriptorChain.ts"
import { makeFeatures } from "../src/virtio/Features.ts"
import type { VirtioBehaviour, VirtioContext, VirtioDevice, VirtioDriver } from "../src/virtio/VirtioDevice.ts"

/** A device with two queues that keeps its chains until the test has it complete them. */
export class TestDevice implements VirtioDevice {
  readonly deviceId = 42
  readonly features = makeFeatures(5, 40)
  readonly queueSizes = [8, 4]
  readonly config = Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8)
  readonly held: Array<{ readonly queue: number; readonly chain: DescriptorChain }> = []
  readonly configWrites: Array<readonly [number, number, number]> = []
  readonly notified: Array<number> = []
  driver: VirtioDriver | undefined
  context: VirtioContext | undefined
  resets = 0
  idle = true

  readonly start = (context: VirtioContext) =>
    Effect.sync((): VirtioBehaviour => {
      this.context = context
      this.driver = undefined
      this.held.length = 0
      return {
        activate: (driver) => {
          this.driver = driver
        },
        notify: (index) => {
          this.notified.push(index)
          const queue = this.driver?.queues[index]
          if (queue === undefined) throw new Error(`queue ${index} is not ready`)
          for (;;) {
            const chain = new DescriptorChain(queue.size)
            if (!queue.take(chain)) break
            this.held.push({ queue: index, chain })
          }
          return queue.resumeNotifications()
        },
        reset: () => {
          this.resets++
          this.driver = undefined
          if (this.idle) this.held.length = 0
          return this.idle
        },
        // Completes the oldest chain.
        signal: () => {
          const oldest = this.held.shift()
          if (oldest !== undefined) {
            this.driver?.queues[oldest.queue]?.complete(oldest.chain, oldest.chain.writableBytes)
          }
          return this.held.length > 0
        },
        writeConfig: (offset, size, value) => {
          this.configWrites.push([offset, size, value])
          this.context?.updateConfig((config) => {
            for (let i = 0; i < size; i++) {
              config.setUint8(offset + i, (value >>> (8 * i)) & 0xff)
            }
          })
        }
      }
    })
}
