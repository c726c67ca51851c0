// `npm run packaging`: builds and packs what would be published, checks the packages' faces, and uses them as a stranger
// would, in an empty project outside this workspace. Needs the npm registry for the strangers' dependencies.
import { execFile, type ExecFileOptions } from "node:child_process"
import { existsSync } from "node:fs"
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { root, toolPath } from "./tools.ts"

/** In an order in which each comes after those it depends on. */
const PACKAGES = ["core", "devices", "vsock", "node"] as const

/** What a packed file's path may look like. */
const PACKED = /^package\/(package\.json|README\.md|LICENSE|src\/.*\.ts|dist\/.*\.(js|js\.map|d\.ts|d\.ts\.map))$/

/** How much of a tool's complaint is shown. */
const LINES_MAX = 40

class PackagingError extends Error {}

const run = (command: string, args: ReadonlyArray<string>, options: ExecFileOptions = {}): Promise<string> =>
  new Promise((resolve, reject) => {
    execFile(command, args, { cwd: root, maxBuffer: 2 ** 26, ...options }, (error, stdout, stderr) => {
      if (error === null) resolve(String(stdout))
      else {
        reject(
          new PackagingError(
            `${command} ${args.join(" ")} failed (${error.code ?? error.signal})\n${String(stdout)}${String(stderr)}`
          )
        )
      }
    })
  })

const step = async <A>(name: string, body: () => Promise<A>): Promise<A> => {
  const begun = performance.now()
  process.stdout.write(`- ${name}\n`)
  const result = await body()
  process.stdout.write(`  ok, ${((performance.now() - begun) / 1000).toFixed(1)} s\n`)
  return result
}

const build = async (): Promise<void> => {
  for (const name of PACKAGES) {
    await rm(join(root, "packages", name, "dist"), { recursive: true, force: true })
    await rm(join(root, "packages", name, ".tsbuildinfo"), { force: true })
  }
  await run(toolPath("tsc"), ["-b", ...PACKAGES.map((name) => join("packages", name))])
}

/** Packs every package; returns the archives in the order of {@link PACKAGES}. */
const pack = async (folder: string): Promise<ReadonlyArray<string>> => {
  const archives: Array<string> = []
  for (const name of PACKAGES) {
    const before = new Set(await readdir(folder))
    await run("pnpm", ["pack", "--pack-destination", folder], { cwd: join(root, "packages", name) })
    const archive = (await readdir(folder)).find((file) => file.endsWith(".tgz") && !before.has(file))
    if (archive === undefined) throw new PackagingError(`pnpm pack made no archive of ${name}`)
    archives.push(join(folder, archive))
  }
  return archives
}

const checkContents = async (archive: string): Promise<void> => {
  const files = (await run("tar", ["-tzf", archive])).split("\n").filter((line) => line !== "")
  const strange = files.filter((file) => !PACKED.test(file))
  if (strange.length > 0) throw new PackagingError(`${archive} holds files that nobody needs: ${strange.join(", ")}`)
  for (const file of ["package.json", "README.md", "LICENSE"]) {
    if (!files.includes(`package/${file}`)) throw new PackagingError(`${archive} has no ${file}`)
  }
  const manifest = await run("tar", ["-xzOf", archive, "package/package.json"])
  if (manifest.includes("workspace:")) throw new PackagingError(`${archive} still names the workspace`)
  if (/"\.\/src\/[^"]*\.ts"/.test(manifest)) throw new PackagingError(`${archive} still points to sources`)
}

const checkFace = async (archive: string): Promise<void> => {
  await run(toolPath("publint"), ["run", archive, "--strict"])
  await run(toolPath("attw"), [archive, "--profile", "esm-only"])
}

/** Installs the archives with npm, compiles a program against their types and runs it, and the `troupe` command. */
const useThem = async (folder: string, archives: ReadonlyArray<string>): Promise<void> => {
  const { devDependencies } = JSON.parse(await readFile(join(root, "package.json"), "utf8"))
  await cp(join(root, "scripts", "packaging"), folder, { recursive: true })
  await writeFile(
    join(folder, "package.json"),
    JSON.stringify({
      name: "stranger",
      private: true,
      type: "module",
      dependencies: { effect: devDependencies.effect }
    })
  )
  await run("npm", ["install", "--no-audit", "--no-fund", "--loglevel=error", ...archives], { cwd: folder })
  await writeFile(
    join(folder, "tsconfig.json"),
    JSON.stringify({
      compilerOptions: {
        target: "es2024",
        lib: ["es2024", "dom", "dom.iterable", "esnext.disposable"],
        module: "nodenext",
        strict: true,
        exactOptionalPropertyTypes: true,
        noUncheckedIndexedAccess: true,
        types: [],
        outDir: "out"
      },
      include: ["*.ts"]
    })
  )
  await run(toolPath("tsc"), ["-p", "."], { cwd: folder })
  const said = (await run(process.execPath, ["out/stranger.js"], { cwd: folder })).trim()
  if (said !== "PowerOff") throw new PackagingError(`the program printed ${JSON.stringify(said)}, not PowerOff`)
  const bin = join(folder, "node_modules", ".bin", "troupe")
  if (!existsSync(bin)) throw new PackagingError("@troupe/node installed no troupe command")
  const version = await run(bin, ["--version"], { cwd: folder })
  const { version: expected } = JSON.parse(await readFile(join(root, "packages/node/package.json"), "utf8"))
  if (!version.includes(expected)) throw new PackagingError(`troupe --version said ${version.trim()}, not ${expected}`)
}

const main = async (): Promise<void> => {
  await step("building", build)
  const archivesFolder = join(root, ".cache", "packaging")
  await rm(archivesFolder, { recursive: true, force: true })
  await mkdir(archivesFolder, { recursive: true })
  const archives = await step("packing", () => pack(archivesFolder))
  for (const [index, archive] of archives.entries()) {
    await step(`checking @troupe/${PACKAGES[index]} with publint and arethetypeswrong`, async () => {
      await checkContents(archive)
      await checkFace(archive)
    })
  }
  // Not in the clone: there, what a package forgot to depend on would be found in the clone's node_modules.
  const stranger = await mkdtemp("/tmp/troupe-stranger-")
  try {
    await step("using the packages in an empty project", () => useThem(stranger, archives))
  } finally {
    await rm(stranger, { recursive: true, force: true })
  }
  process.stdout.write("The packages are in order.\n")
}

try {
  await main()
} catch (cause) {
  if (!(cause instanceof PackagingError)) throw cause
  const lines = cause.message.trimEnd().split("\n")
  const more = lines.length > LINES_MAX ? [`... ${lines.length - LINES_MAX} more lines`] : []
  process.stderr.write(`  FAILED: ${[...lines.slice(0, LINES_MAX), ...more].join("\n  ")}\n`)
  process.exitCode = 1
}
