// Brings what the commands of this clone need, then runs one of them under the Node that the clone brings along:
//
//   node scripts/bootstrap.mjs PROGRAM [ARGUMENT...]      e.g. node scripts/bootstrap.mjs node scripts/demo.ts
//
// Plain JavaScript that runs on Node 20: nothing is installed yet when it starts. Everything it fetches or writes stays
// inside the clone, in node_modules and .cache; a second run finds the stamp of the first and needs no network.
import { spawn, spawnSync } from "node:child_process"
import { createHash } from "node:crypto"
import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
  writeSync
} from "node:fs"
import { constants } from "node:os"
import { basename, delimiter, dirname, join } from "node:path"
import { fileURLToPath } from "node:url"

const PNPM_VERSION = "12.21.0"
const NODE_MAJOR_MIN = 20
const NPM_MAJOR_MIN = 8

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const cache = join(root, ".cache")
const bin = join(root, "node_modules", ".bin")
const pnpmHome = join(cache, "pnpm", PNPM_VERSION)
const pnpmBin = join(pnpmHome, "node_modules", ".bin")
const stampFile = join(root, "node_modules", ".bootstrap-stamp")
const lockFile = join(cache, "bootstrap.lock")

const say = (text) => process.stderr.write(`${text}\n`)

class Refusal extends Error {
  constructor(message, code = 1) {
    super(message)
    this.code = code
  }
}

/** The environment in which package managers and tools keep their files inside the clone. */
const environment = () => ({
  ...process.env,
  PATH: [bin, pnpmBin, process.env.PATH ?? ""].join(delimiter),
  TMPDIR: join(cache, "tmp"),
  XDG_CACHE_HOME: join(cache, "xdg", "cache"),
  XDG_DATA_HOME: join(cache, "xdg", "data"),
  XDG_STATE_HOME: join(cache, "xdg", "state"),
  DPRINT_CACHE_DIR: join(cache, "dprint"),
  PNPM_HOME: pnpmBin,
  // pnpm keeps its locks here if the folder is the user's alone, otherwise in /tmp.
  XDG_RUNTIME_DIR: join(cache, "run"),
  npm_config_cache: join(cache, "npm"),
  npm_config_update_notifier: "false"
})

const checkMachine = () => {
  const version = process.versions.node
  if (Number(version.split(".")[0]) < NODE_MAJOR_MIN) {
    throw new Refusal(
      `Node ${version} is too old to begin with: Node ${NODE_MAJOR_MIN} or newer is needed (it fetches a newer one itself).`
    )
  }
  if (process.platform !== "linux") {
    throw new Refusal(
      `Troupe's commands run on Linux, and this is ${process.platform}. Use a Linux machine or a Linux virtual machine.`
    )
  }
  if (process.arch !== "x64" && process.arch !== "arm64") {
    throw new Refusal(
      `There is no Node for this processor (${process.arch}) on the npm registry: x64 or arm64 is needed.`
    )
  }
  const loader = process.arch === "x64" ? "/lib64/ld-linux-x86-64.so.2" : "/lib/ld-linux-aarch64.so.1"
  if (!existsSync(loader)) {
    throw new Refusal(`This Linux has no glibc (there is no ${loader}), which Node's own builds need. Use e.g. Debian.`)
  }
}

/** What the installed packages depend on. */
const wantedStamp = () => {
  const hash = createHash("sha256")
  hash.update(`${PNPM_VERSION} ${process.platform} ${process.arch}\n`)
  for (const file of ["pnpm-lock.yaml", "pnpm-workspace.yaml"]) hash.update(readFileSync(join(root, file)))
  const folders = readdirSync(join(root, "packages")).toSorted().map((name) => join("packages", name))
  for (const folder of [".", "test", ...folders]) {
    const path = join(root, folder, "package.json")
    if (!existsSync(path)) continue
    const { dependencies, devDependencies, optionalDependencies, peerDependencies } = JSON.parse(
      readFileSync(path, "utf8")
    )
    hash.update(JSON.stringify([folder, dependencies, devDependencies, optionalDependencies, peerDependencies]))
  }
  return hash.digest("hex")
}

const isInstalled = (stamp) =>
  existsSync(join(bin, "node")) && existsSync(stampFile) && readFileSync(stampFile, "utf8").trim() === stamp

let child

/** Runs a program to its end; the terminal's Ctrl-C reaches it by itself, a signal sent to us is passed on. */
const run = (command, args, options = {}) =>
  new Promise((resolve, reject) => {
    let errors = ""
    child = spawn(command, args, { cwd: root, env: environment(), stdio: "inherit", ...options })
    child.stderr?.on("data", (chunk) => {
      errors += chunk
    })
    child.on("error", (cause) => reject(new Refusal(`${command} could not be run: ${cause.message}`, 127)))
    child.on("close", (code, signal) => {
      child = undefined
      resolve({ code: code ?? 128 + (constants.signals[signal] ?? 0), signal, errors })
    })
  })

let interrupted
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) {
  process.on(signal, () => {
    interrupted ??= signal
    // The terminal sends SIGINT to the whole group; the others come to this process alone.
    if (signal !== "SIGINT") child?.kill(signal)
  })
}

const checkInterrupted = () => {
  if (interrupted === undefined) return
  throw new Refusal(
    "Interrupted. Nothing is broken: the same command goes on where this one stopped.",
    128 + constants.signals[interrupted]
  )
}

/** How to call npm: the one that runs this script, else the one on the path. */
const findNpm = () => {
  const script = process.env.npm_execpath
  if (script !== undefined && basename(script) === "npm-cli.js" && existsSync(script)) {
    return { command: process.env.npm_node_execpath ?? process.execPath, args: [script] }
  }
  return { command: "npm", args: [] }
}

const NETWORK_ERROR =
  /ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH|ERR_SOCKET_TIMEOUT/

const installPnpm = async () => {
  if (existsSync(join(pnpmBin, "pnpm"))) return
  const npm = findNpm()
  const asked = spawnSync(npm.command, [...npm.args, "--version"], { cwd: root, env: environment(), encoding: "utf8" })
  if (asked.status !== 0) {
    throw new Refusal("There is no npm here: install npm (Debian: apt-get install npm) and try again.")
  }
  const version = asked.stdout.trim()
  if (!(Number(version.split(".")[0]) >= NPM_MAJOR_MIN)) {
    throw new Refusal(
      `npm ${version} is too old: npm ${NPM_MAJOR_MIN} or newer is needed (npm install --global npm@latest).`
    )
  }
  say(`- fetching pnpm ${PNPM_VERSION} with npm ${version}`)
  const folder = `${pnpmHome}.new`
  rmSync(folder, { recursive: true, force: true })
  mkdirSync(folder, { recursive: true })
  const quiet = ["--no-audit", "--no-fund", "--loglevel=error", "--fetch-retries=1"]
  const result = await run(
    npm.command,
    [...npm.args, "install", ...quiet, "--prefix", folder, `pnpm@${PNPM_VERSION}`],
    { stdio: ["ignore", "ignore", "pipe"], cwd: folder }
  )
  checkInterrupted()
  if (result.code !== 0) {
    const why = result.errors.trim().split("\n").slice(0, 8).map((line) => `  ${line}`).join("\n")
    throw new Refusal(
      NETWORK_ERROR.test(result.errors)
        ? `The npm registry cannot be reached, and the first run needs it (later ones do not). npm said:\n${why}`
        : `npm could not install pnpm ${PNPM_VERSION}. npm said:\n${why}`
    )
  }
  rmSync(pnpmHome, { recursive: true, force: true })
  renameSync(folder, pnpmHome)
}

/** A node_modules that the user's own pnpm made keeps its store: pnpm would otherwise throw all of it away. */
const storeOptions = () => {
  const modules = join(root, "node_modules", ".modules.yaml")
  const store = join(cache, "pnpm-store")
  const used = existsSync(modules) ? /"?storeDir"?: "?([^",\n]+)/.exec(readFileSync(modules, "utf8"))?.[1] : undefined
  return used === undefined || used.startsWith(store) ? [`--store-dir=${store}`] : []
}

const install = async (stamp) => {
  await installPnpm()
  say("- fetching dependencies and Node with pnpm (about 300 MB the first time)")
  const reporter = process.stdout.isTTY ? "default" : "append-only"
  const result = await run(join(pnpmBin, "pnpm"), [
    "install",
    "--frozen-lockfile",
    "--prefer-offline",
    `--reporter=${reporter}`,
    ...storeOptions()
  ], { stdio: ["ignore", 2, 2] })
  checkInterrupted()
  if (result.code !== 0) {
    throw new Refusal(
      "pnpm could not install the dependencies: its message is above. What it fetched so far is kept. If it speaks of the\n" +
        "network: the first run needs the npm registry, later ones do not."
    )
  }
  if (!existsSync(join(bin, "node"))) {
    throw new Refusal(
      `pnpm did not bring the package node-linux-${process.arch}: are optional dependencies switched off?`
    )
  }
  writeFileSync(stampFile, `${stamp}\n`)
}

const isAlive = (pid) => {
  try {
    process.kill(pid, 0)
    return true
  } catch (cause) {
    return cause.code === "EPERM"
  }
}

/** One installation at a time: a second command that is started meanwhile waits for the first. */
const withLock = async (body) => {
  let told = false
  for (;;) {
    try {
      const file = openSync(lockFile, "wx")
      writeSync(file, String(process.pid))
      closeSync(file)
      break
    } catch (cause) {
      if (cause.code !== "EEXIST") throw cause
      let holder = 0
      try {
        holder = Number(readFileSync(lockFile, "utf8"))
      } catch {
        continue
      }
      if (holder !== 0 && !isAlive(holder)) {
        rmSync(lockFile, { force: true })
        continue
      }
      if (!told) say(`- waiting for another installation in this clone (process ${holder})`)
      told = true
      await new Promise((resolve) => setTimeout(resolve, 250))
      checkInterrupted()
    }
  }
  try {
    return await body()
  } finally {
    rmSync(lockFile, { force: true })
  }
}

const main = async () => {
  checkMachine()
  mkdirSync(join(cache, "tmp"), { recursive: true })
  mkdirSync(join(cache, "run"), { recursive: true, mode: 0o700 })
  const stamp = wantedStamp()
  if (!isInstalled(stamp)) {
    await withLock(async () => {
      if (isInstalled(stamp)) return
      say("Preparing this clone; this happens once, everything stays inside it.")
      await install(stamp)
    })
  }
  checkInterrupted()
  const [program, ...args] = process.argv.slice(2)
  if (program === undefined) return 0
  return (await run(join(bin, program), args)).code
}

try {
  process.exitCode = await main()
} catch (cause) {
  if (!(cause instanceof Refusal)) throw cause
  say(cause.message)
  process.exitCode = cause.code
}
