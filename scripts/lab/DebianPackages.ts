// Debian packages by name, without root: downloaded by apt, unpacked by dpkg, kept in the cache.
import { existsSync } from "node:fs"
import { mkdir, readdir, readFile, rename, rm, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { cachePath, once } from "./Cache.ts"
import { hasCommand, run, runOk } from "./Command.ts"
import { LabError } from "./LabError.ts"
import { megabytes, type Progress } from "./Progress.ts"

/** One stanza of the package lists. */
export interface PackageRecord {
  readonly name: string
  readonly version: string
  readonly depends: ReadonlyArray<string>
  readonly size: number
}

/** A package that was unpacked into the cache. */
export interface UnpackedPackage {
  readonly name: string
  readonly version: string
  /** The folder that holds the package's files, as if it were `/`. */
  readonly root: string
}

// Debian policy, section 5.6.7. A name that ends in `+` or `-` means something else to apt, so it is refused as well.
const packageName = /^[a-z0-9][a-z0-9+.-]*[a-z0-9]$/

const GIVE_FILES =
  "Or give the files yourself: TROUPE_KERNEL=/path/to/vmlinuz, TROUPE_BUSYBOX=/path/to/a/static/busybox."

/** Reads the fields that matter from the output of `apt-cache show`. */
export const parseRecord = (text: string): PackageRecord | undefined => {
  const stanza = text.split("\n\n", 1)[0] ?? ""
  const fields = new Map<string, string>()
  for (const line of stanza.split("\n")) {
    const match = /^([A-Za-z0-9-]+): (.*)$/.exec(line)
    if (match !== null) fields.set(match[1]!, match[2]!)
  }
  const name = fields.get("Package")
  const version = fields.get("Version")
  if (name === undefined || version === undefined) return undefined
  const depends = (fields.get("Depends") ?? "").split(",").map((entry) => entry.trim().split(/[\s:(|]/, 1)[0]!)
  return { name, version, depends: depends.filter((entry) => entry !== ""), size: Number(fields.get("Size") ?? 0) }
}

/** Asks apt's lists for exactly the package `name`. */
export const lookUp = async (name: string): Promise<PackageRecord> => {
  if (!packageName.test(name)) throw new LabError(`${JSON.stringify(name)} is not the name of a Debian package`)
  for (const tool of ["apt-get", "apt-cache", "dpkg-deb"]) {
    if (!await hasCommand(tool)) {
      throw new LabError(
        `cannot fetch the Debian package ${name}: there is no ${tool} here`,
        GIVE_FILES
      )
    }
  }
  const shown = await run("apt-cache", ["show", "--no-all-versions", `${name}:amd64`])
  const record = parseRecord(shown.stdout.toString())
  if (record === undefined || record.name !== name) {
    throw new LabError(
      `apt's package lists do not know ${name} for amd64`,
      `Run \`apt-get update\` as root, with Debian's main archive among the sources, and try again. ${GIVE_FILES}`
    )
  }
  return record
}

const rootOf = (name: string, version: string): string =>
  cachePath("debian", `${name}_${version}`.replaceAll(":", "%3a"))

// A file that says which package and version a name stood for when it was first asked for.
const indexPath = (name: string): string => cachePath("debian", `${name}.is`)

const remembered = async (name: string): Promise<UnpackedPackage | undefined> => {
  try {
    const [packageName, version] = (await readFile(indexPath(name), "utf8")).trim().split(" ")
    if (packageName === undefined || version === undefined) return undefined
    const root = rootOf(packageName, version)
    return existsSync(root) ? { name: packageName, version, root } : undefined
  } catch {
    return undefined
  }
}

const remember = async (name: string, unpacked: UnpackedPackage): Promise<void> => {
  const path = indexPath(name)
  await writeFile(`${path}.${process.pid}`, `${unpacked.name} ${unpacked.version}\n`)
  await rename(`${path}.${process.pid}`, path)
}

const download = async (record: PackageRecord, progress: Progress): Promise<UnpackedPackage> => {
  const root = rootOf(record.name, record.version)
  await once(root, async (temporary) => {
    const downloads = `${temporary}.download`
    await mkdir(downloads, { recursive: true })
    try {
      progress(`fetching ${record.name} ${record.version} (${megabytes(record.size)}) with apt-get`)
      // The exact version: apt takes a name that it does not know for a pattern, and fetches everything that matches.
      const fetched = await run("apt-get", ["download", `${record.name}:amd64=${record.version}`], { cwd: downloads })
      const archive = (await readdir(downloads)).find((file) => file.endsWith(".deb"))
      if (fetched.code !== 0 || archive === undefined) {
        const tail = fetched.stderr.trim().split("\n").filter((line) => line.startsWith("E:")).join("\n  ")
        throw new LabError(
          `apt-get could not download ${record.name} ${record.version}: ${tail}`,
          "If the archive no longer has this version, run `apt-get update` as root and try again."
        )
      }
      progress(`unpacking ${record.name}`)
      await runOk("dpkg-deb", ["-x", join(downloads, archive), temporary])
    } finally {
      await rm(downloads, { recursive: true, force: true })
    }
  })
  return { name: record.name, version: record.version, root }
}

/**
 * The package `name`, unpacked. Once it is in the cache, apt is not asked again and nothing goes over the network;
 * remove `.cache/debian` to get newer versions.
 */
export const fetchPackage = async (name: string, progress: Progress): Promise<UnpackedPackage> => {
  const known = await remembered(name)
  if (known !== undefined) return known
  const unpacked = await download(await lookUp(name), progress)
  await remember(name, unpacked)
  return unpacked
}

/** Like {@link fetchPackage}, but for the first package that the (meta) package `name` depends on. */
export const fetchFirstDependency = async (name: string, progress: Progress): Promise<UnpackedPackage> => {
  const known = await remembered(name)
  if (known !== undefined) return known
  const meta = await lookUp(name)
  const dependency = meta.depends[0]
  if (dependency === undefined) throw new LabError(`the Debian package ${name} depends on nothing`)
  const unpacked = await download(await lookUp(dependency), progress)
  await remember(name, unpacked)
  return unpacked
}
