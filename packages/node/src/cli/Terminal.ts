/**
 * The host's terminal as the other end of a guest's serial port, or of its console.
 *
 * A terminal is put into raw mode while the guest runs, so that each key reaches the guest as it is typed; Ctrl-C stays with
 * the host and is sent to this process as `SIGINT`. Whatever ends the guest, the terminal is as it was before.
 */
import type { Console } from "@troupe/core/Console"
import * as Data from "effect/Data"
import * as Effect from "effect/Effect"
import * as Queue from "effect/Queue"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"

const CTRL_C = 0x03
/** Typed bytes that may wait for the guest. A terminal must go on being read, or Ctrl-C would not be seen: more is dropped. */
const TYPED_AHEAD_LIMIT = 0x1_0000

/** What a guest types on: its serial port, or its console. */
export interface TerminalPort {
  readonly output: Stream.Stream<Uint8Array>
  readonly write: (bytes: Uint8Array) => Effect.Effect<void>
}

/** The guest's output cannot be written: its reader has gone, or the disk is full. */
export class OutputLost extends Data.TaggedError("OutputLost")<{ readonly cause: Error }> {
  override get message(): string {
    return `the guest's output cannot be written: ${this.cause.message}`
  }
}

/**
 * Has this process survive the loss of `stdout` and `stderr`. Whoever has to know of a failed write hears of it from the write
 * itself; without a listener Node ends the process over it as well.
 */
export const surviveLostStreams = (): void => {
  for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {})
}

/** Writes the guest's output to `stdout` until the guest is gone; `onFirst` runs before the first byte. */
export const showOutput = (
  port: TerminalPort,
  onFirst: Effect.Effect<void>
): Effect.Effect<void, OutputLost> => {
  let first = true
  return Stream.runForEach(port.output, (bytes) => {
    const write = Effect.callback<void, OutputLost>((resume) => {
      process.stdout.write(bytes, (cause) => resume(cause ? Effect.fail(new OutputLost({ cause })) : Effect.void))
    })
    if (!first) return write
    first = false
    return Effect.andThen(onFirst, write)
  })
}

/** Types what comes from `stdin` into the guest until the scope closes. The end of `stdin` is not an event for the guest. */
export const typeInput = (port: TerminalPort): Effect.Effect<void, never, Scope.Scope> =>
  Effect.gen(function*() {
    const chunks = yield* Queue.unbounded<Uint8Array>()
    let waiting = 0
    yield* Effect.acquireRelease(
      Effect.sync(() => {
        const stdin = process.stdin
        const raw = stdin.isTTY
        const onData = (data: Buffer): void => {
          if (raw && data.includes(CTRL_C)) process.kill(process.pid, "SIGINT")
          const typed = raw ? data.filter((byte) => byte !== CTRL_C) : data
          if (typed.length === 0 || (raw && waiting + typed.length > TYPED_AHEAD_LIMIT)) return
          waiting += typed.length
          Queue.offerUnsafe(chunks, typed)
          // A pipe or file can wait, so nothing of it is lost.
          if (!raw) stdin.pause()
        }
        if (raw) stdin.setRawMode(true)
        stdin.on("data", onData)
        stdin.resume()
        return { stdin, raw, onData }
      }),
      ({ onData, raw, stdin }) =>
        Effect.sync(() => {
          stdin.off("data", onData)
          stdin.pause()
          if (raw) stdin.setRawMode(false)
          stdin.unref?.()
        })
    )
    const type = Effect.flatMap(Queue.take(chunks), (bytes) =>
      Effect.andThen(
        port.write(bytes),
        Effect.sync(() => {
          waiting -= bytes.length
          process.stdin.resume()
        })
      ))
    yield* Effect.forkScoped(Effect.forever(type))
  })

/** Tells a console the size of the terminal, now and whenever it changes, until the scope closes. */
export const followSize = (console: Console["Service"]): Effect.Effect<void, never, Scope.Scope> =>
  Effect.gen(function*() {
    const { stdout } = process
    if (!stdout.isTTY) return
    const tell = Effect.suspend(() => console.resize({ cols: stdout.columns, rows: stdout.rows })).pipe(Effect.ignore)
    const changes = yield* Queue.sliding<void>(1)
    const onResize = (): void => void Queue.offerUnsafe(changes, undefined)
    yield* Effect.acquireRelease(
      Effect.sync(() => stdout.on("resize", onResize)),
      () => Effect.sync(() => stdout.off("resize", onResize))
    )
    yield* tell
    yield* Effect.forkScoped(Effect.forever(Effect.andThen(Queue.take(changes), tell)))
  })
