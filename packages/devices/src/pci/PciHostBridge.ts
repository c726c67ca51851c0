/**
 * The PCI host bridge: function 0 of device 0, which is there for operating systems to find, and the ACPI nodes that announce
 * the bus. Configuration pages of functions that do not exist belong to nobody, and so read as all ones.
 */
import { pciHostBridgeDevices } from "@troupe/core/acpi/AcpiDevices"
import { PCI_ECAM_ADDRESS } from "@troupe/core/boot/MachineLayout"
import type { Device, DeviceBehaviour } from "@troupe/core/Device"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { PAGE_SIZE } from "@troupe/core/GuestMemory"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"
import { readPage } from "../RegisterPage.ts"
import { PciConfigSpace, type PciFunction } from "./PciConfigSpace.ts"

/** Red Hat's generic PCI Express host bridge. */
const hostBridge: PciFunction = {
  vendorId: 0x1b36,
  deviceId: 0x0008,
  revision: 0,
  classCode: 0x06_00_00,
  subsystemVendorId: 0,
  subsystemId: 0,
  memories: [],
  capabilities: []
}

/** The host bridge of a machine with PCI. */
export const pciHostBridge: Device = {
  name: "pci0",
  ranges: [{
    space: "mmio",
    base: PCI_ECAM_ADDRESS,
    size: PAGE_SIZE,
    read: "register-page",
    write: "call",
    repeats: () => true
  }],
  interrupts: [],
  acpi: () => pciHostBridgeDevices,
  start: ({ bases: [base = 0], generation, ranges: [range] }) =>
    Effect.suspend(() => {
      const page = range?.page
      if (page === undefined) return Effect.die(new Error("the PCI host bridge was not placed"))
      const config = new PciConfigSpace(hostBridge, page, base, generation)
      const behaviour: DeviceBehaviour = {
        read: (_, offset, size) => readPage(page, offset, size),
        write: (_, offset, size, value) => config.write(offset, size, value)
      }
      return Effect.succeed(behaviour)
    })
}

/** Adds the host bridge, which a machine has when `virtioTransport` is `pci`. */
export const layerPci: Layer.Layer<DeviceCatalog, never, DeviceCatalog> = DeviceCatalog.layerAdd(
  Effect.succeed({
    provides: "pci" as const,
    devices: (config) => Effect.succeed(config.virtioTransport === "pci" ? [pciHostBridge] : [])
  })
)
