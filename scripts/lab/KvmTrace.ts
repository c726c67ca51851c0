// Every exit of a boot, one by one, from the kernel's own trace: counted by kind from the guest kernel's entry on.
import { open, readFile, writeFile } from "node:fs/promises"
import { join } from "node:path"

const TRACING = "/sys/kernel/tracing"

const ENTRY_EVENT = "kvm/kvm_entry"

const EVENTS = [ENTRY_EVENT, "kvm/kvm_exit", "kvm/kvm_userspace_exit", "kvm/kvm_pio", "kvm/kvm_mmio"]

/** Room for a boot's events in each processor's buffer, in KiB. */
const BUFFER_KIB = 96 * 1024

/** The exits of one boot between two moments. */
export interface ExitCounts {
  /** Milliseconds between the two moments. */
  readonly milliseconds: number
  /** Exits from the guest to the kernel by reason, as the kernel names them. */
  readonly kernel: Readonly<Record<string, number>>
  /** Exits that went on to the VMM's process by reason, without `KVM_EXIT_`. */
  readonly userspace: Readonly<Record<string, number>>
  /** Accesses to ports by direction and number, emulated in kernel or process. */
  readonly ports: Readonly<Record<string, number>>
  /** Accesses to device memory by direction and page. */
  readonly pages: Readonly<Record<string, number>>
}

const set = (file: string, value: string): Promise<void> => writeFile(join(TRACING, file), value)

/** The instruction pointers at which the guest's kernel begins: its load address, and some way on. */
export interface KernelEntry {
  readonly from: number
  readonly to: number
}

const prepare = async (): Promise<void> => {
  await set("tracing_on", "0")
  // The clock of `process.hrtime`.
  await set("trace_clock", "mono")
  await set("buffer_size_kb", String(BUFFER_KIB))
  await set("trace", "")
}

/** Starts recording every exit; only one recording at a time. */
export const startTrace = async (): Promise<void> => {
  await prepare()
  for (const event of EVENTS) {
    await set(`events/${event}/filter`, "0")
    await set(`events/${event}/enable`, "1")
  }
  await set("tracing_on", "1")
}

/** Starts recording only when the guest runs the first code of its kernel, which costs a boot next to nothing. */
export const startEntryTrace = async (entry: KernelEntry): Promise<void> => {
  await prepare()
  await set(`events/${ENTRY_EVENT}/filter`, `rip >= ${entry.from} && rip < ${entry.to}`)
  await set(`events/${ENTRY_EVENT}/enable`, "1")
  await set("tracing_on", "1")
}

/** Stops recording. */
export const stopTrace = async (): Promise<void> => {
  await set("tracing_on", "0")
  for (const event of EVENTS) await set(`events/${event}/enable`, "0")
}

const EVENT_LINE = /\s(\d+\.\d+): (\w+): (.*)$/

/** When, in seconds of the monotonic clock, the recording begins; undefined when nothing was recorded. */
export const firstEventSeconds = async (): Promise<number | undefined> => {
  await using file = await open(join(TRACING, "trace"))
  for await (const line of file.readLines()) {
    const match = EVENT_LINE.exec(line)
    if (match !== null) return Number(match[1])
  }
  return undefined
}

/** Puts a mark into the recording, to be named in {@link countExits}. */
export const markTrace = (mark: string): Promise<void> => set("trace_marker", mark)

const add = (counts: Record<string, number>, key: string): void => {
  counts[key] = (counts[key] ?? 0) + 1
}

/** Counts what was recorded from the first exit or entry in `entry` to the mark `until`. */
export const countExits = async (entry: KernelEntry, until: string): Promise<ExitCounts> => {
  const kernel: Record<string, number> = {}
  const userspace: Record<string, number> = {}
  const ports: Record<string, number> = {}
  const pages: Record<string, number> = {}
  let begun: number | undefined
  let ended: number | undefined
  await using file = await open(join(TRACING, "trace"))
  for await (const line of file.readLines()) {
    const match = EVENT_LINE.exec(line)
    if (match === null) continue
    const seconds = Number(match[1])
    const event = match[2]!
    const text = match[3]!
    if (begun === undefined) {
      const rip = event === "kvm_entry" || event === "kvm_exit" ? Number(/rip (0x[0-9a-f]+)/.exec(text)?.[1]) : NaN
      if (!(rip >= entry.from && rip < entry.to)) continue
      begun = seconds
    }
    if (event === "tracing_mark_write" && text.startsWith(until)) {
      ended = seconds
      break
    }
    if (event === "kvm_exit") add(kernel, /reason (?:EXIT_)?(\w+)/.exec(text)?.[1] ?? "unknown")
    else if (event === "kvm_userspace_exit") add(userspace, /reason (?:KVM_EXIT_)?(\w+)/.exec(text)?.[1] ?? "unknown")
    else if (event === "kvm_pio") add(ports, text.split(" ").slice(0, 3).join(" "))
    else if (event === "kvm_mmio") {
      const access = /mmio (\w+) len \d+ gpa (0x[0-9a-f]+)/.exec(text)
      if (access !== null) add(pages, `${access[1]} 0x${(Math.floor(Number(access[2]) / 4096) * 4096).toString(16)}`)
    }
  }
  if (begun === undefined) throw new Error("the recording has no exit in the kernel's first code")
  if (ended === undefined) throw new Error(`the recording has no mark ${until}`)
  return { milliseconds: (ended - begun) * 1000, kernel, userspace, ports, pages }
}

/** How many events the kernel had to throw away because the buffer was full. */
export const lostEvents = async (): Promise<number> => {
  let lost = 0
  for (const cpu of ["cpu0", "cpu1"]) {
    const stats = await readFile(join(TRACING, "per_cpu", cpu, "stats"), "utf8").catch(() => "")
    for (const name of ["overrun", "dropped events"]) {
      lost += Number(new RegExp(`^${name}: (\\d+)`, "m").exec(stats)?.[1] ?? 0)
    }
  }
  return lost
}
