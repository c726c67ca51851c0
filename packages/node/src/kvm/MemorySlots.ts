/**
 * The memory slots of one machine: RAM and register pages, mapped in this process and given to KVM.
 */
import { addressEnd, formatAddress, INVALID_ADDRESS } from "@troupe/core/GuestAddress"
import { PAGE_SIZE } from "@troupe/core/GuestMemory"
import { HypervisorError } from "@troupe/core/Hypervisor"
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import { Ffi, type Mapping } from "../Ffi.ts"
import { kvmError } from "./KvmError.ts"
import { KvmIoctl, KvmValue } from "./KvmIoctl.ts"
import { KvmUserspaceMemoryRegion } from "./KvmStructs.ts"
import type { KvmSystem } from "./KvmSystem.ts"
import type { SlotRange } from "./PluggableSlots.ts"

/** Adds a slot of zeroed memory; it leaves the machine, and then the process, when the scope closes. */
export type AddSlot = (
  guestAddress: number,
  size: number,
  access: "guest-writable" | "host-writable"
) => Effect.Effect<Mapping, HypervisorError, Scope.Scope>

const encode = (slot: number, flags: number, guestAddress: number, size: number, hostAddress: bigint) => {
  const view = KvmUserspaceMemoryRegion.make()
  const fields = KvmUserspaceMemoryRegion.fields
  fields.slot.set(view, slot)
  fields.flags.set(view, flags)
  fields.guest_phys_addr.setNumber(view, guestAddress)
  fields.memory_size.setNumber(view, size)
  fields.userspace_addr.set(view, hostAddress)
  return view
}

/** The slots of a machine. */
export interface MemorySlots {
  readonly addSlot: AddSlot
  /** Slots whose numbers are used for nothing else, for blocks that come and go. */
  readonly reserve: (count: number) => SlotRange
  /** Takes slots whose memory is gone out of the machine. Comes before a vCPU is made. */
  readonly dropStale: Effect.Effect<void, HypervisorError>
}

/**
 * The slots of the machine with descriptor `vm`.
 *
 * Taking a slot out of a machine costs the kernel milliseconds, because it waits for every vCPU. Where there is none
 * (`hasVcpus`), nobody can reach the memory through the slot, so it stays: until a vCPU is made, or, nearly always, until the
 * machine itself is gone.
 */
export const memorySlots = Effect.fnUntraced(function*(
  vm: number,
  ioctl: KvmSystem["Service"]["ioctl"],
  hasVcpus: () => boolean
) {
  const ffi = yield* Ffi
  const stale: Array<Effect.Effect<unknown, HypervisorError>> = []
  let nextSlot = 0

  const addSlot: AddSlot = Effect.fnUntraced(function*(guestAddress, size, access) {
    if (
      addressEnd(guestAddress, size) === INVALID_ADDRESS || size === 0 ||
      guestAddress % PAGE_SIZE !== 0 || size % PAGE_SIZE !== 0
    ) {
      return yield* new HypervisorError({
        operation: KvmIoctl.KVM_SET_USER_MEMORY_REGION.name,
        arguments: `${formatAddress(guestAddress)}, ${size} bytes`,
        detail: `address and size must be multiples of ${PAGE_SIZE} within the guest's physical addresses`
      })
    }
    const mapping = yield* Effect.mapError(ffi.mapAnonymous(size), kvmError)
    const slot = nextSlot++
    const flags = access === "host-writable" ? KvmValue.KVM_MEM_READONLY : 0
    const set = (size: number) =>
      ioctl(vm, KvmIoctl.KVM_SET_USER_MEMORY_REGION, encode(slot, flags, guestAddress, size, mapping.address))
    yield* Effect.acquireRelease(set(size), () => {
      if (hasVcpus()) return Effect.ignore(set(0))
      stale.push(set(0))
      return Effect.void
    })
    return mapping
  })
  const reserve = (count: number): SlotRange => {
    const first = nextSlot
    nextSlot += count
    const set: SlotRange["set"] = (index, guestAddress, size, hostAddress) =>
      Effect.asVoid(
        ioctl(vm, KvmIoctl.KVM_SET_USER_MEMORY_REGION, encode(first + index, 0, guestAddress, size, hostAddress))
      )
    return {
      set,
      drop: (index, guestAddress, hostAddress) => {
        const gone = set(index, guestAddress, 0, hostAddress)
        if (hasVcpus()) return Effect.ignore(gone)
        stale.push(gone)
        return Effect.void
      }
    }
  }
  const dropStale = Effect.suspend(() => Effect.all(stale.splice(0), { discard: true }))
  return { addSlot, reserve, dropStale } satisfies MemorySlots
})
