/** A guest that does what its host says, for tests of the lifecycle: a program, a device that tells it, and a catalog with both. */
import type { Device, DevicePolicy } from "@troupe/core/Device"
import { DeviceCatalog, type DeviceFactory } from "@troupe/core/DeviceCatalog"
import type { GuestConfigInput } from "@troupe/core/GuestConfig"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import type { Hypervisor } from "@troupe/core/Hypervisor"
import { FakeHypervisor, GuestAcpi, GuestProgram } from "@troupe/core/testing"
import { layerPower } from "@troupe/devices/Power"
import { layerSerial } from "@troupe/devices/Serial"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"

/** What a guest can be told to do. */
export const ACTIONS = [
  "power-off",
  "acpi-reset",
  "keyboard-reset",
  "halt",
  "triple-fault",
  "internal-error",
  "panic",
  "break-device"
] as const
/** What a guest can be told to do. */
export type Action = (typeof ACTIONS)[number]

const REMOTE_PORT = 0x700
const REMOTE_GSI = 9
const BREAK = 0xdead
const COM1 = 0x3f8

/** Prints a line, waits to be told, and does it. */
export const obedient = GuestProgram.make(function*(cpu) {
  for (const byte of new TextEncoder().encode("ready\n")) yield* cpu.out8(COM1, byte)
  for (;;) {
    yield* cpu.waitForInterrupt(REMOTE_GSI)
    switch (ACTIONS[yield* cpu.in32(REMOTE_PORT)]) {
      case "power-off":
        yield* GuestAcpi.powerOff(cpu)
        break
      case "acpi-reset":
        yield* GuestAcpi.reset(cpu)
        break
      case "keyboard-reset":
        yield* cpu.out8(0x64, 0xfe)
        break
      case "halt":
        yield* cpu.halt()
        break
      case "triple-fault":
        yield* cpu.tripleFault()
        break
      case "internal-error":
        yield* cpu.internalError(Uint8Array.of(0x0f, 0xc7, 0x0f))
        break
      case "panic":
        yield* cpu.out8(0x505, 1)
        break
      case "break-device":
        yield* cpu.out32(REMOTE_PORT, BREAK)
        break
      default:
        throw new Error("the guest was told something unknown")
    }
  }
})

/** Tells the guests of one catalog what to do. */
export interface Remote {
  /** Tells the guest that runs, or the next one that starts. */
  readonly say: (action: Action) => void
  readonly factory: DeviceFactory
}

/** A remote control, and the device through which it works. Every guest that is told nothing else does the standing order. */
export const makeRemote = (
  options: { readonly standingOrder?: Action; readonly policy?: DevicePolicy } = {}
): Remote => {
  const standing = options.standingOrder === undefined ? undefined : ACTIONS.indexOf(options.standingOrder)
  let said: number | undefined
  let wake: (() => void) | undefined
  const device: Device = {
    name: "remote",
    ranges: [{ space: "pio", base: REMOTE_PORT, size: 4, read: "call", write: "call" }],
    messages: 1,
    interrupts: [REMOTE_GSI],
    ...(options.policy === undefined ? {} : { policy: options.policy }),
    start: (context) =>
      Effect.acquireRelease(
        Effect.sync(() => {
          wake = () => context.interrupts[0]?.trigger()
          if (said !== undefined || standing !== undefined) wake()
          return {
            read: () => {
              const action = said ?? standing ?? ACTIONS.length
              said = undefined
              return action
            },
            write: (_range: number, _offset: number, _size: number, value: number) => {
              if (value === BREAK) throw new Error("the device breaks, as it was told")
            }
          }
        }),
        () =>
          Effect.sync(() => {
            wake = undefined
          })
      )
  }
  return {
    say: (action) => {
      said = ACTIONS.indexOf(action)
      wake?.()
    },
    factory: { provides: "power", devices: () => Effect.succeed([device]) }
  }
}

/** A configuration that works. */
export const goodConfig: GuestConfigInput = {
  kernelType: "LINUX",
  kernel: GuestProgram.kernel(obedient),
  cpus: 2,
  guestMemory: "2M",
  cmdline: "console=ttyS0"
}

/** The fake, and a catalog with power control, a serial port and these devices. */
export const layerHost = (
  factories: ReadonlyArray<DeviceFactory>,
  options: FakeHypervisor.FakeHypervisorOptions = {}
): Layer.Layer<Hypervisor | FakeHypervisor.FakeHypervisor | DeviceCatalog> => {
  let catalog: Layer.Layer<DeviceCatalog> = layerSerial.pipe(
    Layer.provide(layerPower),
    Layer.provide(DeviceCatalog.layerEmpty)
  )
  for (const factory of factories) {
    catalog = DeviceCatalog.layerAdd(Effect.succeed(factory)).pipe(Layer.provide(catalog))
  }
  return Layer.merge(FakeHypervisor.layer(options), catalog)
}

/** A lifecycle on that host. */
export const layerLifecycle = (
  factories: ReadonlyArray<DeviceFactory>,
  options: FakeHypervisor.FakeHypervisorOptions = {}
): Layer.Layer<GuestLifecycle | FakeHypervisor.FakeHypervisor> =>
  GuestLifecycle.layer.pipe(Layer.provideMerge(layerHost(factories, options)))
