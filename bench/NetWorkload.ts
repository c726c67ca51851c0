// The network device on a TAP interface whose kernel is made up, and a driver in plain memory that fills its queues again and
// again: what allocation-net.ts weighs. All of a frame's way is there but the system call.
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import { NET_HEADER_SIZE, NetFeature, NetQueue } from "@troupe/devices/net/NetLayout"
import { NetLine } from "@troupe/devices/net/NetLine"
import { virtioNet } from "@troupe/devices/net/VirtioNet"
import { makeFeatures, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1 } from "@troupe/devices/virtio/Features"
import { TransportState } from "@troupe/devices/virtio/TransportState"
import * as Ffi from "@troupe/node/Ffi"
import { TapPort, VNET_HEADER_SIZE } from "@troupe/node/net/TapPort"
import * as Effect from "effect/Effect"

const SIZE = 256
const QUEUE_STRIDE = 0x1_0000
const DRIVER_AREA = 0x4000
const DEVICE_AREA = 0x5000
const DATA = 0x10_0000
const DATA_STRIDE = 0x800
const MEMORY_SIZE = 0x100_0000
const WRITE = 2
const FRAME = 1442
const EAGAIN = 11

/** Frames of one direction. */
export interface NetWorkload {
  /** The frames of one round. */
  readonly frames: number
  /** The driver gives the device a queue full of buffers. */
  readonly fill: () => void
  /** The device fills or sends them all, until the interface says that there is nothing left. */
  readonly serve: () => void
}

/** A driver and a device on memory of their own. */
export const makeNetWorkload = (direction: "receive" | "send"): NetWorkload => {
  const receives = direction === "receive"
  const { functions } = Effect.runSync(Effect.provide(Ffi.Ffi, Ffi.layerWith({ quiet: true })))
  let waiting = 0
  const take = (): number => waiting-- > 0 ? VNET_HEADER_SIZE + FRAME : -EAGAIN
  const port = new TapPort({
    functions: { ...functions, ioctlNumber: () => 0, readv: take, writev: take },
    fd: 0,
    mtu: 1500,
    offloads: 0
  })
  const made = NetLine.make({ index: 0, name: "net0", macAddress: "02:00:00:00:00:01", port })
  const line = Effect.runSync(Effect.scoped(made))
  const device = virtioNet(line)
  const region = new MemoryRegion(0, new ArrayBuffer(MEMORY_SIZE))
  const memory = new GuestMemory([region])
  let interrupts = 0
  const state = new TransportState(device, {
    memory,
    config: new DataView(new ArrayBuffer(device.config.length)),
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
  state.start(Effect.runSync(Effect.scoped(device.start({
    name: "net0",
    memory,
    generation: 0,
    signal: () => {},
    pluggableMemory: undefined,
    updateConfig: (change) => state.updateConfig(change)
  }))))

  const { high, low } = makeFeatures(VIRTIO_F_VERSION_1, VIRTIO_F_EVENT_IDX, NetFeature.MRG_RXBUF)
  state.writeStatus(3)
  state.writeDriverFeatures(0, low)
  state.writeDriverFeatures(1, high)
  state.writeStatus(11)
  for (const queue of [NetQueue.RECEIVE, NetQueue.TRANSMIT]) {
    state.writeQueue(queue, "descriptorLow", (queue + 1) * QUEUE_STRIDE)
    state.writeQueue(queue, "driverLow", (queue + 1) * QUEUE_STRIDE + DRIVER_AREA)
    state.writeQueue(queue, "deviceLow", (queue + 1) * QUEUE_STRIDE + DEVICE_AREA)
    state.enableQueue(queue)
  }
  state.writeStatus(15)
  const queue = receives ? NetQueue.RECEIVE : NetQueue.TRANSMIT
  const base = (queue + 1) * QUEUE_STRIDE
  const available = (base + DRIVER_AREA) / 2
  const { view, words } = region
  for (let i = 0; i < SIZE; i++) {
    view.setUint32(base + 16 * i, DATA + i * DATA_STRIDE, true)
    view.setUint32(base + 16 * i + 8, receives ? DATA_STRIDE : NET_HEADER_SIZE + FRAME, true)
    view.setUint16(base + 16 * i + 12, receives ? WRITE : 0, true)
    words[available + 2 + i] = i
  }
  let position = 0
  return {
    frames: SIZE,
    fill: () => {
      waiting = SIZE
      position = (position + SIZE) & 0xffff
      // An interrupt for the last of them, please.
      words[available + 2 + SIZE] = (position - 1) & 0xffff
      Atomics.store(words, available + 1, position)
    },
    serve: () => {
      const before = interrupts
      while (state.notify(queue));
      const done = words[(base + DEVICE_AREA) / 2 + 1]
      if (done !== position || interrupts === before) throw new Error(`${done} of ${position} frames, or no interrupt`)
    }
  }
}
