/** How the command tells its exit code: set on the process, so that pending output is still written. */
import * as Effect from "effect/Effect"

/** Sets the exit code of this process. */
export const ExitStatus = {
  set: (code: number): Effect.Effect<void> =>
    Effect.sync(() => {
      process.exitCode = code
    }),
  /** Says on stderr what failed, and sets the exit code. */
  fail: (code: number, message: string): Effect.Effect<void> =>
    Effect.sync(() => {
      process.stderr.write(`troupe: ${message}\n`)
      process.exitCode = code
    })
}
