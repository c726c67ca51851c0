/**
 * The network device (virtio 1.3, section 5.1): a pair of queues for frames, and one for commands.
 *
 * It is offered with everything that the interface's port, or the device in its stead, can take over from the driver: checksums and
 * segments in both directions, and received frames that span several of the driver's buffers.
 */
import { formatMacAddress } from "@troupe/core/MacAddress"
import { Offload } from "@troupe/core/NetBackend"
import * as Effect from "effect/Effect"
import { type Features, hasFeature, makeFeatures } from "../virtio/Features.ts"
import type { VirtioBehaviour, VirtioContext, VirtioDevice } from "../virtio/VirtioDevice.ts"
import { CONTROL_QUEUE_SIZE, NetControl } from "./NetControl.ts"
import { NET_CONFIG_SIZE, NetConfig, NetFeature, NetQueue, VIRTIO_ID_NET, VIRTIO_NET_S_LINK_UP } from "./NetLayout.ts"
import type { NetLine } from "./NetLine.ts"
import { NetReceive } from "./NetReceive.ts"
import { NetTransmit } from "./NetTransmit.ts"
import { ReceiveFilter } from "./ReceiveFilter.ts"

/** The largest size of the two queues of frames. */
export const NET_QUEUE_SIZE = 256

const SIGNAL_READABLE = 0
const SIGNAL_WRITABLE = 1
const SIGNAL_LINK = 2

/** Features that need another one (section 5.1.3.1), each with the one that it needs. */
const REQUIREMENTS: ReadonlyArray<readonly [feature: number, needed: number]> = [
  [NetFeature.GUEST_TSO4, NetFeature.GUEST_CSUM],
  [NetFeature.GUEST_TSO6, NetFeature.GUEST_CSUM],
  [NetFeature.GUEST_USO4, NetFeature.GUEST_CSUM],
  [NetFeature.GUEST_USO6, NetFeature.GUEST_CSUM],
  [NetFeature.HOST_TSO4, NetFeature.CSUM],
  [NetFeature.HOST_TSO6, NetFeature.CSUM],
  [NetFeature.HOST_USO, NetFeature.CSUM],
  [NetFeature.CTRL_RX, NetFeature.CTRL_VQ],
  [NetFeature.CTRL_RX_EXTRA, NetFeature.CTRL_VQ],
  [NetFeature.CTRL_MAC_ADDR, NetFeature.CTRL_VQ],
  [NetFeature.CTRL_GUEST_OFFLOADS, NetFeature.CTRL_VQ]
]

/** Whether each feature comes with what it needs. */
const accepts = (features: Features): boolean =>
  REQUIREMENTS.every(([feature, needed]) => !hasFeature(features, feature) || hasFeature(features, needed))

/** The feature bits, of which all are needed, for each offload in frames that the driver sends. */
const SEND_FEATURES: ReadonlyArray<readonly [offload: number, features: ReadonlyArray<number>]> = [
  [Offload.CHECKSUM, [NetFeature.CSUM]],
  [Offload.TSO4, [NetFeature.HOST_TSO4]],
  [Offload.TSO6, [NetFeature.HOST_TSO6]],
  [Offload.USO, [NetFeature.HOST_USO]]
]
/** As {@link SEND_FEATURES}, in frames that it receives. */
const RECEIVE_FEATURES: ReadonlyArray<readonly [offload: number, features: ReadonlyArray<number>]> = [
  [Offload.CHECKSUM, [NetFeature.GUEST_CSUM]],
  [Offload.TSO4, [NetFeature.GUEST_TSO4]],
  [Offload.TSO6, [NetFeature.GUEST_TSO6]],
  [Offload.USO, [NetFeature.GUEST_USO4, NetFeature.GUEST_USO6]]
]

const offloadsIn = (features: Features, table: typeof SEND_FEATURES): number => {
  let offloads = 0
  for (const [offload, bits] of table) if (bits.every((bit) => hasFeature(features, bit))) offloads |= offload
  return offloads
}

const featuresOf = (offloads: number, table: typeof SEND_FEATURES): ReadonlyArray<number> =>
  table.flatMap(([offload, bits]) => (offloads & offload) === 0 ? [] : bits)

/** All features by which a driver takes offloads in frames that it receives. */
const RECEIVE_OFFLOAD_FEATURES = makeFeatures(...RECEIVE_FEATURES.flatMap(([, bits]) => bits))

const makeBehaviour = (line: NetLine, context: VirtioContext): VirtioBehaviour => {
  const filter = new ReceiveFilter(line.macBytes)
  const receive = new NetReceive(line, filter)
  const transmit = new NetTransmit(line, NET_QUEUE_SIZE)
  let ready = false
  let negotiated: Features = { low: 0, high: 0 }
  /** What the configuration space shows at the start of every generation; see {@link configOf}. */
  let linkShown = true
  /** Whether each queue's next turn goes on with the last one, so that no notification of the driver led to it. */
  const goesOn = [false, false, false]

  const showAddress = (address: Uint8Array): void => {
    context.updateConfig((config) => address.forEach((byte, i) => config.setUint8(NetConfig.MAC + i, byte)))
  }
  const showLink = (): void => {
    if (line.linkUp === linkShown) return
    linkShown = !linkShown
    context.updateConfig((config) => config.setUint16(NetConfig.STATUS, linkShown ? VIRTIO_NET_S_LINK_UP : 0, true))
    line.publish({ _tag: "LinkChanged", up: linkShown })
  }
  const control = new NetControl(filter, {
    setAddress: (address) => {
      showAddress(address)
      line.publish({ _tag: "MacAddressChanged", macAddress: formatMacAddress(address) })
    },
    setOffloads: (low, high) => {
      const allowed = {
        low: negotiated.low & RECEIVE_OFFLOAD_FEATURES.low,
        high: negotiated.high & RECEIVE_OFFLOAD_FEATURES.high
      }
      const wanted = { low, high }
      if ((low & ~allowed.low) !== 0 || (high & ~allowed.high) !== 0 || !accepts(wanted)) return false
      receive.offloads = offloadsIn(wanted, RECEIVE_FEATURES)
      line.port.allowOffloads(receive.offloads)
      return true
    }
  })
  showLink()

  const turn = (queue: number): boolean => {
    const more = queue === NetQueue.RECEIVE
      ? receive.turn()
      : queue === NetQueue.TRANSMIT
      ? transmit.turn()
      : control.turn()
    line.reportDrops()
    return more
  }

  return {
    activate: ({ features, queues }) => {
      ready = true
      negotiated = features
      const sends = offloadsIn(features, SEND_FEATURES)
      const receives = offloadsIn(features, RECEIVE_FEATURES)
      const commands = hasFeature(features, NetFeature.CTRL_VQ)
      line.port.allowOffloads(receives)
      receive.start(
        queues[NetQueue.RECEIVE],
        hasFeature(features, NetFeature.MRG_RXBUF),
        receives,
        hasFeature(features, NetFeature.MTU) ? line.port.mtu : undefined
      )
      transmit.start(queues[NetQueue.TRANSMIT], sends)
      control.start(commands ? queues[NetQueue.CONTROL] : undefined, {
        rx: hasFeature(features, NetFeature.CTRL_RX),
        rxExtra: hasFeature(features, NetFeature.CTRL_RX_EXTRA),
        address: hasFeature(features, NetFeature.CTRL_MAC_ADDR),
        offloads: hasFeature(features, NetFeature.CTRL_GUEST_OFFLOADS)
      })
      line.publish({ _tag: "DriverReady", sends, receives })
    },
    notify: (queue) => {
      if (goesOn[queue] !== true) line.kicks++
      const more = turn(queue)
      goesOn[queue] = more
      return more
    },
    signal: (number) => {
      if (number === SIGNAL_LINK) {
        showLink()
        if (!ready) return false
        // What waits, either way, is lost while the link is down.
        const receives = turn(NetQueue.RECEIVE)
        return turn(NetQueue.TRANSMIT) || receives
      }
      return ready && turn(number === SIGNAL_READABLE ? NetQueue.RECEIVE : NetQueue.TRANSMIT)
    },
    run: Effect.raceFirst(
      line.receiveThrottle.run(() => context.signal(SIGNAL_READABLE)),
      line.sendThrottle.run(() => context.signal(SIGNAL_WRITABLE))
    ),
    reset: () => {
      receive.stop()
      transmit.stop()
      control.stop()
      goesOn.fill(false)
      if (!ready) return true
      ready = false
      line.port.allowOffloads(0)
      const changed = filter.address.some((byte, i) => byte !== line.macBytes[i])
      filter.reset(line.macBytes)
      if (changed) showAddress(line.macBytes)
      line.publish({ _tag: "DriverGone" })
      return true
    }
  }
}

const configOf = (line: NetLine): Uint8Array => {
  const config = new Uint8Array(NET_CONFIG_SIZE)
  const view = new DataView(config.buffer)
  config.set(line.macBytes, NetConfig.MAC)
  view.setUint16(NetConfig.STATUS, VIRTIO_NET_S_LINK_UP, true)
  view.setUint16(NetConfig.MTU, line.port.mtu, true)
  return config
}

/** The network device of an interface, before a transport. */
export const virtioNet = (line: NetLine): VirtioDevice => ({
  deviceId: VIRTIO_ID_NET,
  features: makeFeatures(
    ...featuresOf(line.port.accepts, SEND_FEATURES),
    ...featuresOf(line.port.delivers, RECEIVE_FEATURES),
    // That a driver takes partial checksums costs nobody anything, and others may depend on it.
    NetFeature.GUEST_CSUM,
    NetFeature.CTRL_GUEST_OFFLOADS,
    NetFeature.MTU,
    NetFeature.MAC,
    NetFeature.MRG_RXBUF,
    NetFeature.STATUS,
    NetFeature.CTRL_VQ,
    NetFeature.CTRL_RX,
    NetFeature.CTRL_RX_EXTRA,
    NetFeature.CTRL_MAC_ADDR
  ),
  queueSizes: [NET_QUEUE_SIZE, NET_QUEUE_SIZE, CONTROL_QUEUE_SIZE],
  config: configOf(line),
  accepts,
  start: (context) =>
    Effect.gen(function*() {
      yield* Effect.acquireRelease(
        Effect.sync(() => {
          line.attach(() => context.signal(SIGNAL_LINK))
          line.port.listen({
            readable: () => context.signal(SIGNAL_READABLE),
            writable: () => context.signal(SIGNAL_WRITABLE),
            linkChanged: () => context.signal(SIGNAL_LINK)
          })
        }),
        () =>
          Effect.sync(() => {
            line.attach(undefined)
            line.port.listen(undefined)
            line.port.allowOffloads(0)
          })
      )
      return makeBehaviour(line, context)
    })
})
