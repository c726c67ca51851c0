// `npm run fuzz`: hostile drivers against every virtio device, as many as wanted. The same seed does the same.
import { parseArgs } from "node:util"
// The models of the socket device's tests: no part of any package.
// oxlint-disable-next-line eslint/no-restricted-imports
import { failingSchedule } from "../packages/vsock/test/ConnectionModel.ts"
// oxlint-disable-next-line eslint/no-restricted-imports
import { failingMachine } from "../packages/vsock/test/MachineModel.ts"
import {
  CASE_HEAP_MAX,
  hostileStatistics,
  TURN_BYTES_MAX,
  TURN_CHAINS_MAX,
  TURN_STEPS_MAX
} from "../test/fake/hostile/HostileRig.ts"
import { describeFailure, HOSTILE_DEVICES, type HostileFailure, playCases } from "../test/fake/hostile/HostileRun.ts"

const DEFAULT_CASES = 1_000_000
/** Cases of one device before it is the next one's turn. */
const SLICE = 1024
const PROGRESS_MILLIS = 1000
/** Not devices, but what happens on the connections of one: on its session, and in whole machines. */
const SCHEDULES = new Map([["vsock-model", failingSchedule], ["vsock-machines", failingMachine]])

const USAGE = `Plays hostile drivers against the virtio devices, and says which of them a device does not stand.

  npm run fuzz                       a million cases, shared out among all devices
  npm run fuzz -- --device NAME      only this device; may be given more than once
  npm run fuzz -- --cases N          so many cases in all
  npm run fuzz -- --seed N           the number of the first case; default: 0
  npm run fuzz -- --help

Devices: ${HOSTILE_DEVICES.join(", ")}.

  npm run fuzz -- --device vsock-model      schedules of the socket device's connections, with a guest that keeps to the protocol
  npm run fuzz -- --device vsock-machines   the same in whole machines, with fibers, devices that break and time
`

const fail = (text: string): never => {
  process.stderr.write(`${text}\n`)
  process.exit(2)
}

const wholeNumber = (name: string, text: string): number => {
  const value = Number(text)
  return Number.isSafeInteger(value) && value >= 0 ? value : fail(`--${name} is a whole number, not ${text}`)
}

const options = () => {
  try {
    return parseArgs({
      options: {
        device: { type: "string", multiple: true },
        cases: { type: "string", default: String(DEFAULT_CASES) },
        seed: { type: "string", default: "0" },
        help: { type: "boolean", short: "h", default: false }
      }
    }).values
  } catch (cause) {
    return fail(`${cause instanceof Error ? cause.message : String(cause)}\n${USAGE}`)
  }
}

const values = options()
if (values.help) {
  process.stdout.write(USAGE)
  process.exit(0)
}
const cases = wholeNumber("cases", values.cases)
const seed = wholeNumber("seed", values.seed)
const devices = values.device ?? HOSTILE_DEVICES
for (const device of devices) {
  if (!HOSTILE_DEVICES.includes(device) && !SCHEDULES.has(device)) {
    fail(`there is no device ${JSON.stringify(device)}\n${USAGE}`)
  }
}

const interrupt = new AbortController()
for (const signal of ["SIGINT", "SIGTERM"] as const) {
  process.on(signal, () => {
    if (interrupt.signal.aborted) process.exit(130)
    interrupt.abort()
  })
}
const isInterrupted = () => interrupt.signal.aborted

const begun = performance.now()
let played = 0
let shown = begun
const terminal = process.stderr.isTTY
const progress = (device: string) => {
  const seconds = (performance.now() - begun) / 1000
  const text = `${played.toLocaleString("en-US")} of ${cases.toLocaleString("en-US")} cases, ` +
    `${Math.round(played / seconds).toLocaleString("en-US")} cases/s, ${device}`
  process.stderr.write(terminal ? `\r\x1b[K${text}` : `${text}\n`)
}

const tell = (failure: HostileFailure | undefined) => failure === undefined ? undefined : describeFailure(failure)

const counts = devices.map((_, index) => Math.floor(cases / devices.length) + (index < cases % devices.length ? 1 : 0))
let failures = 0
const dead = new Set<string>()
for (let slice = 0; !isInterrupted() && devices.some((_, i) => slice * SLICE < (counts[i] ?? 0)); slice++) {
  for (const [index, device] of devices.entries()) {
    const count = Math.min(SLICE, (counts[index] ?? 0) - slice * SLICE)
    if (count <= 0 || isInterrupted() || dead.has(device)) continue
    const first = seed + slice * SLICE
    const beforeEach = () => {
      played++
      if (performance.now() - shown > (terminal ? PROGRESS_MILLIS : 10 * PROGRESS_MILLIS)) {
        shown = performance.now()
        progress(device)
      }
      return !isInterrupted()
    }
    const failure = SCHEDULES.get(device)?.(first, count, beforeEach) ??
      (SCHEDULES.has(device) ? undefined : tell(playCases(device, first, count, beforeEach)))
    // Lets a signal in.
    await new Promise((resolve) => setImmediate(resolve))
    if (failure === undefined) continue
    failures++
    dead.add(device)
    process.stderr.write(`${terminal ? "\r\x1b[K" : ""}${failure}\n`)
  }
}
if (terminal) process.stderr.write("\r\x1b[K")
const seconds = (performance.now() - begun) / 1000
const { chains, longest, longestTurn, mostBytes, mostChains, mostHeap, mostSteps, needsReset, turns } =
  hostileStatistics
process.stdout.write(
  `${played.toLocaleString("en-US")} cases of ${devices.join(", ")} from seed ${seed} in ${seconds.toFixed(0)} s` +
    `${isInterrupted() ? ", interrupted" : ""}: ${
      failures === 0 ? "every device stands" : `${failures} devices do not stand`
    }.\n` +
    `${turns.toLocaleString("en-US")} turns, ${chains.toLocaleString("en-US")} chains taken, ` +
    `${needsReset.toLocaleString("en-US")} cases that ended with a device in need of a reset.\n` +
    `The most of a turn: ${mostChains} chains (of ${TURN_CHAINS_MAX}), ${mostSteps} steps (of ${TURN_STEPS_MAX}), ` +
    `${mostBytes} bytes copied (of ${TURN_BYTES_MAX}), ${longestTurn.toFixed(1)} ms (${longest}); ` +
    `the most of a case: ${mostHeap} bytes allocated (of ${CASE_HEAP_MAX}).\n`
)
process.exitCode = failures > 0 ? 1 : isInterrupted() ? 130 : 0
