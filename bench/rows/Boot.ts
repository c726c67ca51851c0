// The cloud kernel's boot, from its entry to init, under our VMM and under QEMU's microvm, taking turns in one nested lab.
import { type BootMeasurement, compareBoots, type Vmm } from "../../scripts/lab/BootComparison.ts"
import { Lab } from "../../scripts/lab/Lab.ts"
import { BenchError, type Effort, type Row } from "../Row.ts"
import { median, spread } from "../Statistics.ts"

const RUNS = 3
const QUICK_RUNS = 1
/** Ours are to be at most this part of QEMU's exits. */
const EXITS_GOAL = 0.25
const TIME_GOAL = 1

const ANCHOR: Vmm = "qemu-microvm"

const sum = (counts: Readonly<Record<string, number>>): number =>
  Object.values(counts).reduce((total, count) => total + count, 0)

const traced = (measurement: BootMeasurement) => {
  const { trace } = measurement.traced
  if (trace === undefined) throw new BenchError(`the boot under ${measurement.vmm} left no trace`)
  return trace
}

/** Counts as text, the most frequent first. */
const kinds = (counts: Readonly<Record<string, number>>): string =>
  Object.entries(counts).toSorted((a, b) => b[1] - a[1]).slice(0, 8).map(([kind, count]) => `${kind} ${count}`).join(
    ", "
  )

const times = (measurement: BootMeasurement): ReadonlyArray<number> =>
  measurement.runs.flatMap((run) => run.kernelToInit === undefined ? [] : [run.kernelToInit])

const measure = async (effort: Effort): Promise<ReadonlyArray<Row>> => {
  await using lab = await Lab.start({ name: "bench", limitSeconds: 1500 })
  const measured = new Map(
    (await compareBoots(lab, ["troupe", ANCHOR], effort.quick ? QUICK_RUNS : RUNS)).map((measurement) => [
      measurement.vmm,
      measurement
    ])
  )
  const ours = measured.get("troupe")
  const theirs = measured.get(ANCHOR)
  if (ours === undefined || theirs === undefined) throw new BenchError("a boot was not measured")
  const exits = sum(traced(ours).kernel)
  const anchorExits = sum(traced(theirs).kernel)
  const processExits = sum(traced(ours).userspace)
  const anchorProcessExits = sum(traced(theirs).userspace)
  const time = median(times(ours))
  const anchorTime = median(times(theirs))
  return [
    {
      name: "boot-exits",
      value: exits,
      unit: "exits",
      anchor: "QEMU microvm, rtc=on, in the same lab",
      anchorValue: anchorExits,
      ratio: exits / anchorExits,
      goal: `≤ ${EXITS_GOAL} × QEMU`,
      met: exits <= EXITS_GOAL * anchorExits,
      detail: {
        "to the kernel, by reason": kinds(traced(ours).kernel),
        "QEMU's": kinds(traced(theirs).kernel),
        ports: kinds(traced(ours).ports),
        "QEMU's ports": kinds(traced(theirs).ports),
        "pages of device memory": kinds(traced(ours).pages),
        "QEMU's pages of device memory": kinds(traced(theirs).pages)
      }
    },
    {
      name: "boot-exits-to-process",
      value: processExits,
      unit: "exits",
      anchor: "QEMU microvm, rtc=on, in the same lab",
      anchorValue: anchorProcessExits,
      ratio: processExits / anchorProcessExits,
      goal: `≤ ${EXITS_GOAL} × QEMU`,
      met: processExits <= EXITS_GOAL * anchorProcessExits,
      detail: {
        "by reason": kinds(traced(ours).userspace),
        "QEMU's": kinds(traced(theirs).userspace)
      }
    },
    {
      name: "boot-time",
      value: time,
      unit: "ms",
      anchor: "QEMU microvm, rtc=on, in the same lab",
      anchorValue: anchorTime,
      ratio: time / anchorTime,
      goal: `≤ ${TIME_GOAL} × QEMU`,
      met: time <= TIME_GOAL * anchorTime,
      detail: {
        boots: times(ours).length,
        "quartiles, ms": spread(times(ours), 0),
        "QEMU's quartiles, ms": spread(times(theirs), 0),
        "command to init, ms": Math.round(median(ours.runs.flatMap((run) => run.init ?? []))),
        "QEMU's command to init, ms": Math.round(median(theirs.runs.flatMap((run) => run.init ?? [])))
      }
    }
  ]
}

let measured: Promise<ReadonlyArray<Row>> | undefined

/** All rows; they are measured together, once. */
export const boots = (effort: Effort): Promise<ReadonlyArray<Row>> => (measured ??= measure(effort))
