// `npm run bench`: measures, each thing beside what it is compared with, prints a table and keeps bench/results.json.
import { existsSync } from "node:fs"
import { availableParallelism, cpus, loadavg, release } from "node:os"
import { parseArgs } from "node:util"
import {
  BenchError,
  BenchSkipped,
  type Effort,
  mergeResults,
  readResults,
  RESULTS_FILE,
  type Row,
  table
} from "./Row.ts"

interface Bench {
  readonly name: string
  readonly about: string
  /** Whether it needs /dev/kvm, or the nested lab. */
  readonly needs: "kvm" | "linux" | undefined
  /** Whether `--quick` has it. */
  readonly quick: boolean
  readonly run: (effort: Effort) => Promise<ReadonlyArray<Row>>
}

const one = (row: Promise<Row>): Promise<ReadonlyArray<Row>> => row.then((measured) => [measured])

// Each is loaded when it is run, so that one can be measured where another could not even be loaded.
const BENCHES: ReadonlyArray<Bench> = [
  {
    name: "posted-write",
    about: "round trip of a write that the vCPU's thread posts",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Exits.ts")).postedWrite(effort))
  },
  {
    name: "shadowed-read",
    about: "round trip of a read that the vCPU's thread answers from a table",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Exits.ts")).shadowedRead(effort))
  },
  {
    name: "call",
    about: "round trip of a read that the device's fiber answers",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Exits.ts")).call(effort))
  },
  {
    name: "register-read",
    about: "a read of a register page in user mode, beside the same read as an exit",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/RegisterRead.ts")).registerRead(effort))
  },
  {
    name: "create-to-first-instruction",
    about: "from create to the guest's first instruction, warm and in a new process",
    needs: "kvm",
    quick: true,
    run: async (effort) => (await import("./rows/FirstInstruction.ts")).firstInstruction(effort)
  },
  {
    name: "memory-per-machine",
    about: "memory of each further machine beyond its guest's own, 1 to 50 machines",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/MemoryPerMachine.ts")).memoryPerMachine(effort))
  },
  {
    name: "chains",
    about: "descriptor chains a second through a queue and a device's loop, beside the crate virtio-queue",
    needs: undefined,
    quick: true,
    run: async (effort) => (await import("./rows/Chains.ts")).chains(effort)
  },
  {
    name: "boot-exits",
    about: "exits of a cloud kernel from its entry to init, beside QEMU microvm",
    needs: "linux",
    quick: false,
    run: async (effort) =>
      (await (await import("./rows/Boot.ts")).boots(effort)).filter((row) => row.name !== "boot-time")
  },
  {
    name: "boot-time",
    about: "time of a cloud kernel from its entry to init, beside QEMU microvm",
    needs: "linux",
    quick: false,
    run: async (effort) =>
      (await (await import("./rows/Boot.ts")).boots(effort)).filter((row) => row.name === "boot-time")
  },
  {
    name: "vsock-g2h",
    about: "bytes of a guest to its host on one connection, beside a Unix socket",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Vsock.ts")).guestToHost(effort))
  },
  {
    name: "vsock-h2g",
    about: "bytes of a host to its guest on one connection, beside a Unix socket",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Vsock.ts")).hostToGuest(effort))
  },
  {
    name: "vsock-g2h-8",
    about: "bytes of a guest to its host on eight connections, beside a Unix socket",
    needs: "kvm",
    quick: false,
    run: async (effort) => one((await import("./rows/Vsock.ts")).guestToHostOnEight(effort))
  },
  {
    name: "vsock-rtt",
    about: "round trip of a byte from the host to the guest's echo, beside a Unix socket",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Vsock.ts")).roundTrip(effort))
  },
  {
    name: "vsock-fairness",
    about: "round trips of eight connections beside one that sends as much as it can",
    needs: "kvm",
    quick: false,
    run: async (effort) => one((await import("./rows/VsockFairness.ts")).fairness(effort))
  },
  {
    name: "vsock-connects",
    about: "connections a second that a guest makes, beside a Unix socket",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Vsock.ts")).connects(effort))
  },
  {
    name: "vsock-idle-memory",
    about: "memory of each of 10,000 connections that do nothing, beside Unix sockets",
    needs: undefined,
    quick: true,
    run: async (effort) => one((await import("./rows/Vsock.ts")).idleMemory(effort))
  },
  {
    name: "vsock-loop",
    about: "packets of 64 KiB through the device's part of vsock, on one core",
    needs: undefined,
    quick: true,
    run: async (effort) => one((await import("./rows/Vsock.ts")).loop(effort))
  },
  {
    name: "block-randread-qd1",
    about: "random reads and writes of 4 KiB, one at a time, beside QEMU",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Block.ts")).randomDepth1(effort))
  },
  {
    name: "block-randread-qd32",
    about: "random reads and writes of 4 KiB, 32 at a time, beside QEMU",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Block.ts")).randomDepth32(effort))
  },
  {
    name: "block-seq",
    about: "reads and writes of 1 MiB one after the other, beside QEMU",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Block.ts")).sequential(effort))
  },
  {
    name: "kicks-per-request",
    about: "kicks and interrupts for a request of a disk under load",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Block.ts")).kicksPerRequest(effort))
  },
  {
    name: "net-throughput",
    about: "TCP frames of 64 KiB from a guest to a TAP interface, beside QEMU",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Net.ts")).throughput(effort))
  },
  {
    name: "net-send",
    about: "frames of Ethernet's size from a guest to a TAP interface, beside QEMU",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Net.ts")).send(effort))
  },
  {
    name: "net-receive",
    about: "frames from a process of the host to a guest, beside QEMU",
    needs: "kvm",
    quick: false,
    run: async (effort) => one((await import("./rows/Net.ts")).receive(effort))
  },
  {
    name: "net-rtt",
    about: "round trip of a datagram from the host to the guest's echo, beside QEMU",
    needs: "kvm",
    quick: true,
    run: async (effort) => one((await import("./rows/Net.ts")).roundTrip(effort))
  },
  {
    name: "fake-lifecycles",
    about: "lifecycles on the fake for each second of processor time",
    needs: undefined,
    quick: true,
    run: async (effort) => one((await import("./rows/FakeLifecycles.ts")).fakeLifecycles(effort))
  }
]

/** All rows in the order of the table. */
const ORDER = BENCHES.flatMap(({ name }) =>
  name === "create-to-first-instruction"
    ? [name, `${name}-cold`]
    : name === "boot-exits"
    ? [name, `${name}-to-process`]
    : name === "chains"
    ? [name, `${name}-packed`, `${name}-device`]
    : [name]
)

const USAGE =
  `Measures, each thing beside what it is compared with, in one run; keeps the results in bench/results.json.

  npm run bench                      everything
  npm run bench -- NAME...           these rows; the others stay as they are in the results
  npm run bench -- --quick [NAME...] a rough look in less than a minute, without Linux; the results file is left alone
  npm run bench -- --table           the table of the results that are kept, without measuring
  npm run bench -- --check-allocation   proves that the way of an access allocates nothing once it is warm
  npm run bench -- --help

${BENCHES.map(({ about, name }) => `  ${name.padEnd(30)}${about}`).join("\n")}
`

const say = (text: string): void => void process.stderr.write(`${text}\n`)

const describeHost = (): string => {
  const load = loadavg()[0] ?? 0
  return `${availableParallelism()} processors (${
    cpus()[0]?.model.trim() ?? "?"
  }), Linux ${release()}, Node ${process.versions.node}, load ${load.toFixed(1)}`
}

/** The benches that these names mean; all for none. */
const choose = (names: ReadonlyArray<string>): ReadonlyArray<Bench> => {
  const wanted = names.map((name) => {
    const bench = BENCHES.find((candidate) => candidate.name === name)
    if (bench === undefined) {
      throw new BenchError(
        `there is no row ${JSON.stringify(name)}; the rows are ${BENCHES.map((candidate) => candidate.name).join(", ")}`
      )
    }
    return bench
  })
  return wanted.length === 0 ? BENCHES : BENCHES.filter((bench) => wanted.includes(bench))
}

const main = async (): Promise<number> => {
  const { positionals, values } = parseArgs({
    allowPositionals: true,
    options: {
      quick: { type: "boolean", default: false },
      "check-allocation": { type: "boolean", default: false },
      table: { type: "boolean", default: false },
      help: { type: "boolean", short: "h", default: false }
    }
  })
  if (values.help) {
    process.stdout.write(USAGE)
    return 0
  }
  if (values["check-allocation"]) return (await import("./Allocation.ts")).checkAllocation()
  if (values.table) {
    process.stdout.write(`${table(await readResults())}\n`)
    return 0
  }
  const chosen = choose(positionals)
  say(describeHost())
  const rows: Array<Row> = []
  let failures = 0
  for (const bench of chosen) {
    if (values.quick && !bench.quick && positionals.length === 0) continue
    if (bench.needs === "kvm" && !existsSync("/dev/kvm")) {
      say(`${bench.name}: skipped, there is no /dev/kvm`)
      continue
    }
    const begun = performance.now()
    try {
      const measured = await bench.run({ quick: values.quick })
      rows.push(...measured)
      if (!values.quick) await mergeResults(measured, ORDER)
      say(`${bench.name}: measured in ${((performance.now() - begun) / 1000).toFixed(0)} s`)
    } catch (cause) {
      if (cause instanceof BenchSkipped) {
        say(`${bench.name}: skipped, ${cause.message}`)
        continue
      }
      failures++
      say(`${bench.name}: failed: ${cause instanceof Error ? cause.message : String(cause)}`)
    }
  }
  if (rows.length > 0) process.stdout.write(`${table(rows)}\n`)
  if (!values.quick && rows.length > 0) say(`kept in ${RESULTS_FILE}`)
  return failures === 0 ? 0 : 1
}

try {
  process.exitCode = await main()
} catch (cause) {
  if (!(cause instanceof BenchError) && !(cause instanceof TypeError && "code" in cause)) throw cause
  say(cause.message)
  process.exitCode = 2
}
