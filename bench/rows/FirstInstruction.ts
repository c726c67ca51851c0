// From `create` to the guest's first instruction: with a vCPU thread waiting in the pool, and in a new process.
import * as Effect from "effect/Effect"
import { execFile } from "node:child_process"
import { join } from "node:path"
import { promisify } from "node:util"
import { buildAnchor, startAnchor } from "../Anchor.ts"
import { type FirstInstruction, GUEST_FILE, GUEST_MEMORY, layer, toFirstInstruction } from "../MarkedLifecycle.ts"
import { BenchError, type Effort, root, type Row } from "../Row.ts"
import { median, spread } from "../Statistics.ts"

const GOAL_MS = 5
const WARM_RUNS = 101
const QUICK_WARM_RUNS = 9
/** The compiler has seen the way by then. */
const WARM_UP = 150
const COLD_RUNS = 15
const QUICK_COLD_RUNS = 3

const anchorArguments = [GUEST_FILE, String(GUEST_MEMORY)]

const rowOf = (
  name: string,
  ours: ReadonlyArray<FirstInstruction>,
  theirs: ReadonlyArray<number>,
  anchor: string,
  goal: number | null,
  detail: Readonly<Record<string, string | number>>
): Row => {
  const total = ours.map((run) => run.total)
  const value = median(total)
  const anchorValue = median(theirs)
  return {
    name,
    value,
    unit: "ms",
    anchor,
    anchorValue,
    ratio: value / anchorValue,
    goal: goal === null ? null : `≤ ${goal} ms`,
    met: goal === null ? null : value <= goal,
    detail: {
      runs: ours.length,
      "quartiles, ms": spread(total),
      "anchor's quartiles, ms": spread(theirs),
      "until create returned, ms": Number(median(ours.map((run) => run.create)).toFixed(2)),
      "stop afterwards, ms": Number(median(ours.map((run) => run.stop)).toFixed(2)),
      ...detail
    }
  }
}

const warm = async (effort: Effort): Promise<Row> => {
  await using anchor = startAnchor(await buildAnchor("create"), anchorArguments)
  await anchor.next()
  const runs = effort.quick ? QUICK_WARM_RUNS : WARM_RUNS
  const program = Effect.gen(function*() {
    const ours: Array<FirstInstruction> = []
    const theirs: Array<number> = []
    for (let i = effort.quick ? -5 : -WARM_UP; i < runs; i++) {
      const a = yield* toFirstInstruction
      const b = yield* Effect.promise(() => anchor.ask(""))
      if (i < 0) continue
      ours.push(a)
      theirs.push(b / 1e6)
    }
    return { ours, theirs }
  })
  const { ours, theirs } = await Effect.runPromise(program.pipe(Effect.provide(layer)))
  return rowOf("create-to-first-instruction", ours, theirs, "C program with the same ioctls", GOAL_MS, {
    "ours less the anchor's, ms": Number((median(ours.map((run) => run.total)) - median(theirs)).toFixed(2))
  })
}

const execute = promisify(execFile)

interface ColdRun extends FirstInstruction {
  readonly fromProcessStart: number
}

const cold = async (effort: Effort): Promise<Row> => {
  const program = await buildAnchor("create")
  const ours: Array<ColdRun> = []
  const theirs: Array<number> = []
  for (let i = 0; i < (effort.quick ? QUICK_COLD_RUNS : COLD_RUNS); i++) {
    const { stdout } = await execute(process.execPath, [
      "--disable-warning=ExperimentalWarning",
      join(root, "bench", "first-instruction.ts")
    ])
    const run: unknown = JSON.parse(stdout)
    if (typeof run !== "object" || run === null || !("total" in run)) throw new BenchError(`no result in ${stdout}`)
    // Written by first-instruction.ts.
    // oxlint-disable-next-line typescript/no-unsafe-type-assertion
    ours.push(run as ColdRun)
    await using anchor = startAnchor(program, anchorArguments)
    theirs.push(await anchor.next() / 1e6)
  }
  return rowOf("create-to-first-instruction-cold", ours, theirs, "C program with the same ioctls, new", null, {
    "from the start of the process, ms": Math.round(median(ours.map((run) => run.fromProcessStart)))
  })
}

/** Both rows. */
export const firstInstruction = async (effort: Effort): Promise<ReadonlyArray<Row>> => [
  await warm(effort),
  await cold(effort)
]
