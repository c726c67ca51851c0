import { assert, describe, it } from "@effect/vitest"
import type { CallReply } from "@troupe/core/Bus"
import type { Device, DeviceBehaviour, DeviceContext, DevicePolicy } from "@troupe/core/Device"
import { CALL_RESERVE, DeviceActor, MAILBOX_CAPACITY, TURN_ACCESSES } from "@troupe/core/DeviceActor"
import { GuestMemory } from "@troupe/core/GuestMemory"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Logger from "effect/Logger"
import * as Schedule from "effect/Schedule"
import * as TestClock from "effect/testing/TestClock"
import * as fc from "fast-check"

const ESCALATE: DevicePolicy = { _tag: "escalate" }
const restart = (times: number): DevicePolicy => ({
  _tag: "restart",
  schedule: Schedule.exponential("10 millis").pipe(Schedule.upTo({ times }))
})

interface World {
  /** What the device saw, in order. */
  readonly seen: Array<string>
  readonly starts: Array<number>
  open: number
  /** Throws at this access. */
  crashAt: string | undefined
}

const makeActor = (
  policy: DevicePolicy,
  behaviour: (world: World, context: DeviceContext) => Partial<DeviceBehaviour> = () => ({})
) => {
  const world: World = { seen: [], starts: [], open: 0, crashAt: undefined }
  const note = (text: string) => {
    world.seen.push(text)
    if (world.crashAt === text) {
      world.crashAt = undefined
      throw new Error(`crash at ${text}`)
    }
  }
  const device: Device = {
    name: "device0",
    ranges: [{
      space: "pio",
      base: 0x10,
      size: 4,
      read: "call",
      write: "posted",
      doorbells: [{ offset: 0, size: 1 }, { offset: 1, size: 1 }]
    }],
    interrupts: [],
    start: (context) =>
      Effect.acquireRelease(
        Effect.sync((): DeviceBehaviour => {
          world.starts.push(context.generation)
          world.open++
          return {
            read: (_range, offset) => {
              note(`read ${offset}`)
              return 100 + offset
            },
            write: (_range, offset, _size, value) => note(`write ${offset} ${value}`),
            doorbell: (_range, doorbell) => {
              note(`doorbell ${doorbell}`)
              return false
            },
            signal: (number) => {
              note(`signal ${number}`)
              return false
            },
            ...behaviour(world, context)
          }
        }),
        () =>
          Effect.sync(() => {
            world.open--
          })
      )
  }
  const actor = new DeviceActor(device, policy, (own) => ({
    ...own,
    name: device.name,
    memory: new GuestMemory([]),
    ranges: [],
    interrupts: [],
    messages: [],
    bases: [],
    stop: () => undefined
  }))
  return { actor, world }
}

const replyTo = (answers: Array<number>): CallReply => ({ complete: (value) => answers.push(value) })

/** Starts the actor and lets it run in the background. */
const running = (actor: DeviceActor) => Effect.andThen(actor.start, Effect.forkScoped(Effect.exit(actor.run)))

const settle = Effect.repeat(Effect.yieldNow, { times: 20 })

describe("DeviceActor", () => {
  it.effect("handles accesses one at a time, in the order of their delivery, and answers every call once", () =>
    Effect.promise(() =>
      fc.assert(fc.asyncProperty(
        fc.array(fc.record({ kind: fc.constantFrom("read", "write", "posted"), value: fc.nat(255) }), {
          maxLength: 60
        }),
        fc.nat(60),
        (accesses, startAfter) =>
          Effect.runPromise(Effect.scoped(Effect.gen(function*() {
            const { actor, world } = makeActor(ESCALATE)
            const answers: Array<number> = []
            const expected: Array<string> = []
            yield* actor.start
            for (const [index, { kind, value }] of accesses.entries()) {
              if (index === Math.min(startAfter, accesses.length - 1)) yield* Effect.forkScoped(actor.run)
              const offset = value % 4
              if (kind === "read") actor.call(0, offset, 1, false, 0, replyTo(answers))
              else if (kind === "write") actor.call(0, offset, 1, true, value, replyTo(answers))
              else assert.isTrue(actor.posted(0, offset, 1, value))
              expected.push(kind === "read" ? `read ${offset}` : `write ${offset} ${value}`)
            }
            yield* settle
            assert.deepStrictEqual(world.seen, expected)
            assert.deepStrictEqual(
              answers,
              accesses.filter(({ kind }) => kind !== "posted").map(({ kind, value }) =>
                kind === "read" ? 100 + value % 4 : 0
              )
            )
          })))
      ))
    ))

  it.effect("refuses posted writes when its mailbox is full, and still takes every vCPU's call", () =>
    Effect.gen(function*() {
      const { actor, world } = makeActor(ESCALATE)
      let taken = 0
      while (actor.posted(0, 0, 1, taken & 0xff)) taken++
      assert.strictEqual(taken, MAILBOX_CAPACITY - CALL_RESERVE)
      const answers: Array<number> = []
      for (let i = 0; i < CALL_RESERVE; i++) actor.call(0, 1, 1, false, 0, replyTo(answers))
      yield* running(actor)
      yield* settle
      assert.strictEqual(world.seen.length, MAILBOX_CAPACITY)
      assert.strictEqual(answers.length, CALL_RESERVE)
      assert.isTrue(actor.posted(0, 0, 1, 0))
    }))

  it.effect("lets other fibers run between turns", () =>
    Effect.gen(function*() {
      const { actor, world } = makeActor(ESCALATE)
      for (let i = 0; i < 2 * TURN_ACCESSES; i++) actor.posted(0, 0, 1, 0)
      let seenByOther = -1
      yield* actor.start
      yield* Effect.forkScoped(actor.run, { startImmediately: true })
      seenByOther = world.seen.length
      assert.strictEqual(seenByOther, TURN_ACCESSES)
      yield* settle
      assert.strictEqual(world.seen.length, 2 * TURN_ACCESSES)
    }))

  it.effect("merges doorbells and signals that wait, and loses none", () =>
    Effect.gen(function*() {
      const { actor, world } = makeActor(ESCALATE)
      for (let i = 0; i < 5; i++) {
        actor.doorbell(0, 1)
        actor.signal(3)
      }
      yield* running(actor)
      yield* settle
      assert.deepStrictEqual(world.seen, ["doorbell 1", "signal 3"])
      actor.doorbell(0, 0)
      actor.doorbell(0, 1)
      yield* settle
      assert.deepStrictEqual(world.seen.slice(2), ["doorbell 0", "doorbell 1"])
    }))

  it.effect("calls a doorbell again while it says that there is more", () =>
    Effect.gen(function*() {
      let left = 5
      const { actor } = makeActor(ESCALATE, () => ({ doorbell: () => --left > 0 }))
      yield* running(actor)
      actor.doorbell(0, 0)
      yield* settle
      assert.strictEqual(left, 0)
    }))

  it.effect("answers the call that crashed it, starts again by its policy, and goes on with what waits", () =>
    Effect.gen(function*() {
      const { actor, world } = makeActor(restart(5))
      const answers: Array<number> = []
      yield* running(actor)
      world.crashAt = "read 2"
      actor.call(0, 2, 1, false, 0, replyTo(answers))
      actor.call(0, 3, 1, false, 0, replyTo(answers))
      yield* settle
      assert.deepStrictEqual(answers, [0])
      assert.strictEqual(world.open, 0)
      yield* TestClock.adjust("10 millis")
      yield* settle
      assert.deepStrictEqual(answers, [0, 103])
      assert.deepStrictEqual(world.starts, [0, 1])
      assert.strictEqual(world.open, 1)
    }))

  it.effect("starts again when its background work fails", () =>
    Effect.gen(function*() {
      const { actor, world } = makeActor(restart(1), (_, context) =>
        context.generation === 0 ? { run: Effect.die(new Error("background")) } : {})
      yield* running(actor)
      yield* TestClock.adjust("10 millis")
      yield* settle
      assert.deepStrictEqual(world.starts, [0, 1])
      assert.strictEqual(world.open, 1)
    }))

  it.effect("escalates at once, or when the schedule ends, with the story", () =>
    Effect.gen(function*() {
      for (const [policy, starts] of [[ESCALATE, 1], [restart(3), 4]] as const) {
        const { actor, world } = makeActor(policy, () => ({ run: Effect.die(new Error("broken for good")) }))
        yield* actor.start
        const fiber = yield* Effect.forkScoped(Effect.flip(actor.run))
        yield* TestClock.adjust("1 second")
        const escalated = yield* Fiber.join(fiber)
        assert.strictEqual(escalated.starts, starts)
        assert.strictEqual(escalated.device, "device0")
        assert.strictEqual(escalated.detail, "broken for good")
        assert.strictEqual(world.open, 0)
      }
    }))

  it.effect("leaves nothing open when it is interrupted, before or while it works or waits to start again", () =>
    Effect.gen(function*() {
      for (const crash of [false, true]) {
        const { actor, world } = makeActor(restart(5))
        yield* Effect.scoped(Effect.gen(function*() {
          const fiber = yield* running(actor)
          if (crash) {
            world.crashAt = "write 0 1"
            actor.posted(0, 0, 1, 1)
          }
          yield* settle
          assert.strictEqual(world.open, crash ? 0 : 1)
          yield* Fiber.interrupt(fiber)
        }))
        assert.strictEqual(world.open, 0)
      }
      const { actor, world } = makeActor(ESCALATE)
      yield* Effect.scoped(actor.start)
      assert.strictEqual(world.open, 0)
    }))

  it.effect("rings a doorbell after every access that was delivered before it, and after the last ring", () =>
    Effect.scoped(Effect.gen(function*() {
      const { actor, world } = makeActor(ESCALATE)
      yield* actor.start
      const post = (from: number, to: number) => {
        for (let i = from; i < to; i++) assert.isTrue(actor.posted(0, 0, 1, i))
      }
      const first = 2 * TURN_ACCESSES
      post(0, first)
      actor.doorbell(0, 0)
      actor.doorbell(0, 1)
      post(first, first + 100)
      actor.doorbell(0, 1)
      yield* Effect.forkScoped(actor.run)
      yield* actor.settled
      const at = (text: string) => world.seen.indexOf(text)
      assert.isAbove(at("doorbell 0"), at(`write 0 ${first - 1}`))
      assert.isAbove(at("doorbell 1"), at(`write 0 ${first + 99}`))
      assert.strictEqual(world.seen.filter((text) => text.startsWith("doorbell")).length, 2)
    })))

  it.effect("settles when the doorbells that were rung have been answered, but never waits for ever", () =>
    Effect.scoped(Effect.gen(function*() {
      for (const rounds of [0, 5, Number.POSITIVE_INFINITY]) {
        let left = rounds
        const { actor } = makeActor(ESCALATE, () => ({ doorbell: () => left-- > 0 }))
        yield* actor.start
        const fiber = yield* Effect.forkScoped(actor.run)
        yield* settle
        actor.doorbell(0, 1)
        yield* actor.settled
        if (rounds !== Number.POSITIVE_INFINITY) assert.strictEqual(left, -1)
        yield* Fiber.interrupt(fiber)
        actor.doorbell(0, 1)
        // A device that does not work now is not waited for.
        yield* actor.settled
      }
    })))

  it.effect("loses what is posted beyond its mailbox while it waits to start again, so that others are not held up", () =>
    Effect.scoped(Effect.gen(function*() {
      const { actor, world } = makeActor({ _tag: "restart", schedule: Schedule.spaced("1 hour") })
      world.crashAt = "write 0 0"
      yield* running(actor)
      const room = MAILBOX_CAPACITY - CALL_RESERVE
      actor.posted(0, 0, 1, 0)
      yield* settle
      for (let i = 1; i <= room + 10; i++) assert.isTrue(actor.posted(0, 0, 1, i))
      const answers: Array<number> = []
      actor.call(0, 1, 1, false, 0, replyTo(answers))
      yield* TestClock.adjust("1 hour")
      yield* settle
      const kept = Array.from({ length: room + 1 }, (_, i) => `write 0 ${i}`)
      assert.deepStrictEqual(world.seen, [...kept, "read 1"])
      assert.deepStrictEqual(answers, [101])
      // One that works is waited for.
      assert.isTrue(actor.posted(0, 0, 1, 0))
    })))

  const step = fc.record({
    kind: fc.constantFrom(
      "hold",
      "hold",
      "hold",
      "release",
      "release",
      "read",
      "write",
      "posted",
      "crash",
      "crash held"
    ),
    value: fc.nat(12)
  })

  it.effect("answers a held write when it is released or the generation ends, and every call exactly once", () =>
    Effect.promise(() =>
      fc.assert(
        fc.asyncProperty(fc.array(step, { maxLength: 40, size: "max" }), fc.boolean(), (steps, interrupt) =>
          Effect.runPromise(
            Effect.gen(function*() {
              const HOLD = 1
              const CRASH = 2
              // All that there ever were: also those of generations that have ended.
              const releases: Array<() => void> = []
              const answers: Array<number> = []
              const expected: Array<number> = []
              let held: Array<{ readonly call: number; readonly release: number }> = []
              const { actor, world } = makeActor(
                { _tag: "restart", schedule: Schedule.recurs(1000) },
                (_, context) => ({
                  write: (_range, _offset, _size, value) => {
                    if ((value & HOLD) !== 0) {
                      releases.push(context.hold())
                      // There is nothing left to hold.
                      context.hold()()
                    }
                    if ((value & CRASH) !== 0) {
                      throw new Error("crash")
                    }
                  }
                })
              )
              const call = (isWrite: boolean, value: number) => {
                const index = answers.push(0) - 1
                actor.call(0, 0, 1, isWrite, value, {
                  complete: () => {
                    answers[index] = (answers[index] ?? 0) + 1
                  }
                })
                return index
              }
              const endAll = () => {
                for (const { call } of held) {
                  expected[call] = 1
                }
                held = []
              }
              yield* Effect.scoped(Effect.gen(function*() {
                const fiber = yield* running(actor)
                yield* settle
                for (const { kind, value } of steps) {
                  if (kind === "hold") {
                    expected.push(0)
                    held.push({ release: releases.length, call: call(true, HOLD) })
                  } else if (kind === "read" || kind === "write") {
                    call(kind === "write", 0)
                    expected.push(1)
                  } else if (kind === "posted") {
                    actor.posted(0, 0, 1, HOLD)
                  } else if (kind === "release") {
                    releases[value]?.()
                    for (const { call, release } of held) {
                      if (release === value) {
                        expected[call] = 1
                      }
                    }
                    held = held.filter(({ release }) =>
                      release !== value
                    )
                  } else {
                    call(true, kind === "crash" ? CRASH : CRASH | HOLD)
                    expected.push(1)
                    endAll()
                  }
                  yield* settle
                  assert.deepStrictEqual(answers, expected)
                }
                if (interrupt) {
                  yield* Fiber.interrupt(fiber)
                }
              }))
              endAll()
              assert.deepStrictEqual(answers, expected)
              for (const release of releases) {
                release()
              }
              assert.deepStrictEqual(answers, expected)
              assert.strictEqual(world.open, 0)
            }).pipe(Effect.provide(Logger.layer([])))
          ))
      )
    ))

  it.effect("goes on with everything else while it holds a write", () =>
    Effect.gen(function*() {
      let release = () => {}
      const { actor, world } = makeActor(ESCALATE, (_, context) => ({
        write: (_range, _offset, _size, value) => {
          if (value === 1) release = context.hold()
        }
      }))
      const answers: Array<number> = []
      const held: Array<number> = []
      yield* running(actor)
      actor.call(0, 0, 1, true, 1, replyTo(held))
      actor.call(0, 3, 1, false, 0, replyTo(answers))
      actor.doorbell(0, 1)
      actor.signal(3)
      yield* settle
      yield* actor.settled
      assert.deepStrictEqual([held, answers], [[], [103]])
      assert.deepStrictEqual(world.seen, ["read 3", "doorbell 1", "signal 3"])
      release()
      release()
      assert.deepStrictEqual(held, [0])
    }))
})
