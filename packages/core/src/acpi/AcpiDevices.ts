/** ACPI device nodes of the devices that an x86-64 machine commonly has. */
import {
  PCI_ECAM_ADDRESS,
  PCI_ECAM_BUS_SIZE,
  PCI_MEMORY_ADDRESS,
  PCI_MEMORY_SIZE,
  VIRTIO_MMIO_SIZE
} from "../boot/MachineLayout.ts"
import { Aml, type AmlTerm, Resource } from "./Aml.ts"

/** First I/O port of the first serial port of a PC. */
export const COM1_PORT = 0x3f8
/** Number of I/O ports of a 16550 serial port. */
export const SERIAL_PORT_SIZE = 8
/** Interrupt of the first serial port of a PC. */
export const COM1_GSI = 4

/** A 16550 serial port (`PNP0501`). Defaults are those of a PC's first one. */
export const serialPortDevice = (
  options: { readonly index?: number; readonly port?: number; readonly gsi?: number } = {}
): AmlTerm => {
  const index = options.index ?? 0
  return Aml.device(`COM${index + 1}`, [
    Aml.name("_HID", Aml.eisaId("PNP0501")),
    Aml.name("_UID", Aml.integer(index)),
    Aml.name(
      "_CRS",
      Aml.resourceTemplate([
        Resource.io(options.port ?? COM1_PORT, SERIAL_PORT_SIZE),
        Resource.interrupt(options.gsi ?? COM1_GSI)
      ])
    )
  ])
}

/**
 * A virtio-mmio device (`LNRO0005`, the identifier that Linux's `virtio_mmio` driver binds to) with its register page at `base`
 * and an edge-triggered interrupt. `index`, 0 to 4095, makes its name unique.
 */
export const virtioMmioDevice = (index: number, base: number, gsi: number): AmlTerm =>
  Aml.device(`V${index.toString(16).toUpperCase().padStart(3, "0")}`, [
    Aml.name("_HID", Aml.string("LNRO0005")),
    Aml.name("_UID", Aml.integer(index)),
    // The device sees memory as the processors do.
    Aml.name("_CCA", Aml.integer(1)),
    Aml.name(
      "_CRS",
      Aml.resourceTemplate([Resource.memory32Fixed(base, VIRTIO_MMIO_SIZE), Resource.interrupt(gsi)])
    )
  ])

/**
 * The PCI Express host bridge (`PNP0A08`) of segment 0 with bus 0 behind it, and the reservation of the bus's configuration
 * pages, without which operating systems do not believe the MCFG table (PCI Firmware Specification 3.3, section 4.1.2).
 *
 * There is no `_OSC`: the machine has none of the features whose control could be asked for.
 */
export const pciHostBridgeDevices: ReadonlyArray<AmlTerm> = [
  Aml.device("PCI0", [
    Aml.name("_HID", Aml.eisaId("PNP0A08")),
    Aml.name("_CID", Aml.eisaId("PNP0A03")),
    Aml.name("_UID", Aml.integer(0)),
    Aml.name("_SEG", Aml.integer(0)),
    Aml.name("_BBN", Aml.integer(0)),
    Aml.name("_CCA", Aml.integer(1)),
    Aml.name(
      "_CRS",
      Aml.resourceTemplate([
        Resource.busNumbers(0, 1),
        Resource.memoryWindow(PCI_MEMORY_ADDRESS, PCI_MEMORY_SIZE)
      ])
    )
  ]),
  Aml.device("MCFG", [
    Aml.name("_HID", Aml.eisaId("PNP0C02")),
    Aml.name("_UID", Aml.string("ECAM")),
    Aml.name("_CRS", Aml.resourceTemplate([Resource.memory32Fixed(PCI_ECAM_ADDRESS, PCI_ECAM_BUS_SIZE)]))
  ])
]

/** I/O ports that belong to the machine itself and to no driver (`PNP0C02`), such as those of the power registers. */
export const systemPortsDevice = (
  index: number,
  ranges: ReadonlyArray<{ readonly base: number; readonly size: number }>
): AmlTerm =>
  Aml.device(`SYS${index.toString(16).toUpperCase()}`, [
    Aml.name("_HID", Aml.eisaId("PNP0C02")),
    Aml.name("_UID", Aml.integer(index)),
    Aml.name("_CRS", Aml.resourceTemplate(ranges.map((range) => Resource.io(range.base, range.size))))
  ])
