// A queue of 256 entries that a driver fills and a device serves, again and again, in plain memory: what rows/Chains.ts times and
// allocation-chains.ts weighs. bench/anchor/chains does the same in Rust.
import type { DeviceBehaviour } from "@troupe/core/Device"
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import { DescriptorChain } from "@troupe/devices/virtio/DescriptorChain"
import {
  type Features,
  makeFeatures,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_RING_PACKED,
  VIRTIO_F_VERSION_1
} from "@troupe/devices/virtio/Features"
import { makeVirtqueue } from "@troupe/devices/virtio/QueueMaker"
import { TransportState } from "@troupe/devices/virtio/TransportState"
import type { VirtioBehaviour, VirtioDevice } from "@troupe/devices/virtio/VirtioDevice"
import type { Virtqueue } from "@troupe/devices/virtio/Virtqueue"
import * as Effect from "effect/Effect"

/** What a chain is: a buffer to fill; a request with a header, data to fill and a status; the same in an indirect table. */
export type ChainShape = "one" | "three" | "table"
export const CHAIN_SHAPES: ReadonlyArray<ChainShape> = ["one", "three", "table"]

const SIZE = 256
const DESCRIPTORS = 0x1000
const DRIVER_AREA = 0x4000
const DEVICE_AREA = 0x5000
const TABLES = 0x1_0000
const DATA = 0x10_0000
const DATA_STRIDE = 0x2000
const MEMORY_SIZE = 0x100_0000
const NEXT = 1
const WRITE = 2
const INDIRECT = 4
const AVAIL = 0x80
const USED = 0x8000

/** Has the device serve what is there. */
type Serve = () => void

const featuresOf = (packed: boolean): Features =>
  makeFeatures(
    VIRTIO_F_VERSION_1,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_EVENT_IDX,
    ...(packed ? [VIRTIO_F_RING_PACKED] : [])
  )

/** Takes and gives back every chain, and asks once whether the driver wants an interrupt. */
const serveQueue = (queue: Virtqueue): Serve => {
  const chain = new DescriptorChain(SIZE)
  return () => {
    while (queue.take(chain)) queue.complete(chain, chain.writableBytes)
    if (!queue.publish()) throw new Error("the driver wants an interrupt, and is given none")
  }
}

/** A device that gives every chain back, with its budget, behind the transport's state machine. */
const serveDevice = (memory: GuestMemory, packed: boolean): Serve => {
  const chain = new DescriptorChain(SIZE)
  let queue: Virtqueue | undefined
  const behaviour: VirtioBehaviour = {
    activate: ({ queues }) => {
      queue = queues[0]
    },
    notify: () => {
      if (queue === undefined) return false
      queue.suppressNotifications()
      for (let chains = 0; chains < SIZE; chains++) {
        if (!queue.take(chain)) break
        queue.complete(chain, chain.writableBytes)
      }
      return queue.resumeNotifications()
    },
    reset: () => true
  }
  const device: VirtioDevice = {
    deviceId: 42,
    features: featuresOf(packed),
    queueSizes: [SIZE],
    config: new Uint8Array(0),
    start: () => Effect.succeed(behaviour)
  }
  let interrupts = 0
  const state = new TransportState(device, {
    memory,
    config: new DataView(new ArrayBuffer(0)),
    show: () => {},
    interruptQueues: () => {
      interrupts++
    },
    interruptConfiguration: () => {},
    wasReset: () => {},
    signal: () => {},
    hold: () => () => {},
    report: (text) => {
      throw new Error(text)
    }
  }, { status: 0, configGeneration: 0 })
  state.start(behaviour)
  state.writeStatus(3)
  const { high, low } = featuresOf(packed)
  state.writeDriverFeatures(0, low)
  state.writeDriverFeatures(1, high)
  state.writeStatus(11)
  state.writeQueue(0, "descriptorLow", DESCRIPTORS)
  state.writeQueue(0, "driverLow", DRIVER_AREA)
  state.writeQueue(0, "deviceLow", DEVICE_AREA)
  state.enableQueue(0)
  state.writeStatus(15)
  const doorbell: NonNullable<DeviceBehaviour["doorbell"]> = (_, queueIndex) => state.notify(queueIndex)
  return () => {
    const before = interrupts
    while (doorbell(0, 0));
    if (interrupts === before) throw new Error("the driver wants an interrupt, and is given none")
  }
}

/** A driver and a device. */
export interface ChainsWorkload {
  /** The chains of one round. */
  readonly chains: number
  /** The driver's part: makes all chains available. */
  readonly fill: () => void
  /** The device's part. */
  readonly serve: Serve
}

/** Makes both, on memory of their own. */
export const makeChainsWorkload = (
  shape: ChainShape,
  options: { readonly packed: boolean; readonly device: boolean }
): ChainsWorkload => {
  const region = new MemoryRegion(0, new ArrayBuffer(MEMORY_SIZE))
  const memory = new GuestMemory([region])
  const { view, words } = region
  const { device, packed } = options
  const entries = shape === "three" ? 3 : 1
  const chains = Math.floor(SIZE / entries)
  const write = (at: number, address: number, length: number, flags: number, next: number, id: number) => {
    view.setUint32(at, address, true)
    view.setUint32(at + 4, 0, true)
    view.setUint32(at + 8, length, true)
    view.setUint16(at + (packed ? 14 : 12), flags, true)
    view.setUint16(at + (packed ? 12 : 14), packed ? id : next, true)
  }
  const dataOf = (chain: number) => DATA + chain * DATA_STRIDE
  for (let i = 0; i < chains; i++) {
    const table = TABLES + 64 * i
    const data = dataOf(i)
    write(table, data, 16, packed ? 0 : NEXT, 1, 0)
    write(table + 16, data + 16, 4096, packed ? WRITE : WRITE | NEXT, 2, 0)
    write(table + 32, data + 16 + 4096, 1, WRITE, 0, 0)
  }
  /** Writes an entry of a chain. `lap` goes into its flags. */
  const writeEntry = (chain: number, index: number, slot: number, following: number, lap: number) => {
    const data = dataOf(chain)
    const at = DESCRIPTORS + 16 * slot
    if (shape === "one") write(at, data, 64, WRITE | lap, 0, chain)
    else if (shape === "table") write(at, TABLES + 64 * chain, 48, INDIRECT | lap, 0, chain)
    else if (index === 0) write(at, data, 16, NEXT | lap, following, chain)
    else if (index === 1) write(at, data + 16, 4096, NEXT | WRITE | lap, following, chain)
    else write(at, data + 16 + 4096, 1, WRITE | lap, 0, chain)
  }
  let position = 0
  if (!packed) {
    for (let i = 0; i < chains * entries; i++) writeEntry(Math.floor(i / entries), i % entries, i, i + 1, 0)
  }
  const fillSplit = () => {
    for (let i = 0; i < chains; i++) {
      words[DRIVER_AREA / 2 + 2 + (position & (SIZE - 1))] = entries * i
      position = (position + 1) & 0xffff
    }
    // An interrupt for the last of them, please.
    words[DRIVER_AREA / 2 + 2 + SIZE] = (position - 1) & 0xffff
    Atomics.store(words, DRIVER_AREA / 2 + 1, position)
  }
  let wrap = 1
  const fillPacked = () => {
    for (let i = 0; i < chains * entries; i++) {
      writeEntry(Math.floor(i / entries), i % entries, position, 0, wrap === 1 ? AVAIL : USED)
      if (++position < SIZE) continue
      position = 0
      wrap ^= 1
    }
  }
  const queue = () => {
    const made = makeVirtqueue(memory, {
      size: SIZE,
      descriptorArea: DESCRIPTORS,
      driverArea: DRIVER_AREA,
      deviceArea: DEVICE_AREA,
      features: featuresOf(packed)
    })
    if (made === undefined) throw new Error("the queue is refused")
    return made
  }
  return {
    chains,
    fill: packed ? fillPacked : fillSplit,
    serve: device ? serveDevice(memory, packed) : serveQueue(queue())
  }
}
