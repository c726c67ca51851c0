import { assert, describe, it } from "@effect/vitest"
import { FakeHypervisor, GuestProgram, Simulation } from "@troupe/core/testing"
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Random from "effect/Random"
import * as TestClock from "effect/testing/TestClock"
import * as fc from "fast-check"
import { quietHandlers, range, testMachine } from "./TestMachine.ts"

const COUNTER = 0x1000

/** Each vCPU adds to a counter in memory without a lock. */
const racyCounter = Effect.gen(function*() {
  const add = GuestProgram.make(function*(cpu) {
    for (let i = 0; i < 4; i++) yield* cpu.store(COUNTER, 4, (yield* cpu.load(COUNTER, 4)) + 1)
  })
  const boot = GuestProgram.make(function*(cpu) {
    assert.strictEqual(yield* cpu.startVcpu(1, add), 1)
    yield* add(cpu)
  })
  const machine = yield* testMachine(boot, { vcpus: 2 })
  const others = yield* Effect.forkScoped(machine.vcpus[1]?.run ?? Effect.never)
  yield* machine.boot.run
  yield* Fiber.join(others)
  return machine.memory.view.getUint32(COUNTER, true)
}).pipe(Effect.provide(FakeHypervisor.layer()))

describe("Simulation", () => {
  it("makes the same trace of the same seed, byte for byte", () => {
    fc.assert(fc.property(fc.integer(), (seed) => {
      const first = Simulation.run(racyCounter, { seed })
      const second = Simulation.run(racyCounter, { seed })
      assert.deepStrictEqual(first.exit, second.exit)
      assert.deepStrictEqual(first.trace.bytes, second.trace.bytes)
      assert.strictEqual(first.steps, second.steps)
    }))
  })

  it("reaches different interleavings with different seeds: a racy counter loses different numbers of updates", () => {
    const outcomes = new Set(Simulation.explore(racyCounter, 200))
    assert.isTrue(outcomes.has(8), "no seed ran the two one after the other")
    assert.isAtLeast(outcomes.size, 4)
    assert.isTrue(Array.from(outcomes).every((count) => count >= 2 && count <= 8))
  })

  it("preempts fibers between their effects", () => {
    const racyFibers = Effect.gen(function*() {
      let count = 0
      const add = Effect.gen(function*() {
        for (let i = 0; i < 40; i++) {
          const seen = yield* Effect.sync(() => count)
          yield* Effect.sync(() => {
            count = seen + 1
          })
        }
      })
      yield* Effect.all([add, add], { concurrency: "unbounded" })
      return count
    })
    assert.isAtLeast(new Set(Simulation.explore(racyFibers, 50)).size, 2)
    assert.strictEqual(new Set(Simulation.explore(racyFibers, 50, { preempt: false })).size, 1)
  })

  it("jumps to the next timer", () => {
    const result = Simulation.run(Effect.gen(function*() {
      const order: Array<string> = []
      const nap = (name: string, hours: number) =>
        Effect.sleep(`${hours} hours`).pipe(Effect.andThen(Effect.sync(() => order.push(name))))
      yield* Effect.all([nap("c", 300), nap("a", 1), nap("b", 20)], { concurrency: "unbounded" })
      yield* TestClock.adjust("1 hour")
      return { order, now: yield* Clock.currentTimeMillis }
    }))
    assert.deepStrictEqual(result.exit, Exit.succeed({ order: ["a", "b", "c"], now: 301 * 3_600_000 }))
    assert.strictEqual(result.time, 301 * 3_600_000)
  })

  it("fires timers in order of time, whatever was cancelled in between", () => {
    fc.assert(fc.property(
      fc.array(fc.record({ millis: fc.integer({ min: 1, max: 50 }), cancel: fc.boolean() }), { maxLength: 60 }),
      fc.integer(),
      Simulation.property((timers) =>
        Effect.gen(function*() {
          const fired: Array<number> = []
          const fibers = yield* Effect.forEach(timers, ({ millis }) =>
            Effect.forkChild(Effect.gen(function*() {
              yield* Effect.sleep(millis)
              assert.strictEqual(yield* Clock.currentTimeMillis, millis)
              fired.push(millis)
            })))
          yield* Effect.yieldNow
          for (const [index, { cancel }] of timers.entries()) {
            const fiber = fibers[index]
            if (cancel && fiber !== undefined) {
              yield* Fiber.interrupt(fiber)
            }
          }
          yield* Effect.sleep(100)
          assert.deepStrictEqual(
            fired,
            timers.filter((timer) => !timer.cancel).map((timer) => timer.millis).toSorted((a, b) => a - b)
          )
        })
      )
    ))
  })

  it("gives Random by the seed", () => {
    const draw = Effect.all([Random.next, Random.nextInt])
    assert.deepStrictEqual(Simulation.check(draw, { seed: 5 }), Simulation.check(draw, { seed: 5 }))
    assert.notDeepEqual(Simulation.check(draw, { seed: 5 }), Simulation.check(draw, { seed: 6 }))
  })

  it("reports a standstill with what everyone waits for, and closes what is open", () => {
    let open: ReadonlyArray<string> = ["not asked"]
    const result = Simulation.run(
      Effect.gen(function*() {
        const fake = yield* FakeHypervisor.FakeHypervisor
        const program = GuestProgram.make(function*(cpu) {
          yield* cpu.waitForInterrupt(5)
        })
        yield* Effect.scoped(Effect.gen(function*() {
          const machine = yield* testMachine(program, { lines: 6, vcpus: 2 })
          const second = yield* Effect.forkScoped(machine.vcpus[1]?.run ?? Effect.never)
          const asked = yield* Effect.forkScoped(
            Simulation.label("the test waits for an answer")(Deferred.await(Deferred.makeUnsafe<void>()))
          )
          yield* machine.boot.run
          yield* Fiber.join(second)
          yield* Fiber.join(asked)
        })).pipe(
          Effect.ensuring(Effect.flatMap(fake.openResources, (resources) =>
            Effect.sync(() => {
              open = resources
            })))
        )
      }).pipe(Effect.provide(FakeHypervisor.layer()))
    )
    assert.isTrue(Exit.isFailure(result.exit))
    const error = Exit.isFailure(result.exit) ? Cause.squash(result.exit.cause) : undefined
    assert.instanceOf(error, Simulation.SimulationStuck)
    assert.sameMembers(Array.from(error instanceof Simulation.SimulationStuck ? error.waiting : []), [
      "vm1 vCPU 0 waits for interrupt 5",
      "vm1 vCPU 1 waits to be started by another vCPU",
      "the test waits for an answer"
    ])
    assert.deepStrictEqual(open, [])
  })

  it("gives up what does not end", () => {
    const spin = Effect.forever(Effect.yieldNow)
    const result = Simulation.run(spin, { maxSteps: 1000 })
    assert.isTrue(Exit.isFailure(result.exit))
    assert.include(Simulation.report(result), "has not ended after 1000 steps")
  })

  it("names the seed of a failure", () => {
    assert.throws(() => Simulation.check(Effect.fail("no"), { seed: 42 }), /seed 42/)
  })

  it("fails when a rule of the boundary was broken, even if the effect succeeded", () => {
    const result = Simulation.run(
      Effect.gen(function*() {
        const program = GuestProgram.make(function*(cpu) {
          yield* cpu.in8(0x60)
        })
        const machine = yield* testMachine(program, {
          ranges: [range({ space: "pio", base: 0x60, size: 1, device: "keyboard" })],
          handlers: { ...quietHandlers, call: (_range, _offset, _size, _isWrite, _value, reply) => reply.complete(256) }
        })
        yield* Effect.exit(machine.boot.run)
      }).pipe(Effect.provide(FakeHypervisor.layer()))
    )
    assert.include(Simulation.report(result), "the answer to a read of keyboard+0x0 is 256")
  })
})
