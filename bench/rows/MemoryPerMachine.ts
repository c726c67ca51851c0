// What each further machine costs in memory beyond its guest's own, beside what the bare Worker costs that its vCPU runs on.
import { execFile } from "node:child_process"
import { join } from "node:path"
import { promisify } from "node:util"
import type { ProcessMemory } from "../ProcessMemory.ts"
import { BenchError, type Effort, root, type Row } from "../Row.ts"
import { median, slope } from "../Statistics.ts"

const MIB = 2 ** 20
const GOAL_MIB = 5
const STEPS = "1,10,20,30,40,50"
const QUICK_STEPS = "1,4,8"
const RUNS = 3

interface Step extends ProcessMemory {
  readonly machines: number
}

const execute = promisify(execFile)

const isStep = (value: unknown): value is Step => typeof value === "object" && value !== null && "privateDirty" in value

/** Runs one of the programs and returns what each further machine (or Worker) costs, in MiB. */
const measure = async (program: string, steps: string) => {
  const { stdout } = await execute(process.execPath, [
    "--expose-gc",
    "--disable-warning=ExperimentalWarning",
    join(root, "bench", program),
    steps
  ], { timeout: 300_000 })
  const points = stdout.trim().split("\n").map((line): unknown => JSON.parse(line)).filter(isStep)
  if (points.length < 2) throw new BenchError(`${program} printed no results:\n${stdout}`)
  const each = (pick: (step: Step) => number) => slope(points.map((point) => [point.machines, pick(point)])) / MIB
  return {
    privateDirty: each((step) => step.privateDirty),
    rss: each((step) => step.rss),
    guest: each((step) => step.guest)
  }
}

const round = (value: number): number => Number(value.toFixed(2))

/** MiB of private dirty memory for each further machine with one vCPU. */
export const memoryPerMachine = async (effort: Effort): Promise<Row> => {
  const steps = effort.quick ? QUICK_STEPS : STEPS
  const machines: Array<Awaited<ReturnType<typeof measure>>> = []
  const workers: typeof machines = []
  for (let i = 0; i < (effort.quick ? 1 : RUNS); i++) {
    machines.push(await measure("machines-memory.ts", steps))
    workers.push(await measure("workers-memory.ts", steps))
  }
  const value = median(machines.map((run) => run.privateDirty))
  const anchorValue = median(workers.map((run) => run.privateDirty))
  const rss = median(machines.map((run) => run.rss))
  return {
    name: "memory-per-machine",
    value,
    unit: "MiB",
    anchor: "a Worker of Node that does nothing",
    anchorValue,
    ratio: value / anchorValue,
    goal: `≤ ${GOAL_MIB} MiB`,
    met: value <= GOAL_MIB,
    detail: {
      machines: steps,
      runs: machines.length,
      "resident, MiB": round(rss),
      "a Worker resident, MiB": round(median(workers.map((run) => run.rss))),
      "beyond the Worker, MiB": round(value - anchorValue),
      "guest memory left out, MiB": round(median(machines.map((run) => run.guest)))
    }
  }
}
