/** Exits while threads start: `node exit-while-starting.ts BACK_END MILLISECONDS`. */
import * as Ffi from "@troupe/node/Ffi"
import * as VcpuThreads from "@troupe/node/kvm/VcpuThreads"
import { Effect, Layer } from "effect"
import process from "node:process"

const [, , backEnd, delay] = process.argv
if (backEnd !== "node:ffi" && backEnd !== "koffi") throw new Error(`no such back end: ${backEnd}`)
const layer = VcpuThreads.layerWith({ warm: 0 }).pipe(
  Layer.provide(Ffi.layerWith({ backEnds: [backEnd], quiet: true }))
)
const program = Effect.gen(function*() {
  const { acquire } = yield* VcpuThreads.VcpuThreads
  setTimeout(() => process.exit(7), Number(delay))
  yield* Effect.all(Array.from({ length: 8 }, () => acquire), { concurrency: "unbounded" })
  yield* Effect.never
})
await Effect.runPromise(Effect.scoped(program).pipe(Effect.provide(layer)))
