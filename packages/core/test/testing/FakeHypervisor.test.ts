import { assert, describe, it } from "@effect/vitest"
import { SHADOW_INVALID } from "@troupe/core/Bus"
import { Hypervisor } from "@troupe/core/Hypervisor"
import { FakeHypervisor, FaultPlan, GuestProgram } from "@troupe/core/testing"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import { MEMORY_SIZE, quietHandlers, range, testMachine } from "./TestMachine.ts"

const UART = 0x3f8

describe("FakeHypervisor", () => {
  it.effect("runs a program and reports how it ended", () =>
    Effect.gen(function*() {
      const ends = [
        [
          "Halted",
          GuestProgram.make(function*(cpu) {
            yield* cpu.halt()
          })
        ],
        ["Halted", GuestProgram.make(function*() {})],
        [
          "TripleFault",
          GuestProgram.make(function*(cpu) {
            yield* cpu.tripleFault()
          })
        ],
        [
          "HypervisorInternalError",
          GuestProgram.make(function*(cpu) {
            yield* cpu.internalError(Uint8Array.of(0x0f, 0x0b))
          })
        ]
      ] as const
      for (const [tag, program] of ends) {
        const exit = yield* Effect.scoped(Effect.flatMap(testMachine(program), (machine) => machine.boot.run))
        assert.strictEqual(exit._tag, tag)
      }
      const fake = yield* FakeHypervisor.FakeHypervisor
      assert.deepStrictEqual(yield* fake.openResources, [])
      assert.deepStrictEqual(yield* fake.violations, [])
    }).pipe(Effect.provide(FakeHypervisor.layer())))

  it.effect("serves each kind of access as the bus declares it", () =>
    Effect.gen(function*() {
      const seen: Array<unknown> = []
      const values: Array<number> = []
      const program = GuestProgram.make(function*(cpu) {
        yield* cpu.store(0x1000, 4, 0x1234_5678)
        values.push(yield* cpu.load(0x1000, 2))
        values.push(yield* cpu.load(0xd000_0004, 4))
        values.push(yield* cpu.in8(UART + 5))
        values.push(yield* cpu.in8(UART + 2))
        values.push(yield* cpu.in16(0x70))
        values.push(yield* cpu.load(0xe000_0000, 4))
        yield* cpu.out8(UART, 0x41)
        yield* cpu.out8(UART, 0x42)
        yield* cpu.store(0xd000_0050, 4, 1)
        yield* cpu.store(0xd000_0050, 4, 1)
        yield* cpu.store(0xd000_0070, 4, 7)
        yield* cpu.yield()
        yield* cpu.yield()
      })
      const exit = yield* Effect.scoped(Effect.gen(function*() {
        const machine = yield* testMachine(program, {
          ranges: [
            range({ space: "pio", base: UART, size: 8, read: "shadowed", write: "posted", device: "serial0" }),
            range({
              space: "mmio",
              base: 0xd000_0000,
              size: 0x1000,
              read: "register-page",
              doorbells: [{ offset: 0x50, size: 4 }],
              device: "rng0"
            })
          ],
          handlers: {
            call: (range, offset, size, isWrite, value, reply) => {
              seen.push(["call", range, offset, size, isWrite, value])
              reply.complete(isWrite ? 0 : 0xc1)
            },
            posted: (range, offset, size, value) => {
              seen.push(["posted", range, offset, size, value])
              return true
            },
            doorbell: (range, doorbell) => {
              seen.push(["doorbell", range, doorbell])
            }
          }
        })
        const shadow = machine.backings[0]?.shadow
        assert.strictEqual(shadow?.[5], SHADOW_INVALID)
        if (shadow !== undefined) shadow[5] = 0x60
        machine.backings[1]?.page?.setUint32(4, 2, true)
        return yield* machine.boot.run
      }))
      assert.strictEqual(exit._tag, "Halted")
      assert.deepStrictEqual(values, [0x5678, 2, 0x60, 0xc1, 0xffff, 0xffff_ffff])
      assert.deepStrictEqual(seen, [
        ["call", 0, 2, 1, false, 0],
        ["posted", 0, 0, 1, 0x41],
        ["posted", 0, 0, 1, 0x42],
        ["call", 1, 0x70, 4, true, 7],
        ["doorbell", 1, 0]
      ])
    }).pipe(Effect.provide(FakeHypervisor.layer())))

  it.effect("wakes a vCPU that waits, and loses no interrupt that came before", () =>
    Effect.gen(function*() {
      const taken: Array<number> = []
      const program = GuestProgram.make(function*(cpu) {
        taken.push(yield* cpu.waitForInterrupt())
        taken.push(yield* cpu.waitForInterrupt(2))
        taken.push(yield* cpu.waitForInterrupt())
      })
      yield* Effect.scoped(Effect.gen(function*() {
        const machine = yield* testMachine(program, { lines: 3 })
        machine.lines[1]?.trigger()
        const run = yield* Effect.forkChild(machine.boot.run)
        yield* Effect.yieldNow
        machine.lines[0]?.trigger()
        machine.lines[0]?.trigger()
        yield* Effect.yieldNow
        machine.lines[2]?.trigger()
        assert.strictEqual((yield* Fiber.join(run))._tag, "Halted")
      }))
      assert.deepStrictEqual(taken, [1, 2, 0])
    }).pipe(Effect.provide(FakeHypervisor.layer())))

  it.effect("empties every view when its owner closes", () =>
    Effect.gen(function*() {
      const machine = yield* Effect.scoped(
        testMachine(function*() {}, {
          ranges: [range({ space: "mmio", base: 0xd000_0000, size: 0x1000, read: "register-page" })],
          handlers: quietHandlers
        })
      )
      assert.strictEqual(machine.memory.bytes.length, 0)
      assert.strictEqual(machine.memory.size, MEMORY_SIZE)
      assert.throws(() => machine.backings[0]?.page?.setUint8(0, 1), TypeError)
    }).pipe(Effect.provide(FakeHypervisor.layer())))

  it.effect("interruption takes the vCPU out of the guest", () =>
    Effect.gen(function*() {
      let turns = 0
      const program = GuestProgram.make(function*(cpu) {
        for (;;) {
          turns++
          yield* cpu.yield()
        }
      })
      yield* Effect.scoped(Effect.gen(function*() {
        const machine = yield* testMachine(program)
        const run = yield* Effect.forkChild(machine.boot.run)
        yield* Effect.yieldNow
        yield* Effect.yieldNow
        yield* Fiber.interrupt(run)
      }))
      const left = turns
      yield* Effect.yieldNow
      yield* Effect.yieldNow
      assert.isAbove(left, 0)
      assert.strictEqual(turns, left)
      const fake = yield* FakeHypervisor.FakeHypervisor
      assert.deepStrictEqual(yield* fake.openResources, [])
    }).pipe(Effect.provide(FakeHypervisor.layer())))

  it.effect("fails the operation that the plan names, with nothing left open", () =>
    Effect.gen(function*() {
      const cycle = Effect.scoped(
        Effect.flatMap(testMachine(function*() {}, { lines: 1 }), (machine) => machine.boot.run)
      )
      const count = yield* Effect.gen(function*() {
        yield* cycle
        return yield* (yield* FakeHypervisor.FakeHypervisor).operationCount
      }).pipe(Effect.provide(FakeHypervisor.layer()))
      assert.strictEqual(count, 7)
      for (let index = 0; index < count; index++) {
        yield* Effect.gen(function*() {
          const error = yield* Effect.flip(cycle)
          const fake = yield* FakeHypervisor.FakeHypervisor
          assert.strictEqual(error._tag, "HypervisorError")
          assert.strictEqual(error.errno?.name, "ENOMEM")
          assert.strictEqual((yield* fake.operations)[index], error.operation)
          assert.deepStrictEqual(yield* fake.openResources, [])
        }).pipe(Effect.provide(FakeHypervisor.layer({ faults: FaultPlan.failAt(index, FaultPlan.ENOMEM) })))
      }
    }))

  it.effect("reports an answer that is given twice", () =>
    Effect.gen(function*() {
      const exit = yield* Effect.exit(Effect.scoped(Effect.flatMap(
        testMachine(function*(cpu) {
          yield* cpu.in8(0x60)
        }, {
          ranges: [range({ space: "pio", base: 0x60, size: 1, device: "keyboard" })],
          handlers: {
            ...quietHandlers,
            call: (_range, _offset, _size, _isWrite, _value, reply) => {
              reply.complete(1)
              reply.complete(2)
            }
          }
        }),
        (machine) => machine.boot.run
      )))
      assert.isTrue(Exit.isFailure(exit))
      const fake = yield* FakeHypervisor.FakeHypervisor
      assert.deepStrictEqual(yield* fake.violations, ["the answer to a read of keyboard+0x0 was given twice"])
    }).pipe(Effect.provide(FakeHypervisor.layer())))

  it.effect("refuses what KVM refuses", () =>
    Effect.gen(function*() {
      const hypervisor = yield* Hypervisor
      yield* Effect.scoped(Effect.gen(function*() {
        const vm = yield* hypervisor.createVm
        yield* vm.addMemory(0, 0x2000)
        assert.strictEqual((yield* Effect.flip(vm.addMemory(0x1000, 0x1000))).errno?.name, "EEXIST")
        assert.strictEqual((yield* Effect.flip(vm.addMemory(0x8001, 0x1000))).errno?.name, "EINVAL")
        assert.strictEqual((yield* Effect.flip(vm.addMemory(2 ** 52, 0x1000))).errno?.name, "EINVAL")
        yield* vm.interruptLine(23)
        assert.strictEqual((yield* Effect.flip(vm.interruptLine(23))).errno?.name, "EEXIST")
        assert.strictEqual((yield* Effect.flip(vm.interruptLine(24))).errno?.name, "EINVAL")
        assert.strictEqual((yield* Effect.flip(vm.createVcpu(64))).errno?.name, "EINVAL")
        const vcpu = yield* vm.createVcpu(0)
        assert.strictEqual((yield* Effect.flip(vm.createVcpu(0))).errno?.name, "EEXIST")
        assert.strictEqual((yield* Effect.flip(vcpu.run)).errno?.name, "EINVAL")
      }))
    }).pipe(Effect.provide(FakeHypervisor.layer())))
})

describe("the rules of the boundary", () => {
  const violationsOf = (options: Parameters<typeof testMachine>[1], program: GuestProgram.GuestProgram) =>
    Effect.gen(function*() {
      const exit = yield* Effect.exit(
        Effect.scoped(Effect.flatMap(testMachine(program, options), (machine) => {
          const shadow = machine.backings[0]?.shadow
          if (shadow !== undefined) shadow[1] = 0x100
          return machine.boot.run
        }))
      )
      assert.isTrue(Exit.isFailure(exit))
      const fake = yield* FakeHypervisor.FakeHypervisor
      assert.deepStrictEqual(yield* fake.openResources, [])
      return (yield* fake.violations).join("; ")
    }).pipe(Effect.provide(FakeHypervisor.layer()))

  it.effect("a shadow is a byte or SHADOW_INVALID", () =>
    Effect.gen(function*() {
      const told = yield* violationsOf(
        { ranges: [range({ space: "pio", base: 0x70, size: 2, read: "shadowed", device: "clock0" })] },
        function*(cpu) {
          yield* cpu.in8(0x71)
        }
      )
      assert.strictEqual(told, "the shadow of clock0+0x1 is 256, not a byte and not SHADOW_INVALID")
    }))

  it.effect("a handler does not throw", () =>
    Effect.gen(function*() {
      for (const write of ["call", "posted"] as const) {
        const told = yield* violationsOf(
          {
            ranges: [range({ space: "pio", base: 0x70, size: 2, write })],
            handlers: {
              ...quietHandlers,
              call: () => {
                throw new Error("the handler broke")
              },
              posted: () => {
                throw new Error("the handler broke")
              }
            }
          },
          function*(cpu) {
            yield* cpu.out8(0x70, 1)
          }
        )
        assert.include(told, "the handler broke")
      }
    }))

  it.effect("nothing is released under a vCPU that runs", () =>
    Effect.gen(function*() {
      yield* Effect.scoped(Effect.gen(function*() {
        const machine = yield* Effect.scoped(Effect.gen(function*() {
          const machine = yield* testMachine(function*(cpu) {
            yield* cpu.waitForInterrupt()
          })
          const run = yield* Effect.forkDetach(machine.boot.run)
          yield* Effect.yieldNow
          yield* Effect.yieldNow
          return { run }
        }))
        assert.isTrue(Exit.isFailure(yield* Fiber.await(machine.run)))
      }))
      const fake = yield* FakeHypervisor.FakeHypervisor
      assert.deepStrictEqual(yield* fake.violations, ["vCPU 0 of vm1 was released while vCPU 0 ran"])
      assert.deepStrictEqual(yield* fake.openResources, [])
    }).pipe(Effect.provide(FakeHypervisor.layer())))
})
