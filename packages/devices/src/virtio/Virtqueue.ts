/** A virtqueue as a device sees it, whatever the format of its rings. */
import type { DescriptorChain } from "./DescriptorChain.ts"

/** The most bytes of a descriptor chain (virtio 1.3, section 2.7.4.1). */
export const CHAIN_BYTES_MAX = 2 ** 32

/** Which rule a driver broke. */
export type QueueFaultKind =
  /** More chains are said to be available than the queue has entries. */
  | "available-index"
  /** The head of a chain is not in the descriptor table. */
  | "head-index"
  /** The head of a chain is that of another one, which the device still has. */
  | "head-in-flight"
  /** The chain goes on outside its table, or where nothing is available. */
  | "next-index"
  /** More descriptors than the queue has entries, which is also what a loop looks like. */
  | "chain-length"
  /** More than {@link CHAIN_BYTES_MAX} bytes. */
  | "chain-bytes"
  /** A buffer for the device to read comes after one for it to write. */
  | "direction"
  /** A buffer, or a table, is not in guest memory. */
  | "address"
  /** A table without the feature for it, in a table, with `VIRTQ_DESC_F_NEXT`, or not made of whole descriptors. */
  | "indirect"
  /** The chain itself is well-formed, and its contents make no sense to the device. */
  | "contents"

/** What is wrong with a queue. */
export interface QueueFault {
  readonly kind: QueueFaultKind
  /** What the guest wrote, in a sentence. */
  readonly detail: string
}

/**
 * A virtqueue that a driver has set up, split or packed. Valid until the driver resets the device or stops the queue; what a
 * device does with it after that has no effect.
 */
export interface Virtqueue {
  /** The number of entries. */
  readonly size: number
  /** What the driver did wrong, once it has. */
  readonly fault: QueueFault | undefined
  /** The number of chains that were taken and not yet completed. */
  readonly inFlight: number
  /**
   * Takes the next chain that the driver has made available. Returns `false`, and an empty chain, when there is none or the
   * queue is faulty. The chain's buffers may be used until it is completed.
   */
  readonly take: (chain: DescriptorChain) => boolean
  /**
   * Gives a chain back to the driver; `written` is the number of bytes written at the beginning of its writable buffers. The
   * driver sees it after the next {@link publish}. Chains may be completed in any order, each once. Nothing happens when the
   * queue was closed meanwhile.
   */
  readonly complete: (chain: DescriptorChain, written: number) => void
  /** Shows the driver all completed chains; the transport's part. Returns whether it wants an interrupt for them. */
  readonly publish: () => boolean
  /** Tells the driver that the device is at work and needs no notification. It is a hint: notifications may still come. */
  readonly suppressNotifications: () => void
  /**
   * Asks the driver for a notification of the next chain. Returns `true` when there is one already: it may have become
   * available before the driver could see the wish, so the caller takes it, or is called again, instead of waiting.
   */
  readonly resumeNotifications: () => boolean
  /** Makes the queue faulty: what a chain holds makes no sense to the device. */
  readonly reject: (detail: string) => void
  /** The driver has stopped the queue: from now on nothing of it is read or written. */
  readonly close: () => void
}
