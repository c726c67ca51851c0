// The clone's `.cache` folder: where it is, and how something is put into it whole or not at all.
import { randomBytes } from "node:crypto"
import { existsSync } from "node:fs"
import { mkdir, readdir, readFile, rename, rm } from "node:fs/promises"
import { dirname, join } from "node:path"
import { fileURLToPath } from "node:url"

/** The root of the clone. */
export const cloneRoot = fileURLToPath(new URL("../..", import.meta.url)).replace(/\/$/, "")

/** The folder that holds everything downloaded or built; git ignores it, and it may be removed at any time. */
export const cacheRoot = join(cloneRoot, ".cache")

/** A path inside the cache. */
export const cachePath = (...parts: ReadonlyArray<string>): string => join(cacheRoot, ...parts)

/** A name beside `path` that no other process uses, and that {@link sweep} knows. */
export const temporaryName = (path: string): string => `${path}.${process.pid}.${randomBytes(4).toString("hex")}.tmp`

// A process that has ended but was not waited for is dead as well; only its state tells.
const isAlive = async (pid: number): Promise<boolean> => {
  const stat = await readFile(`/proc/${pid}/stat`, "latin1").catch(() => "")
  const state = stat.slice(stat.lastIndexOf(")") + 2, stat.lastIndexOf(")") + 3)
  return state !== "" && state !== "Z" && state !== "X"
}

/** Removes what processes that were killed have left in `folder`. */
export const sweep = async (folder: string): Promise<void> => {
  for (const name of await readdir(folder).catch(() => [])) {
    const pid = /\.(\d+)\.[0-9a-f]{8}\.tmp(\.\w+)?$/.exec(name)?.[1]
    if (pid !== undefined && !await isAlive(Number(pid))) await rm(join(folder, name), { recursive: true, force: true })
  }
}

/**
 * Returns `path`, after `build` has made it if it is not there yet. `build` works on a temporary sibling, which takes
 * its place only when complete: a build that is interrupted, or two that run at once, leave nothing half made.
 */
export const once = async (path: string, build: (temporary: string) => Promise<void>): Promise<string> => {
  if (existsSync(path)) return path
  const temporary = temporaryName(path)
  await mkdir(dirname(path), { recursive: true })
  await sweep(dirname(path))
  try {
    await build(temporary)
    await rename(temporary, path).catch((cause: unknown) => {
      // Another process was first: its result is as good.
      if (!existsSync(path)) throw cause
    })
    return path
  } finally {
    await rm(temporary, { recursive: true, force: true })
  }
}
