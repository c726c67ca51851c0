/** Puts a guest into its memory: ACPI tables, reset vector, kernel, initial RAM disk and what the boot protocol asks for. */
import * as Effect from "effect/Effect"
import * as Result from "effect/Result"
import { provideAcpi } from "./acpi/AcpiCache.ts"
import { RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT } from "./acpi/PowerPorts.ts"
import type { GuestBlock } from "./boot/GuestBlock.ts"
import { loadKernel } from "./boot/KernelImage.ts"
import { PCI_ECAM_ADDRESS, PCI_ECAM_BUS_SIZE } from "./boot/MachineLayout.ts"
import { resetVector } from "./boot/ResetVector.ts"
import type { GuestConfig } from "./GuestConfig.ts"
import { GuestError, type GuestErrorReason, InternalError, KernelLoadFailure } from "./GuestError.ts"
import type { GuestFile } from "./GuestFile.ts"
import type { GuestMemory } from "./GuestMemory.ts"
import type { PlacedDevice } from "./Placement.ts"

const fail = (reason: GuestErrorReason): Effect.Effect<never, GuestError> => Effect.fail(new GuestError({ reason }))

/**
 * Reads the configuration's files, fills the memory, and returns the state in which the boot processor starts. The files are
 * not kept.
 */
export const loadGuest = Effect.fnUntraced(
  function*(config: GuestConfig, memory: GuestMemory, devices: ReadonlyArray<PlacedDevice>) {
    const acpi = provideAcpi({
      cpus: config.cpus,
      sleepControl: { space: "pio", address: SLEEP_CONTROL_PORT },
      sleepStatus: { space: "pio", address: SLEEP_STATUS_PORT },
      reset: { register: { space: "pio", address: RESET_PORT }, value: RESET_VALUE },
      pci: hasPci(devices) ? { address: PCI_ECAM_ADDRESS, firstBus: 0, lastBus: 0 } : undefined,
      devices: devices.flatMap(({ device, placement }) => device.acpi?.(placement) ?? [])
    })
    if (Result.isFailure(acpi)) {
      return yield* fail(
        new InternalError({
          operation: "create",
          detail: `the ACPI tables could not be built: ${acpi.failure.message}`
        })
      )
    }
    const plan = yield* planKernel(config, acpi.success.rsdpAddress)
    for (const block of [...acpi.success.blocks, resetVector, ...plan.segments, ...plan.blocks]) {
      yield* place(memory, block)
    }
    return plan.entry
  }
)

/** Whether one of the devices has configuration pages. */
const hasPci = (devices: ReadonlyArray<PlacedDevice>): boolean =>
  devices.some(({ placement }) =>
    placement.bases.some((base) => base >= PCI_ECAM_ADDRESS && base < PCI_ECAM_ADDRESS + PCI_ECAM_BUS_SIZE)
  )

const readFile = (file: GuestFile | Uint8Array, what: string): Effect.Effect<Uint8Array, GuestError> =>
  file instanceof Uint8Array
    ? Effect.succeed(file)
    : Effect.mapError(file.read, (error) =>
      new GuestError({
        reason: new KernelLoadFailure({
          operation: "create",
          detail: `the ${what} could not be read: ${error.message}`
        })
      }))

const planKernel = Effect.fnUntraced(function*(config: GuestConfig, rsdpAddress: number) {
  const image = yield* readFile(config.kernel, "kernel")
  const initrd = config.ramdisk === undefined ? undefined : yield* readFile(config.ramdisk, "initial RAM disk")
  const plan = loadKernel({
    image,
    initrd,
    commandLine: [config.cmdline, ...config.cmdlineAdd].filter((piece) => piece !== "").join(" "),
    memorySize: config.guestMemory,
    rsdpAddress,
    bootProtocol: config.bootProtocol
  })
  if (Result.isFailure(plan)) {
    const error = plan.failure
    return yield* fail(
      new KernelLoadFailure({ operation: "create", detail: error.message, field: error.field })
    )
  }
  return plan.success
})

const place = (memory: GuestMemory, block: GuestBlock): Effect.Effect<void, GuestError> =>
  memory.write(block.guestAddress, block.bytes)
    ? Effect.void
    : fail(
      new InternalError({
        operation: "create",
        detail: `${block.name} at 0x${block.guestAddress.toString(16)} does not lie in guest memory`
      })
    )
