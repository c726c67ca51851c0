/** The guest's client API: the protocol `Guest`, its endpoints and its epitaph. */
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import { BalloonController } from "./BalloonController.ts"
import { BlockDevices } from "./BlockDevices.ts"
import { Console } from "./Console.ts"
import { DeviceNotPresent, GuestError, type GuestErrorReason } from "./GuestError.ts"
import { HostVsockEndpoint } from "./HostVsockEndpoint.ts"
import { MemController } from "./MemController.ts"
import { NetInterfaces } from "./NetInterfaces.ts"
import { SerialPort } from "./SerialPort.ts"

/**
 * What clients of a guest learn when it is gone.
 *
 * - `ZX_OK`: a clean shutdown
 * - `ZX_ERR_INTERNAL`: an unexpected shutdown, with the error unless it was replaced or stopped before it ran
 * - `none`: the machine's owner was itself torn down, or another machine took this one's place before it ran
 */
export type Epitaph =
  | { readonly _tag: "ZX_OK" }
  | { readonly _tag: "ZX_ERR_INTERNAL"; readonly reason: GuestErrorReason | undefined }
  | { readonly _tag: "none" }

/** One client's handle on a guest. Any number of clients may hold one; dropping it does nothing to the guest. */
export interface Guest {
  /** The low-level debug log and input of the guest. */
  readonly getSerial: Effect.Effect<SerialPort["Service"], GuestError>
  /** The console. Fails with DEVICE_NOT_PRESENT when the guest has none. */
  readonly getConsole: Effect.Effect<Console["Service"], GuestError>
  /** The vsock endpoint. Fails with DEVICE_NOT_PRESENT when the guest has none. */
  readonly getHostVsockEndpoint: Effect.Effect<HostVsockEndpoint["Service"], GuestError>
  /** The balloon controller. Fails with DEVICE_NOT_PRESENT when the guest has none. */
  readonly getBalloonController: Effect.Effect<BalloonController["Service"], GuestError>
  /** The memory controller. Fails with DEVICE_NOT_PRESENT when the guest has none. */
  readonly getMemController: Effect.Effect<MemController["Service"], GuestError>
  /** The disks: their failures and their statistics. Fails with DEVICE_NOT_PRESENT when the guest has none. */
  readonly getBlockDevices: Effect.Effect<BlockDevices["Service"], GuestError>
  /** The network interfaces. Fails with DEVICE_NOT_PRESENT when the guest has none. */
  readonly getNetInterfaces: Effect.Effect<NetInterfaces["Service"], GuestError>
  /** Returns when the guest is gone, before `run` returns. */
  readonly epitaph: Effect.Effect<Epitaph>
}

/** The client API over the services that a machine's devices publish. */
export const makeGuest = (services: Context.Context<never>, epitaph: Effect.Effect<Epitaph>): Guest => {
  const endpoint = <I, S>(
    key: Context.Service<I, S>,
    operation: string,
    device: string,
    hint: string
  ): Effect.Effect<S, GuestError> =>
    Effect.fromOption(Context.getOption(services, key), () =>
      new GuestError({
        reason: new DeviceNotPresent({ operation, device, detail: `this guest has no ${device} device`, hint })
      }))
  return {
    getSerial: endpoint(SerialPort, "getSerial", "serial", "Add the serial device's layer to the catalog"),
    getConsole: endpoint(Console, "getConsole", "console", "Set virtioConsole in the configuration"),
    getHostVsockEndpoint: endpoint(
      HostVsockEndpoint,
      "getHostVsockEndpoint",
      "vsock",
      "Set virtioVsock in the configuration"
    ),
    getBalloonController: endpoint(
      BalloonController,
      "getBalloonController",
      "balloon",
      "Set virtioBalloon in the configuration"
    ),
    getMemController: endpoint(MemController, "getMemController", "mem", "Set virtioMem in the configuration"),
    getBlockDevices: endpoint(
      BlockDevices,
      "getBlockDevices",
      "block",
      "Name disks in blockDevices of the configuration"
    ),
    getNetInterfaces: endpoint(
      NetInterfaces,
      "getNetInterfaces",
      "net",
      "Name interfaces in netDevices of the configuration"
    ),
    epitaph
  }
}
