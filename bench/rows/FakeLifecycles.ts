// Lifecycles a second on the fake: a machine is created, its guest prints a line and turns the machine off, and it is gone.
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { FakeHypervisor, GuestProgram } from "@troupe/core/testing"
import { layerPower } from "@troupe/devices/Power"
import { layerSerial } from "@troupe/devices/Serial"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import { BenchError, type Effort, type Row } from "../Row.ts"
import { median, spread } from "../Statistics.ts"

const GOAL = 2000
const LIFECYCLES = 500
const WARM_UP = 8
const BATCHES = 21
const QUICK_BATCHES = 3

const COM1 = 0x3f8
const TEXT = new TextEncoder().encode("hello\n")

const guest = GuestProgram.make(function*(cpu) {
  for (const byte of TEXT) yield* cpu.out8(COM1, byte)
  yield* cpu.out8(0x600, (5 << 2) | 0x20) // SLEEP_CONTROL: S5, enabled
})

const CONFIG = { kernelType: "LINUX", kernel: GuestProgram.kernel(guest), cpus: 1, guestMemory: "2M" } as const

const devices = layerSerial.pipe(Layer.provide(layerPower), Layer.provide(DeviceCatalog.layerEmpty))
const layer = GuestLifecycle.layer.pipe(Layer.provide(devices), Layer.provideMerge(FakeHypervisor.layer()))

/** Processor time of all threads of this process since a point, in seconds. */
const processorSeconds = (since?: NodeJS.CpuUsage): number => {
  const { system, user } = process.cpuUsage(since)
  return (system + user) / 1e6
}

/** Times one batch: lifecycles a second of processor time, and by the clock. */
const timed = <E, R>(count: number, effect: Effect.Effect<void, E, R>) =>
  Effect.gen(function*() {
    const cpu = process.cpuUsage()
    const begun = performance.now()
    for (let i = 0; i < count; i++) yield* effect
    const wall = (performance.now() - begun) / 1000
    return { processor: count / processorSeconds(cpu), wall: count / wall }
  })

/** The least that a lifecycle could cost here: a scope with a finalizer and a fiber that is joined. */
const bare = Effect.scoped(Effect.gen(function*() {
  yield* Effect.addFinalizer(() => Effect.void)
  yield* Fiber.join(yield* Effect.forkScoped(Effect.yieldNow))
}))

/** Lifecycles for each second of processor time, threads of the garbage collector and the compiler included. */
export const fakeLifecycles = (effort: Effort): Promise<Row> =>
  Effect.runPromise(
    Effect.gen(function*() {
      const lifecycle = yield* GuestLifecycle
      const fake = yield* FakeHypervisor.FakeHypervisor
      const once = Effect.gen(function*() {
        yield* lifecycle.create(CONFIG)
        const stop = yield* lifecycle.run
        if (stop._tag !== "PowerOff") return yield* Effect.die(new BenchError(`the guest ended with ${stop._tag}`))
      })
      const ours: Array<number> = []
      const clock: Array<number> = []
      const bares: Array<number> = []
      const batches = effort.quick ? QUICK_BATCHES : BATCHES
      for (let i = -WARM_UP; i < batches; i++) {
        const a = yield* timed(LIFECYCLES, once)
        const b = yield* timed(LIFECYCLES * 10, bare)
        if (i < 0) continue
        ours.push(a.processor)
        clock.push(a.wall)
        bares.push(b.processor)
      }
      const open = yield* fake.openResources
      if (open.length > 0) return yield* Effect.die(new BenchError(`left open: ${open.join(", ")}`))
      const value = median(ours)
      const anchorValue = median(bares)
      const row: Row = {
        name: "fake-lifecycles",
        value,
        unit: "lifecycles/s",
        anchor: "a bare Effect scope and fiber",
        anchorValue,
        ratio: value / anchorValue,
        goal: `≥ ${GOAL}/s on one core`,
        met: value >= GOAL,
        detail: {
          batches,
          "lifecycles a batch": LIFECYCLES,
          quartiles: spread(ours, 0),
          "by the clock": Math.round(median(clock))
        }
      }
      return row
    }).pipe(Effect.provide(layer), Effect.scoped)
  )
