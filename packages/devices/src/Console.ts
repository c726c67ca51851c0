/**
 * The console device (virtio 1.3, section 5.3): a console of any speed for the guest, with the size of the host's terminal, and
 * further named ports for whatever host and guest have to say to each other.
 *
 * Bytes go from the guest's buffers to the host's streams and back with backpressure both ways; see `ConsoleLine`. A port that
 * nobody serves holds up that port and nothing else. Every turn is bounded.
 */
import { Console } from "@troupe/core/Console"
import { DeviceFailure, type DevicePolicy } from "@troupe/core/Device"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { restartPolicy } from "@troupe/core/RestartSchedule"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import { ConsoleControl, MESSAGE_BYTES_MAX } from "./console/ConsoleControl.ts"
import {
  CONSOLE_CONFIG_SIZE,
  CONSOLE_QUEUE_SIZE,
  ConsoleConfig,
  CONTROL_SIZE,
  QUEUE_CONTROL_RX,
  QUEUE_CONTROL_TX,
  queueCount,
  receiveQueue,
  transmitQueue,
  VIRTIO_CONSOLE_F_EMERG_WRITE,
  VIRTIO_CONSOLE_F_MULTIPORT,
  VIRTIO_CONSOLE_F_SIZE,
  VIRTIO_ID_CONSOLE
} from "./console/ConsoleLayout.ts"
import type { ConsoleLine } from "./console/ConsoleLine.ts"
import { ConsoleState } from "./console/ConsoleState.ts"
import { DescriptorChain } from "./virtio/DescriptorChain.ts"
import { hasFeature, makeFeatures } from "./virtio/Features.ts"
import type { VirtioBehaviour, VirtioContext, VirtioDevice } from "./virtio/VirtioDevice.ts"
import { virtioOn } from "./virtio/VirtioTransport.ts"
import type { Virtqueue } from "./virtio/Virtqueue.ts"

/** The most bytes moved for one queue in one turn. */
export const CONSOLE_BYTES_PER_TURN = 0x1_0000
/** The most chains worked on for one queue in one turn. */
export const CONSOLE_CHAINS_PER_TURN = 64

/** The host has something for the device to look at. */
const SIGNAL_LOOK = 0

/** A console that is started again a few times, at growing intervals, when it fails. */
export const consolePolicy: DevicePolicy = restartPolicy({ delay: "100 millis" })

/** A queue out of which the driver's bytes come, and the chain in hand, which may wait for room. */
class Transmit {
  readonly chain = new DescriptorChain(CONSOLE_QUEUE_SIZE)
  queue: Virtqueue | undefined
  busy = false
  position = 0

  clear(): void {
    this.queue = undefined
    this.busy = false
    this.chain.clear()
  }

  /** The chain in hand is done. */
  complete(queue: Virtqueue): void {
    this.busy = false
    queue.complete(this.chain, 0)
  }
}

/** The running device. */
class ConsoleBehaviour implements VirtioBehaviour {
  readonly #state: ConsoleState
  readonly #context: VirtioContext
  readonly #control: ConsoleControl
  /** By port. */
  readonly #receive: Array<Virtqueue | undefined>
  readonly #transmit: ReadonlyArray<Transmit>
  #toDriver: Virtqueue | undefined
  #fromDriver: Virtqueue | undefined
  readonly #chain = new DescriptorChain(CONSOLE_QUEUE_SIZE)
  readonly #message = new DataView(new ArrayBuffer(MESSAGE_BYTES_MAX))
  readonly #messageBytes = new Uint8Array(this.#message.buffer)
  #multiport = false
  /** The configuration space shows another size than the host wants. */
  #resized = true

  constructor(state: ConsoleState, context: VirtioContext) {
    this.#state = state
    this.#context = context
    this.#control = new ConsoleControl(state.lines, () => state.size)
    this.#receive = state.lines.map(() => undefined)
    this.#transmit = state.lines.map(() => new Transmit())
    this.#showSize()
  }

  /** Connects the host's side, until {@link ConsoleState.detach}. */
  attach(): void {
    const look = () => this.#context.signal(SIGNAL_LOOK)
    const looking = (change: (id: number) => void) => (line: ConsoleLine) => {
      change(line.id)
      look()
    }
    this.#state.attach({
      look,
      added: looking((id) => this.#control.added(id)),
      removed: looking((id) => this.#removed(id)),
      hostOpenChanged: looking((id) => this.#control.hostOpenChanged(id)),
      resized: () => {
        this.#resized = true
        this.#control.resized()
        look()
      },
      isLeaving: (id) => this.#control.isLeaving(id)
    })
  }

  readonly activate: VirtioBehaviour["activate"] = ({ features, queues }) => {
    this.#multiport = hasFeature(features, VIRTIO_CONSOLE_F_MULTIPORT)
    const ports = this.#multiport ? this.#receive.length : 1
    for (let port = 0; port < ports; port++) {
      this.#receive[port] = queues[receiveQueue(port)]
      const transmit = this.#transmit[port]
      if (transmit !== undefined) transmit.queue = queues[transmitQueue(port)]
    }
    if (this.#multiport) {
      this.#toDriver = queues[QUEUE_CONTROL_RX]
      this.#fromDriver = queues[QUEUE_CONTROL_TX]
    } else {
      this.#open(0)
    }
  }

  readonly notify = (queue: number): boolean => {
    const more = this.#workOn(queue)
    this.#wake()
    return more
  }

  readonly signal = (): boolean => {
    if (this.#resized) this.#showSize()
    let more = this.#toDriverTurn()
    for (let port = 0; port < this.#receive.length; port++) {
      if (this.#receiveTurn(port)) more = true
      if (this.#transmitTurn(port)) more = true
    }
    this.#wake()
    return more
  }

  readonly writeConfig = (offset: number, size: number, value: number): void => {
    // The other fields are the device's. Only the lowest byte is output (section 5.3.5.1).
    if (offset !== ConsoleConfig.emerg_wr || size === 0) return
    this.#state.lines[0]?.transmitByte(value & 0xff)
    this.#wake()
  }

  readonly reset = (): boolean => {
    this.#multiport = false
    this.#toDriver = undefined
    this.#fromDriver = undefined
    this.#receive.fill(undefined)
    for (const transmit of this.#transmit) transmit.clear()
    this.#control.reset()
    for (const line of this.#state.lines) if (line !== undefined) line.guestOpen = false
    return true
  }

  /** Lets the host's fibers go on. They may run at once, so nothing is in the middle of a turn now. */
  #wake(): void {
    for (const line of this.#state.lines) line?.wake()
  }

  #workOn(queue: number): boolean {
    if (queue < 2) return queue === 0 ? this.#receiveTurn(0) : this.#transmitTurn(0)
    if (queue === QUEUE_CONTROL_RX) return this.#toDriverTurn()
    if (queue === QUEUE_CONTROL_TX) return this.#fromDriverTurn()
    const port = Math.floor(queue / 2) - 1
    return queue % 2 === 0 ? this.#receiveTurn(port) : this.#transmitTurn(port)
  }

  #open(port: number): void {
    const line = this.#state.lines[port]
    if (line !== undefined) line.guestOpen = true
  }

  #removed(port: number): void {
    this.#control.removed(port)
    // The driver gets back what was in hand; nobody is there to take it.
    const transmit = this.#transmit[port]
    if (transmit?.queue !== undefined && transmit.busy) transmit.complete(transmit.queue)
  }

  #showSize(): void {
    this.#resized = false
    const { cols, rows } = this.#state.size
    this.#context.updateConfig((config) => {
      config.setUint16(ConsoleConfig.cols, cols, true)
      config.setUint16(ConsoleConfig.rows, rows, true)
    })
  }

  /** Moves output of the guest to the host. Returns whether there may be more. */
  #transmitTurn(port: number): boolean {
    const line = this.#state.lines[port]
    const transmit = this.#transmit[port]
    const queue = transmit?.queue
    if (queue === undefined || transmit === undefined) return false
    queue.suppressNotifications()
    let left = CONSOLE_BYTES_PER_TURN
    for (let chains = 0; chains < CONSOLE_CHAINS_PER_TURN && left > 0; chains++) {
      if (!transmit.busy) {
        if (!queue.take(transmit.chain)) return queue.resumeNotifications()
        if (transmit.chain.writableBytes > 0) {
          queue.reject("output is one or more readable buffers")
          return false
        }
        transmit.busy = true
        transmit.position = 0
      }
      if (line !== undefined) {
        const moved = line.transmit(transmit.chain, transmit.position)
        transmit.position += moved
        left -= moved
        // The line asks for attention when somebody has read.
        if (transmit.position < transmit.chain.readableBytes) return false
      }
      transmit.complete(queue)
    }
    return true
  }

  /** Moves input of the host to the guest. Returns whether there may be more. */
  #receiveTurn(port: number): boolean {
    const line = this.#state.lines[port]
    const queue = this.#receive[port]
    if (queue === undefined || line === undefined) return false
    queue.suppressNotifications()
    let left = CONSOLE_BYTES_PER_TURN
    for (let chains = 0; chains < CONSOLE_CHAINS_PER_TURN && left > 0; chains++) {
      // Without input nobody needs to know of new buffers.
      if (!line.hasInput || !line.guestOpen) return false
      if (!queue.take(this.#chain)) return queue.resumeNotifications()
      // What is no room for input is given back as it is.
      const written = this.#chain.readableBytes > 0 ? 0 : line.receive(this.#chain)
      left -= written
      queue.complete(this.#chain, written)
    }
    return true
  }

  /** Tells the driver about the ports. Returns whether there may be more. */
  #toDriverTurn(): boolean {
    const queue = this.#toDriver
    if (queue === undefined) return false
    queue.suppressNotifications()
    for (let chains = 0; chains < CONSOLE_CHAINS_PER_TURN; chains++) {
      if (!this.#control.waiting) return false
      if (!queue.take(this.#chain)) return queue.resumeNotifications()
      const usable = this.#chain.readableBytes === 0 && this.#chain.writableBytes >= CONTROL_SIZE
      const length = usable ? this.#control.next(this.#message) : 0
      const written = this.#chain.write(0, this.#messageBytes.subarray(0, length))
      queue.complete(this.#chain, written)
    }
    return true
  }

  /** Hears what the driver says about the ports. Returns whether there may be more. */
  #fromDriverTurn(): boolean {
    const queue = this.#fromDriver
    if (queue === undefined) return false
    queue.suppressNotifications()
    for (let chains = 0; chains < CONSOLE_CHAINS_PER_TURN; chains++) {
      if (!queue.take(this.#chain)) {
        // An answer, and ports that may have been opened, are for the device to look at.
        if (chains > 0) this.#context.signal(SIGNAL_LOOK)
        return queue.resumeNotifications()
      }
      if (this.#chain.writableBytes > 0) {
        queue.reject("a message to the device is one or more readable buffers")
        return false
      }
      if (this.#chain.read(0, this.#messageBytes.subarray(0, CONTROL_SIZE)) === CONTROL_SIZE) {
        this.#control.receive(this.#message)
      }
      queue.complete(this.#chain, 0)
    }
    this.#context.signal(SIGNAL_LOOK)
    return true
  }
}

const startConsole = (state: ConsoleState, context: VirtioContext) =>
  Effect.acquireRelease(
    Effect.sync(() => {
      const behaviour = new ConsoleBehaviour(state, context)
      behaviour.attach()
      return behaviour
    }),
    () => Effect.sync(() => state.detach())
  )

/** The console before a transport, and its host's side. */
export interface ConsoleDevice {
  readonly device: VirtioDevice
  readonly console: Console["Service"]
}

/** A console with further ports of these names, `portsMax` (with the console itself) at most. */
export const makeConsole = (
  portsMax = 1,
  names: ReadonlyArray<string> = []
): Effect.Effect<ConsoleDevice, DeviceFailure, Scope.Scope> =>
  Effect.map(
    Effect.mapError(
      ConsoleState.make(portsMax, names),
      (error) => new DeviceFailure({ device: "console", detail: error.message })
    ),
    (state) => {
      const config = new Uint8Array(CONSOLE_CONFIG_SIZE)
      new DataView(config.buffer).setUint32(ConsoleConfig.max_nr_ports, portsMax, true)
      return {
        device: {
          deviceId: VIRTIO_ID_CONSOLE,
          features: makeFeatures(
            VIRTIO_CONSOLE_F_SIZE,
            VIRTIO_CONSOLE_F_EMERG_WRITE,
            ...(portsMax > 1 ? [VIRTIO_CONSOLE_F_MULTIPORT] : [])
          ),
          queueSizes: Array.from({ length: queueCount(portsMax) }, () => CONSOLE_QUEUE_SIZE),
          config,
          isWritableEarly: (offset) => offset === ConsoleConfig.emerg_wr,
          start: (context) => startConsole(state, context)
        },
        console: state.console
      }
    }
  )

/** Adds the console, which a machine has when `virtioConsole` is set. */
export const layerConsole: Layer.Layer<DeviceCatalog, never, DeviceCatalog> = DeviceCatalog.layerAdd(
  Effect.succeed({
    provides: "virtioConsole" as const,
    devices: Effect.fnUntraced(function*(config) {
      if (!config.virtioConsole) return []
      const portsMax = config.consolePortsMax ?? 1 + config.consolePorts.length
      const { console, device } = yield* makeConsole(portsMax, config.consolePorts)
      return [virtioOn(config, device, {
        name: "console0",
        policy: consolePolicy,
        services: Context.make(Console, console)
      })]
    })
  })
)
