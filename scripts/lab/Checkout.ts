// The clone's own sources as an archive, taken into the lab at every start, and the npm packages they need.
//
// The types are taken out of the sources on the way: Node does that with a compiler in WebAssembly, which takes an emulated
// processor half a minute, and which V8 has crashed on there when it optimised it.
import { existsSync } from "node:fs"
import { lstat, readdir, readFile, readlink, realpath } from "node:fs/promises"
import { stripTypeScriptTypes } from "node:module"
import { dirname, join, relative, sep } from "node:path"
import { cloneRoot } from "./Cache.ts"
import type { CpioEntry } from "./Cpio.ts"

/** What of the clone goes into the lab. */
const SOURCES: ReadonlyArray<string> = ["package.json", "packages", "test", "scripts", "bench"]

const LEFT_OUT = new Set(["dist", ".cache", "coverage", ".tsbuildinfo"])

/** A module for Node's `--import` that has it take the sources in the lab as they are. */
export const PLAIN_SOURCES = `import { readFileSync } from "node:fs"
import { registerHooks } from "node:module"
registerHooks({
  load: (url, context, next) =>
    url.startsWith("file:///repo/") && url.endsWith(".ts")
      ? { format: "module", source: readFileSync(new URL(url), "utf8"), shortCircuit: true }
      : next(url, context)
})
`

const contentOf = async (path: string): Promise<Uint8Array> => {
  const data = await readFile(path)
  return path.endsWith(".ts") ? Buffer.from(stripTypeScriptTypes(data.toString())) : data
}

/** The sources below the clone as archive entries; of `node_modules` only the links. */
export const checkoutEntries = async (): Promise<ReadonlyArray<CpioEntry>> => {
  const entries: Array<CpioEntry> = []
  const add = async (path: string, insideModules: boolean): Promise<void> => {
    const stats = await lstat(join(cloneRoot, path))
    if (stats.isSymbolicLink()) {
      entries.push({ type: "link", path, target: await readlink(join(cloneRoot, path)) })
    } else if (stats.isDirectory()) {
      entries.push({ type: "directory", path })
      for (const name of (await readdir(join(cloneRoot, path))).toSorted()) {
        if (!LEFT_OUT.has(name)) await add(join(path, name), insideModules || name === "node_modules")
      }
    } else if (stats.isFile() && !insideModules) {
      const mode = (stats.mode & 0o111) === 0 ? 0o644 : 0o755
      entries.push({ type: "file", path, data: await contentOf(join(cloneRoot, path)), mode })
    }
  }
  for (const path of SOURCES) if (existsSync(join(cloneRoot, path))) await add(path, false)
  return entries
}

/** Native modules and tools have no business in the lab. */
const NOT_NEEDED = new Set(["koffi", "vitest", "vite", "typescript", "@types/node", "@effect/vitest"])

const STORE = join(cloneRoot, "node_modules", ".pnpm")

/** The links in a `node_modules` folder: name of the package to its real folder. */
const linksIn = async (folder: string): Promise<ReadonlyArray<readonly [name: string, target: string]>> => {
  if (!existsSync(folder)) return []
  const links: Array<readonly [string, string]> = []
  for (const entry of await readdir(folder, { withFileTypes: true })) {
    if (entry.name.startsWith(".")) continue
    const names = entry.name.startsWith("@")
      ? (await readdir(join(folder, entry.name))).map((name) => `${entry.name}/${name}`)
      : [entry.name]
    for (const name of names) {
      if (!NOT_NEEDED.has(name)) links.push([name, await realpath(join(folder, name)).catch(() => "")])
    }
  }
  return links
}

/** The folders of pnpm's store, relative to the clone, that the packages of the clone need at run time. */
export const dependencyFolders = async (): Promise<ReadonlyArray<string>> => {
  const found = new Set<string>()
  const visit = async (target: string): Promise<void> => {
    if (!target.startsWith(STORE + sep)) return
    const folder = join(STORE, relative(STORE, target).split(sep, 1)[0]!)
    if (found.has(folder)) return
    found.add(folder)
    for (const [, next] of await linksIn(join(folder, "node_modules"))) await visit(next)
  }
  const packages = await readdir(join(cloneRoot, "packages"))
  for (const name of packages) {
    for (const [, target] of await linksIn(join(cloneRoot, "packages", name, "node_modules"))) await visit(target)
  }
  return [...found].map((folder) => relative(cloneRoot, folder)).toSorted()
}

/** Whether a file of a dependency is of use at run time. */
export const isRuntimeFile = (path: string): boolean =>
  !/\.(d\.[cm]?ts|map|md|ts)$/.test(path) && !dirname(path).includes(`${sep}src${sep}`)
