/**
 * Guests on TAP interfaces of the host: each interface of a guest is one of the host's kernel, which routes, bridges or filters what
 * goes through it as the host's administrator wants it.
 *
 * ```ts
 * KvmGuestLifecycle.layer.pipe(Layer.provide(Tap.layer({ name: "tap0" })))
 * ```
 */
import { MTU_MAX, MTU_MIN, NetBackend, NetBackendError, type NetPortRequest, Offload } from "@troupe/core/NetBackend"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import { Ffi, layerWith as layerFfiWith, O_NONBLOCK, O_RDWR, POLL_READABLE } from "../Ffi.ts"
import { type FfiError, ffiError, type FfiUnavailable } from "../FfiError.ts"
import { AF_INET, SOCK_DGRAM } from "../internal/ForeignFunctions.ts"
import { TapPort, tunOffloads, VNET_HEADER_SIZE } from "./TapPort.ts"
import { IFREQ_SIZE, IFREQ_VALUE, NetIoctl, NetValue } from "./TunIoctl.ts"

/** The device node of TAP interfaces. */
export const TUN_DEVICE = "/dev/net/tun"
/** The names of interfaces that are made when the host names none: the kernel puts a number for `%d`. */
export const TAP_NAME = "troupe%d"

/** What a host may choose. */
export interface TapOptions {
  /**
   * The name of the interface, at most 15 bytes, one for all or one for each interface of a guest. One that exists is used, which
   * needs no privilege when it belongs to the user; otherwise it is made, and goes when the machine goes. Default: {@link TAP_NAME}.
   */
  readonly name?: string | ((request: NetPortRequest) => string)
  /** The bridge to which interfaces of guests with `enableBridge` are added, which are refused without it. */
  readonly bridge?: string
  /** The MTU to set. Default: what the interface has, 1500 for a new one. */
  readonly mtu?: number
}

const HINTS: { readonly [operation: string]: { readonly [errno: string]: string } } = {
  open: {
    ENOENT: "Load the kernel module tun",
    EACCES: `Run as a user who may open ${TUN_DEVICE}`,
    EPERM: `Run where ${TUN_DEVICE} may be used: some containers forbid it`
  },
  TUNSETIFF: {
    EPERM: "Have an administrator make it for you (ip tuntap add NAME mode tap user USER), or run with CAP_NET_ADMIN",
    EBUSY: "Another process uses the interface: give each guest one of its own",
    EINVAL: "An interface of that name is not a TAP interface with one queue, or the name is none"
  },
  SIOCSIFFLAGS: { EPERM: "Have an administrator set it up (ip link set NAME up), or run with CAP_NET_ADMIN" },
  SIOCSIFMTU: {
    EPERM: "Have an administrator set the MTU (ip link set NAME mtu MTU), or run with CAP_NET_ADMIN",
    EINVAL: "The interface does not take that MTU"
  },
  SIOCBRADDIF: {
    EPERM: "Have an administrator add it (ip link set NAME master BRIDGE), or run with CAP_NET_ADMIN",
    EOPNOTSUPP: "The bridge must be a bridge: ip link add BRIDGE type bridge"
  },
  SIOCGIFINDEX: { ENODEV: "Make the interface first" }
}

const toBackendError = (subject: string) => (error: FfiError): NetBackendError => {
  const hint = error.hint ?? HINTS[error.operation]?.[error.errno.name]
  return new NetBackendError({
    operation: `${error.operation} ${subject}`,
    detail: `${error.detail} (${error.errno.name})`,
    ...(hint === undefined ? {} : { hint })
  })
}

const refuse = (operation: string, detail: string, hint: string) => new NetBackendError({ operation, detail, hint })

/** A `struct ifreq` for an interface. */
const ifreq = (name: string): DataView<ArrayBuffer> => {
  const request = new DataView(new ArrayBuffer(IFREQ_SIZE))
  new TextEncoder().encodeInto(name, new Uint8Array(request.buffer, 0, NetValue.IFNAMSIZ - 1))
  return request
}

const nameIn = (request: DataView<ArrayBuffer>): string => {
  const bytes = new Uint8Array(request.buffer, 0, NetValue.IFNAMSIZ)
  return new TextDecoder().decode(bytes.subarray(0, bytes.indexOf(0)))
}

const isName = (name: string): boolean =>
  name !== "" && !/[\0/\s]/.test(name) && new TextEncoder().encode(name).length < NetValue.IFNAMSIZ

/** Whether the kernel knows these offloads. */
const probeOffloads = (ffi: Ffi["Service"], fd: number, offloads: number): Effect.Effect<boolean> =>
  Effect.match(ffi.ioctl(fd, NetIoctl.TUNSETOFFLOAD, tunOffloads(offloads)), {
    onFailure: () => false,
    onSuccess: () => true
  })

const openPort = Effect.fnUntraced(function*(ffi: Ffi["Service"], options: TapOptions, request: NetPortRequest) {
  const wanted = typeof options.name === "function" ? options.name(request) : options.name ?? TAP_NAME
  if (!isName(wanted)) {
    return yield* refuse("open a TAP interface", `${JSON.stringify(wanted)} is not a name`, "Use at most 15 bytes")
  }
  const { bridge, mtu } = options
  if (request.enableBridge && bridge === undefined) {
    return yield* refuse(
      `bridge ${request.name}`,
      "the back end has no bridge",
      "Name one (Tap.layer({ bridge: \"br0\" })), or set enableBridge to false"
    )
  }
  if (mtu !== undefined && !(Number.isInteger(mtu) && mtu >= MTU_MIN && mtu <= MTU_MAX)) {
    return yield* refuse(`set the MTU of ${wanted}`, `${mtu} is not an MTU`, `Use ${MTU_MIN} to ${MTU_MAX}`)
  }
  const fd = yield* ffi.open(TUN_DEVICE, O_RDWR | O_NONBLOCK).pipe(Effect.mapError(toBackendError(TUN_DEVICE)))
  const made = ifreq(wanted)
  made.setUint16(IFREQ_VALUE, NetValue.IFF_TAP | NetValue.IFF_NO_PI | NetValue.IFF_VNET_HDR, true)
  yield* ffi.ioctl(fd, NetIoctl.TUNSETIFF, made).pipe(Effect.mapError(toBackendError(wanted)))
  const name = nameIn(made)
  const failed = toBackendError(name)

  const int = (value: number): DataView<ArrayBuffer> => {
    const argument = new DataView(new ArrayBuffer(4))
    argument.setInt32(0, value, true)
    return argument
  }
  const configure = Effect.gen(function*() {
    yield* ffi.ioctl(fd, NetIoctl.TUNSETVNETHDRSZ, int(VNET_HEADER_SIZE))
    yield* ffi.ioctl(fd, NetIoctl.TUNSETVNETLE, int(1))
    const socket = yield* ffi.own(Effect.suspend(() => {
      const result = ffi.functions.socket(AF_INET, SOCK_DGRAM, 0)
      return result < 0 ? Effect.fail(ffiError("socket", "AF_INET, SOCK_DGRAM", result)) : Effect.succeed(result)
    }))
    const argument = ifreq(name)
    if (mtu !== undefined) {
      argument.setInt32(IFREQ_VALUE, mtu, true)
      yield* ffi.ioctl(socket, NetIoctl.SIOCSIFMTU, argument)
    }
    if (request.enableBridge && bridge !== undefined) {
      yield* ffi.ioctl(socket, NetIoctl.SIOCGIFINDEX, argument)
      const member = ifreq(bridge)
      member.setInt32(IFREQ_VALUE, argument.getInt32(IFREQ_VALUE, true), true)
      // Busy: it belongs to a bridge already, as an interface that its administrator has made may.
      yield* ffi.ioctl(socket, NetIoctl.SIOCBRADDIF, member).pipe(
        Effect.catchIf((error) => error.errno.name === "EBUSY", () => Effect.succeed(0))
      )
    }
    yield* ffi.ioctl(socket, NetIoctl.SIOCGIFFLAGS, argument)
    const flags = argument.getUint16(IFREQ_VALUE, true)
    if ((flags & NetValue.IFF_UP) === 0) {
      argument.setUint16(IFREQ_VALUE, flags | NetValue.IFF_UP, true)
      yield* ffi.ioctl(socket, NetIoctl.SIOCSIFFLAGS, argument)
    }
    yield* ffi.ioctl(socket, NetIoctl.SIOCGIFMTU, argument)
    return argument.getInt32(IFREQ_VALUE, true)
  })
  const actualMtu = yield* Effect.scoped(configure).pipe(Effect.mapError(failed))

  const basic = Offload.CHECKSUM | Offload.TSO4 | Offload.TSO6
  const offloads = (yield* probeOffloads(ffi, fd, basic | Offload.USO)) ? basic | Offload.USO : basic
  yield* ffi.ioctl(fd, NetIoctl.TUNSETOFFLOAD, 0).pipe(Effect.mapError(failed))
  const port = new TapPort({ functions: ffi.functions, fd, mtu: Math.min(actualMtu, MTU_MAX), offloads })
  // Not at once: a poll that begins with nothing to wait for cannot be begun.
  const poll = yield* ffi.poll(fd, POLL_READABLE, port.onReady).pipe(Effect.mapError(failed))
  port.watchedBy(poll, POLL_READABLE)
  yield* Effect.addFinalizer(() => Effect.sync(() => port.close()))
  return port
})

/** The back end over an `Ffi`. */
export const make = (options: TapOptions = {}): Effect.Effect<NetBackend["Service"], never, Ffi> =>
  Effect.map(Ffi, (ffi) => ({ open: (request) => openPort(ffi, options, request) }))

/** TAP interfaces as the network of guests. */
export const layer = (options: TapOptions = {}): Layer.Layer<NetBackend, FfiUnavailable> =>
  Layer.effect(NetBackend, make(options)).pipe(Layer.provide(layerFfiWith({ quiet: true })))
