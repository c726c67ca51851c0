/**
 * The virtio-pci transport without the legacy interface (virtio 1.3, section 4.1): a virtio device as a PCI function with MSI-X.
 *
 * Configuration space, common and device configuration and the MSI-X table are pages that the guest reads without an exit.
 * Notifications are doorbells. All other writes are calls, and so is a read of the ISR status, which no driver makes that uses
 * MSI-X.
 */
import type { Doorbell } from "@troupe/core/Bus"
import type { Device } from "@troupe/core/Device"
import { PAGE_SIZE } from "@troupe/core/GuestMemory"
import * as Effect from "effect/Effect"
import { MSIX_VECTORS_MAX, msixCapability } from "../pci/Msix.ts"
import type { PciCapability, PciFunction } from "../pci/PciConfigSpace.ts"
import { PciCapabilityId } from "../pci/PciLayout.ts"
import { readPage } from "../RegisterPage.ts"
import { startTransport } from "./TransportStart.ts"
import { CONFIG_SIZE_MAX, type VirtioDevice, type VirtioOptions } from "./VirtioDevice.ts"
import {
  NOTIFY_OFF_MULTIPLIER,
  PCI_QUEUES_MAX,
  PciMemoryLayout,
  VIRTIO_PCI_DEVICE_BASE,
  VIRTIO_PCI_REVISION,
  VIRTIO_PCI_SUBSYSTEM,
  VIRTIO_PCI_VENDOR,
  VirtioPciCap
} from "./VirtioPciLayout.ts"
import { memoryCapabilities, PciRegisters } from "./VirtioPciRegisters.ts"

const CONFIG_RANGE = 0
const PAGES_RANGE = 1

/** Size of `struct virtio_pci_cap` without the two bytes that every capability has (section 4.1.4). */
const CAPABILITY_BODY = 14
/** What follows it in two of them: the multiplier of notification offsets, or the data of the window. */
const CAPABILITY_TAIL = 4

const capability = (
  { bar, kind, length, offset }: {
    readonly kind: number
    readonly bar: number
    readonly offset: number
    readonly length: number
  },
  tail?: number
): PciCapability => {
  const body = new Uint8Array(CAPABILITY_BODY + (tail === undefined ? 0 : CAPABILITY_TAIL))
  const view = new DataView(body.buffer)
  view.setUint8(0, body.length + 2)
  view.setUint8(1, kind)
  view.setUint8(2, bar)
  view.setUint32(6, offset, true)
  view.setUint32(10, length, true)
  if (tail !== undefined) view.setUint32(14, tail, true)
  return { id: PciCapabilityId.VENDOR, body }
}

/** Access to the function's memory through its configuration space: place, length and data are the driver's (section 4.1.4.9). */
const windowCapability = (): PciCapability => {
  const { body, id } = capability({ kind: VirtioPciCap.PCI_CFG, bar: 0, offset: 0, length: 0 }, 0)
  const writable = new Uint8Array(body.length)
  writable[2] = 0xff
  writable.fill(0xff, 6)
  return { id, body, writable }
}

/** Class codes of device types (PCI Code and ID Assignment Specification 1.11); others are unclassified. */
const CLASS_UNCLASSIFIED = 0x00_ff_00
const classCodes: { readonly [deviceId: number]: number } = {
  1: 0x02_00_00,
  2: 0x01_80_00,
  3: 0x07_80_00,
  5: 0x05_00_00
}

/** One vector for the configuration, and one for each queue as far as there is room. */
const vectorsOf = (device: VirtioDevice): number => Math.min(device.queueSizes.length + 1, MSIX_VECTORS_MAX)

const functionOf = (device: VirtioDevice, pages: number, calls: number): PciFunction => ({
  vendorId: VIRTIO_PCI_VENDOR,
  deviceId: VIRTIO_PCI_DEVICE_BASE + device.deviceId,
  revision: VIRTIO_PCI_REVISION,
  classCode: classCodes[device.deviceId] ?? CLASS_UNCLASSIFIED,
  subsystemVendorId: VIRTIO_PCI_VENDOR,
  subsystemId: VIRTIO_PCI_SUBSYSTEM,
  memories: [
    { register: PciMemoryLayout.PAGES, base: pages, size: PciMemoryLayout.PAGES_SIZE },
    { register: PciMemoryLayout.CALLS, base: calls, size: PciMemoryLayout.CALLS_SIZE }
  ],
  // The first two are found by their places: `CapabilityOrder`.
  capabilities: [
    msixCapability(vectorsOf(device), PciMemoryLayout.PAGES, PciMemoryLayout.MSIX),
    windowCapability(),
    ...memoryCapabilities(device.queueSizes.length, Math.min(device.config.length, CONFIG_SIZE_MAX)).map((part) =>
      capability(part, part.kind === VirtioPciCap.NOTIFY_CFG ? NOTIFY_OFF_MULTIPLIER : undefined)
    )
  ]
})

/** A virtio device behind virtio-pci: one function of bus 0, with its interrupts as messages. */
export const virtioPci = (device: VirtioDevice, options: VirtioOptions): Device => ({
  name: options.name,
  ranges: [
    // Configuration space and MSI-X table are the function's: a reset of the device leaves them as they are.
    {
      space: "mmio",
      window: "pci-function",
      size: PAGE_SIZE,
      read: "register-page",
      write: "call",
      repeats: () => true
    },
    {
      space: "mmio",
      window: "pci-memory",
      size: PciMemoryLayout.PAGES_SIZE,
      read: "register-page",
      write: "call",
      repeats: (offset) => offset >= PciMemoryLayout.MSIX
    },
    {
      space: "mmio",
      window: "pci-memory",
      size: PciMemoryLayout.CALLS_SIZE,
      read: "call",
      write: "call",
      doorbells: device.queueSizes.slice(0, PCI_QUEUES_MAX).map((_, queue): Doorbell => ({
        offset: PciMemoryLayout.NOTIFY + NOTIFY_OFF_MULTIPLIER * queue,
        size: 2
      }))
    }
  ],
  interrupts: [],
  messages: vectorsOf(device),
  ...(options.services === undefined ? {} : { services: options.services }),
  ...(options.policy === undefined ? {} : { policy: options.policy }),
  ...(options.pluggableMemory === undefined ? {} : { pluggableMemory: options.pluggableMemory }),
  start: (context) =>
    Effect.gen(function*() {
      const { bases, generation, messages, ranges } = context
      const configPage = ranges[CONFIG_RANGE]?.page
      const pages = ranges[PAGES_RANGE]?.page
      const [configAddress, pagesBase, callsBase] = bases
      if (
        configPage === undefined || pages === undefined || configAddress === undefined || pagesBase === undefined ||
        callsBase === undefined
      ) return yield* Effect.die(new Error(`${options.name} was not placed`))
      const { behaviour, registers } = yield* startTransport(
        device,
        context,
        (ports) =>
          new PciRegisters(device, functionOf(device, pagesBase, callsBase), {
            ...ports,
            generation,
            configPage,
            configAddress,
            pages,
            messages
          })
      )
      return {
        ...behaviour,
        read: (range, offset, size) =>
          range === CONFIG_RANGE
            ? readPage(configPage, offset, size)
            : range === PAGES_RANGE
            ? readPage(pages, offset, size)
            : registers.readCalls(offset, size),
        write: (range, offset, size, value) => {
          if (range === CONFIG_RANGE) registers.writeConfigSpace(offset, size, value)
          else if (range === PAGES_RANGE) registers.writePages(offset, size, value)
          else registers.writeCalls(offset, size, value)
        },
        doorbell: (_, queue) => registers.state.notify(queue)
      }
    })
})
