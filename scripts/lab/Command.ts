// Runs a command of the host to its end and keeps what it printed.
import { spawn } from "node:child_process"
import { LabError } from "./LabError.ts"

/** What a finished command left. */
export interface CommandResult {
  readonly code: number
  readonly stdout: Buffer
  readonly stderr: string
}

export interface CommandOptions {
  readonly cwd?: string
  readonly signal?: AbortSignal | undefined
  /** Given to the command's standard input. */
  readonly input?: Uint8Array
}

// Users other than root often have no sbin folder in PATH, and mkfs.ext4 lives there.
const searchPath = `${process.env["PATH"] ?? ""}:/usr/sbin:/sbin`

/** Runs `command`; resolves with its exit code, or rejects when it cannot be started at all. */
export const run = (
  command: string,
  args: ReadonlyArray<string>,
  options: CommandOptions = {}
): Promise<CommandResult> =>
  new Promise((resolve, reject) => {
    const child = spawn(command, args, {
      cwd: options.cwd,
      signal: options.signal,
      killSignal: "SIGKILL",
      env: { ...process.env, PATH: searchPath, LC_ALL: "C" },
      stdio: ["pipe", "pipe", "pipe"]
    })
    const stdout: Array<Buffer> = []
    const stderr: Array<Buffer> = []
    child.stdout.on("data", (chunk: Buffer) => stdout.push(chunk))
    child.stderr.on("data", (chunk: Buffer) => stderr.push(chunk))
    child.stdin.on("error", () => {
      // A command that does not read its input to the end is no failure of ours: its exit code tells.
    })
    child.on("error", reject)
    child.on("close", (code) => {
      resolve({ code: code ?? -1, stdout: Buffer.concat(stdout), stderr: Buffer.concat(stderr).toString() })
    })
    child.stdin.end(options.input)
  })

/** Like {@link run}, but an exit code other than 0 is a {@link LabError} with the last lines of standard error. */
export const runOk = async (
  command: string,
  args: ReadonlyArray<string>,
  options: CommandOptions = {}
): Promise<CommandResult> => {
  const result = await run(command, args, options)
  if (result.code !== 0) {
    const tail = result.stderr.trim().split("\n").slice(-5).join("\n  ")
    throw new LabError(`${command} ${args.join(" ")} ended with exit code ${result.code}: ${tail}`)
  }
  return result
}

/** Whether a command of that name can be found. */
export const hasCommand = async (command: string): Promise<boolean> =>
  (await run("/bin/sh", ["-c", `command -v "$1"`, "sh", command])).code === 0
