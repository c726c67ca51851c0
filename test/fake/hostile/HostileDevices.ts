// Each virtio device as the hostile driver meets it: with a host that does something, and a request that a correct driver makes of
// it afterwards.
import { BalloonController } from "@troupe/core/BalloonController"
import { blockClientFromBytes } from "@troupe/core/BlockClient"
import { Console } from "@troupe/core/Console"
import type { Device } from "@troupe/core/Device"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { decodeGuestConfig } from "@troupe/core/GuestConfig"
import { HostVsockEndpoint } from "@troupe/core/HostVsockEndpoint"
import { MemController } from "@troupe/core/MemController"
import { NetBackend, type NetPort, type NetPortListener } from "@troupe/core/NetBackend"
import type { NetFrame } from "@troupe/core/NetFrame"
import {
  balloonProfile,
  blockProfile,
  consoleProfile,
  entropyProfile,
  memProfile,
  netProfile,
  vsockProfile
} from "@troupe/core/testing/drivers/HostileProfiles"
import {
  HOSTILE_MEM_ADDRESS,
  HOSTILE_MEM_BLOCK,
  HOSTILE_MEM_BLOCKS,
  HOSTILE_QUEUES_MAX,
  type HostileProfile
} from "@troupe/core/testing/drivers/HostileScript"
import type { DriverBuffer } from "@troupe/core/testing/drivers/QueueDriver"
import { layerBalloon } from "@troupe/devices/Balloon"
import { layerBlock } from "@troupe/devices/Block"
import { layerConsole } from "@troupe/devices/Console"
import { layerEntropy } from "@troupe/devices/Entropy"
import { EntropySource } from "@troupe/devices/EntropySource"
import { layerMem } from "@troupe/devices/Mem"
import { layerNet } from "@troupe/devices/Net"
import { layerVsock, VsockManager } from "@troupe/vsock"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Result from "effect/Result"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"

/** What a rig knows of a device. */
export interface HostileSubject {
  readonly profile: HostileProfile
  readonly device: Device
  /** Something that the host does to the device, on one number. */
  readonly host: (action: number) => Effect.Effect<unknown>
  /** What the host does all the time. */
  readonly background: Effect.Effect<unknown>
  /** Whether the device has pluggable memory. */
  readonly pluggable: boolean
  /** Features that a correct driver accepts. */
  readonly features: { readonly low: number; readonly high: number }
  /** What a correct driver asks, and which of its buffers (by queue) must come back. */
  readonly request: (address: number) => {
    readonly queue: number
    readonly bytes: ReadonlyArray<number>
    readonly buffers: ReadonlyArray<DriverBuffer>
  }
  /** The host stops being difficult, and throws away what it has collected. */
  readonly calm: () => void
}

/** How the devices of a rig are reached. */
export interface HostileChoices {
  readonly transport: "mmio" | "pci"
  /** Whether the correct driver uses packed queues. */
  readonly packed: boolean
}

const ALL = { low: 0xffff_ffff, high: 0xffff_fff8 }
const readable = (address: number, length: number): DriverBuffer => ({ address, length, writable: false })
const writable = (address: number, length: number): DriverBuffer => ({ address, length, writable: true })

/** A generator of bytes that takes no time and is the same each time. */
const entropySource = Layer.succeed(EntropySource, { fill: (bytes: Uint8Array) => void bytes.fill(0x5a) })

const build = Effect.fnUntraced(function*(
  layer: Layer.Layer<DeviceCatalog, never, DeviceCatalog | VsockManager | EntropySource>,
  choices: HostileChoices,
  flags: object
): Effect.fn.Return<Device, never, Scope.Scope> {
  const catalog = yield* Layer.build(
    layer.pipe(Layer.provide(VsockManager.layer), Layer.provide(entropySource), Layer.provide(DeviceCatalog.layerEmpty))
  )
  const config = Result.getOrThrow(decodeGuestConfig({
    kernelType: "LINUX",
    kernel: new Uint8Array(1),
    cpus: 1,
    guestMemory: "2M",
    virtioTransport: choices.transport,
    virtioPackedRing: true,
    ...flags
  }))
  const factory = Context.get(catalog, DeviceCatalog).factories[0]
  const [device] = factory === undefined ? [] : yield* Effect.orDie(factory.devices(config))
  if (device === undefined) throw new Error("the catalog has no such device")
  return device
})

/** A service that a device publishes. */
const serviceOf = <I, S>(device: Device, key: Context.Key<I, S>): S => {
  const found = Option.getOrUndefined(Context.getOption(device.services ?? Context.empty(), key))
  if (found === undefined) throw new Error(`${device.name} does not publish ${key.key}`)
  return found
}

const nothing = { host: () => Effect.void, background: Effect.never, features: ALL, calm: () => {}, pluggable: false }

/** Makes a device, and the host around it. */
export type MakeSubject = (choices: HostileChoices) => Effect.Effect<HostileSubject, never, Scope.Scope>

const entropyOf = (flags: object): MakeSubject => (choices) =>
  Effect.map(build(layerEntropy, choices, { virtioRng: true, ...flags }), (device) => ({
    ...nothing,
    profile: entropyProfile,
    device,
    request: (address) => ({ queue: 0, bytes: [], buffers: [writable(address, 32)] })
  }))

/** The entropy device. */
export const entropySubject = entropyOf({})

/** The same at a pace that large requests have to wait for. */
const slowEntropy = entropyOf({
  entropyRateLimit: {
    bytes: { size: 0x1000, refillTimeMillis: 10 },
    operations: { size: 10, refillTimeMillis: 10, oneTimeBurst: 3 }
  }
})

const balloon: MakeSubject = (choices) =>
  Effect.map(build(layerBalloon, choices, { virtioBalloon: true }), (device) => {
    const controller = serviceOf(device, BalloonController)
    return {
      ...nothing,
      profile: balloonProfile,
      device,
      host: (action) =>
        action % 3 === 0
          ? Effect.ignore(controller.getMemStats)
          : Effect.ignore(controller.requestNumPages(action % 600)),
      request: (address) => ({ queue: 0, bytes: [1, 0, 0, 0, 2, 0, 0, 0], buffers: [readable(address, 8)] })
    }
  })

const mem: MakeSubject = (choices) =>
  Effect.map(
    build(layerMem, choices, {
      virtioMem: true,
      virtioMemBlockSize: HOSTILE_MEM_BLOCK,
      virtioMemRegionSize: HOSTILE_MEM_BLOCK * HOSTILE_MEM_BLOCKS
    }),
    (device) => {
      const controller = serviceOf(device, MemController)
      const address = Array.from({ length: 8 }, (_, i) => Math.floor(HOSTILE_MEM_ADDRESS / 2 ** (8 * i)) % 0x100)
      return {
        ...nothing,
        profile: memProfile,
        pluggable: true,
        device,
        host: (action) =>
          Effect.ignore(controller.requestSize((action % (HOSTILE_MEM_BLOCKS + 2)) * HOSTILE_MEM_BLOCK)),
        request: (at) => ({
          queue: 0,
          bytes: [3, 0, 0, 0, 0, 0, 0, 0, ...address, 1, 0, 0, 0, 0, 0, 0, 0],
          buffers: [readable(at, 24), writable(at + 24, 10)]
        })
      }
    }
  )

const blockOf = (spec: object): MakeSubject => (choices) =>
  Effect.map(
    build(layerBlock, choices, {
      blockDevices: [{
        id: "disk",
        mode: "READ_WRITE",
        format: "FILE",
        client: blockClientFromBytes("disk", new Uint8Array(0x1_0000)),
        ...spec
      }]
    }),
    (device) => ({
      ...nothing,
      profile: blockProfile,
      device,
      request: (address) => ({
        queue: 0,
        bytes: Array.from({ length: 16 }, () => 0),
        buffers: [readable(address, 16), writable(address + 16, 512), writable(address + 1024, 1)]
      })
    })
  )

/** A network that is a thing of the host's alone: it may have frames, room and a link, or not. */
class HostilePort implements NetPort {
  readonly mtu = 1500
  readonly accepts = 0xf
  readonly delivers = 0xf
  linkUp = true
  room = Number.POSITIVE_INFINITY
  waiting: Array<number> = []
  #listener: NetPortListener | undefined
  readonly #bytes = new Uint8Array(0x1_0000)

  listen(listener: NetPortListener | undefined): void {
    this.#listener = listener
  }

  allowOffloads(): void {}

  send(frame: NetFrame): boolean {
    if (this.room === 0) return false
    this.room--
    frame.read(0, this.#bytes, 0, Math.min(frame.size, this.#bytes.length))
    return true
  }

  receive(frame: NetFrame): number {
    const next = this.waiting[0]
    if (next === undefined) return 0
    if (next > frame.size) return -next
    frame.write(0, this.#bytes.subarray(0, next))
    this.waiting.shift()
    return next
  }

  discard(): void {
    this.waiting.shift()
  }

  put(length: number): void {
    if (this.waiting.length < 16) this.waiting.push(length)
    this.#listener?.readable()
  }

  makeRoom(frames: number): void {
    this.room += frames
    this.#listener?.writable()
  }

  setLink(up: boolean): void {
    this.linkUp = up
    this.#listener?.linkChanged()
  }
}

const net: MakeSubject = (choices) =>
  Effect.suspend(() => {
    const port = new HostilePort()
    const backend = Layer.succeed(NetBackend, { open: () => Effect.succeed(port) })
    return Effect.map(build(Layer.provide(layerNet, backend), choices, { defaultNet: true }), (device) => ({
      ...nothing,
      profile: netProfile,
      device,
      host: (action) =>
        Effect.sync(() => {
          if (action % 7 === 0) port.setLink(action % 2 === 0)
          else if (action % 7 === 1) port.room = action % 3
          else if (action % 7 === 2) port.makeRoom(action % 100)
          else port.put(1 + action % 2000)
        }),
      request: (address) => ({
        queue: 1,
        bytes: Array.from({ length: 12 + 60 }, () => 0),
        buffers: [readable(address, 12), readable(address + 12, 60)]
      }),
      calm: () => {
        port.waiting = []
        port.makeRoom(Number.POSITIVE_INFINITY)
        port.setLink(true)
      }
    }))
  })

const terminal: MakeSubject = (choices) =>
  Effect.map(
    build(layerConsole, choices, { virtioConsole: true, consolePorts: ["one"], consolePortsMax: 2 }),
    (device) => {
      const service = serviceOf(device, Console)
      return {
        ...nothing,
        profile: consoleProfile,
        device,
        host: (action) => {
          const ports = [service, ...service.ports()]
          const port = ports[action % ports.length]
          if (port === undefined || action % 5 === 0) {
            return Effect.ignore(service.resize({ cols: action % 300, rows: action % 100 }))
          }
          if (action % 5 === 1) return port.setOpen(action % 2 === 0)
          // Nobody waits for a guest that does not read.
          return Effect.asVoid(Effect.forkDetach(Effect.timeoutOption(port.write(new Uint8Array(action % 5000)), 1)))
        },
        background: Effect.forEach([service, ...service.ports()], (port) => Stream.runDrain(port.output), {
          concurrency: "unbounded"
        }),
        // Without ports of its own: a plain terminal.
        features: { low: ALL.low & ~2, high: ALL.high },
        request: (address) => ({ queue: 1, bytes: [104, 105], buffers: [readable(address, 2)] })
      }
    }
  )

const vsock: MakeSubject = (choices) =>
  Effect.map(build(layerVsock, choices, { virtioVsock: true }), (device) => {
    const endpoint = serviceOf(device, HostVsockEndpoint)
    return {
      ...nothing,
      profile: vsockProfile,
      device,
      host: (action) =>
        Effect.asVoid(Effect.forkDetach(Effect.ignore(Effect.scoped(
          Effect.gen(function*() {
            const socket = yield* endpoint.connect2(1024 + action % 4)
            yield* socket.write(new Uint8Array(action))
            yield* socket.read
          }).pipe(Effect.timeoutOption(100))
        )))),
      background: Effect.ignore(Stream.runForEach(endpoint.connections(1024), (socket) =>
        Effect.forkDetach(Effect.ignore(Effect.andThen(Stream.runDrain(socket.input), socket.close))))),
      request: (address) => ({
        queue: 1,
        // A packet of a connection that there is not.
        bytes: [
          3,
          0,
          0,
          0,
          0,
          0,
          0,
          0,
          2,
          0,
          0,
          0,
          0,
          0,
          0,
          0,
          ...Array.from({ length: 12 }, () =>
            1),
          1,
          0,
          5,
          0,
          ...Array.from({ length: 12 }, () => 0)
        ],
        buffers: [readable(address, 44)]
      })
    }
  })

/** All devices by name, and some of them in more than one way. */
export const HOSTILE_SUBJECTS: Readonly<
  Record<string, { readonly profile: HostileProfile; readonly make: MakeSubject }>
> = {
  entropy: { profile: entropyProfile, make: entropySubject },
  "entropy-slow": { profile: entropyProfile, make: slowEntropy },
  balloon: { profile: balloonProfile, make: balloon },
  mem: { profile: memProfile, make: mem },
  block: { profile: blockProfile, make: blockOf({}) },
  "block-read-only": { profile: blockProfile, make: blockOf({ mode: "READ_ONLY" }) },
  // With so little memory for what is written that there is soon no room.
  "block-volatile": { profile: blockProfile, make: blockOf({ mode: "VOLATILE_WRITE", volatileLimit: 0x4000 }) },
  net: { profile: netProfile, make: net },
  console: { profile: consoleProfile, make: terminal },
  vsock: { profile: vsockProfile, make: vsock }
}

/** Sizes of queues for a correct driver of any of them. */
export const correctQueueSizes = (profile: HostileProfile): ReadonlyArray<number> =>
  Array.from({ length: Math.min(profile.queues, HOSTILE_QUEUES_MAX) }, () => 8)
