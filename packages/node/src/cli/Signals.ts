/** The second Ctrl-C: a process that is being taken apart and does not come to an end is ended at once. */
import { ExitCode } from "./ExitCode.ts"

/** Ends the process at the second `SIGINT` or `SIGTERM`; the first one is left to the runtime. */
export const forceOnSecondSignal = (): void => {
  let signals = 0
  const count = (): void => {
    signals++
    if (signals === 1) {
      process.stderr.write("\ntroupe: stopping the guest; once more to force\n")
      return
    }
    if (process.stdin.isTTY) process.stdin.setRawMode(false)
    process.exit(ExitCode.STOPPED)
  }
  process.on("SIGINT", count)
  process.on("SIGTERM", count)
}
