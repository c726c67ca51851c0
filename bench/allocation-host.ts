// Run in a new process: how much the main thread allocates while a guest makes accesses. A turn of the event loop and the wake-up
// of a fiber cost something whatever the number of accesses, so it is told apart: what each further posted write costs is the
// difference between batches of two sizes.
import * as KvmHypervisor from "@troupe/node/kvm/KvmHypervisor"
import * as Effect from "effect/Effect"
import { getHeapStatistics } from "node:v8"
import type { Access } from "./BatchGuest.ts"
import { startBatchMachine } from "./BatchMachine.ts"
import { median } from "./Statistics.ts"

const REPEATS = 15
const WARM_UP = 10
/** Less than this for each access is noise: the smallest object has 12 bytes or more. */
const LIMIT_BYTES = 4

/** Bytes ever allocated on this thread's heap. */
const allocated = (): number => {
  const { total_allocated_bytes: total } = getHeapStatistics()
  return total
}

const CASES: ReadonlyArray<{ readonly access: Access; readonly small: number; readonly large: number; readonly checked: boolean }> =
  [
    { access: "posted", small: 1000, large: 5000, checked: true },
    { access: "shadowed", small: 1000, large: 5000, checked: true },
    { access: "page", small: 1000, large: 1_000_000, checked: true },
    // Each call wakes the device's fiber, which is work of Effect's.
    { access: "call", small: 100, large: 500, checked: false }
  ]

let failed = false
const program = Effect.gen(function*() {
  for (const { access, checked, large, small } of CASES) {
    const machine = yield* startBatchMachine(access)
    const bytes = (count: number) =>
      Effect.map(Effect.suspend(() => {
        const before = allocated()
        return Effect.map(machine.batch(count), () => allocated() - before)
      }), (used) => used)
    for (let i = 0; i < WARM_UP; i++) yield* bytes(large)
    const smalls: Array<number> = []
    const larges: Array<number> = []
    for (let i = 0; i < REPEATS; i++) {
      smalls.push(yield* bytes(small))
      larges.push(yield* bytes(large))
    }
    const each = (median(larges) - median(smalls)) / (large - small)
    const verdict = !checked ? "a call wakes the device's fiber" : each < LIMIT_BYTES ? "ok" : "allocates"
    failed ||= checked && each >= LIMIT_BYTES
    process.stdout.write(
      `main thread, ${access}: ${each.toFixed(2)} bytes for each access (${Math.round(median(smalls))} for a batch of ${small}, ${
        Math.round(median(larges))
      } for ${large}): ${verdict}\n`
    )
  }
})
await Effect.runPromise(Effect.scoped(program).pipe(Effect.provide(KvmHypervisor.layerDefault)))
process.exitCode = failed ? 1 : 0
