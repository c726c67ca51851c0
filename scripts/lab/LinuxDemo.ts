// `npm run demo -- linux`: boots an unmodified distribution kernel under this clone's VMM and shows its console.
import { parseArgs } from "node:util"
import { LabError } from "./LabError.ts"
import { type LinuxOutcome, openLinuxRunner } from "./LinuxRunner.ts"

const USAGE = `Boots an unmodified Linux under Troupe: Debian's cloud kernel, or one that you give.

  npm run demo -- linux [--kernel BZIMAGE] [--cpus N] [--shell]

--shell leaves you at the guest's prompt, where the host's own KVM can run Linux.
`

/** Runs the demo with its own arguments (those after \`linux\`); returns the exit code. */
export const runLinuxDemo = async (args: ReadonlyArray<string>): Promise<number> => {
  const abort = new AbortController()
  const stop = (): void => abort.abort()
  const signals = ["SIGINT", "SIGTERM", "SIGHUP"] as const
  for (const signal of signals) process.once(signal, stop)
  try {
    const { values } = parseArgs({
      args: [...args],
      options: {
        kernel: { type: "string" },
        cpus: { type: "string", default: "2" },
        shell: { type: "boolean", default: false },
        help: { type: "boolean", default: false }
      }
    })
    if (values.help) {
      process.stdout.write(USAGE)
      return 0
    }
    await using runner = await openLinuxRunner({ kernel: values.kernel, signal: abort.signal, name: "demo" })
    process.stderr.write(`- booting ${runner.kernel.origin} ${runner.where}\n`)
    if (values.shell && runner.lab !== undefined) {
      process.stderr.write("- the lab has no terminal, so the guest turns itself off instead of giving you a shell\n")
    }
    const outcome = await runner.run({
      action: values.shell && runner.lab === undefined ? "shell" : "rng",
      image: "bzImage",
      cpus: Number(values.cpus),
      onOutput: (chunk) => process.stdout.write(chunk)
    })
    process.stderr.write(`- ${describe(outcome)}\n`)
    return outcome.code ?? 1
  } catch (cause) {
    if (abort.signal.aborted) return 130
    if (!(cause instanceof LabError)) throw cause
    process.stderr.write(`${cause.message}\n`)
    return 1
  } finally {
    for (const signal of signals) process.off(signal, stop)
  }
}

const describe = ({ code, report, seconds }: LinuxOutcome): string => {
  if (code === undefined) return "the guest was still running when its time was up"
  const uname = report.get("uname")
  const reached = uname === undefined ? "" : `${uname} reached its userspace; `
  return `${reached}\`troupe run\` ended with exit code ${code} after ${seconds.toFixed(1)} s`
}
