// The batch guest on our library's hypervisor: accesses reach a device actor through the same bus, ring and mailbox as those of
// any device.
import { Bus, type BusRange, type CallReply } from "@troupe/core/Bus"
import type { Device } from "@troupe/core/Device"
import { DeviceActor } from "@troupe/core/DeviceActor"
import { GuestMemory } from "@troupe/core/GuestMemory"
import { Hypervisor } from "@troupe/core/Hypervisor"
import * as Effect from "effect/Effect"
import {
  type Access,
  BATCH_MEMORY_SIZE,
  BATCH_STATE,
  BEGIN_ADDRESS,
  CALL_PORT,
  COUNT_ADDRESS,
  END_ADDRESS,
  EXIT_PAGE_ADDRESS,
  MARK_PORT,
  PAGE_ADDRESS,
  POSTED_PORT,
  SHADOWED_PORT,
  writeBatchGuest
} from "./BatchGuest.ts"
import { BenchError } from "./Row.ts"

const PAGE_SIZE = 4096

const range = (request: Pick<BusRange, "space" | "base" | "size" | "read" | "write">): BusRange => ({
  ...request,
  doorbells: [],
  device: "bench"
})

const RANGES: ReadonlyArray<BusRange> = [
  range({ space: "pio", base: MARK_PORT, size: 1, read: "call", write: "call" }),
  range({ space: "pio", base: POSTED_PORT, size: 1, read: "call", write: "posted" }),
  range({ space: "pio", base: SHADOWED_PORT, size: 1, read: "shadowed", write: "call" }),
  range({ space: "pio", base: CALL_PORT, size: 1, read: "call", write: "call" }),
  range({ space: "mmio", base: PAGE_ADDRESS, size: PAGE_SIZE, read: "register-page", write: "call" }),
  range({ space: "mmio", base: EXIT_PAGE_ADDRESS, size: PAGE_SIZE, read: "shadowed", write: "call" })
]
const MARK_RANGE = 0

/** A device that does next to nothing: what is measured is the way to it. */
const makeDevice = (seen: { writes: number }): Device => ({
  name: "bench",
  ranges: RANGES,
  interrupts: [],
  start: () =>
    Effect.succeed({
      read: () => 0x60,
      write: () => {
        seen.writes++
      }
    })
})

/** A machine whose guest makes a batch of accesses when it is told to. */
export interface BatchMachine {
  /** Has the guest make so many accesses; succeeds with the ticks of the time-stamp counter that they took. */
  readonly batch: (count: number) => Effect.Effect<number, BenchError>
  /** Posted writes that have reached the device. */
  readonly writes: () => number
}

/** Starts the guest. It waits at its first mark. */
export const startBatchMachine = Effect.fnUntraced(function*(access: Access) {
  const hypervisor = yield* Hypervisor
  const vm = yield* hypervisor.createVm
  const memory = yield* vm.addMemory(0, BATCH_MEMORY_SIZE)
  writeBatchGuest(memory.bytes, access)
  const bus = Bus.make(RANGES)
  if (!(bus instanceof Bus)) return yield* Effect.die(new BenchError(bus.message))
  const seen = { writes: 0 }
  const backings: Array<Effect.Success<ReturnType<typeof vm.attachBus>>[number]> = []
  const actor = new DeviceActor(makeDevice(seen), { _tag: "escalate" }, (own) => ({
    name: "bench",
    memory: new GuestMemory([memory]),
    ranges: backings,
    interrupts: [],
    messages: [],
    bases: [],
    ...own,
    stop: () => undefined
  }))
  let waiting: CallReply | undefined
  let reached: ((effect: Effect.Effect<void, BenchError>) => void) | undefined
  backings.push(
    ...yield* vm.attachBus(bus, {
      call: (index, offset, size, isWrite, value, reply) => {
        if (index !== MARK_RANGE) return actor.call(index, offset, size, isWrite, value, reply)
        waiting = reply
        reached?.(Effect.void)
      },
      posted: actor.posted,
      doorbell: actor.doorbell
    })
  )
  for (const { shadow } of backings) shadow?.fill(0x60)
  yield* actor.start
  yield* Effect.forkScoped(actor.run)
  const vcpu = yield* vm.createVcpu(0)
  yield* vcpu.setState(BATCH_STATE)
  yield* Effect.forkScoped(
    Effect.onExit(
      vcpu.run,
      (exit) => Effect.sync(() => reached?.(Effect.fail(new BenchError(`the guest ended: ${JSON.stringify(exit)}`))))
    )
  )

  const nextMark = Effect.callback<void, BenchError>((resume) => {
    if (waiting !== undefined) return resume(Effect.void)
    reached = resume
  })
  const batch = (count: number): Effect.Effect<number, BenchError> =>
    Effect.suspend(() => {
      const mark = waiting
      waiting = undefined
      memory.view.setUint32(COUNT_ADDRESS, count, true)
      mark?.complete(0)
      return Effect.map(nextMark, () => {
        const begin = memory.view.getBigUint64(BEGIN_ADDRESS, true)
        return Number(memory.view.getBigUint64(END_ADDRESS, true) - begin)
      })
    })
  yield* nextMark
  const machine: BatchMachine = { batch, writes: () => seen.writes }
  return machine
})
