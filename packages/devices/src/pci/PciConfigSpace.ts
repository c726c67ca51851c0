/**
 * The configuration space of one PCI function on its register page (PCI Local Bus Specification 3.0, chapter 6; PCI Express 5.0,
 * section 7.2.2): reads cost nothing, writes are calls, and the page is up to date before a write is answered.
 *
 * Where a function's memory is cannot be changed: its base address registers answer the question for their size, and otherwise
 * say the same address always.
 */
import { PAGE_SIZE } from "@troupe/core/GuestMemory"
import { MULTI_FUNCTION, PCI_CONFIG_SIZE, PciCommand, PciHeader, PciStatus } from "./PciLayout.ts"

/** Memory behind a base address register: 32-bit, not prefetchable, at a multiple of its size, a power of two. */
export interface PciMemory {
  /** Number of the register, 0 to 5. */
  readonly register: number
  readonly base: number
  readonly size: number
}

/** A capability of a function. */
export interface PciCapability {
  /** {@link PciCapabilityId} */
  readonly id: number
  /** What follows the identifier and the pointer to the next one. */
  readonly body: Uint8Array
  /** Which bits of the body can be written. Default: none. */
  readonly writable?: Uint8Array
}

/** What a function is. */
export interface PciFunction {
  readonly vendorId: number
  readonly deviceId: number
  readonly revision: number
  /** Class, subclass and programming interface. */
  readonly classCode: number
  readonly subsystemVendorId: number
  readonly subsystemId: number
  readonly memories: ReadonlyArray<PciMemory>
  /** In the order in which they are listed. */
  readonly capabilities: ReadonlyArray<PciCapability>
}

const COMMAND_BITS = PciCommand.MEMORY_SPACE | PciCommand.BUS_MASTER | PciCommand.PARITY_ERROR_RESPONSE |
  PciCommand.SERR_ENABLE | PciCommand.INTERRUPT_DISABLE
/** Functions of one device follow each other in the configuration pages. */
const FUNCTIONS_PER_DEVICE = 8
/** A base address register's bits that say what kind of memory there is: 32-bit, not prefetchable. */
const MEMORY_KIND_MASK = 0xf

/** The configuration space of a running function. None of its methods throws for what a guest does. */
export class PciConfigSpace {
  readonly #page: DataView
  readonly #writable = new Uint8Array(PCI_CONFIG_SIZE)
  readonly #memories: ReadonlyArray<PciMemory>
  readonly #capabilities: ReadonlyArray<number>

  /** `address` is where the page is. What the guest has set in an earlier generation of the device stays. */
  constructor(pciFunction: PciFunction, page: DataView, address: number, generation: number) {
    this.#page = page
    this.#memories = pciFunction.memories
    const bytes = new Uint8Array(PCI_CONFIG_SIZE)
    const view = new DataView(bytes.buffer)
    const writable = this.#writable
    const isFirst = (address / PAGE_SIZE) % FUNCTIONS_PER_DEVICE === 0
    view.setUint16(PciHeader.VendorID, pciFunction.vendorId, true)
    view.setUint16(PciHeader.DeviceID, pciFunction.deviceId, true)
    view.setUint16(PciHeader.Status, pciFunction.capabilities.length === 0 ? 0 : PciStatus.CAPABILITIES_LIST, true)
    // The class code shares its word with the revision.
    view.setUint32(PciHeader.RevisionID, pciFunction.classCode * 0x100 + pciFunction.revision, true)
    view.setUint8(PciHeader.HeaderType, isFirst ? MULTI_FUNCTION : 0)
    view.setUint16(PciHeader.SubsystemVendorID, pciFunction.subsystemVendorId, true)
    view.setUint16(PciHeader.SubsystemID, pciFunction.subsystemId, true)
    new DataView(writable.buffer).setUint16(PciHeader.Command, COMMAND_BITS, true)
    writable[PciHeader.CacheLineSize] = 0xff
    writable[PciHeader.InterruptLine] = 0xff
    for (const { base, register } of pciFunction.memories) {
      view.setUint32(PciHeader.BaseAddress + 4 * register, base, true)
    }
    const capabilities: Array<number> = []
    let pointer: number = PciHeader.CapabilitiesPointer
    let next: number = PciHeader.End
    for (const { body, id, writable: bits } of pciFunction.capabilities) {
      view.setUint8(pointer, next)
      view.setUint8(next, id)
      bytes.set(body, next + 2)
      if (bits !== undefined) writable.set(bits, next + 2)
      capabilities.push(next)
      pointer = next + 1
      next = Math.ceil((next + 2 + body.length) / 4) * 4
    }
    this.#capabilities = capabilities
    // A register that has been asked for the size of its memory has not answered yet.
    for (const { register } of generation === 0 ? [] : pciFunction.memories) {
      const at = PciHeader.BaseAddress + 4 * register
      view.setUint32(at, page.getUint32(at, true), true)
    }
    for (let i = 0; i < PCI_CONFIG_SIZE; i++) {
      const kept = generation === 0 ? 0 : page.getUint8(i) & (writable[i] ?? 0)
      page.setUint8(i, generation === 0 ? bytes[i] ?? 0 : (bytes[i] ?? 0) & ~(writable[i] ?? 0) | kept)
    }
  }

  /** Where a capability begins, by its place in the list. */
  capability(index: number): number {
    return this.#capabilities[index] ?? 0
  }

  /** Sets or clears a bit of the status register. */
  showStatus(bit: number, set: boolean): void {
    const status = this.#page.getUint16(PciHeader.Status, true)
    this.#page.setUint16(PciHeader.Status, set ? status | bit : status & ~bit, true)
  }

  /** Takes a write of the guest, wherever it is in the page. */
  write(offset: number, size: number, value: number): void {
    if (offset + size > PCI_CONFIG_SIZE) return
    for (let i = 0; i < size; i++) {
      const mask = this.#writable[offset + i] ?? 0
      const old = this.#page.getUint8(offset + i)
      this.#page.setUint8(offset + i, (old & ~mask) | ((value >>> (8 * i)) & mask))
    }
    if (size === 4 && offset % 4 === 0) this.#probe(offset, value)
  }

  /** A base address register to which all ones are written says how large its memory is, until it is written again. */
  #probe(offset: number, value: number): void {
    for (const { base, register, size } of this.#memories) {
      if (PciHeader.BaseAddress + 4 * register !== offset) continue
      const asks = (value | MEMORY_KIND_MASK) >>> 0 === 0xffff_ffff
      this.#page.setUint32(offset, asks ? (~(size - 1)) >>> 0 : base, true)
    }
  }
}
