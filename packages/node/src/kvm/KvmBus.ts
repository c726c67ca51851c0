/**
 * A machine's bus on KVM: register pages in read-only memory slots, doorbells as ioeventfds, everything else in the tables
 * that the vCPU threads look up.
 */
import type { Bus, BusHandlers, BusRange, Doorbell, RangeBacking } from "@troupe/core/Bus"
import { formatAddress } from "@troupe/core/GuestAddress"
import { HypervisorError } from "@troupe/core/Hypervisor"
import * as Effect from "effect/Effect"
import { Ffi } from "../Ffi.ts"
import { AccessDispatcher } from "./AccessDispatcher.ts"
import { kvmError } from "./KvmError.ts"
import { KvmIoctl, KvmValue } from "./KvmIoctl.ts"
import { KvmIoeventfd } from "./KvmStructs.ts"
import type { KvmSystem } from "./KvmSystem.ts"
import type { AddSlot } from "./MemorySlots.ts"
import { AccessTable, buildAccessTable } from "./thread/AccessTable.ts"
import type { PostedRing } from "./thread/PostedRing.ts"
import type { MutableWakeCounts } from "./WakeCounts.ts"

/** Offsets in a range are handed over as 32-bit numbers. */
const RANGE_SIZE_LIMIT = 2 ** 32

/** The pages of register-page ranges, by index of the range. */
type RegisterPages = ReadonlyMap<number, DataView<ArrayBuffer>>

/** Ranges that follow each other without a gap, as one run. */
interface PageRun {
  readonly base: number
  readonly size: number
  readonly members: ReadonlyArray<{ readonly index: number; readonly range: BusRange }>
}

const pageRuns = (bus: Bus): ReadonlyArray<PageRun> => {
  const pages = bus.ranges.map((range, index) => ({ range, index })).filter(({ range }) =>
    range.read === "register-page"
  )
    .toSorted((a, b) => a.range.base - b.range.base)
  const runs: Array<PageRun> = []
  for (const member of pages) {
    const last = runs.at(-1)
    if (last !== undefined && last.base + last.size === member.range.base) {
      runs[runs.length - 1] = {
        base: last.base,
        size: last.size + member.range.size,
        members: [...last.members, member]
      }
    } else {
      runs.push({ base: member.range.base, size: member.range.size, members: [member] })
    }
  }
  return runs
}

/** One slot for each run of register pages: a slot costs the kernel more than the pages between two devices. */
const addRegisterPages = Effect.fnUntraced(function*(bus: Bus, addSlot: AddSlot) {
  const pages = new Map<number, DataView<ArrayBuffer>>()
  for (const run of pageRuns(bus)) {
    const mapping = yield* addSlot(run.base, run.size, "host-writable")
    for (const { index, range } of run.members) {
      pages.set(index, new DataView(mapping.buffer, range.base - run.base, range.size))
    }
  }
  return pages
})

const readPage = (page: DataView<ArrayBuffer>, offset: number, size: number): number =>
  size === 1 ? page.getUint8(offset) : size === 2 ? page.getUint16(offset, true) : page.getUint32(offset, true)

/** The handlers, except that a read of a register page that does exit (an atomic instruction, say) is answered from the page. */
const withPages = (handlers: BusHandlers, pages: RegisterPages): BusHandlers =>
  pages.size === 0 ? handlers : {
    posted: (range, offset, size, value) => handlers.posted(range, offset, size, value),
    doorbell: (range, doorbell) => handlers.doorbell(range, doorbell),
    call: (range, offset, size, isWrite, value, reply) => {
      const page = isWrite ? undefined : pages.get(range)
      if (page === undefined) handlers.call(range, offset, size, isWrite, value, reply)
      else reply.complete(readPage(page, offset, size))
    }
  }

const encodeDoorbell = (range: BusRange, doorbell: Doorbell, fd: number, flags: number) => {
  const view = KvmIoeventfd.make()
  const fields = KvmIoeventfd.fields
  fields.addr.setNumber(view, range.base + doorbell.offset)
  fields.len.set(view, doorbell.size)
  fields.fd.set(view, fd)
  if (doorbell.value !== undefined) fields.datamatch.setNumber(view, doorbell.value)
  fields.flags.set(
    view,
    flags | (range.space === "pio" ? KvmValue.KVM_IOEVENTFD_FLAG_PIO : 0) |
      (doorbell.value === undefined ? 0 : KvmValue.KVM_IOEVENTFD_FLAG_DATAMATCH)
  )
  return view
}

/** Puts a bus in place. What comes back serves the machine until the scope closes. */
export const attachBus = Effect.fnUntraced(function*(options: {
  readonly vm: number
  readonly ioctl: KvmSystem["Service"]["ioctl"]
  readonly addSlot: AddSlot
  readonly hasVcpus: () => boolean
  readonly ring: PostedRing
  readonly bus: Bus
  readonly handlers: BusHandlers
  readonly wakes: MutableWakeCounts
  readonly onDefect: (defect: unknown) => void
}) {
  const { addSlot, bus, handlers, hasVcpus, ioctl, onDefect, ring, vm, wakes } = options
  const ffi = yield* Ffi
  for (const range of bus.ranges) {
    if (range.size > RANGE_SIZE_LIMIT) {
      return yield* new HypervisorError({
        operation: "attachBus",
        arguments: `${range.device} at ${formatAddress(range.base)}`,
        detail: "a range of a bus on KVM is at most 4 GiB long"
      })
    }
  }
  const pages = yield* addRegisterPages(bus, addSlot)
  const buffers = buildAccessTable(bus)
  const table = new AccessTable(buffers, bus.ranges.length)
  const dispatcher = yield* Effect.acquireRelease(
    Effect.sync(() => new AccessDispatcher(ring, withPages(handlers, pages), onDefect)),
    (dispatcher) => Effect.sync(() => dispatcher.close())
  )
  for (const [index, range] of bus.ranges.entries()) {
    for (const [number, doorbell] of range.doorbells.entries()) {
      const eventFd = yield* Effect.mapError(ffi.eventFd, kvmError)
      const set = (flags: number) =>
        ioctl(vm, KvmIoctl.KVM_IOEVENTFD, encodeDoorbell(range, doorbell, eventFd.fd, flags))
      // A bus is attached once, so without vCPUs nobody can ring it any more and it may stay for the rest of the machine's
      // life: taking it away costs the kernel milliseconds.
      yield* Effect.acquireRelease(
        set(0),
        () => hasVcpus() ? Effect.ignore(set(KvmValue.KVM_IOEVENTFD_FLAG_DEASSIGN)) : Effect.void
      )
      // A descriptor that nobody reads counts the rings, which is all that is asked of it.
      if (doorbell.wakes === false) continue
      const onRing = (): void => {
        wakes.doorbells++
        dispatcher.doorbell(index, number)
      }
      yield* Effect.mapError(eventFd.onSignal(onRing), kvmError)
    }
  }
  const backings = bus.ranges.map((range, index): RangeBacking => ({
    shadow: range.read === "shadowed" ? table.shadowOf(index, range.size) : undefined,
    page: pages.get(index)
  }))
  return { backings, dispatcher, table: buffers, rows: bus.ranges.length }
})
