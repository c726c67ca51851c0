/**
 * Power control: how a guest ends its machine by its own will.
 *
 * ACPI's hardware-reduced sleep registers and reset register, the reset line of the keyboard controller, and pvpanic. All
 * writes are calls: the machine has heard of the end before the guest executes another instruction. Everything the guest
 * wrote to other devices was delivered earlier.
 */
import { systemPortsDevice } from "@troupe/core/acpi/AcpiDevices"
import { SLEEP_CONTROL_S5, SLEEP_ENABLE, SLEEP_TYPE_MASK } from "@troupe/core/acpi/AcpiTables"
import { Aml, Resource } from "@troupe/core/acpi/Aml"
import {
  KEYBOARD_CONTROLLER_PORT,
  PVPANIC_PANICKED,
  PVPANIC_PORT,
  RESET_PORT,
  RESET_VALUE,
  SLEEP_CONTROL_PORT
} from "@troupe/core/acpi/PowerPorts"
import type { Device, DeviceBehaviour, RangeRequest } from "@troupe/core/Device"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import type { GuestStop } from "@troupe/core/GuestStop"
import type { GuestFailure } from "@troupe/core/VcpuExit"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"

const ACPI_RANGE = 0
const KEYBOARD_RANGE = 1
const PVPANIC_RANGE = 2

const ranges: ReadonlyArray<RangeRequest> = [
  // Sleep control, sleep status, reset: three bytes in a row.
  {
    space: "pio",
    base: SLEEP_CONTROL_PORT,
    size: RESET_PORT - SLEEP_CONTROL_PORT + 1,
    read: "shadowed",
    write: "call"
  },
  { space: "pio", base: KEYBOARD_CONTROLLER_PORT, size: 1, read: "shadowed", write: "call" },
  { space: "pio", base: PVPANIC_PORT, size: 1, read: "shadowed", write: "call" }
]

/** What each byte of each range reads as, always. */
const READ_VALUES: ReadonlyArray<ReadonlyArray<number>> = [
  // Sleep control and reset are write-only; WAK_STS is never set, because no sleep state but S5 exists.
  [0, 0, 0],
  // Input and output buffer empty: a kernel that waits for the controller does not wait.
  [0],
  // The events that can be announced.
  [PVPANIC_PANICKED]
]

/** `0xf0` to `0xff` pulse the output lines whose bits are clear; bit 0 is the processor's reset. */
const KEYBOARD_PULSE_OUTPUT = 0xf0

/** What a write of one byte asks for, if it asks for the machine's end. */
const stopOf = (range: number, offset: number, value: number): GuestStop | GuestFailure | undefined => {
  switch (range) {
    case ACPI_RANGE:
      if (offset === 0 && (value & (SLEEP_TYPE_MASK | SLEEP_ENABLE)) === SLEEP_CONTROL_S5) return { _tag: "PowerOff" }
      if (offset === RESET_PORT - SLEEP_CONTROL_PORT && value === RESET_VALUE) return { _tag: "Reset", by: "acpi" }
      return undefined
    case KEYBOARD_RANGE:
      return (value & 0xf1) === KEYBOARD_PULSE_OUTPUT ? { _tag: "Reset", by: "keyboard-controller" } : undefined
    case PVPANIC_RANGE:
      return (value & PVPANIC_PANICKED) !== 0 ? { _tag: "GuestPanic" } : undefined
    default:
      return undefined
  }
}

/** The power control of a machine. */
export const power: Device = {
  name: "power",
  ranges,
  interrupts: [],
  acpi: () => [
    systemPortsDevice(0, [{ base: SLEEP_CONTROL_PORT, size: RESET_PORT - SLEEP_CONTROL_PORT + 1 }]),
    // The name by which drivers know pvpanic.
    Aml.device("PEVT", [
      Aml.name("_HID", Aml.string("QEMU0001")),
      Aml.name("_CRS", Aml.resourceTemplate([Resource.io(PVPANIC_PORT, 1)]))
    ])
  ],
  start: (context) =>
    Effect.sync((): DeviceBehaviour => {
      READ_VALUES.forEach((values, range) => {
        const shadow = context.ranges[range]?.shadow
        if (shadow !== undefined) values.forEach((value, offset) => Atomics.store(shadow, offset, value))
      })
      return {
        // The registers are bytes: a wider access is one access to each of them, lowest address first.
        read: (range, offset, size) => {
          let value = 0
          for (let i = 0; i < size; i++) value |= (READ_VALUES[range]?.[offset + i] ?? 0xff) << (8 * i)
          return value >>> 0
        },
        write: (range, offset, size, value) => {
          for (let i = 0; i < size; i++) {
            const stop = stopOf(range, offset + i, (value >>> (8 * i)) & 0xff)
            if (stop !== undefined) return context.stop(stop)
          }
        }
      }
    })
}

/** Adds power control, which every machine has. */
export const layerPower: Layer.Layer<DeviceCatalog, never, DeviceCatalog> = DeviceCatalog.layerAdd(
  Effect.succeed({ provides: "power" as const, devices: () => Effect.succeed([power]) })
)
