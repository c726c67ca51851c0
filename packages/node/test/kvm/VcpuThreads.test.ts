/** The pool of vCPU threads, with jobs that fail at once: no KVM is needed. */
import { assert, describe, it } from "@effect/vitest"
import { Bus } from "@troupe/core/Bus"
import * as Ffi from "@troupe/node/Ffi"
import { buildAccessTable } from "@troupe/node/kvm/thread/AccessTable"
import { PostedRing } from "@troupe/node/kvm/thread/PostedRing"
import * as Control from "@troupe/node/kvm/thread/VcpuControl"
import * as VcpuThreads from "@troupe/node/kvm/VcpuThreads"
import { Effect, Exit, Fiber, Layer, Scope } from "effect"
import * as fc from "fast-check"
import { spawnSync } from "node:child_process"
import { readdirSync } from "node:fs"
import process from "node:process"
import { fileURLToPath } from "node:url"
import type { Worker } from "node:worker_threads"

const EBADF = 9
const EXIT_WHILE_STARTING = fileURLToPath(new URL("./exit-while-starting.ts", import.meta.url))

const layer = (options: VcpuThreads.VcpuThreadsOptions, backEnd: Ffi.ForeignFunctionsName = "node:ffi") =>
  VcpuThreads.layerWith(options).pipe(Layer.provideMerge(Ffi.layerWith({ backEnds: [backEnd], quiet: true })))

/** Gives a thread a vCPU that does not exist, and waits for it to say so. */
const runNothing = Effect.fnUntraced(function*(thread: VcpuThreads.VcpuThread) {
  const ffi = yield* Ffi.Ffi
  const mapping = yield* ffi.mapAnonymous(12288)
  const control = new Int32Array(new SharedArrayBuffer(Control.CONTROL_WORDS * 4))
  const bus = Bus.make([])
  if (!(bus instanceof Bus)) return yield* Effect.die(bus)
  thread.start({
    vcpu: -1,
    run: { address: mapping.address, length: mapping.length },
    control: control.buffer,
    ring: PostedRing.allocate(2),
    wake: -1,
    table: buildAccessTable(bus),
    rows: 0
  }, () => {})
  while (Atomics.load(control, Control.CONTROL_THREAD) !== Control.THREAD_STOPPED) {
    yield* Effect.promise(async () => {
      await Atomics.waitAsync(control, Control.CONTROL_THREAD, Atomics.load(control, Control.CONTROL_THREAD), 10).value
    })
  }
  return [control[Control.CONTROL_STOP], control[Control.CONTROL_STOP_VALUE]]
})

describe("VcpuThreads", () => {
  for (const backEnd of ["node:ffi", "koffi"] as const) {
    it.live(`runs one job after the other on one thread (${backEnd})`, () =>
      Effect.gen(function*() {
        const threads = yield* VcpuThreads.VcpuThreads
        for (let i = 0; i < 3; i++) {
          yield* Effect.scoped(Effect.gen(function*() {
            const thread = yield* threads.acquire
            assert.deepStrictEqual(threads.counts(), { idle: 0, held: 1 })
            assert.deepStrictEqual(yield* runNothing(thread), [Control.STOP_FAILED, EBADF])
          }))
          assert.deepStrictEqual(threads.counts(), { idle: 1, held: 0 })
        }
      }).pipe(Effect.scoped, Effect.provide(layer({ warm: 0 }, backEnd))))
  }

  it.live("grows on demand, keeps so many as it is told, and keeps them warm", () =>
    Effect.gen(function*() {
      const threads = yield* VcpuThreads.VcpuThreads
      const scope = yield* Scope.make()
      const held = yield* Effect.all(Array.from({ length: 4 }, () => Scope.provide(threads.acquire, scope)), {
        concurrency: "unbounded"
      })
      assert.strictEqual(new Set(held).size, 4)
      assert.strictEqual(threads.counts().held, 4)
      // One more is started in the background.
      yield* Effect.repeat(Effect.sleep("5 millis"), { until: () => threads.counts().idle === 1 })
      yield* Scope.close(scope, Exit.void)
      assert.deepStrictEqual(threads.counts(), { idle: 2, held: 0 })
    }).pipe(Effect.scoped, Effect.provide(layer({ warm: 1, idle: 2 }))))

  it.live("has its threads end by themselves, whenever it is closed, for none can be stopped safely while it starts", () =>
    Effect.gen(function*() {
      const codes: Array<number> = []
      let started = 0
      const watch = (worker: Worker) => {
        started++
        worker.once("exit", (code) => codes.push(code))
      }
      process.on("worker", watch)
      yield* Effect.addFinalizer(() => Effect.sync(() => process.off("worker", watch)))
      for (const delay of fc.sample(fc.nat({ max: 100 }), 20)) {
        const use = Effect.scoped(Effect.andThen(
          Effect.flatMap(VcpuThreads.VcpuThreads, ({ acquire }) => acquire),
          Effect.never
        )).pipe(Effect.provide(layer({ warm: 2 }), { local: true }))
        const fiber = yield* Effect.forkChild(use)
        yield* Effect.sleep(delay)
        yield* Fiber.interrupt(fiber)
      }
      assert.isAtLeast(started, 20)
      assert.deepStrictEqual(codes, Array.from({ length: started }, () => 0))
    }).pipe(Effect.scoped))

  for (const backEnd of ["node:ffi", "koffi"]) {
    it(`lets a process exit while its threads start (${backEnd})`, async () => {
      for (const delay of fc.sample(fc.nat({ max: 200 }), 8)) {
        const child = spawnSync(process.execPath, [EXIT_WHILE_STARTING, backEnd, String(delay)], { encoding: "utf8" })
        assert.deepInclude({ delay, ...child }, { delay, status: 7, signal: null }, child.stderr)
      }
    })
  }

  it.live("leaves no thread when its layer is closed", () =>
    Effect.gen(function*() {
      const tasks = () => readdirSync("/proc/self/task").length
      yield* Effect.scoped(Effect.flatMap(VcpuThreads.VcpuThreads, ({ acquire }) => acquire)).pipe(
        Effect.provide(layer({ warm: 2 }))
      )
      const before = tasks()
      yield* Effect.scoped(Effect.flatMap(VcpuThreads.VcpuThreads, ({ acquire }) => acquire)).pipe(
        Effect.provide(layer({ warm: 2 }))
      )
      // A thread that has been joined may still be on its way out of the kernel's list.
      yield* Effect.repeat(Effect.sleep("1 millis"), { until: () => tasks() <= before })
    }))
})
