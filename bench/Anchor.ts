// The C programs that measurements are compared with: compiled when they are needed, and spoken to line by line.
import { spawn } from "node:child_process"
import { existsSync, statSync } from "node:fs"
import { mkdir } from "node:fs/promises"
import { join } from "node:path"
import { createInterface } from "node:readline"
import { BenchError, root } from "./Row.ts"

const SOURCES = join(root, "bench", "anchor")
/** Where built programs and the images of guests are kept. */
export const BENCH_CACHE = join(root, ".cache", "bench")

const run = (command: string, args: ReadonlyArray<string>): Promise<void> =>
  new Promise((resolve, reject) => {
    const child = spawn(command, args, { stdio: ["ignore", "inherit", "inherit"] })
    child.on("error", (cause) => reject(new BenchError(`${command} could not be run (${cause.message}); install gcc`)))
    child.on("close", (code) =>
      code === 0 ? resolve() : reject(new BenchError(`${command} ${args.join(" ")} failed with ${code}`)))
  })

/** Builds an anchor unless what is there is newer than its source; returns the program's path. */
export const buildAnchor = async (name: string): Promise<string> => {
  const program = join(BENCH_CACHE, name)
  const sources = [join(SOURCES, `${name}.c`), join(SOURCES, "kvm.h")]
  const built = existsSync(program) ? statSync(program).mtimeMs : 0
  if (sources.some((source) => statSync(source).mtimeMs > built)) {
    await mkdir(BENCH_CACHE, { recursive: true })
    await run("gcc", ["-O2", "-Wall", "-Wextra", "-o", program, join(SOURCES, `${name}.c`)])
  }
  return program
}

/** A running anchor: one line in, one line out. */
export interface Anchor extends AsyncDisposable {
  /** The next line that it prints, as a number. */
  readonly next: () => Promise<number>
  /** Sends a line and returns the number that comes back. */
  readonly ask: (line: string) => Promise<number>
}

/** Starts an anchor. */
export const startAnchor = (program: string, args: ReadonlyArray<string>): Anchor => {
  const child = spawn(program, args, { stdio: ["pipe", "pipe", "inherit"] })
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]()
  const ended = new Promise<void>((resolve) => child.on("close", () => resolve()))
  child.stdin.on("error", () => {})
  child.on("error", () => {})
  const next = async (): Promise<number> => {
    const line = await lines.next()
    const value = line.done === true ? Number.NaN : Number(line.value)
    if (!Number.isFinite(value)) {
      throw new BenchError(`the anchor ${program} ended or said nonsense: ${JSON.stringify(line)}`)
    }
    return value
  }
  return {
    next,
    ask: (line) => {
      child.stdin.write(`${line}\n`)
      return next()
    },
    [Symbol.asyncDispose]: async () => {
      child.stdin.end()
      const timer = setTimeout(() => child.kill("SIGKILL"), 2000)
      await ended
      clearTimeout(timer)
    }
  }
}
