/**
 * The virtio-mmio transport, register layout version 2 (virtio 1.3, section 4.2): a virtio device as a device of the machine.
 *
 * Every readable register is on one read-only page of guest memory, so reads cost nothing; the page is up to date before a
 * write that changes it is answered. QueueNotify and InterruptACK are doorbells. All other writes are calls.
 */
import { virtioMmioDevice } from "@troupe/core/acpi/AcpiDevices"
import { VIRTIO_MMIO_SIZE } from "@troupe/core/boot/MachineLayout"
import type { Doorbell } from "@troupe/core/Bus"
import type { Device } from "@troupe/core/Device"
import * as Effect from "effect/Effect"
import { readPage } from "../RegisterPage.ts"
import { startTransport } from "./TransportStart.ts"
import type { VirtioDevice, VirtioOptions } from "./VirtioDevice.ts"
import { InterruptCause, Register } from "./VirtioMmioLayout.ts"
import { MmioRegisters } from "./VirtioMmioRegisters.ts"

/**
 * The doorbells: one for each queue, then the acknowledgement of an interrupt for used buffers alone, which nobody needs to
 * know of. One that includes a configuration change has another value and is a call (see `MmioRegisters`).
 */
const doorbellsOf = (device: VirtioDevice): ReadonlyArray<Doorbell> => [
  ...device.queueSizes.map((_, queue): Doorbell => ({ offset: Register.QueueNotify, size: 4, value: queue })),
  { offset: Register.InterruptACK, size: 4, value: InterruptCause.USED_BUFFERS, wakes: false }
]

/** A virtio device behind virtio-mmio: one page of registers, one interrupt, one ACPI node. */
export const virtioMmio = (device: VirtioDevice, options: VirtioOptions): Device => ({
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
  ...(options.pluggableMemory === undefined ? {} : { pluggableMemory: options.pluggableMemory }),
  start: (context) =>
    Effect.gen(function*() {
      const page = context.ranges[0]?.page
      const line = context.interrupts[0]
      if (page === undefined || line === undefined) {
        return yield* Effect.die(new Error(`${options.name} was not placed`))
      }
      const { behaviour, registers } = yield* startTransport(
        device,
        context,
        (ports) => new MmioRegisters(device, { ...ports, page, interrupt: line.trigger })
      )
      return {
        ...behaviour,
        read: (_, offset, size) => readPage(page, offset, size),
        write: (_, offset, size, value) => registers.write(offset, size, value),
        doorbell: (_, doorbell) => doorbell < device.queueSizes.length && registers.state.notify(doorbell)
      }
    })
})
