/** Hot-pluggable memory on a real KVM: there for guest and host exactly while it is plugged, and given back to the host. */
import { assert, describe, it } from "@effect/vitest"
import type { CallReply } from "@troupe/core/Bus"
import { GuestMemory } from "@troupe/core/GuestMemory"
import * as Ffi from "@troupe/node/Ffi"
import * as KvmHypervisor from "@troupe/node/kvm/KvmHypervisor"
import { KvmIoctl } from "@troupe/node/kvm/KvmIoctl"
import * as KvmSystem from "@troupe/node/kvm/KvmSystem"
import * as VcpuThreads from "@troupe/node/kvm/VcpuThreads"
import { Effect, Fiber, Layer, Queue } from "effect"
import { kvmObstacle, onKvm, residentBytesIn } from "./support.ts"
import { asm, CONTROL, dword, flatMode, kvmLayer, range, tinyMachine, word } from "./TinyMachine.ts"

const isolated = { excludeTestServices: true }
const REGION = 0x4000_0000
const BLOCK = 0x20_0000
const ENOMEM = 12
const WRITTEN = 0x1234_5678

const load = (address: number) => [0xa1, ...dword(address)]
const store = (address: number, value: number) => [0xc7, 0x05, ...dword(address), ...dword(value)]
const tell = [0xef]

/** Tells what it reads at the region's first word, writes there, tells what it reads then, and so on. */
const readAndWrite = asm(
  [0x66, 0xba, ...word(CONTROL)],
  load(REGION),
  tell,
  store(REGION, WRITTEN),
  load(REGION),
  tell,
  [0xeb, -(5 + 1 + 10 + 5 + 1 + 2) & 0xff]
)

/** Tells as soon as the region's first word is not what it should be; otherwise says nothing. */
const watch = asm(
  [0x66, 0xba, ...word(CONTROL)],
  [0x81, 0x3d, ...dword(REGION + BLOCK), ...dword(WRITTEN)],
  [0x74, -(10 + 2) & 0xff],
  tell,
  [0xeb, 0xfe]
)

/** A machine whose guest tells numbers, each of which waits for the test's leave to go on. */
const tellingMachine = Effect.fnUntraced(function*(code: ReadonlyArray<number>) {
  const told = yield* Queue.unbounded<{ readonly value: number; readonly reply: CallReply }>()
  const machine = yield* tinyMachine({
    state: flatMode,
    code,
    ranges: [range({ base: CONTROL })],
    handlers: {
      call: (_range, _offset, _size, _isWrite, value, reply) => Queue.offerUnsafe(told, { value, reply })
    }
  })
  const memory = yield* machine.vm.addPluggableMemory(REGION, 8 * BLOCK, BLOCK)
  /** What the guest tells next; it goes on after `meanwhile`. */
  const next = <E>(meanwhile: Effect.Effect<unknown, E> = Effect.void) =>
    Effect.gen(function*() {
      const { reply, value } = yield* Queue.take(told)
      yield* meanwhile
      reply.complete(0)
      return value
    })
  return { machine, memory, told, next }
})

/** Memory of the region that is really there, in bytes. */
const residentBytes = (): number => residentBytesIn(8 * BLOCK)

/** The FFI, where the ioctls with these numbers among those for memory slots, counted from 0 on, fail. */
const failingFfi = (failing: Set<number>) =>
  Layer.effect(
    Ffi.Ffi,
    Effect.map(Ffi.Ffi, ({ functions }) => {
      let slots = 0
      return Ffi.make({
        ...functions,
        ioctlBuffer: (fd, request, argument) =>
          request === KvmIoctl.KVM_SET_USER_MEMORY_REGION.request && failing.has(slots++)
            ? -ENOMEM
            : functions.ioctlBuffer(fd, request, argument)
      })
    })
  ).pipe(Layer.provide(Ffi.layerWith({ quiet: true })))

describe.skipIf(kvmObstacle !== undefined)(onKvm("pluggable memory"), () => {
  it.layer(kvmLayer(), isolated)("on KVM", (it) => {
    it.effect("is an open bus until it is plugged, zero then, and an open bus again", () =>
      Effect.gen(function*() {
        const { machine, memory, next } = yield* tellingMachine(readAndWrite)
        const guest = new GuestMemory([machine.memory, memory.region])
        yield* Effect.forkScoped(machine.vcpu.run)
        assert.strictEqual(yield* next(), 0xffff_ffff)
        // The write went nowhere. What the guest waits for happens before it goes on.
        assert.strictEqual(yield* next(memory.plug(0, 2)), 0xffff_ffff)
        assert.strictEqual(yield* next(), 0)
        assert.strictEqual(yield* next(), WRITTEN)
        assert.strictEqual(guest.slice(REGION, 2 * BLOCK)?.[0], 0x78)
        assert.isUndefined(guest.slice(REGION + 2 * BLOCK - 1, 2))
        assert.strictEqual(yield* next(memory.unplug(0, 1)), WRITTEN)
        assert.strictEqual(yield* next(memory.plug(0, 1)), 0xffff_ffff)
        assert.strictEqual(yield* next(), 0)
        assert.strictEqual(memory.blocks.plugged, 2)
      }).pipe(Effect.scoped))

    it.effect("goes back to the host, and what the host's devices still write there is not seen by the next owner", () =>
      Effect.gen(function*() {
        const { memory } = yield* tellingMachine(readAndWrite)
        yield* memory.plug(0, 8)
        const before = residentBytes()
        memory.region.bytes.fill(7)
        assert.isAtLeast(residentBytes() - before, 7 * BLOCK)
        yield* memory.unplug(1, 7)
        assert.isAtMost(residentBytes() - before, 2 * BLOCK)
        // A request that had begun before writes late. That goes back as well, as soon as anything changes.
        memory.region.bytes.fill(9, BLOCK)
        assert.isAtLeast(residentBytes() - before, 7 * BLOCK)
        yield* memory.plug(7, 1)
        assert.isAtMost(residentBytes() - before, 2 * BLOCK)
        memory.region.bytes.fill(9, BLOCK, 2 * BLOCK)
        yield* memory.plug(1, 1)
        assert.strictEqual(memory.region.bytes[BLOCK], 0)
        assert.strictEqual(memory.region.bytes[0], 7)
      }).pipe(Effect.scoped))

    it.effect("is never away for a moment while its neighbours come and go", () =>
      Effect.gen(function*() {
        const { machine, memory, told } = yield* tellingMachine(watch)
        yield* memory.plug(1, 1)
        memory.region.view.setUint32(BLOCK, WRITTEN, true)
        yield* Effect.forkScoped(machine.vcpu.run)
        for (let round = 0; round < 20; round++) {
          yield* memory.plug(0, 8)
          yield* memory.unplug(0, 1)
          yield* memory.unplug(2, 6)
        }
        assert.strictEqual(Queue.sizeUnsafe(told), 0)
        // The guest does watch.
        yield* memory.unplug(1, 1)
        assert.isDefined(yield* Queue.take(told))
      }).pipe(Effect.scoped))

    it.effect("stays true to its map when it is interrupted anywhere", () =>
      Effect.gen(function*() {
        const { machine, memory, next } = yield* tellingMachine(readAndWrite)
        yield* Effect.forkScoped(machine.vcpu.run)
        for (let turns = 0; turns < 12; turns++) {
          for (const work of [memory.plug(0, 8), memory.unplug(0, 8)]) {
            const fiber = yield* Effect.forkChild(work)
            for (let turn = 0; turn < turns; turn++) yield* Effect.yieldNow
            yield* Fiber.interrupt(fiber)
            yield* next()
            assert.strictEqual(yield* next(), memory.blocks.isPlugged(0) ? WRITTEN : 0xffff_ffff)
          }
        }
      }).pipe(Effect.scoped))
  })

  for (let failing = 0; failing < 8; failing++) {
    it.live(`changes nothing when its slot number ${failing} cannot be had, or be given back`, () => {
      const faults = new Set<number>()
      const layer = KvmHypervisor.layer.pipe(
        Layer.provideMerge(VcpuThreads.layerWith({ warm: 0 })),
        Layer.provide(KvmSystem.layer),
        Layer.provide(failingFfi(faults))
      )
      return Effect.gen(function*() {
        const { machine, memory, next } = yield* tellingMachine(readAndWrite)
        yield* Effect.forkScoped(machine.vcpu.run)
        // The machine's RAM has the first slot.
        let slots = 1
        faults.add(slots + failing)
        assert.strictEqual((yield* Effect.flip(memory.plug(0, 8))).errno?.number, ENOMEM)
        assert.strictEqual(memory.blocks.plugged, 0)
        yield* next()
        assert.strictEqual(yield* next(memory.plug(0, 8)), 0xffff_ffff)
        yield* next()
        memory.region.bytes.fill(3, BLOCK)
        slots += (2 * failing + 1) + 8
        faults.add(slots + failing)
        yield* Effect.flip(memory.unplug(0, 8))
        assert.strictEqual(memory.blocks.plugged, 8)
        for (let block = 1; block < 8; block++) assert.strictEqual(memory.region.bytes[block * BLOCK], 3)
        yield* next()
        yield* next()
        assert.strictEqual(yield* next(), WRITTEN)
      }).pipe(Effect.scoped, Effect.provide(layer))
    })
  }
})
