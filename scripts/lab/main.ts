// The lab as a command: `node scripts/lab/main.ts -- COMMAND` runs COMMAND in the lab, `packages` lists what it needs.
import { mkdir, writeFile } from "node:fs/promises"
import { dirname, join, normalize } from "node:path"
import { parseArgs } from "node:util"
import { cachePath } from "./Cache.ts"
import { Lab } from "./Lab.ts"
import { LabError } from "./LabError.ts"
import { debianPackages } from "./Requirements.ts"

const USAGE = `Runs a command of this clone in the nested lab, a Linux with an ordinary KVM under software emulation.

  node scripts/lab/main.ts [--timeout SECONDS] -- COMMAND   run COMMAND with sh in /repo, the clone's sources
  node scripts/lab/main.ts packages                         print the Debian packages that the lab needs

In the lab: /lab/bzImage, /lab/vmlinux and /lab/guest.cpio.gz are a distribution kernel and a busybox initramfs, node
and qemu-system-x86_64 are on the PATH. Files that the command leaves in $FILES are brought back to .cache/lab/files.
`

const main = async (): Promise<number> => {
  const { positionals, values } = parseArgs({
    allowPositionals: true,
    options: {
      timeout: { type: "string", default: "600" },
      memory: { type: "string", default: "3072" },
      kernel: { type: "string" },
      help: { type: "boolean", default: false }
    }
  })
  if (values.help || positionals.length === 0) {
    process.stdout.write(USAGE)
    return values.help ? 0 : 2
  }
  if (positionals.length === 1 && positionals[0] === "packages") {
    process.stdout.write(`${(await debianPackages()).join("\n")}\n`)
    return 0
  }
  const timeout = Number(values.timeout)
  const memory = Number(values.memory)
  if (!(timeout > 0) || !(memory >= 1024)) throw new LabError("--timeout takes seconds, --memory MiB (at least 1024)")
  const abort = new AbortController()
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.once(signal, () => abort.abort())
  await using lab = await Lab.start({
    limitSeconds: timeout + 120,
    memory,
    kernel: values.kernel,
    signal: abort.signal
  })
  const result = await lab.run({
    script: positionals.join(" "),
    timeoutSeconds: timeout,
    onOutput: (chunk) => process.stdout.write(chunk)
  })
  for (const [name, data] of result.files) {
    const path = join(cachePath("lab", "files"), normalize(`/${name}`))
    await mkdir(dirname(path), { recursive: true })
    await writeFile(path, data)
    process.stderr.write(`- brought back ${path}\n`)
  }
  if (result.code === undefined) throw new LabError(`the command was still running after ${timeout} s and was killed`)
  process.stderr.write(`- the command took ${result.seconds.toFixed(1)} s and ended with exit code ${result.code}\n`)
  return result.code
}

try {
  process.exitCode = await main()
} catch (cause) {
  process.stderr.write(`${cause instanceof LabError ? cause.message : String(cause)}\n`)
  process.exitCode = 1
}
