/** When the watch takes a machine for halted, and how little it disturbs one that is not. */
import { assert, describe, it } from "@effect/vitest"
import { haltWatch, type WatchedVcpu } from "@troupe/node/kvm/HaltWatch"
import { KvmValue } from "@troupe/node/kvm/KvmIoctl"
import * as Control from "@troupe/node/kvm/thread/VcpuControl"
import { Effect } from "effect"
import { TestClock } from "effect/testing"

/** A vCPU whose guest the test plays. */
class PlayedVcpu implements WatchedVcpu {
  readonly control = new Int32Array(new SharedArrayBuffer(Control.CONTROL_WORDS * 4))
  readonly parts: WatchedVcpu["parts"]
  isRunning = true
  halted = false
  stopped = false
  inspections = 0
  blocked = false
  halts = 0
  state: number = KvmValue.KVM_MP_STATE_RUNNABLE
  interrupts = true

  constructor(hasStats = true) {
    this.parts = { stats: hasStats ? { isBlocked: () => this.blocked, halts: () => this.halts } : undefined }
  }

  hlt(interrupts: boolean): void {
    this.blocked = true
    this.halts++
    this.state = KvmValue.KVM_MP_STATE_HALTED
    this.interrupts = interrupts
  }

  wake(): void {
    this.blocked = false
    this.state = KvmValue.KVM_MP_STATE_RUNNABLE
  }

  readonly request = (request: number): void => {
    if ((request & Control.REQUEST_STOP) !== 0) {
      this.stopped = true
      this.isRunning = false
    }
    if ((request & Control.REQUEST_INSPECT) !== 0) {
      this.inspections++
      this.control[Control.CONTROL_MP_STATE] = this.state
      this.control[Control.CONTROL_INTERRUPTS_ENABLED] = this.interrupts ? 1 : 0
      Atomics.add(this.control, Control.CONTROL_INSPECTIONS, 1)
    }
  }
}

/** Notices a halt at the latest after this time. */
const LIMIT = "2 seconds"

describe("haltWatch", () => {
  it.effect("ends a machine whose vCPUs have all halted with interrupts off", () =>
    Effect.gen(function*() {
      const [first, second] = [new PlayedVcpu(), new PlayedVcpu()]
      yield* Effect.forkScoped(haltWatch([first, second]))
      yield* TestClock.adjust("10 seconds")
      assert.strictEqual(first.inspections + second.inspections, 0)
      first.hlt(false)
      yield* TestClock.adjust("10 seconds")
      assert.strictEqual(first.inspections, 0, "the other vCPU still runs")
      second.hlt(false)
      yield* TestClock.adjust(LIMIT)
      assert.deepStrictEqual([first.halted, first.stopped, second.halted, second.stopped], [true, true, true, true])
    }))

  it.effect("counts vCPUs that were never started as halted, but not them alone", () =>
    Effect.gen(function*() {
      const [first, second] = [new PlayedVcpu(), new PlayedVcpu()]
      second.blocked = true
      second.state = KvmValue.KVM_MP_STATE_UNINITIALIZED
      const waiting = new PlayedVcpu()
      waiting.blocked = true
      waiting.state = KvmValue.KVM_MP_STATE_UNINITIALIZED
      yield* Effect.forkScoped(haltWatch([first, second]))
      yield* Effect.forkScoped(haltWatch([waiting]))
      first.hlt(false)
      yield* TestClock.adjust(LIMIT)
      assert.isTrue(second.halted)
      assert.isFalse(waiting.halted)
    }))

  it.effect("disturbs an idle guest once in an idle period, and a busy one never", () =>
    Effect.gen(function*() {
      const vcpu = new PlayedVcpu()
      yield* Effect.forkScoped(haltWatch([vcpu]))
      for (let period = 1; period <= 3; period++) {
        vcpu.hlt(true)
        yield* TestClock.adjust("1 minute")
        assert.strictEqual(vcpu.inspections, period)
        vcpu.wake()
        yield* TestClock.adjust("1 minute")
      }
      // Ticks: it halts again and again, and is never blocked for long.
      for (let tick = 0; tick < 100; tick++) {
        vcpu.hlt(true)
        yield* TestClock.adjust("250 millis")
      }
      assert.strictEqual(vcpu.inspections, 3)
      assert.isFalse(vcpu.halted)
      // The halt that is not like the others is still noticed.
      vcpu.hlt(false)
      yield* TestClock.adjust(LIMIT)
      assert.isTrue(vcpu.halted)
    }))

  it.effect("finds a halt without statistics, by asking", () =>
    Effect.gen(function*() {
      const vcpu = new PlayedVcpu(false)
      yield* Effect.forkScoped(haltWatch([vcpu]))
      // Spins for a while without an exit, and halts then.
      yield* TestClock.adjust("10 seconds")
      assert.isFalse(vcpu.halted)
      vcpu.hlt(false)
      yield* TestClock.adjust(LIMIT)
      assert.isTrue(vcpu.halted)
    }))

  it.effect("takes no answer for no halt", () =>
    Effect.gen(function*() {
      const vcpu = new PlayedVcpu()
      vcpu.hlt(false)
      let answers = false
      const silent: WatchedVcpu = {
        get isRunning() {
          return vcpu.isRunning
        },
        get halted() {
          return vcpu.halted
        },
        set halted(halted) {
          vcpu.halted = halted
        },
        control: vcpu.control,
        parts: vcpu.parts,
        request: (request) => {
          if (answers) vcpu.request(request)
        }
      }
      yield* Effect.forkScoped(haltWatch([silent]))
      yield* TestClock.adjust("10 seconds")
      assert.isFalse(vcpu.halted)
      answers = true
      yield* TestClock.adjust(LIMIT)
      assert.isTrue(vcpu.halted)
    }))
})
