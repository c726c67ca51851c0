// The network of a guest on a TAP interface, beside QEMU's virtio-net on the same guest and the same kind of interface.
import { execFile, spawnSync } from "node:child_process"
import { join } from "node:path"
import { BenchError, BenchSkipped, type Effort, root, type Row } from "../Row.ts"
import { median, spread } from "../Statistics.ts"

const PROGRAM = join(root, "bench", "net-namespace.ts")
const ANCHOR = "QEMU virtio-net, tap"
const ROUNDS = 7
const QUICK_ROUNDS = 2

const FRAME = 1514
const LARGE_FRAME = 65_535
const SEGMENT = 1448
const DATAGRAM = 1400

interface Run {
  readonly numbers: Readonly<Record<string, number>>
  readonly trips: ReadonlyArray<number>
  /** Nanoseconds of processor time in the measurement: of the VMM's first thread, and of all with the guest's. */
  readonly used?: { readonly first: number; readonly all: number }
}

const checkMeans = (): void => {
  const probe = spawnSync("unshare", ["-rn", "ip", "tuntap", "add", "probe0", "mode", "tap", "vnet_hdr"])
  if (probe.error !== undefined || probe.status !== 0) throw new BenchSkipped("no TAP interface in a network namespace")
  if (spawnSync("qemu-system-x86_64", ["--version"]).error !== undefined) throw new BenchSkipped("there is no QEMU")
}

const run = (machine: "troupe" | "qemu", words: string, task: string, number: number): Promise<Run> =>
  new Promise((resolve, reject) => {
    const args = ["-rn", process.execPath, PROGRAM, machine, words, task, String(number)]
    execFile("unshare", args, { timeout: 120_000, maxBuffer: 2 ** 24 }, (error, stdout, stderr) => {
      if (error !== null) return reject(new BenchError(`${machine}: ${error.message}\n${stderr}`))
      const { lines, ...result }: Omit<Run, "numbers"> & { lines: ReadonlyArray<string> } = JSON.parse(stdout)
      if (lines.findLast((line) => line.startsWith("net ")) !== "net ok") {
        return reject(new BenchError(`${machine}: the guest failed: ${lines.join(" / ")}`))
      }
      // What came before the last one was for the code to become warm.
      const line = lines.findLast((line) => line.startsWith("net bench")) ?? ""
      const numbers = Object.fromEntries(
        Array.from(line.matchAll(/(\w+)=(\d+)/g), ([, name = "", value]) => [name, Number(value)])
      )
      resolve({ ...result, numbers })
    })
  })

const of = (run: Run, name: string): number => run.numbers[name] ?? Number.NaN

interface Measurement {
  readonly name: string
  readonly unit: string
  /** The less the better. */
  readonly less?: boolean
  readonly words: string
  readonly valueOf: (run: Run) => number
  readonly task?: "ask" | "flood"
  readonly number?: number
}

/** Both in turn, so that what else the host does meets both. */
const measure = async (effort: Effort, measurement: Measurement): Promise<Row> => {
  const { less = false, name, number = 0, task = "", unit, valueOf, words } = measurement
  checkMeans()
  const ours: Array<Run> = []
  const theirs: Array<Run> = []
  for (let i = effort.quick ? QUICK_ROUNDS : ROUNDS; i > 0; i--) {
    ours.push(await run("troupe", words, task, number))
    theirs.push(await run("qemu", words, task, number))
  }
  const values = ours.map(valueOf)
  const anchors = theirs.map(valueOf)
  const value = median(values)
  const anchorValue = median(anchors)
  const ratio = value / anchorValue
  const perFrame = (runs: ReadonlyArray<Run>, what: string) =>
    Number(median(runs.map((run) => of(run, what) / of(run, "n"))).toPrecision(2))
  const microseconds = (runs: ReadonlyArray<Run>, which: "first" | "all") =>
    Number((median(runs.map((run) => (run.used?.[which] ?? Number.NaN) / of(run, "n"))) / 1000).toPrecision(3))
  return {
    name,
    value,
    unit,
    anchor: ANCHOR,
    anchorValue,
    ratio,
    goal: less ? "at most QEMU's" : "at least QEMU's",
    met: less ? ratio <= 1 : ratio >= 1,
    detail: {
      spread: spread(values),
      "anchor's spread": spread(anchors),
      ...(task === "ask" ? {} : {
        "notifications for a frame": perFrame(ours, "kicks"),
        "interrupts for a frame": perFrame(ours, "interrupts"),
        "anchor's notifications": perFrame(theirs, "kicks"),
        "anchor's interrupts": perFrame(theirs, "interrupts"),
        "us of the main thread for a frame": microseconds(ours, "first"),
        "us of all threads for a frame, the guest's too": microseconds(ours, "all"),
        "anchor's us of the main thread": microseconds(theirs, "first"),
        "anchor's us of all threads": microseconds(theirs, "all")
      })
    }
  }
}

const gigabits = (run: Run): number => of(run, "bytes") * 8 / of(run, "ns")
const framesPerSecond = (run: Run): number => of(run, "n") / of(run, "ns") * 1e9

/** Frames of TCP of 64 KiB, which the host cuts, from the guest to the host. */
export const throughput = (effort: Effort): Promise<Row> => {
  const word = (count: number) => `net=send,${count},${LARGE_FRAME},${SEGMENT}`
  return measure(effort, {
    name: "net-throughput",
    unit: "Gb/s",
    words: `${word(20_000)} ${word(effort.quick ? 20_000 : 60_000)}`,
    valueOf: gigabits
  })
}

/** Frames of Ethernet's size, from the guest to the host. */
export const send = (effort: Effort): Promise<Row> => {
  const word = (count: number) => `net=send,${count},${FRAME}`
  return measure(effort, {
    name: "net-send",
    unit: "frames/s",
    words: `${word(60_000)} ${word(effort.quick ? 60_000 : 300_000)}`,
    valueOf: framesPerSecond
  })
}

/** Frames that a process of the host sends as fast as it can. */
export const receive = (effort: Effort): Promise<Row> =>
  measure(effort, {
    name: "net-receive",
    unit: "frames/s",
    words: `ip=10.1.0.2 net=sink,60000 net=sink,${effort.quick ? 60_000 : 300_000}`,
    valueOf: framesPerSecond,
    task: "flood",
    number: DATAGRAM
  })

/** A datagram to the guest and back, one after the other; all but the last quarter is for the code to become warm. */
export const roundTrip = (effort: Effort): Promise<Row> => {
  const trips = effort.quick ? 4000 : 12_000
  return measure(effort, {
    name: "net-rtt",
    unit: "us",
    less: true,
    words: `ip=10.1.0.2 net=echo,${trips}`,
    valueOf: (run) => median(run.trips.slice(run.trips.length * 0.75)),
    task: "ask",
    number: trips
  })
}
