// Round trips of the accesses that leave the guest, beside a C loop that finishes the same exits on the same /dev/kvm.
import * as KvmHypervisor from "@troupe/node/kvm/KvmHypervisor"
import * as Effect from "effect/Effect"
import { mkdir, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { BENCH_CACHE, buildAnchor, startAnchor } from "../Anchor.ts"
import { type Access, anchorState, BATCH_MEMORY_SIZE, BATCH_STATE, writeBatchGuest } from "../BatchGuest.ts"
import { startBatchMachine } from "../BatchMachine.ts"
import type { Effort, Row } from "../Row.ts"
import { median, quantile, spread } from "../Statistics.ts"

/** The C loop with the batch guest in it. */
export const startExitLoop = async (access: Access) => {
  const program = await buildAnchor("exits")
  const memory = new Uint8Array(BATCH_MEMORY_SIZE)
  writeBatchGuest(memory, access)
  const image = join(BENCH_CACHE, `${access}.img`)
  await mkdir(BENCH_CACHE, { recursive: true })
  await writeFile(image, memory)
  const anchor = startAnchor(program, [image, ...anchorState(BATCH_STATE)])
  return { anchor, kHz: await anchor.next() }
}

/** How often, and how many accesses each time. */
interface Plan {
  readonly batches: number
  readonly count: number
}

/** Batches of ours and of the C loop's, taking turns; microseconds for each access. */
const measure = async (access: Access, plan: Plan) => {
  const { anchor, kHz } = await startExitLoop(access)
  await using _ = anchor
  const micros = (ticks: number) => ticks / kHz * 1000 / plan.count
  const program = Effect.gen(function*() {
    const machine = yield* startBatchMachine(access)
    const ours: Array<number> = []
    const theirs: Array<number> = []
    const ratios: Array<number> = []
    for (let i = -2; i < plan.batches; i++) {
      const a = micros(yield* machine.batch(plan.count))
      const b = micros(yield* Effect.promise(() => anchor.ask(String(plan.count))))
      if (i < 0) continue
      ours.push(a)
      theirs.push(b)
      ratios.push(a / b)
    }
    return { ours, theirs, ratios }
  })
  return await Effect.runPromise(Effect.scoped(program).pipe(Effect.provide(KvmHypervisor.layerDefault)))
}

interface Exit {
  readonly access: Access
  readonly name: string
  readonly anchor: string
  readonly goal: number | null
}

const rowOf = async (exit: Exit, plan: Plan): Promise<Row> => {
  const { ours, ratios, theirs } = await measure(exit.access, plan)
  const value = median(ours)
  const anchorValue = median(theirs)
  const ratio = value / anchorValue
  return {
    name: exit.name,
    value,
    unit: "us",
    anchor: exit.anchor,
    anchorValue,
    ratio,
    goal: exit.goal === null ? null : `≤ ${exit.goal} × C`,
    met: exit.goal === null ? null : ratio <= exit.goal,
    detail: {
      batches: plan.batches,
      "accesses a batch": plan.count,
      "quartiles, us": spread(ours),
      "anchor's quartiles, us": spread(theirs),
      "median of the ratios of neighbouring batches": Number(median(ratios).toFixed(3)),
      "ratio of the fastest tenth": Number((quantile(ours, 0.1) / quantile(theirs, 0.1)).toFixed(3))
    }
  }
}

const planOf = (effort: Effort, count: number): Plan => ({ batches: effort.quick ? 5 : 41, count })

/** A write that the vCPU's thread puts into the ring. */
export const postedWrite = (effort: Effort): Promise<Row> =>
  rowOf(
    { access: "posted", name: "posted-write", anchor: "C loop that stores the write in a ring", goal: 1.05 },
    planOf(effort, 4000)
  )

/** A read that the vCPU's thread answers from the table. */
export const shadowedRead = (effort: Effort): Promise<Row> =>
  rowOf(
    { access: "shadowed", name: "shadowed-read", anchor: "C loop that answers from a table", goal: 1.05 },
    planOf(effort, 4000)
  )

/** A read that the device's fiber answers, on the main thread. */
export const call = (effort: Effort): Promise<Row> =>
  rowOf(
    { access: "call", name: "call", anchor: "C loop that answers on the vCPU's thread", goal: null },
    planOf(effort, 200)
  )
