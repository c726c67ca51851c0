/** Where the Node versions of the tests are, and how to run a script under one of them. */
import { execFile } from "node:child_process"
import { existsSync } from "node:fs"
import process from "node:process"
import { fileURLToPath } from "node:url"

/** A Node to run scripts under. */
export interface Runtime {
  readonly name: string
  readonly path: string
  /** Why it cannot be used here, or `undefined`. */
  readonly obstacle: string | undefined
}

const installed = (major: number): Runtime => {
  const directory = new URL(`../../../../test/runtimes/node_modules/node-${major}-${process.arch}/`, import.meta.url)
  const path = fileURLToPath(new URL("bin/node", directory))
  const obstacle = existsSync(path) ? undefined : `Node ${major} is not installed: ${path}`
  return { name: `Node ${major}`, path, obstacle }
}

/** The Node that runs the tests. */
export const current: Runtime = { name: `Node ${process.versions.node}`, path: process.execPath, obstacle: undefined }

/** The older Nodes that the library supports. */
export const older: ReadonlyArray<Runtime> = [installed(22), installed(24)]

/** What a script did. */
export interface Outcome {
  readonly code: number | string | null
  readonly signal: string | null
  readonly stdout: string
  readonly stderr: string
}

/** Runs a script of this directory to its end. */
export const run = (runtime: Runtime, args: ReadonlyArray<string>, flags: ReadonlyArray<string> = []) =>
  new Promise<Outcome>((resolve) => {
    const [script, ...rest] = args
    const path = fileURLToPath(new URL(script ?? "", import.meta.url))
    const child = execFile(
      runtime.path,
      [...flags, path, ...rest],
      { timeout: 60_000, env: {} },
      (_error, stdout, stderr) => resolve({ code: child.exitCode, signal: child.signalCode, stdout, stderr })
    )
  })
