// What a read of a device register costs when the register is on a page that the guest reads as memory, beside the same read as
// an exit. Both are ours, in the same run, with the guest in user mode.
import * as KvmHypervisor from "@troupe/node/kvm/KvmHypervisor"
import * as Effect from "effect/Effect"
import { startBatchMachine } from "../BatchMachine.ts"
import type { Effort, Row } from "../Row.ts"
import { median, spread } from "../Statistics.ts"
import { startExitLoop } from "./Exits.ts"

const PAGE_READS = 2_000_000
const EXIT_READS = 200
const BATCHES = 31
const QUICK_BATCHES = 5
/** A register page is to make a read cheaper by this factor. */
const FACTOR = 1000

/** Nanoseconds for one read. */
export const registerRead = async (effort: Effort): Promise<Row> => {
  // The C program knows the frequency of the counter.
  const { anchor, kHz } = await startExitLoop("page-as-exit")
  await using _ = anchor
  const nanos = (ticks: number, reads: number) => ticks / kHz * 1e6 / reads
  const batches = effort.quick ? QUICK_BATCHES : BATCHES
  const program = Effect.gen(function*() {
    const page = yield* startBatchMachine("page")
    const exit = yield* startBatchMachine("page-as-exit")
    const pages: Array<number> = []
    const exits: Array<number> = []
    const loops: Array<number> = []
    for (let i = -1; i < batches; i++) {
      const a = nanos(yield* page.batch(PAGE_READS), PAGE_READS)
      const b = nanos(yield* exit.batch(EXIT_READS), EXIT_READS)
      const c = nanos(yield* Effect.promise(() => anchor.ask(String(EXIT_READS))), EXIT_READS)
      if (i < 0) continue
      pages.push(a)
      exits.push(b)
      loops.push(c)
    }
    return { pages, exits, loops }
  })
  const { exits, loops, pages } = await Effect.runPromise(
    Effect.scoped(program).pipe(Effect.provide(KvmHypervisor.layerDefault))
  )
  const value = median(pages)
  const anchorValue = median(exits)
  return {
    name: "register-read",
    value,
    unit: "ns",
    anchor: "the same read as an exit (shadowed)",
    anchorValue,
    ratio: value / anchorValue,
    goal: `≤ 1/${FACTOR} of the exit`,
    met: value * FACTOR <= anchorValue,
    detail: {
      batches,
      "times cheaper": Math.round(anchorValue / value),
      "quartiles, ns": spread(pages),
      "exit's quartiles, ns": spread(exits, 0),
      "the exit in a C loop, ns": Math.round(median(loops))
    }
  }
}
