/** Files of the host as guest files: kernels and initial RAM disks by path. */
import { type GuestFile, GuestFileError, makeGuestFile } from "@troupe/core/GuestFile"
import * as Effect from "effect/Effect"
import { constants } from "node:fs"
import { open } from "node:fs/promises"

const explain = (error: unknown): string => {
  const code = typeof error === "object" && error !== null && "code" in error ? String(error.code) : undefined
  switch (code) {
    case "ENOENT":
      return "there is no such file"
    case "EACCES":
      return "no permission to read it"
    case "EISDIR":
      return "it is a directory"
    case "ERR_FS_FILE_TOO_LARGE":
      return "it is larger than this process can hold in one buffer"
    default:
      return error instanceof Error ? error.message : String(error)
  }
}

/** What opens at once whatever is there: a FIFO without a writer would hold a thread of the process, and with it its exit. */
const OPEN_FLAGS = constants.O_RDONLY | constants.O_NONBLOCK

/** The regular file at `path`, read whenever a guest is created or reset. */
export const fromPath = (path: string): GuestFile => {
  const failure = (detail: string) => new GuestFileError({ name: path, detail })
  const attempt = <A>(evaluate: (signal: AbortSignal) => Promise<A>) =>
    Effect.tryPromise({ try: evaluate, catch: (error) => failure(explain(error)) })
  return makeGuestFile(
    path,
    Effect.acquireUseRelease(
      attempt(() => open(path, OPEN_FLAGS)),
      (handle) =>
        Effect.flatMap(attempt(() => handle.stat()), (stats) =>
          stats.isFile() || stats.isDirectory()
            ? attempt((signal) => handle.readFile({ signal }))
            : Effect.fail(failure("it is not a regular file but a device, a FIFO or a socket"))),
      (handle) => Effect.promise(() => handle.close())
    )
  )
}
