// Runs the tools that the workspace's scripts are made of.
import { spawn } from "node:child_process"
import { constants } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"

/** The root of the clone. */
export const root = fileURLToPath(new URL("..", import.meta.url)).replace(/\/$/, "")

/** A program that a dependency brings. */
export const toolPath = (name: string): string => join(root, "node_modules", ".bin", name)

// Ctrl-C reaches the whole group of processes: the program ends by itself, and then so do we.
const wait = (): void => {}

/** Runs a program in the root of the clone, with our own input and output, to its end; returns its exit code. */
export const runTool = (
  command: string,
  args: ReadonlyArray<string>,
  environment: Readonly<Record<string, string>> = {}
): Promise<number> =>
  new Promise((resolve, reject) => {
    const child = spawn(command, args, { cwd: root, stdio: "inherit", env: { ...process.env, ...environment } })
    const terminate = (): void => void child.kill("SIGTERM")
    process.on("SIGINT", wait)
    process.on("SIGTERM", terminate)
    child.on("error", reject)
    child.on("close", (code, signal) => {
      process.off("SIGINT", wait)
      process.off("SIGTERM", terminate)
      resolve(code ?? 128 + (signal === null ? 0 : constants.signals[signal]))
    })
  })
