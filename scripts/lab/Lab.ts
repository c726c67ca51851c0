// The nested lab: an emulated AMD machine whose Linux has a real KVM, in which commands of the clone are run.
import { type ChildProcess, spawn } from "node:child_process"
import { randomBytes } from "node:crypto"
import { createWriteStream, type WriteStream } from "node:fs"
import { mkdir, rm, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { Duplex } from "node:stream"
import { cachePath, sweep, temporaryName } from "./Cache.ts"
import { checkoutEntries } from "./Checkout.ts"
import { encodeCpio, filesOfCpio } from "./Cpio.ts"
import { LabError } from "./LabError.ts"
import { givenKernel, provideKernel } from "./LinuxKernel.ts"
import { buildOuterInitramfs } from "./OuterInitramfs.ts"
import { type Progress, toStandardError } from "./Progress.ts"
import { EMULATOR, requireLab } from "./Requirements.ts"
import { provideRootImage } from "./RootImage.ts"

export interface LabOptions {
  /** Names the log of the outer machine's console, `.cache/lab/NAME.log`. */
  readonly name?: string
  readonly progress?: Progress
  /** The outer machine ends after this many seconds, whatever happens. {@link LAB_SECONDS} unless given. */
  readonly limitSeconds?: number
  /** Memory of the outer machine in MiB. 3072 unless given. */
  readonly memory?: number
  /** A bzImage for the guests; the outer machine always has Debian's cloud kernel. */
  readonly kernel?: string | undefined
  readonly signal?: AbortSignal | undefined
}

/** A shell script to be run in the lab, in the folder `/repo`; files that it leaves in `$FILES` are brought back. */
export interface LabJob {
  readonly script: string
  /** The script and everything it started are killed after this many seconds. {@link JOB_SECONDS} unless given. */
  readonly timeoutSeconds?: number
  /** Called with what the script prints, as it comes. */
  readonly onOutput?: (chunk: Buffer) => void
}

/** What a job left. */
export interface LabResult {
  /** The script's exit code; undefined when its time was up. */
  readonly code: number | undefined
  /** Seconds that it took by the outer machine's clock. */
  readonly seconds: number
  /** What it printed, standard output and error together. */
  readonly output: string
  readonly files: ReadonlyMap<string, Buffer>
}

interface Pending {
  readonly marker: Buffer
  readonly onOutput: ((chunk: Buffer) => void) | undefined
  readonly resolve: (result: LabResult) => void
  readonly reject: (error: LabError) => void
  /** What came and has not been passed on yet, because it might be the beginning of the marker. */
  rest: Buffer
  output: Array<Buffer>
}

/** A prefix for the command that must not outlive this process, not even when it is killed. */
const WITH_PARENT = ["setpriv", "--pdeathsig", "KILL", "--"] as const

/**
 * The outer machine: an AMD processor with SVM and nested paging, a channel to the host on descriptor 3, and a pulse on descriptor 4.
 * One processor, because with more QEMU before 8.1 may go on with code that another processor has changed meanwhile, and Linux and V8
 * change theirs. The pulse interrupts the processor again and again, because QEMU loses an interrupt now and then, and the next one brings
 * it along; for that each byte has to be an interrupt, hence no event indices. See `docs/lab.md`.
 */
const FIXED_OPTIONS: ReadonlyArray<string> = [
  "-accel tcg -M q35 -cpu max,+svm,+npt -smp 1 -nodefaults -no-user-config -no-reboot",
  "-display none -serial stdio",
  "-device virtio-serial-pci,event_idx=off",
  "-chardev socket,id=agent,fd=3 -device virtserialport,nr=1,chardev=agent",
  "-chardev socket,id=pulse,fd=4 -device virtserialport,nr=2,chardev=pulse"
].flatMap((options) => options.split(" "))

/**
 * Limits are there for what hangs, not for what is slow: on a quiet host most jobs take less than a twentieth of theirs, and a
 * host may have much else to do.
 */
export const JOB_SECONDS = 780
const LAB_SECONDS = 7200

/** How long the outer machine may take to be there: some 5 s on a quiet host. */
const START_SECONDS = 300

/** How often the outer machine is interrupted. */
const PULSE_MILLIS = 200

/** How long an answer may be overdue. */
const PATIENCE_SECONDS = 90

const CONSOLE_TAIL_BYTES = 4096

/** The longest line that follows a marker. */
const STATUS_BYTES = 128

const running = new Set<ChildProcess>()
process.on("exit", () => {
  for (const child of running) child.kill("SIGKILL")
})

/** A started lab. Dispose of it to end the outer machine. */
export class Lab implements AsyncDisposable {
  /** The outer machine's console, for when something goes wrong. */
  readonly log: string
  readonly #child: ChildProcess
  readonly #channel: Duplex
  readonly #ended: Promise<void>
  #pending: Pending | undefined
  #queue: Promise<unknown> = Promise.resolve()
  #console = ""
  #over: string | undefined

  private constructor(child: ChildProcess, log: string, folder: string, stream: WriteStream) {
    this.#child = child
    const [, , , channel, pulse] = child.stdio
    if (!(channel instanceof Duplex && pulse instanceof Duplex)) {
      throw new LabError("the channels to the outer machine could not be made")
    }
    this.#channel = channel
    const beating = setInterval(() => {
      if (pulse.writableLength === 0) pulse.write(".")
    }, PULSE_MILLIS).unref()
    this.log = log
    running.add(child)
    const keep = (chunk: Buffer): void => {
      stream.write(chunk)
      this.#console = (this.#console + chunk.toString("latin1")).slice(-CONSOLE_TAIL_BYTES)
    }
    child.stdout?.on("data", keep)
    child.stderr?.on("data", keep)
    this.#channel.on("data", (chunk: Buffer) => this.#receive(chunk))
    for (const written of [channel, pulse]) {
      written.on("error", () => {
        // The machine's end is seen below; writing to one that has ended is not another failure.
      })
    }
    this.#ended = new Promise((resolve) => {
      const end = (why: string): void => {
        running.delete(child)
        clearInterval(beating)
        stream.end()
        this.#end(why)
        void rm(folder, { recursive: true, force: true }).then(() => resolve())
      }
      // A program that cannot be started has an error and no close.
      child.on("error", (cause) => end(`${EMULATOR} could not be run: ${cause.message}`))
      child.on("close", (code, signal) => end(`the outer machine ended (${signal ?? `exit code ${code}`})`))
    })
  }

  /** Starts the outer machine and waits until it takes jobs. Fetches and builds what is not in the cache. */
  static async start(options: LabOptions = {}): Promise<Lab> {
    await requireLab()
    const progress = options.progress ?? toStandardError
    const limit = options.limitSeconds ?? LAB_SECONDS
    const kernel = await provideKernel({ progress })
    const given = options.kernel ?? givenKernel()
    const guestKernel = given === undefined ? kernel : await provideKernel({ progress, kernel: given })
    const rootImage = await provideRootImage(guestKernel, progress)
    const name = options.name ?? "lab"
    await sweep(cachePath("lab"))
    const folder = temporaryName(cachePath("lab", "run"))
    await mkdir(folder, { recursive: true })
    const initrd = join(folder, "initrd")
    const sources = join(folder, "sources")
    await writeFile(initrd, await buildOuterInitramfs(kernel))
    const archive = encodeCpio(await checkoutEntries())
    await writeFile(sources, Buffer.concat([archive, Buffer.alloc(512 - (archive.length % 512))]))
    const log = cachePath("lab", `${name}.log`)
    progress(`starting the lab's outer machine under software emulation (console in ${log})`)
    const begun = performance.now()
    const child = spawn(WITH_PARENT[0], [
      ...WITH_PARENT.slice(1),
      EMULATOR,
      ...FIXED_OPTIONS,
      "-m",
      String(options.memory ?? 3072),
      "-kernel",
      kernel.bzImage,
      "-initrd",
      initrd,
      "-append",
      `console=ttyS0 panic=-1 quiet mitigations=off troupe.limit=${limit}`,
      "-drive",
      `file=${escaped(rootImage)},if=virtio,format=raw,readonly=on`,
      "-drive",
      `file=${escaped(sources)},if=virtio,format=raw,readonly=on`
    ], { stdio: ["ignore", "pipe", "pipe", "pipe", "pipe"] })
    const lab = new Lab(child, log, folder, createWriteStream(log))
    const stop = (): void => void child.kill("SIGKILL")
    const timer = setTimeout(stop, (limit + 30) * 1000).unref()
    options.signal?.addEventListener("abort", stop)
    void lab.#ended.then(() => {
      clearTimeout(timer)
      options.signal?.removeEventListener("abort", stop)
    })
    if (options.signal?.aborted === true) stop()
    const overdue = setTimeout(
      () => lab.#end(`the outer machine was not ready after ${START_SECONDS} s`),
      START_SECONDS * 1000
    )
    await lab.#expect("ready\n", undefined, () => {}).finally(() => clearTimeout(overdue))
    progress(`the lab is ready after ${((performance.now() - begun) / 1000).toFixed(1)} s`)
    return lab
  }

  /** Runs a job; jobs run one after the other. Fails only when the lab itself does. */
  run(job: LabJob): Promise<LabResult> {
    const result = this.#queue.then(() => {
      const name = `job-${randomBytes(12).toString("hex")}`
      const script = Buffer.from(job.script).toString("base64")
      const limit = job.timeoutSeconds ?? JOB_SECONDS
      // The agent ends a job in time. When nothing is heard of it long after, the outer machine itself hangs.
      const timer = setTimeout(
        () =>
          this.#end(
            `the outer machine does not answer, ${
              limit + PATIENCE_SECONDS
            } s after a job with a limit of ${limit} s was begun`
          ),
        (limit + PATIENCE_SECONDS) * 1000
      )
      return this.#expect(`\n${name} `, job.onOutput, () => {
        this.#channel.write(`${name} ${limit} ${script}\n`)
      }).finally(() => clearTimeout(timer))
    })
    this.#queue = result.catch(() => {})
    return result
  }

  /** Ends the outer machine at once and waits until nothing of it is left. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill("SIGKILL")
    await this.#ended
  }

  /** Stops the outer machine if it still runs, and tells whoever waits. The first reason is the one that counts. */
  #end(why: string): void {
    this.#over ??= why
    this.#child.kill("SIGKILL")
    this.#pending?.reject(this.#failure())
    this.#pending = undefined
  }

  #failure(): LabError {
    const lines = this.#console.replaceAll("\r", "").trim().split("\n").slice(-12).join("\n  ")
    return new LabError(
      `${this.#over ?? "the lab failed"}; its console ended with:\n  ${lines}`,
      `All of it is in ${this.log}.`
    )
  }

  #expect(marker: string, onOutput: Pending["onOutput"], send: () => void): Promise<LabResult> {
    return new Promise((resolve, reject) => {
      if (this.#over !== undefined) {
        reject(this.#failure())
        return
      }
      this.#pending = { marker: Buffer.from(marker), onOutput, resolve, reject, rest: Buffer.alloc(0), output: [] }
      send()
    })
  }

  #receive(chunk: Buffer): void {
    const pending = this.#pending
    if (pending === undefined) return
    const data = Buffer.concat([pending.rest, chunk])
    const at = data.indexOf(pending.marker)
    const sure = at >= 0 ? at : Math.max(0, data.length - pending.marker.length)
    if (sure > 0) {
      const part = data.subarray(0, sure)
      pending.output.push(part)
      pending.onOutput?.(part)
    }
    pending.rest = data.subarray(sure)
    if (at < 0) return
    const result = finished(pending)
    if (result === undefined) return
    this.#pending = undefined
    pending.resolve(result)
  }
}

/** The result, once all that follows the marker has come. */
const finished = (pending: Pending): LabResult | undefined => {
  const after = pending.rest.subarray(pending.marker.length)
  const output = Buffer.concat(pending.output).toString()
  if (pending.marker.toString() === "ready\n") return { code: 0, seconds: 0, output, files: new Map() }
  const end = after.subarray(0, STATUS_BYTES).indexOf("\n")
  if (end < 0) return undefined
  const [code, begun, ended, bytes] = after.toString("latin1", 0, end).split(" ")
  const archive = after.subarray(end + 1, end + 1 + Number(bytes))
  if (archive.length < Number(bytes)) return undefined
  return {
    code: code === "late" ? undefined : Number(code),
    seconds: Number(ended) - Number(begun),
    output,
    files: filesOfCpio(archive)
  }
}

/** A path as part of a `-drive` option, where a comma must be doubled. */
const escaped = (path: string): string => path.replaceAll(",", ",,")
