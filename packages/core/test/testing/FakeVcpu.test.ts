import { assert, describe, it } from "@effect/vitest"
import type { BusHandlers } from "@troupe/core/Bus"
import { FakeHypervisor, GuestProgram, Simulation } from "@troupe/core/testing"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as fc from "fast-check"
import { quietHandlers, range, testMachine, type TestMachineOptions } from "./TestMachine.ts"

const PORT = 0x700
const DOORBELL_PAGE = 0xd000_0000

/** Runs a program on the boot vCPU of a machine, and returns its exit. */
const runProgram = (program: GuestProgram.GuestProgram, options: TestMachineOptions = {}) =>
  Effect.gen(function*() {
    const machine = yield* testMachine(program, options)
    const others = yield* Effect.forEach(machine.vcpus.slice(1), (vcpu) => Effect.forkScoped(vcpu.run))
    const exit = yield* machine.boot.run
    yield* Effect.forEach(others, Fiber.join)
    return exit
  })

const onFake = Effect.provide(FakeHypervisor.layer())

interface Seen {
  readonly kind: "post" | "call"
  readonly value: number
}

const operations = fc.array(
  fc.record({ kind: fc.constantFrom<Seen["kind"]>("post", "post", "post", "call"), value: fc.nat(0xff) }),
  { maxLength: 40 }
)

describe("posted writes and calls", () => {
  it("reach the device in the order of each vCPU, however often the device has no room", () => {
    fc.assert(fc.property(
      fc.record({ programs: fc.tuple(operations, operations), refusals: fc.array(fc.boolean(), { minLength: 1 }) }),
      fc.integer(),
      Simulation.property(({ programs, refusals }) =>
        Effect.gen(function*() {
          const seen: ReadonlyArray<Array<Seen>> = [[], []]
          let offered = 0
          const handlers: BusHandlers = {
            ...quietHandlers,
            call: (_range, offset, _size, _isWrite, value, reply) => {
              seen[offset >> 1]?.push({ kind: "call", value })
              reply.complete(0)
            },
            posted: (_range, offset, _size, value) => {
              if (refusals[offered++ % refusals.length] === true && offered % 7 !== 0) return false
              seen[offset >> 1]?.push({ kind: "post", value })
              return true
            }
          }
          // Each vCPU has a byte that is posted and one that is called.
          const write = (cpu: number): GuestProgram.GuestProgram =>
            function*(guest) {
              for (const { kind, value } of programs[cpu] ?? []) {
                yield* guest.out8(kind === "post" ? PORT + cpu * 2 : PORT + 0x10 + cpu * 2, value)
              }
            }
          const boot = GuestProgram.make(function*(cpu) {
            yield* cpu.startVcpu(1, write(1))
            yield* write(0)(cpu)
          })
          yield* runProgram(boot, {
            vcpus: 2,
            handlers,
            ranges: [
              range({ space: "pio", base: PORT, size: 4, write: "posted" }),
              range({ space: "pio", base: PORT + 0x10, size: 4, write: "call" })
            ]
          })
          assert.deepStrictEqual(seen, programs)
        }).pipe(onFake)
      )
    ))
  })

  it("hold the vCPU when the ring is full, and lose nothing", () => {
    Simulation.explore(
      Effect.gen(function*() {
        const taken: Array<number> = []
        let open = false
        let written = 0
        const program = GuestProgram.make(function*(cpu) {
          for (let i = 0; i < 1000; i++) {
            yield* cpu.out32(PORT, i)
            written++
          }
        })
        const run = yield* Effect.forkScoped(runProgram(program, {
          ranges: [range({ space: "pio", base: PORT, size: 4, write: "posted" })],
          handlers: {
            ...quietHandlers,
            posted: (_range, _offset, _size, value) => {
              if (open) taken.push(value)
              return open
            }
          }
        }))
        yield* Effect.sleep("1 second")
        assert.strictEqual(written, 256)
        open = true
        yield* Fiber.join(run)
        assert.deepStrictEqual(taken, Array.from({ length: 1000 }, (_, i) => i))
      }).pipe(onFake),
      5
    )
  })

  it("wait for an answer that comes later", () => {
    const answers: Array<number> = []
    const result = Simulation.run(
      Effect.gen(function*() {
        const program = GuestProgram.make(function*(cpu) {
          answers.push(yield* cpu.in32(PORT), cpu.now())
        })
        const pending: Array<(value: number) => void> = []
        const run = yield* Effect.forkScoped(runProgram(program, {
          ranges: [range({ space: "pio", base: PORT, size: 4 })],
          handlers: {
            ...quietHandlers,
            call: (_range, _offset, _size, _isWrite, _value, reply) => {
              pending.push(reply.complete)
            }
          }
        }))
        yield* Effect.sleep("3 seconds")
        for (const complete of pending) complete(0xffff_fffe)
        return yield* Fiber.join(run)
      }).pipe(onFake)
    )
    assert.strictEqual(result.exit._tag, "Success", Simulation.report(result))
    assert.deepStrictEqual(answers, [0xffff_fffe, 3000])
  })
})

describe("interrupts and doorbells", () => {
  it("are merged, and never lost: whoever is woken finds all of the work", () => {
    fc.assert(fc.property(
      fc.record({ requests: fc.integer({ min: 1, max: 20 }), useHandler: fc.boolean() }),
      fc.integer(),
      Simulation.property(({ requests, useHandler }) =>
        Effect.gen(function*() {
          // The guest asks and rings; the device does what it finds and triggers; the guest counts what it finds.
          const ASKED = 0x3000
          const DONE = 0x3004
          const program = GuestProgram.make(function*(cpu) {
            let seen = 0
            if (useHandler) {
              cpu.interrupts.handle(5, function*(inner) {
                assert.isFalse(inner.interrupts.enabled)
                seen = yield* inner.load(DONE, 4)
              })
              cpu.enableInterrupts()
            }
            for (let i = 1; i <= requests; i++) {
              yield* cpu.store(ASKED, 4, i)
              yield* cpu.store(DOORBELL_PAGE + 0x50, 4, 0)
            }
            cpu.disableInterrupts()
            while (seen < requests) {
              yield* cpu.waitForInterrupt(5)
              seen = yield* cpu.load(DONE, 4)
            }
            assert.strictEqual(seen, requests)
          })
          const exit = yield* runProgram(program, {
            lines: 6,
            ranges: [
              range({ space: "mmio", base: DOORBELL_PAGE, size: 0x1000, doorbells: [{ offset: 0x50, size: 4 }] })
            ],
            handlersOf: (machine) => ({
              ...quietHandlers,
              doorbell: () => {
                const { lines, memory } = machine()
                memory.view.setUint32(DONE, memory.view.getUint32(ASKED, true), true)
                lines[5]?.trigger()
              }
            })
          })
          assert.strictEqual(exit._tag, "Halted")
        }).pipe(onFake)
      )
    ))
  })

  it("go to the vCPU that a line is routed to", () => {
    Simulation.explore(
      Effect.gen(function*() {
        const taken: Array<[cpu: number, gsi: number]> = []
        const second = GuestProgram.make(function*(cpu) {
          cpu.interrupts.route(3)
          yield* cpu.out8(PORT, 3)
          taken.push([cpu.id, yield* cpu.waitForInterrupt()])
          yield* cpu.out8(PORT, 2)
        })
        const boot = GuestProgram.make(function*(cpu) {
          assert.strictEqual(yield* cpu.startVcpu(1, second), 1)
          assert.strictEqual(yield* cpu.startVcpu(7, second), 0)
          taken.push([cpu.id, yield* cpu.waitForInterrupt()])
        })
        yield* runProgram(boot, {
          vcpus: 2,
          lines: 4,
          ranges: [range({ space: "pio", base: PORT, size: 1 })],
          handlersOf: (machine) => ({
            ...quietHandlers,
            call: (_range, _offset, _size, _isWrite, value, reply) => {
              machine().lines[value]?.trigger()
              reply.complete(0)
            }
          })
        })
        assert.deepStrictEqual(taken, [[1, 3], [0, 2]])
      }).pipe(onFake),
      50
    )
  })

  it("are waited for with a limit in virtual time", () => {
    const result = Simulation.run(
      Effect.gen(function*() {
        const found: Array<number | undefined> = []
        yield* runProgram(
          GuestProgram.make(function*(cpu) {
            found.push(yield* cpu.waitForInterruptWithin("5 minutes", 1), cpu.now())
            yield* cpu.sleep("1 minute")
            found.push(cpu.now())
          }),
          { lines: 2 }
        )
        return found
      }).pipe(onFake)
    )
    assert.deepStrictEqual(result.exit._tag === "Success" ? result.exit.value : result.exit, [
      undefined,
      300_000,
      360_000
    ])
  })
})

describe("a guest program", () => {
  it("that forgets yield* is told so", () => {
    const result = Simulation.run(
      runProgram(function*(cpu) {
        // oxlint-disable-next-line typescript/no-unused-expressions -- the mistake itself
        cpu.in8(0x60)
        yield* cpu.halt()
      }).pipe(onFake)
    )
    assert.include(Simulation.report(result), "pio-read operation and did not do it; write yield* before it")
  })

  it("that is not there ends like an instruction that cannot be emulated", () => {
    const result = Simulation.run(
      Effect.gen(function*() {
        const machine = yield* testMachine(function*() {})
        machine.memory.bytes.set([0x0f, 0xc7, 0x0f], 0x10_0000)
        return yield* machine.boot.run
      }).pipe(onFake)
    )
    const exit = result.exit._tag === "Success" ? result.exit.value : undefined
    assert.strictEqual(exit?._tag, "HypervisorInternalError")
    if (exit?._tag === "HypervisorInternalError") {
      assert.match(exit.instructionBytes, /^0f c7 0f /)
      assert.strictEqual(exit.registers["rip"], "0x100000")
    }
  })

  it("goes on where it was when its run is interrupted and begun again", () => {
    Simulation.explore(
      Effect.gen(function*() {
        let done = 0
        const program = GuestProgram.make(function*(cpu) {
          for (; done < 50; done++) yield* cpu.sleep("1 second")
        })
        const machine = yield* testMachine(program)
        for (let i = 0; i < 4; i++) {
          const run = yield* Effect.forkChild(machine.boot.run)
          yield* Effect.sleep("10 seconds")
          yield* Fiber.interrupt(run)
          const left = done
          yield* Effect.sleep("100 seconds")
          assert.strictEqual(done, left)
        }
        assert.isAtLeast(done, 36)
        assert.strictEqual((yield* machine.boot.run)._tag, "Halted")
        assert.strictEqual(done, 50)
      }).pipe(onFake),
      20
    )
  })
})

describe("a machine", () => {
  it("has halted when all of its vCPUs have, and one that goes on can start a halted one again", () => {
    Simulation.explore(
      Effect.gen(function*() {
        const starts: Array<number> = []
        const second = GuestProgram.make(function*(cpu) {
          starts.push(cpu.now())
          yield* cpu.halt()
          assert.fail("a halted vCPU went on")
        })
        const exit = yield* runProgram(
          function*(cpu) {
            assert.strictEqual(yield* cpu.startVcpu(1, second), 1)
            yield* cpu.sleep("1 second")
            assert.strictEqual(yield* cpu.startVcpu(1, second), 1)
            yield* cpu.sleep("1 second")
          },
          { vcpus: 3 }
        )
        assert.strictEqual(exit._tag, "Halted")
        assert.deepStrictEqual(starts, [0, 1000])
      }).pipe(onFake),
      20
    )
  })
})
