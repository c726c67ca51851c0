/**
 * A guest that does what its host tells it: a busybox userspace whose init runs the commands that come over the serial port,
 * and the host's side of that, for programs that try a machine's devices with the kernel's own drivers.
 */
import type { SerialPort } from "@troupe/core"
import * as Data from "effect/Data"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Stream from "effect/Stream"
import { readFile } from "node:fs/promises"
import { encodeCpio } from "./Cpio.ts"
import { initramfsEntries, REPORT } from "./GuestInitramfs.ts"
import { KernelModules } from "./KernelModules.ts"

/** The terminal takes a line of at most this many bytes. */
const COMMAND_BYTES = 4000

// A command's output comes in one piece, so that nothing of the kernel's is in the middle of a line.
const INIT = `#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /tmp && mount -t tmpfs tmp /tmp
stty -echo
echo "${REPORT}shell"
while read -r number command; do
  eval "$command" </dev/null >/tmp/.output 2>&1
  code=$?
  cat /tmp/.output
  echo
  echo "${REPORT}$number $code"
done
`

/** Where the files of a guest are. */
export interface GuestFiles {
  readonly busybox: string
  /** A folder of modules, with `modules.builtin`. */
  readonly modules: string
}

/** An initramfs with the shell and these modules, and the names of the modules in the order in which each can be inserted. */
export const buildShellInitramfs = async (
  files: GuestFiles,
  wanted: ReadonlyArray<string>
): Promise<{ readonly initramfs: Uint8Array; readonly order: ReadonlyArray<string> }> => {
  const modules = await (await KernelModules.open(files.modules, files.busybox)).load(wanted)
  return {
    // Not compressed: it is made and read once, by emulated processors.
    initramfs: encodeCpio(initramfsEntries(await readFile(files.busybox), INIT, modules)),
    order: modules.map(({ name }) => name)
  }
}

/** A command failed in the guest, or its guest ended before it did. */
export class ShellError extends Data.TaggedError("ShellError")<{
  readonly command: string
  readonly code: number | undefined
  readonly output: string
}> {
  override get message(): string {
    const how = this.code === undefined ? "did not return" : `returned ${this.code}`
    return `${this.command} ${how}:\n${this.output}`
  }
}

/** The host's side of a guest's shell. */
export interface GuestShell {
  /** Runs a command in the guest: what it printed, without the last line's end. Fails when it does not return 0. One at a time. */
  readonly run: (command: string) => Effect.Effect<string, ShellError>
  /** The same for a command that may fail: its exit code as well. */
  readonly attempt: (
    command: string
  ) => Effect.Effect<{ readonly code: number; readonly output: string }, ShellError>
}

/** Opens the shell of a guest that runs; returns when its userspace has begun. `echo` is given all that the guest prints. */
export const openGuestShell = Effect.fnUntraced(
  function*(serial: SerialPort["Service"], echo: (text: string) => void = () => {}) {
    const decoder = new TextDecoder()
    let text = ""
    let number = 0
    let marker = `${REPORT}shell`
    let found = Deferred.makeUnsafe<{ readonly code: number; readonly output: string }>()
    const begun = found
    const look = (): void => {
      const lines = text.split("\n")
      const at = lines.findIndex((line) => line === marker || line.startsWith(`${marker} `))
      // The line has come whole when another one has begun.
      if (at < 0 || at === lines.length - 1) return
      const code = Number(lines[at]!.slice(marker.length))
      const output = lines.slice(0, at).join("\n").trimEnd()
      text = lines.slice(at + 1).join("\n")
      Deferred.doneUnsafe(found, Effect.succeed({ code, output }))
    }
    yield* serial.output.pipe(
      Stream.runForEach((bytes) =>
        Effect.sync(() => {
          const piece = decoder.decode(bytes, { stream: true }).replaceAll("\r", "")
          echo(piece)
          text += piece
          look()
        })
      ),
      Effect.forkScoped
    )
    yield* Deferred.await(begun)
    const attempt: GuestShell["attempt"] = Effect.fnUntraced(function*(command) {
      const line = new TextEncoder().encode(`${++number} ${command}\n`)
      if (line.length > COMMAND_BYTES || /\n/.test(command)) {
        return yield* Effect.die(new Error(`a command is one line of at most ${COMMAND_BYTES} bytes: ${command}`))
      }
      marker = `${REPORT}${number}`
      const answer = Deferred.makeUnsafe<{ readonly code: number; readonly output: string }>()
      found = answer
      yield* serial.write(line)
      return yield* Deferred.await(answer).pipe(
        Effect.timeout("4 minutes"),
        Effect.mapError(() => new ShellError({ command, code: undefined, output: text }))
      )
    })
    return {
      attempt,
      run: (command) =>
        Effect.flatMap(
          attempt(command),
          ({ code, output }) =>
            code === 0 ? Effect.succeed(output) : Effect.fail(new ShellError({ command, code, output }))
        )
    } satisfies GuestShell
  }
)
