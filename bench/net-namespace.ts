// One run of the small guest on a TAP interface, under Troupe or under QEMU, in a network namespace that this process is root of.
// Arguments: `troupe` or `qemu`, the guest's words, what the host does meanwhile (`ask`, `flood` or nothing) and a number for that.
// Prints the guest's lines, the host's round trips and the VMM's processor time as one object of JSON.
import { execFileSync, spawn } from "node:child_process"
import { readdirSync, readFileSync } from "node:fs"
import { join } from "node:path"
import { createInterface } from "node:readline"
import { fileURLToPath } from "node:url"

const root = fileURLToPath(new URL("..", import.meta.url))
const KERNEL = join(root, "test", "guest", "troupe-guest.elf")
const MAC = "02:00:00:00:00:01"
const [machine = "troupe", words = "", task = "", number = "0"] = process.argv.slice(2)

const ip = (...args: ReadonlyArray<string>) => execFileSync("ip", args)
ip("link", "set", "lo", "up")
ip("tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
ip("addr", "add", "10.1.0.1/24", "dev", "tap0")
ip("link", "set", "tap0", "up")
// A guest that only listens does not answer ARP.
ip("neigh", "replace", "10.1.0.2", "lladdr", MAC, "dev", "tap0")

const commands = {
  troupe: [
    process.execPath,
    "--disable-warning=ExperimentalWarning",
    join(root, "packages/node/src/bin/troupe.ts"),
    ...["run", "--quiet", "--memory", "64M", "--net", `tap=tap0,mac=${MAC}`, "--kernel", KERNEL],
    ...["--cmdline", `quiet ${words}`]
  ],
  qemu: [
    "qemu-system-x86_64",
    ...["-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,auto-kernel-cmdline=off,isa-serial=on"],
    ...["-enable-kvm", "-cpu", "host", "-m", "64", "-nodefaults", "-no-user-config", "-display", "none"],
    ...["-serial", "stdio", "-kernel", KERNEL, "-append", `quiet ${words}`],
    ...["-global", "virtio-mmio.force-legacy=false"],
    ...["-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no,vhost=off"],
    ...["-device", `virtio-net-device,netdev=n,mac=${MAC}`]
  ]
}

/** The host's part, each in a process of its own. */
const programs: Readonly<Record<string, string>> = {
  ask: `
    const s = require("node:dgram").createSocket("udp4"), n = Number(process.argv[1]), trips = []
    let wake
    s.on("message", () => wake())
    s.bind(0, "10.1.0.1", async () => {
      for (let i = 0; i < n; i++) {
        const from = process.hrtime.bigint()
        s.send(Buffer.alloc(64), 7, "10.1.0.2")
        await new Promise((resolve) => (wake = resolve))
        trips.push(Number(process.hrtime.bigint() - from) / 1000)
      }
      console.log(JSON.stringify(trips))
      s.close()
    })`,
  flood: `
    const s = require("node:dgram").createSocket("udp4"), datagram = Buffer.alloc(Number(process.argv[1]), 0x5a)
    const more = () => { for (let i = 0; i < 64; i++) s.send(datagram, 9, "10.1.0.2"); setImmediate(more) }
    s.bind(0, "10.1.0.1", more)`
}

/** Nanoseconds for which threads of a process have run: its first one, and all together. */
const processorTime = (pid: number): { readonly first: number; readonly all: number } => {
  const ran = (thread: string) => Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "utf8").split(" ")[0])
  return {
    first: ran(String(pid)),
    all: readdirSync(`/proc/${pid}/task`).reduce((sum, thread) => sum + ran(thread), 0)
  }
}

const [command = "", ...args] = commands[machine === "qemu" ? "qemu" : "troupe"]
const vmm = spawn(command, args, { stdio: ["ignore", "pipe", "inherit"] })
const lines: Array<string> = []
let trips: ReadonlyArray<number> = []
/** At the end of each of the guest's measurements. */
const times: Array<ReturnType<typeof processorTime>> = []
let host: ReturnType<typeof spawn> | undefined
const hostDone = new Promise<void>((resolve) => {
  createInterface({ input: vmm.stdout }).on("line", (text) => {
    const line = text.trim().replace("troupe-guest: ", "")
    lines.push(line)
    if (line.startsWith("net bench") && vmm.pid !== undefined) times.push(processorTime(vmm.pid))
    const program = programs[task]
    if (line !== "net ready" || program === undefined || host !== undefined) return
    const child = spawn(process.execPath, ["-e", program, number], { stdio: ["ignore", "pipe", "inherit"] })
    host = child
    createInterface({ input: child.stdout }).on("line", (text) => (trips = JSON.parse(text)))
    child.on("close", () => resolve())
  }).on("close", () => {
    if (task === "flood" || host === undefined) resolve()
  })
})
await new Promise((resolve) => vmm.on("close", resolve))
if (task === "flood") host?.kill()
await hostDone
const [warm, end] = times.slice(-2)
const used = warm === undefined || end === undefined
  ? undefined
  : { first: end.first - warm.first, all: end.all - warm.all }
process.stdout.write(`${JSON.stringify({ lines, trips, used })}\n`)
