/** The `troupe` command as a process: what it prints, how it ends, what it leaves behind. */
import { type ChildProcess, spawn, spawnSync } from "node:child_process"
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { kvmObstacle, onKvm } from "./support.ts"

const root = fileURLToPath(new URL("../..", import.meta.url))
const TROUPE = join(root, "packages/node/src/bin/troupe.ts")
const GUEST = join(root, "test/guest/troupe-guest.elf")

interface Ended {
  readonly code: number | null
  readonly signal: string | null
  readonly stdout: string
  readonly stderr: string
}

class Run {
  readonly process: ChildProcess
  readonly ended: Promise<Ended>
  #stdout = ""
  #stderr = ""
  #waiters: Array<() => void> = []
  #isOver = false

  constructor(args: ReadonlyArray<string>, command: string = process.execPath) {
    this.process = spawn(command, command === process.execPath ? [TROUPE, ...args] : args, {
      cwd: root,
      stdio: ["pipe", "pipe", "pipe"]
    })
    const more = () => {
      for (const wake of this.#waiters.splice(0)) wake()
    }
    this.process.stdout?.on("data", (data: Buffer) => {
      this.#stdout += data.toString("latin1")
      more()
    })
    this.process.stderr?.on("data", (data: Buffer) => {
      this.#stderr += data.toString("latin1")
      more()
    })
    this.ended = new Promise((resolve) => {
      this.process.on("close", (code, signal) => {
        this.#isOver = true
        resolve({ code, signal, stdout: this.#stdout, stderr: this.#stderr })
        more()
      })
    })
  }

  /** Waits until the text has been printed on either stream. */
  async printed(text: string): Promise<void> {
    while (!this.#stdout.includes(text) && !this.#stderr.includes(text)) {
      // The exit may be told before the last output.
      if (this.#isOver) {
        assert.fail(`ended without ${JSON.stringify(text)}:\n${this.#stdout}\n${this.#stderr}`)
      }
      await new Promise<void>((resolve) => this.#waiters.push(resolve))
    }
  }
}

const troupe = (...args: ReadonlyArray<string>): Promise<Ended> => {
  const run = new Run(args)
  run.process.stdin?.end()
  return run.ended
}
const runGuest = (cmdline: string, ...args: ReadonlyArray<string>): Promise<Ended> =>
  troupe("run", "--kernel", GUEST, "--memory", "32M", "--cmdline", cmdline, ...args)

let folder = ""
const file = (name: string, bytes: Uint8Array): string => {
  const path = join(folder, name)
  writeFileSync(path, bytes)
  return path
}

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "troupe-command-"))
})
afterAll(() => rmSync(folder, { recursive: true }))

describe("troupe", () => {
  it("explains itself", async () => {
    const help = await troupe("run", "--help")
    assert.strictEqual(help.code, 0)
    for (const word of ["--kernel", "--initrd", "--cmdline", "--cpus", "--memory", "Exit codes"]) {
      assert.include(help.stdout, word)
    }
    assert.strictEqual((await troupe("--version")).stdout.includes("0.0.0"), true)
  })

  it("refuses words that it does not know", async () => {
    for (const args of [["run"], ["walk"], ["run", "--kernel", GUEST, "--colour", "red"]]) {
      const ended = await troupe(...args)
      assert.strictEqual(ended.code, 1)
      assert.include(ended.stderr, "ERROR")
    }
  })
})

describe.skipIf(kvmObstacle !== undefined || process.getuid?.() !== 0)(
  onKvm("troupe where KVM is not to be had (needs root to take it away)"),
  () => {
    const without = (prepare: string) =>
      spawnSync("unshare", ["-m", "sh", "-c", `${prepare}; exec "$0" "$@"`, process.execPath, TROUPE, "doctor"], {
        encoding: "utf8"
      })

    it("says so when /dev/kvm is not there", () => {
      const ended = without(
        "mkdir -p /run/troupe-dev; mount -t tmpfs none /run; mkdir /run/dev; mount --rbind /dev /run/dev; mount -t tmpfs none /dev; for n in null zero urandom; do touch /dev/$n; mount --bind /run/dev/$n /dev/$n; done"
      )
      assert.strictEqual(ended.status, 1, ended.stderr)
      assert.match(ended.stdout, /missing .*\/dev\/kvm.*ENOENT/)
    })

    it("says so when this user may not open it", () => {
      const ended = spawnSync("setpriv", [
        "--reuid=65534",
        "--clear-groups",
        process.execPath,
        TROUPE,
        "run",
        "--kernel",
        GUEST
      ], { encoding: "utf8" })
      assert.strictEqual(ended.status, 1, ended.stderr)
      assert.match(ended.stderr, /\/dev\/kvm.*EACCES.*group kvm/)
    })

    it("says so when it is something else", () => {
      const ended = without("mount --bind /dev/null /dev/kvm")
      assert.strictEqual(ended.status, 1, ended.stderr)
      assert.match(ended.stdout, /missing .*ENOTTY/)
    })
  }
)

describe.skipIf(kvmObstacle !== undefined)(onKvm("troupe on KVM"), () => {
  it("doctor tells what this host can run", async () => {
    const { code, stdout } = await troupe("doctor")
    assert.strictEqual(code, 0, stdout)
    for (
      const words of [
        "KVM_CAP_IRQFD",
        "kernel mode:",
        "user mode:",
        "int3",
        "cmpxchg16b",
        "In short",
        "This host can run"
      ]
    ) {
      assert.include(stdout, words)
    }
  })

  it.each([
    ["poweroff", 0, "powered off"],
    ["reset=acpi", 32, "reset through ACPI"],
    ["reset=kbd", 32, "reset through the keyboard controller"],
    ["halt", 33, "halted with interrupts off"],
    ["panic-line", 34, "kernel panicked"],
    ["triplefault", 35, "triple fault"],
    ["internal-error", 36, "could not emulate"]
  ])("tells by its exit code how the guest ended: %s is %i", async (word, code, words) => {
    const ended = await runGuest(`quiet ${word}`)
    assert.strictEqual(ended.code, code, ended.stderr)
    assert.include(ended.stderr, words)
    assert.include(ended.stdout, `troupe-guest: ${word.replace("=", " ")}`)
  })

  it("prints only what the guest prints when it is quiet", async () => {
    const ended = await runGuest("quiet say=hello", "--quiet")
    assert.deepStrictEqual(ended, {
      code: 0,
      signal: null,
      stdout: "troupe-guest: say hello\r\ntroupe-guest: poweroff\r\n",
      stderr: ""
    })
  })

  // Each is a process of its own, which takes a while to start.
  const image = readFileSync(GUEST)
  const mistakes: ReadonlyArray<readonly [what: string, args: () => ReadonlyArray<string>, words: RegExp]> = [
    ["no kernel", () => ["--kernel", join(folder, "nowhere")], /nowhere: there is no such file/],
    ["a directory", () => ["--kernel", folder], /it is a directory/],
    ["a text", () => ["--kernel", file("text", new TextEncoder().encode("no kernel"))], /field: magic/],
    ["half a kernel", () => ["--kernel", file("short", image.subarray(0, 5000))], /truncated/],
    ["an empty kernel", () => ["--kernel", file("empty", new Uint8Array(0))], /field: magic/],
    ["no RAM disk", () => ["--kernel", GUEST, "--initrd", join(folder, "nowhere")], /initial RAM disk.*no such file/],
    [
      "a large RAM disk",
      () => ["--kernel", GUEST, "--initrd", file("large", new Uint8Array(2 ** 25)), "--memory", "32M"],
      /initrd.*must fit/
    ],
    ["little memory", () => ["--kernel", GUEST, "--memory", "1M"], /guestMemory: must be from 2 MiB/],
    ["memory in words", () => ["--kernel", GUEST, "--memory", "lots"], /guestMemory: must be a number of bytes/],
    ["no processor", () => ["--kernel", GUEST, "--cpus", "0"], /cpus: .*got 0/],
    ["a long command line", () => ["--kernel", GUEST, "--cmdline", "x".repeat(5000)], /command line.*must not exceed/]
  ]
  it.each(mistakes)(
    "names what is wrong with files and configurations, and exits with 2: %s",
    async (_, args, words) => {
      const ended = await troupe("run", ...args())
      assert.strictEqual(ended.code, 2, ended.stderr)
      assert.match(ended.stderr, words)
    }
  )

  it("has a virtio console on the terminal when told to, and not the serial port", async () => {
    const run = new Run(["run", "-q", "--kernel", GUEST, "--cmdline", "console", "--console", "virtio"])
    run.process.stdin?.write("hello quit")
    assert.deepStrictEqual(await run.ended, { code: 0, signal: null, stdout: "!hello quit", stderr: "" })
  })

  it("types standard input into the guest", async () => {
    const run = new Run(["run", "-q", "--kernel", GUEST, "--cmdline", "quiet echo"])
    await run.printed("echo ready")
    run.process.stdin?.end("hello there\nquit\n")
    const ended = await run.ended
    assert.strictEqual(ended.code, 0, ended.stderr)
    assert.include(ended.stdout, "troupe-guest: echo hello there")
  })

  it("stops the guest, and says why, when its output cannot be written any more", async () => {
    const run = new Run(["run", "--kernel", GUEST, "--cmdline", "quiet echo"])
    await run.printed("echo ready")
    run.process.stdout?.destroy()
    run.process.stdin?.write("hello there\n")
    const ended = await run.ended
    assert.strictEqual(ended.code, 1, ended.stderr)
    assert.match(ended.stderr, /troupe: the guest's output cannot be written: .*EPIPE.*\n$/)
    assert.notInclude(ended.stderr, "    at ")
  })

  it("goes on when nobody reads its messages", async () => {
    const run = new Run(["run", "--kernel", GUEST, "--cmdline", "quiet echo"])
    run.process.stderr?.destroy()
    await run.printed("echo ready")
    run.process.stdin?.end("quit\n")
    const ended = await run.ended
    assert.strictEqual(ended.code, 0, ended.stdout)
  })

  it("stops the guest at a signal and exits with 130", async () => {
    for (const signal of ["SIGINT", "SIGTERM"] as const) {
      const run = new Run(["run", "--kernel", GUEST, "--cmdline", "quiet hang"])
      await run.printed("troupe-guest: hang")
      run.process.kill(signal)
      const ended = await run.ended
      assert.strictEqual(ended.code, 130, ended.stderr)
      assert.include(ended.stderr, "stopping the guest")
    }
  })

  it("stops at Ctrl-C on a terminal, which is as it was afterwards", async () => {
    const command =
      `"${process.execPath}" "${TROUPE}" run -q --kernel "${GUEST}" --cmdline "quiet hang"; echo "code $?"; stty -a`
    const run = new Run(["-qec", command, "/dev/null"], "script")
    await run.printed("troupe-guest: hang")
    run.process.stdin?.write("\u0003")
    await run.printed("code 130")
    const ended = await run.ended
    assert.match(ended.stdout, / icanon/)
    assert.match(ended.stdout, / echo /)
  })

  it("leaves nothing behind when it is killed: the next run is as the first", async () => {
    for (let round = 0; round < 2; round++) {
      const run = new Run(["run", "--kernel", GUEST, "--cmdline", "quiet hang", "--cpus", "2"])
      await run.printed("troupe-guest: hang")
      const { pid } = run.process
      run.process.kill("SIGKILL")
      assert.strictEqual((await run.ended).signal, "SIGKILL")
      assert.notInclude(readdirSync("/proc"), String(pid))
    }
    assert.strictEqual((await runGuest("quiet poweroff")).code, 0)
  })
})
