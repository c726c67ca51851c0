// The same guest, words and devices under our VMM and under QEMU's microvm, each as a process of its own on this host's KVM.
import { type ChildProcess, spawn } from "node:child_process"
import { join } from "node:path"
import { BenchError, root } from "./Row.ts"

/** The two that are compared. */
export type Vmm = "troupe" | "qemu"

const KERNEL = join(root, "test", "guest", "troupe-guest.elf")
const TROUPE = join(root, "packages", "node", "src", "bin", "troupe.ts")
const MEMORY = "128M"
const LIMIT_MS = 120_000

/** A device of the guest, as each of the two is told of it. */
export interface BenchDevice {
  readonly troupe: ReadonlyArray<string>
  readonly qemu: ReadonlyArray<string>
}

/** A raw disk in a file, through the host's page cache. */
export const disk = (path: string): BenchDevice => ({
  troupe: ["--disk", path],
  qemu: [
    "-drive",
    `file=${path},if=none,id=disk0,format=raw,cache=writeback,aio=threads`,
    "-device",
    "virtio-blk-device,drive=disk0"
  ]
})

/** A TAP interface that exists. */
export const tap = (name: string, mac: string): BenchDevice => ({
  troupe: ["--net", `tap=${name},mac=${mac}`],
  qemu: [
    "-netdev",
    `tap,id=net0,ifname=${name},script=no,downscript=no`,
    "-device",
    `virtio-net-device,netdev=net0,mac=${mac},mrg_rxbuf=on`
  ]
})

const commandOf = (vmm: Vmm, device: BenchDevice, words: string): readonly [string, ReadonlyArray<string>] =>
  vmm === "troupe"
    ? [
      process.execPath,
      [
        "--disable-warning=ExperimentalWarning",
        TROUPE,
        "run",
        "--quiet",
        "--no-rng",
        "--memory",
        MEMORY,
        "--kernel",
        KERNEL,
        "--cmdline",
        words,
        ...device.troupe
      ]
    ]
    : [
      "qemu-system-x86_64",
      [
        ..."-M microvm,acpi=on,rtc=on -accel kvm -cpu host,-popcnt,-cx16 -nodefaults -no-user-config".split(" "),
        ..."-nographic -serial stdio -global virtio-mmio.force-legacy=false".split(" "),
        "-m",
        MEMORY,
        "-kernel",
        KERNEL,
        "-append",
        words,
        ...device.qemu
      ]
    ]

/** A guest that runs. */
export interface RunningGuest {
  /** Returns once the guest has printed this. */
  readonly printed: (text: string) => Promise<void>
  /** Waits for its end, and returns what it printed. */
  readonly output: Promise<string>
}

/** Starts the guest with the words of its command line; it ends with `poweroff`. */
export const startGuest = (vmm: Vmm, device: BenchDevice, words: string): RunningGuest => {
  const [command, args] = commandOf(vmm, device, `quiet ${words} poweroff`)
  const child: ChildProcess = spawn(command, args, { stdio: ["ignore", "pipe", "pipe"], timeout: LIMIT_MS })
  let text = ""
  let waiting: Array<{ readonly text: string; readonly resolve: () => void }> = []
  const take = (chunk: Buffer) => {
    text += chunk.toString()
    waiting = waiting.filter((wait) => {
      if (!text.includes(wait.text)) return true
      wait.resolve()
      return false
    })
  }
  child.stdout?.on("data", take)
  child.stderr?.on("data", take)
  const output = new Promise<string>((resolve, reject) => {
    child.on("error", (cause) => reject(new BenchError(`${command} could not be run (${cause.message})`)))
    child.on("close", (code) =>
      code === 0
        ? resolve(text)
        : reject(new BenchError(`${vmm} ended with ${code} after: ${text.split("\n").slice(-6).join(" / ")}`)))
  })
  return {
    output,
    printed: (wanted) =>
      text.includes(wanted)
        ? Promise.resolve()
        : Promise.race([
          new Promise<void>((resolve) => waiting.push({ text: wanted, resolve })),
          output.then(() => Promise.reject(new BenchError(`${vmm} ended before it printed ${wanted}`)))
        ])
  }
}

/** What the guest counted in a loop: the words `name=number` of its line about the bench. */
export type BenchLine = Readonly<Record<string, number>>

/** The lines `troupe-guest: DEVICE bench WHAT ...` of an output, by WHAT and, for disks, the depth. */
export const benchLines = (output: string): ReadonlyMap<string, BenchLine> =>
  new Map(
    Array.from(
      output.matchAll(/troupe-guest: \w+ bench (\S+)(?: depth (\d+))? (.*)/g),
      ([, what = "", depth, rest = ""]) => [
        depth === undefined ? what : `${what} ${depth}`,
        Object.fromEntries(
          Array.from(rest.matchAll(/(\w+)[= ](\d+)/g), ([, name = "", value]) => [name, Number(value)])
        )
      ]
    )
  )
