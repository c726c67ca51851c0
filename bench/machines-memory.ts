// Run in a new process: starts up to N idle machines one after the other and prints, after each step, a line of JSON with the
// memory of the process beyond the guests' own.
//
//   node --expose-gc bench/machines-memory.ts 1,10,20,30,40,50
//
// Guest memory has a size of its own that nothing else has, so that its mappings can be told from all others.
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import * as KvmGuestLifecycle from "@troupe/node/KvmGuestLifecycle"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { readFileSync } from "node:fs"
import { GUEST_FILE } from "./MarkedLifecycle.ts"
import { readMemory } from "./ProcessMemory.ts"

/** In bytes: no other mapping has this size. */
const GUEST_MEMORY = 37 * 2 ** 20

const kernel = readFileSync(GUEST_FILE)

/** A lifecycle of its own for each machine, all on one hypervisor: one that runs until its scope closes. */
const startMachine = Effect.fnUntraced(function*(scope: Scope.Scope) {
  const lifecycle = Context.get(yield* Layer.buildWithScope(Layer.fresh(GuestLifecycle.layer), scope), GuestLifecycle)
  yield* lifecycle.create({
    kernelType: "LINUX",
    kernel,
    cmdline: "idle",
    cpus: 1,
    guestMemory: GUEST_MEMORY,
    virtioRng: true
  })
  const serial = yield* Effect.flatMap(lifecycle.bind, (guest) => guest.getSerial)
  const idles = serial.output.pipe(
    Stream.decodeText(),
    Stream.splitLines,
    Stream.filter((line) => line === "troupe-guest: idle"),
    Stream.runHead
  )
  const waiting = yield* Effect.forkIn(idles, scope)
  yield* Effect.forkIn(lifecycle.run, scope)
  yield* Fiber.join(waiting)
})

const steps = (process.argv[2] ?? "1,10,20,30,40,50").split(",").map(Number)
const collect = globalThis.gc
if (collect === undefined) throw new Error("run this with --expose-gc")

const program = Effect.gen(function*() {
  const scope = yield* Scope.make()
  let machines = 0
  for (const step of steps) {
    for (; machines < step; machines++) yield* startMachine(scope)
    yield* Effect.sleep("1 second")
    collect()
    yield* Effect.sleep("200 millis")
    const { heapUsed } = process.memoryUsage()
    process.stdout.write(`${JSON.stringify({ machines, heapUsed, ...readMemory(GUEST_MEMORY) })}\n`)
  }
  yield* Scope.close(scope, Exit.void)
})
await Effect.runPromise(
  program.pipe(Effect.provide([KvmGuestLifecycle.layerHypervisor(), KvmGuestLifecycle.layerCatalog]))
)
