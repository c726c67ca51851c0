/**
 * The virtio-mmio transport, register layout version 2 (virtio 1.3, section 4.2): a virtio device as a device of the machine.
 *
 * Every readable register is on one read-only page of guest memory, so reads cost nothing; the page is up to date before a
 * write that changes it is answered. QueueNotify and InterruptACK are doorbells. All other writes are calls.
 */
import { virtioMmioDevice } from "@troupe/core/acpi/AcpiDevices"
import { VIRTIO_MMIO_SIZE } from "@troupe/core/boot/MachineLayout"
import type { Doorbell } from "@troupe/core/Bus"
import type { Device, DeviceBehaviour, DevicePolicy } from "@troupe/core/Device"
import type * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Queue from "effect/Queue"
import type { VirtioContext, VirtioDevice } from "./VirtioDevice.ts"
import { InterruptCause, Register } from "./VirtioMmioLayout.ts"
import { MmioRegisters, SIGNAL_LOOK } from "./VirtioMmioRegisters.ts"

/** What a device may choose besides its own nature. */
export interface VirtioMmioOptions {
  /** Unique in its machine, e.g. `rng0`. */
  readonly name: string
  /** What happens when the device fails. Default: the machine's policy. */
  readonly policy?: DevicePolicy
  /** Services that it publishes to clients of the guest. */
  readonly services?: Context.Context<never>
}

/** Reports of broken drivers that wait to be logged; a guest that breaks things quickly is not worth more. */
const REPORTS_WAITING_MAX = 4
/** Reports that one generation of a device logs. */
const REPORTS_MAX = 16

/**
 * The doorbells: one for each queue, then the acknowledgement of an interrupt for used buffers alone, which nobody needs to
 * know of. One that includes a configuration change has another value and is a call (see `MmioRegisters`).
 */
const doorbellsOf = (device: VirtioDevice): ReadonlyArray<Doorbell> => [
  ...device.queueSizes.map((_, queue): Doorbell => ({ offset: Register.QueueNotify, size: 4, value: queue })),
  { offset: Register.InterruptACK, size: 4, value: InterruptCause.USED_BUFFERS, wakes: false }
]

/** A virtio device behind virtio-mmio: one page of registers, one interrupt, one ACPI node. */
export const virtioMmio = (device: VirtioDevice, options: VirtioMmioOptions): Device => ({
  name: options.name,
  ranges: [{
    space: "mmio",
    size: VIRTIO_MMIO_SIZE,
    read: "register-page",
    write: "call",
    doorbells: doorbellsOf(device)
  }],
  interrupts: ["any"],
  // A machine has fewer device pages than names: the page's number in the window is unique.
  acpi: ({ bases: [base = 0], gsis: [gsi = 0] }) => [virtioMmioDevice((base / VIRTIO_MMIO_SIZE) % 0x1000, base, gsi)],
  ...(options.services === undefined ? {} : { services: options.services }),
  ...(options.policy === undefined ? {} : { policy: options.policy }),
  start: (context) =>
    Effect.gen(function*() {
      const page = context.ranges[0]?.page
      const line = context.interrupts[0]
      if (page === undefined || line === undefined) {
        return yield* Effect.die(new Error(`${options.name} was not placed`))
      }
      const reports = yield* Queue.dropping<string>(REPORTS_WAITING_MAX)
      const registers = new MmioRegisters(device, {
        page,
        memory: context.memory,
        interrupt: line.trigger,
        signal: context.signal,
        report: (text) => Queue.offerUnsafe(reports, text)
      })
      const virtioContext: VirtioContext = {
        name: options.name,
        memory: context.memory,
        generation: context.generation,
        signal: context.signal,
        updateConfig: (change) => registers.updateConfig(change)
      }
      const behaviour = yield* device.start(virtioContext)
      registers.start(behaviour)
      const log = Queue.take(reports).pipe(
        Effect.flatMap((text) => Effect.logWarning(`${options.name}: ${text}`)),
        Effect.repeat({ times: REPORTS_MAX - 1 }),
        Effect.andThen(Effect.never)
      )
      const started: DeviceBehaviour = {
        // The bus answers reads from the page. Whatever asks all the same sees the page.
        read: (_, offset, size) =>
          size === 1 ? page.getUint8(offset) : size === 2 ? page.getUint16(offset, true) : page.getUint32(offset, true),
        write: (_, offset, size, value) => registers.write(offset, size, value),
        doorbell: (_, doorbell) => doorbell < device.queueSizes.length && registers.notify(doorbell),
        signal: (number) => number === SIGNAL_LOOK ? registers.look() : registers.signal(number),
        run: behaviour.run === undefined ? log : Effect.raceFirst(behaviour.run, log)
      }
      return started
    })
})
