/** A guest that does anything at all to every device, from several vCPUs at once: its machine ends in a typed way. */
import { assert, describe, it } from "@effect/vitest"
import { SLEEP_CONTROL_S5 } from "@troupe/core/acpi/AcpiTables"
import {
  KEYBOARD_CONTROLLER_PORT,
  PVPANIC_PANICKED,
  PVPANIC_PORT,
  RESET_PORT,
  RESET_VALUE,
  SLEEP_CONTROL_PORT
} from "@troupe/core/acpi/PowerPorts"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { FakeHypervisor, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as fc from "fast-check"

const CPUS = 3

/** Values that registers and descriptors care about. */
const value = fc.oneof(
  fc.constantFrom(0, 1, 2, 3, 4, 7, 8, 0xf, 0x10, 0x80, 0xff, 0x100, 0x1000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff),
  fc.nat(0xff),
  fc.nat(0xffff_ffff)
)
const size = fc.constantFrom<GuestProgram.AccessSize>(1, 2, 4)

/** Where an access goes: a port of a device or beside it, a register page, memory that queues may use, anywhere. */
const place = fc.oneof(
  fc.record({ kind: fc.constant("port" as const), at: fc.integer({ min: 0x3f6, max: 0x401 }) }),
  fc.record({ kind: fc.constant("port" as const), at: fc.constantFrom(0x64, 0x505, 0x601, 0x602) }),
  fc.record({ kind: fc.constant("device" as const), at: fc.integer({ min: 0, max: 0x110 }) }),
  fc.record({ kind: fc.constant("device" as const), at: fc.nat(0x1003) }),
  fc.record({ kind: fc.constant("memory" as const), at: fc.nat(0x1000) }),
  fc.record({ kind: fc.constant("anywhere" as const), at: fc.nat(2 ** 32) })
)

/** What ends a machine: power off, a reset by either way, a panic. */
const end = fc.constantFrom(
  { at: SLEEP_CONTROL_PORT, value: SLEEP_CONTROL_S5 },
  { at: RESET_PORT, value: RESET_VALUE },
  { at: KEYBOARD_CONTROLLER_PORT, value: 0xfe },
  { at: PVPANIC_PORT, value: PVPANIC_PANICKED }
).map(({ at, value }) => ({
  kind: "write" as const,
  place: { kind: "port" as const, at },
  size: 1 as const,
  value
}))

const action = fc.oneof(
  { weight: 20, arbitrary: fc.record({ kind: fc.constant("read" as const), place, size }) },
  { weight: 40, arbitrary: fc.record({ kind: fc.constant("write" as const), place, size, value }) },
  { weight: 20, arbitrary: fc.record({ kind: fc.constant("wait" as const) }) },
  { weight: 20, arbitrary: fc.record({ kind: fc.constant("pass" as const) }) },
  { weight: 3, arbitrary: end }
)

type Action = typeof action extends fc.Arbitrary<infer A> ? A : never

const MEMORY = 0x18_0000

const perform = function*(
  cpu: GuestProgram.GuestCpu,
  base: number,
  actions: ReadonlyArray<Action>
): GuestProgram.GuestRoutine {
  for (const it of actions) {
    if (it.kind === "wait") {
      yield* cpu.waitForInterruptWithin("1 second")
      continue
    }
    if (it.kind === "pass") {
      yield* cpu.yield()
      continue
    }
    const { at, kind } = it.place
    if (kind === "port") {
      if (it.kind === "read") yield* it.size === 1 ? cpu.in8(at) : it.size === 2 ? cpu.in16(at) : cpu.in32(at)
      else {yield* it.size === 1
          ? cpu.out8(at, it.value)
          : it.size === 2
          ? cpu.out16(at, it.value)
          : cpu.out32(at, it.value)}
    } else {
      const address = kind === "device" ? base + at : kind === "memory" ? MEMORY + at : at
      // The machine's own tables and code are left alone, so that the monkey lives to do more.
      if (kind === "anywhere" && address < MEMORY) continue
      if (it.kind === "read") yield* cpu.load(address, it.size)
      else yield* cpu.store(address, it.size, it.value)
    }
  }
}

describe("a monkey at the keyboard", () => {
  it("never breaks its machine", () => {
    const ends = new Map<string, number>()
    fc.assert(
      fc.property(
        fc.array(fc.array(action, { maxLength: 60 }), { minLength: CPUS, maxLength: CPUS }),
        fc.integer(),
        Simulation.property((programs) =>
          Effect.gen(function*() {
            const boot = GuestProgram.make(function*(cpu) {
              const base = GuestAcpi.find(cpu).virtioMmio[0]?.base ?? 0
              for (let id = 1; id < CPUS; id++) {
                yield* cpu.startVcpu(id, (other) => perform(other, base, programs[id] ?? []))
              }
              yield* perform(cpu, base, programs[0] ?? [])
            })
            const lifecycle = yield* GuestLifecycle
            yield* lifecycle.create({
              kernelType: "LINUX",
              kernel: GuestProgram.kernel(boot),
              cpus: CPUS,
              guestMemory: "2M",
              virtioRng: true
            })
            const run = yield* Effect.forkChild(lifecycle.run)
            yield* Effect.sleep("10 minutes")
            yield* lifecycle.stop
            const exit = yield* Fiber.await(run)
            const end = Exit.isSuccess(exit)
              ? exit.value._tag
              : Option.match(Exit.findErrorOption(exit), {
                onNone: () => Cause.pretty(exit.cause),
                onSome: (error) => (error.reason._tag === "INTERNAL_ERROR" ? error.message : error.reason._tag)
              })
            ends.set(end, (ends.get(end) ?? 0) + 1)
            assert.oneOf(end, ["PowerOff", "Reset", "Halt", "VCPU_RUNTIME_FAILURE"])
            const fake = yield* FakeHypervisor.FakeHypervisor
            assert.deepStrictEqual(yield* fake.openResources, [])
          }).pipe(
            Effect.provide(
              GuestLifecycle.layer.pipe(
                Layer.provide(Layer.provide(layerDevices, EntropySource.layerRandom)),
                Layer.provideMerge(FakeHypervisor.layer())
              )
            )
          )
        )
      ),
      { numRuns: 300 }
    )
    // Most monkeys come to the end of what they do, and some end their machine, in every way.
    for (const one of ["Halt", "PowerOff", "Reset", "VCPU_RUNTIME_FAILURE"]) assert.isAbove(ends.get(one) ?? 0, 0, one)
  })
})
