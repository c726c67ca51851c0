// Run in a new process: how much the main thread allocates while a guest makes accesses. A turn of the event loop and the wake-up
// of a fiber cost something whatever the number of accesses, so they are told apart: what each further access costs is the
// difference between batches of two sizes. The least of many batches counts, as the compiler allocates now and then.
import * as KvmHypervisor from "@troupe/node/kvm/KvmHypervisor"
import * as Effect from "effect/Effect"
import { getHeapStatistics } from "node:v8"
import type { Access } from "./BatchGuest.ts"
import { startBatchMachine } from "./BatchMachine.ts"

const REPEATS = 40
const WARM_UP = 10
/** Less than this for each access is what the turns in between cost: the smallest object has 16 bytes. */
const LIMIT_BYTES = 16

/** Bytes ever allocated on this thread's heap. */
const allocated = (): number => {
  const { total_allocated_bytes: total } = getHeapStatistics()
  return total
}

const CASES: ReadonlyArray<
  { readonly access: Access; readonly small: number; readonly large: number; readonly checked: boolean }
> = [
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
      Effect.suspend(() => {
        const before = allocated()
        return Effect.map(machine.batch(count), () => allocated() - before)
      })
    for (let i = 0; i < WARM_UP; i++) yield* bytes(large)
    const smalls: Array<number> = []
    const larges: Array<number> = []
    for (let i = 0; i < REPEATS; i++) {
      smalls.push(yield* bytes(small))
      larges.push(yield* bytes(large))
    }
    const each = (Math.min(...larges) - Math.min(...smalls)) / (large - small)
    const verdict = !checked ? "a call wakes the device's fiber" : each < LIMIT_BYTES ? "ok" : "allocates"
    failed ||= checked && each >= LIMIT_BYTES
    process.stdout.write(
      `main thread, ${access}: ${each.toFixed(2)} bytes for each access (${
        Math.min(...smalls)
      } for a batch of ${small}, ${Math.min(...larges)} for ${large}): ${verdict}\n`
    )
  }
})
await Effect.runPromise(Effect.scoped(program).pipe(Effect.provide(KvmHypervisor.layerDefault)))
process.exitCode = failed ? 1 : 0
