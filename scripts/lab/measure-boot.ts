// Run inside the lab: boots a guest with any VMM's command line and says how long it took and what exits it cost.
//
//   node measure-boot.ts [--trace] [--entry FROM-TO] [--name NAME] -- COMMAND ARGS...
//
// The guest's console must come out on the command's standard output. The result is printed as one line of JSON and
// written to $FILES/NAME.json. Time and counters are taken when the guest's init prints its first line. With --trace
// every exit is recorded by the kernel and counted from the guest kernel's entry on; that slows the boot, so times are
// taken from runs without it.
import { spawn } from "node:child_process"
import { writeFileSync } from "node:fs"
import { parseArgs } from "node:util"
import { type KvmCounters, readCounters } from "./KvmStatistics.ts"
import {
  countExits,
  type ExitCounts,
  firstEventSeconds,
  type KernelEntry,
  lostEvents,
  markTrace,
  startEntryTrace,
  startTrace,
  stopTrace
} from "./KvmTrace.ts"

/** The first line of the guest's init. */
const INIT_LINE = "TROUPE init"

/** Where Debian's kernel begins as an ELF file. */
const DEFAULT_ENTRY = "0x1000000-0x8000000"

/** One boot. Times are milliseconds since the command was started. */
export interface BootRun {
  readonly firstOutput: number | undefined
  readonly init: number | undefined
  /** Milliseconds from the guest kernel's first instructions to init, by the host's clock. */
  readonly kernelToInit: number | undefined
  readonly ended: number
  /** Seconds that the guest's own clock had counted when init began. */
  readonly guestUptime: number | undefined
  readonly code: number | null
  readonly atInit: KvmCounters
  readonly trace?: ExitCounts & { readonly lost: number }
  /** The end of what was printed, when init was not reached. */
  readonly output?: string
}

const boot = async (
  command: string,
  args: ReadonlyArray<string>,
  entry: KernelEntry,
  trace: boolean
): Promise<BootRun> => {
  await (trace ? startTrace() : startEntryTrace(entry))
  const begun = performance.now()
  const since = (): number => Math.round((performance.now() - begun) * 10) / 10
  const child = spawn(command, args, { stdio: ["ignore", "pipe", "inherit"] })
  let output = ""
  let firstOutput: number | undefined
  let init: number | undefined
  let initSeconds = 0
  let counters: Promise<KvmCounters> = Promise.resolve({})
  child.stdout.on("data", (chunk: Buffer) => {
    firstOutput ??= since()
    output += chunk.toString("latin1")
    if (init === undefined && output.includes(INIT_LINE)) {
      init = since()
      initSeconds = Number(process.hrtime.bigint()) / 1e9
      counters = trace ? markTrace("init").then(readCounters) : readCounters()
    }
  })
  const code = await new Promise<number | null>((resolve, reject) => {
    child.on("error", reject)
    child.on("close", resolve)
  })
  const ended = since()
  await stopTrace()
  const entered = await firstEventSeconds()
  const uptime = /TROUPE uptime ([0-9.]+)/.exec(output)?.[1]
  const run: BootRun = {
    firstOutput,
    init,
    kernelToInit: trace || init === undefined || entered === undefined ? undefined : (initSeconds - entered) * 1000,
    ended,
    guestUptime: uptime === undefined ? undefined : Number(uptime),
    code,
    atInit: await counters,
    ...(init === undefined ? { output: output.slice(-2000) } : {})
  }
  if (!trace || init === undefined) return run
  return { ...run, trace: { ...await countExits(entry, "init"), lost: await lostEvents() } }
}

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    trace: { type: "boolean", default: false },
    entry: { type: "string", default: DEFAULT_ENTRY },
    name: { type: "string", default: "boot" }
  }
})
const [command, ...args] = positionals
if (command === undefined) throw new Error("no command to measure")
const [from, to] = values.entry.split("-").map(Number)
if (from === undefined || to === undefined || !(from < to)) throw new Error(`--entry ${values.entry} is not FROM-TO`)
const run = await boot(command, args, { from, to }, values.trace)
const line = `${JSON.stringify(run)}\n`
process.stdout.write(line)
const files = process.env["FILES"]
if (files !== undefined) writeFileSync(`${files}/${values.name}.json`, line)
