/**
 * Message-signalled interrupts of a PCI function (MSI-X; PCI Local Bus Specification 3.0, section 6.8.2): the table and the
 * pending bits on a register page, and the masks in front of the machine's interrupts.
 */
import type { MessageInterrupt } from "@troupe/core/Hypervisor"
import type { PciCapability } from "./PciConfigSpace.ts"
import { PciCapabilityId } from "./PciLayout.ts"

/** Bytes of an entry of the table. */
export const MSIX_ENTRY_SIZE = 16
/** Offsets in an entry. */
const ENTRY_ADDRESS_LOW = 0
const ENTRY_ADDRESS_HIGH = 4
const ENTRY_DATA = 8
const ENTRY_CONTROL = 12
/** In an entry's control: the vector is masked. The other bits are reserved. */
const ENTRY_MASKED = 1

/** In the capability's message control: the function has all vectors masked, and has MSI-X on. */
const CONTROL_FUNCTION_MASK = 0x4000
const CONTROL_ENABLE = 0x8000
/** Offset of message control in the capability. */
export const MSIX_CONTROL = 2

/** The most vectors of a function for which table and pending bits have room on one page. */
export const MSIX_VECTORS_MAX = 240
/** Where the pending bits are on the page, behind the table. */
export const MSIX_PENDING_OFFSET = MSIX_VECTORS_MAX * MSIX_ENTRY_SIZE

/** The capability of a function with this many vectors whose page is at `offset` behind a base address register. */
export const msixCapability = (vectors: number, register: number, offset: number): PciCapability => {
  const body = new Uint8Array(10)
  const view = new DataView(body.buffer)
  view.setUint16(0, vectors - 1, true)
  view.setUint32(2, offset | register, true)
  view.setUint32(6, (offset + MSIX_PENDING_OFFSET) | register, true)
  const writable = new Uint8Array(10)
  new DataView(writable.buffer).setUint16(0, CONTROL_FUNCTION_MASK | CONTROL_ENABLE, true)
  return { id: PciCapabilityId.MSI_X, body, writable }
}

/** The vectors of a running function. None of its methods throws for what a guest does. */
export class Msix {
  readonly #page: DataView
  readonly #messages: ReadonlyArray<MessageInterrupt>
  /** Which message each vector was routed to last: three words each. */
  readonly #routed: Uint32Array
  readonly #isRouted: Uint8Array
  #control: number

  /**
   * `page` has the table and the pending bits, `control` is what the capability's message control says. In a later generation
   * of the device the table is what the guest has made of it.
   */
  constructor(page: DataView, messages: ReadonlyArray<MessageInterrupt>, control: number, generation: number) {
    this.#page = page
    this.#messages = messages
    this.#routed = new Uint32Array(3 * messages.length)
    this.#isRouted = new Uint8Array(messages.length)
    this.#control = control
    if (generation === 0) {
      for (let vector = 0; vector < messages.length; vector++) {
        page.setUint32(vector * MSIX_ENTRY_SIZE + ENTRY_CONTROL, ENTRY_MASKED, true)
      }
    }
    this.#refresh()
  }

  /** The number of vectors. */
  get count(): number {
    return this.#messages.length
  }

  /** Whether the guest has turned MSI-X on. */
  get isEnabled(): boolean {
    return (this.#control & CONTROL_ENABLE) !== 0
  }

  /** Takes what message control says now. */
  setControl(control: number): void {
    this.#control = control
    this.#refresh()
  }

  /** Takes a write of the guest to the page. The table is written in words; the pending bits are not written. */
  write(offset: number, size: number, value: number): void {
    const vector = Math.floor(offset / MSIX_ENTRY_SIZE)
    if (size !== 4 || offset % 4 !== 0 || vector >= this.count) return
    const isControl = offset % MSIX_ENTRY_SIZE === ENTRY_CONTROL
    this.#page.setUint32(offset, isControl ? value & ENTRY_MASKED : value, true)
    this.#refreshVector(vector)
  }

  /** Interrupts, or remembers it while that is masked. A vector that there is not, and MSI-X that is off, interrupt nobody. */
  trigger(vector: number): void {
    const message = this.#messages[vector]
    if (message === undefined || !this.isEnabled) return
    if (this.#isMasked(vector)) this.#setPending(vector, true)
    else message.trigger()
  }

  #isMasked(vector: number): boolean {
    return (this.#control & CONTROL_FUNCTION_MASK) !== 0 ||
      (this.#page.getUint32(vector * MSIX_ENTRY_SIZE + ENTRY_CONTROL, true) & ENTRY_MASKED) !== 0
  }

  #isPending(vector: number): boolean {
    return (this.#page.getUint8(MSIX_PENDING_OFFSET + (vector >>> 3)) & (1 << (vector & 7))) !== 0
  }

  #setPending(vector: number, pending: boolean): void {
    const at = MSIX_PENDING_OFFSET + (vector >>> 3)
    const bit = 1 << (vector & 7)
    const bits = this.#page.getUint8(at)
    this.#page.setUint8(at, pending ? bits | bit : bits & ~bit)
  }

  #refresh(): void {
    for (let vector = 0; vector < this.count; vector++) this.#refreshVector(vector)
  }

  /** A vector that can interrupt has its message where the guest wants it, and nothing pending. */
  #refreshVector(vector: number): void {
    const message = this.#messages[vector]
    if (message === undefined || !this.isEnabled || this.#isMasked(vector)) return
    const entry = vector * MSIX_ENTRY_SIZE
    const low = this.#page.getUint32(entry + ENTRY_ADDRESS_LOW, true)
    const high = this.#page.getUint32(entry + ENTRY_ADDRESS_HIGH, true)
    const data = this.#page.getUint32(entry + ENTRY_DATA, true)
    const at = 3 * vector
    const routed = this.#routed
    if (
      this.#isRouted[vector] === 0 || routed[at] !== low || routed[at + 1] !== high || routed[at + 2] !== data
    ) {
      routed[at] = low
      routed[at + 1] = high
      routed[at + 2] = data
      this.#isRouted[vector] = 1
      message.route(low, high, data)
    }
    if (!this.#isPending(vector)) return
    this.#setPending(vector, false)
    message.trigger()
  }
}
