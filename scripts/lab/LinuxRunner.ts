// Where an unmodified Linux can be run under this clone's VMM: on the host's own KVM, or in the nested lab.
import { spawn } from "node:child_process"
import { createHash } from "node:crypto"
import { constants } from "node:fs"
import { access, readFile, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { cachePath, cloneRoot, once } from "./Cache.ts"
import { watched } from "./ExitWatch.ts"
import { buildGuestInitramfs, type GuestAction, REPORT } from "./GuestInitramfs.ts"
import { JOB_SECONDS, Lab } from "./Lab.ts"
import { givenKernel, type LinuxKernel, provideKernel } from "./LinuxKernel.ts"
import { type Progress, toStandardError } from "./Progress.ts"
import { missingForLab } from "./Requirements.ts"
import { labPaths } from "./RootImage.ts"
import { quoted, troupeArguments, type TroupeRun } from "./TroupeCommand.ts"

/** A guest of the distribution's kernel and the busybox initramfs. */
export interface LinuxGuest {
  readonly action: GuestAction
  /** The kernel as it is shipped, or the ELF file inside it. */
  readonly image: "bzImage" | "vmlinux"
  readonly bootProtocol?: TroupeRun["bootProtocol"]
  readonly cpus?: number
  /** MiB. */
  readonly memory?: number
  /** More words for the kernel's command line. */
  readonly cmdline?: string
  readonly timeoutSeconds?: number
  readonly onOutput?: (chunk: Buffer) => void
}

/** How it ended. */
export interface LinuxOutcome {
  /** The exit code of `troupe run`; undefined when its time was up. */
  readonly code: number | undefined
  /** Everything printed: the guest's console, and what `troupe run` itself said. */
  readonly output: string
  readonly seconds: number
  /** The guest's report by key, see `GuestInitramfs.ts`; a key that came more than once has all its lines. */
  readonly report: ReadonlyMap<string, string>
  /** The command line that the guest was given. */
  readonly cmdline: string
}

/** An application that makes its own guest: a source of the clone, see `test/lab/hosts`. */
export interface HostProgram {
  /** Relative to the clone. */
  readonly source: string
  readonly args?: ReadonlyArray<string>
  readonly timeoutSeconds?: number
  readonly onOutput?: (chunk: Buffer) => void
}

/** What it left: the steps that went well, in order, and everything printed. */
export interface HostOutcome {
  readonly code: number | undefined
  readonly output: string
  readonly seconds: number
  readonly steps: ReadonlyArray<string>
}

/** Runs guests in one place. */
export interface LinuxRunner extends AsyncDisposable {
  /** The place, for people. */
  readonly where: string
  readonly kernel: LinuxKernel
  /** The lab, where it is one. */
  readonly lab: Lab | undefined
  readonly run: (guest: LinuxGuest) => Promise<LinuxOutcome>
  readonly runHost: (program: HostProgram) => Promise<HostOutcome>
}

export interface LinuxRunnerOptions {
  readonly progress?: Progress
  /** A bzImage for the guests instead of Debian's cloud kernel or what `TROUPE_KERNEL` names. */
  readonly kernel?: string | undefined
  readonly signal?: AbortSignal | undefined
  readonly name?: string
  /** A lab ends after this many seconds, see {@link Lab}. */
  readonly limitSeconds?: number
}

/** Why this host's own KVM cannot boot Linux, in a line; undefined when it can, as far as looking can tell. */
const lookAtHost = async (): Promise<string | undefined> => {
  if (process.platform !== "linux" || process.arch !== "x64") return "the host is not Linux on x86-64"
  try {
    await access("/dev/kvm", constants.R_OK | constants.W_OK)
  } catch (cause) {
    return `/dev/kvm cannot be opened (${cause instanceof Error ? cause.message : String(cause)})`
  }
  // KVM without either runs kernel code by emulating it, and the emulator lacks instructions that Linux needs.
  const flags = /^flags\s*:(.*)$/m.exec(await readFile("/proc/cpuinfo", "utf8"))?.[1]?.split(" ") ?? []
  return flags.includes("vmx") || flags.includes("svm")
    ? undefined
    : "the host's processor offers neither VMX nor SVM, so its KVM emulates kernel code and lacks instructions that Linux needs"
}

/** Why no unmodified Linux can be run here, neither on the host's KVM nor in a lab; undefined when it can. */
export const missingForLinux = async (): Promise<string | undefined> =>
  await lookAtHost() === undefined ? undefined : missingForLab()

const reportOf = (output: string): ReadonlyMap<string, string> => {
  const report = new Map<string, string>()
  for (const line of output.split(/\r?\n/)) {
    if (!line.startsWith(REPORT)) continue
    const [key, ...words] = line.slice(REPORT.length).split(" ")
    const value = words.join(" ")
    const before = report.get(key!)
    report.set(key!, before === undefined ? value : `${before}\n${value}`)
  }
  return report
}

const cmdlineOf = (guest: LinuxGuest): string =>
  ["console=ttyS0 panic=-1 quiet", guest.cmdline, `troupe.action=${guest.action}`].filter(Boolean).join(" ")

const troupeRunOf = (guest: LinuxGuest, files: Record<"bzImage" | "vmlinux" | "initrd", string>): TroupeRun => ({
  kernel: files[guest.image],
  initrd: files.initrd,
  cmdline: cmdlineOf(guest),
  cpus: guest.cpus ?? 1,
  memory: guest.memory ?? 512,
  bootProtocol: guest.bootProtocol ?? "auto"
})

interface NodeRun {
  readonly interactive: boolean
  readonly timeoutSeconds: number | undefined
  readonly onOutput: ((chunk: Buffer) => void) | undefined
}

/** Runs Node on this host. */
const runNode = async (
  args: ReadonlyArray<string>,
  { interactive, onOutput, timeoutSeconds }: NodeRun
): Promise<{ readonly code: number | undefined; readonly output: string; readonly seconds: number }> => {
  const begun = performance.now()
  const child = spawn(process.execPath, args, {
    stdio: interactive ? "inherit" : ["ignore", "pipe", "pipe"],
    cwd: cloneRoot
  })
  let late = false
  const timer = interactive ? undefined : setTimeout(() => {
    late = true
    child.kill("SIGKILL")
  }, (timeoutSeconds ?? JOB_SECONDS) * 1000)
  const chunks: Array<Buffer> = []
  const keep = (chunk: Buffer): void => {
    chunks.push(chunk)
    onOutput?.(chunk)
  }
  child.stdout?.on("data", keep)
  child.stderr?.on("data", keep)
  const code = await new Promise<number | null>((resolve, reject) => {
    child.on("error", reject)
    child.on("close", resolve)
  }).finally(() => clearTimeout(timer))
  return {
    code: late ? undefined : code ?? -1,
    output: Buffer.concat(chunks).toString(),
    seconds: (performance.now() - begun) / 1000
  }
}

const runOnHost = async (kernel: LinuxKernel, initrd: string, guest: LinuxGuest): Promise<LinuxOutcome> => {
  const args = troupeArguments(troupeRunOf(guest, { bzImage: kernel.bzImage, vmlinux: kernel.vmlinux, initrd }))
  const { onOutput, timeoutSeconds } = guest
  const result = await runNode(args, { interactive: guest.action === "shell", timeoutSeconds, onOutput })
  return { ...result, report: reportOf(result.output), cmdline: cmdlineOf(guest) }
}

const stepsOf = (output: string): ReadonlyArray<string> =>
  [...output.matchAll(/^ok (.*) [\d.]+ s$/gm)].map((match) => match[1]!)

const runHostOnHost = async (kernel: LinuxKernel, program: HostProgram): Promise<HostOutcome> => {
  const files = ["--kernel", kernel.vmlinux, "--busybox", kernel.busybox, "--modules", kernel.modules?.folder ?? ""]
  const args = ["--disable-warning=ExperimentalWarning", join(cloneRoot, program.source), ...files]
  const { onOutput, timeoutSeconds } = program
  const result = await runNode([...args, ...program.args ?? []], { interactive: false, timeoutSeconds, onOutput })
  return { ...result, steps: stepsOf(result.output) }
}

const runHostInLab = async (lab: Lab, program: HostProgram): Promise<HostOutcome> => {
  const result = await lab.run({
    script: watched([labPaths.node, program.source, ...program.args ?? []].map(quoted).join(" ")),
    ...(program.timeoutSeconds === undefined ? {} : { timeoutSeconds: program.timeoutSeconds }),
    ...(program.onOutput === undefined ? {} : { onOutput: program.onOutput })
  })
  return { ...result, steps: stepsOf(result.output) }
}

const runInLab = async (lab: Lab, guest: LinuxGuest): Promise<LinuxOutcome> => {
  const args = troupeArguments(troupeRunOf(guest, labPaths), labPaths.repository)
  const result = await lab.run({
    script: watched([labPaths.node, ...args].map(quoted).join(" ")),
    ...(guest.timeoutSeconds === undefined ? {} : { timeoutSeconds: guest.timeoutSeconds }),
    ...(guest.onOutput === undefined ? {} : { onOutput: guest.onOutput })
  })
  return { ...result, report: reportOf(result.output), cmdline: cmdlineOf(guest) }
}

const provideInitrd = async (kernel: LinuxKernel): Promise<string> => {
  const initrd = await buildGuestInitramfs(kernel)
  const digest = createHash("sha256").update(initrd).digest("hex").slice(0, 16)
  return once(cachePath("linux", `guest-${digest}.cpio.gz`), (path) => writeFile(path, initrd))
}

/**
 * Whether an unmodified Linux boots on this host's own KVM: where looking at the host does not say no, it is tried with
 * `kernel`. Returns the reason when it cannot.
 */
export const canBootLinux = async (
  kernel: LinuxKernel
): Promise<{ readonly can: boolean; readonly reason: string }> => {
  const reason = await lookAtHost()
  if (reason !== undefined) return { can: false, reason }
  const initrd = await provideInitrd(kernel)
  const outcome = await runOnHost(kernel, initrd, { action: "poweroff", image: "vmlinux", timeoutSeconds: 60 })
  return outcome.report.has("uname") && outcome.code === 0
    ? { can: true, reason: "the host's own KVM boots Linux" }
    : { can: false, reason: `a trial boot on the host's own KVM failed (exit code ${outcome.code ?? "none in 60 s"})` }
}

/** Runs guests on the host's own KVM where that can boot Linux, and otherwise in a lab, which is started here. */
export const openLinuxRunner = async (options: LinuxRunnerOptions = {}): Promise<LinuxRunner> => {
  const progress = options.progress ?? toStandardError
  const given = options.kernel ?? givenKernel()
  const kernel = await provideKernel({ progress, kernel: given })
  const host = await canBootLinux(kernel)
  progress(`${host.reason}: ${host.can ? "using that" : "using the nested lab"}`)
  if (host.can) {
    const initrd = await provideInitrd(kernel)
    return {
      where: "on this host's own KVM",
      kernel,
      lab: undefined,
      run: (guest) => runOnHost(kernel, initrd, guest),
      runHost: (program) => runHostOnHost(kernel, program),
      [Symbol.asyncDispose]: () => Promise.resolve()
    }
  }
  const lab = await Lab.start({
    progress,
    kernel: given,
    signal: options.signal,
    name: options.name ?? "lab",
    ...(options.limitSeconds === undefined ? {} : { limitSeconds: options.limitSeconds })
  })
  return {
    where: "in the nested lab",
    kernel,
    lab,
    run: (guest) => runInLab(lab, guest),
    runHost: (program) => runHostInLab(lab, program),
    [Symbol.asyncDispose]: () => lab[Symbol.asyncDispose]()
  }
}
