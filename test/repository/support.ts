// Feeds sources to the workspace's own checking tools, with the workspace's own configuration.
import { execFile } from "node:child_process"
import { copyFileSync, mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { dirname, join } from "node:path"
import { fileURLToPath } from "node:url"

/** The root of the clone. */
export const root = fileURLToPath(new URL("../..", import.meta.url)).replace(/\/$/, "")

/** What a tool said. */
export interface Verdict {
  readonly code: number
  readonly output: string
}

/** Runs a program of the workspace in `folder`. */
export const runTool = (folder: string, name: string, args: ReadonlyArray<string>): Promise<Verdict> =>
  new Promise((resolve) => {
    execFile(
      join(root, "node_modules", ".bin", name),
      args,
      { cwd: folder, maxBuffer: 2 ** 26, timeout: 60_000 },
      (error, stdout, stderr) => {
        const code = error === null ? 0 : typeof error.code === "number" ? error.code : 127
        resolve({ code, output: `${stdout}${stderr}` })
      }
    )
  })

/** A folder that looks like the workspace, with the configuration files named and nothing but the given sources. */
export class Scratch implements Disposable {
  readonly folder = mkdtempSync(join(tmpdir(), "troupe-repository-"))

  constructor(
    configuration: ReadonlyArray<string>,
    sources: Readonly<Record<string, string>>,
    options: { readonly withModules?: boolean } = {}
  ) {
    // Temporary files may be in a folder of the clone that git ignores; a repository of its own is not ignored.
    mkdirSync(join(this.folder, ".git"))
    if (options.withModules === true) symlinkSync(join(root, "node_modules"), join(this.folder, "node_modules"))
    for (const file of configuration) {
      mkdirSync(dirname(join(this.folder, file)), { recursive: true })
      copyFileSync(join(root, file), join(this.folder, file))
    }
    for (const [path, text] of Object.entries(sources)) {
      mkdirSync(dirname(join(this.folder, path)), { recursive: true })
      writeFileSync(join(this.folder, path), text)
    }
  }

  [Symbol.dispose]() {
    rmSync(this.folder, { recursive: true, force: true })
  }
}
