/** Progress on stderr: lines, and one waiting line that counts seconds where a terminal can show it. */
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Schedule from "effect/Schedule"

/** Tells the person at the terminal what is going on. */
export interface Progress {
  /** Prints a line. */
  readonly line: (text: string) => Effect.Effect<void>
  /** Shows that something is awaited, with the seconds that it has taken, until `done`. */
  readonly wait: (text: string) => Effect.Effect<void>
  /** Ends the waiting line. */
  readonly done: Effect.Effect<void>
}

const CLEAR_LINE = "\r\u001b[K"

const silent: Progress = { line: () => Effect.void, wait: () => Effect.void, done: Effect.void }

/** Progress on stderr, or none. The waiting line ends when the calling fiber does. */
export const makeProgress = (quiet: boolean): Effect.Effect<Progress> =>
  Effect.sync(() => {
    if (quiet) return silent
    const write = (text: string) => Effect.sync(() => process.stderr.write(text))
    const onTerminal = process.stderr.isTTY
    let waiting: Fiber.Fiber<unknown> | undefined
    const done = Effect.suspend(() => {
      const fiber = waiting
      waiting = undefined
      if (fiber === undefined) return Effect.void
      return Effect.andThen(Fiber.interrupt(fiber), onTerminal ? write(CLEAR_LINE) : Effect.void)
    })
    return {
      line: (text) => Effect.asVoid(write(`troupe: ${text}\n`)),
      wait: Effect.fnUntraced(function*(text) {
        yield* done
        if (!onTerminal) {
          yield* write(`troupe: ${text}\n`)
          return
        }
        let seconds = 0
        const tick = Effect.suspend(() => write(`${CLEAR_LINE}troupe: ${text} (${seconds++} s)`))
        waiting = yield* Effect.forkChild(Effect.repeat(tick, Schedule.spaced("1 second")))
      }),
      done
    }
  })
