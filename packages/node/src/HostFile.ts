/** Files of the host as guest files: kernels and initial RAM disks by path. */
import { type GuestFile, GuestFileError, makeGuestFile } from "@troupe/core/GuestFile"
import * as Effect from "effect/Effect"
import { readFile } from "node:fs/promises"

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

/** The file at `path`, read whenever a guest is created or reset. */
export const fromPath = (path: string): GuestFile =>
  makeGuestFile(
    path,
    Effect.tryPromise({
      try: (signal) => readFile(path, { signal }),
      catch: (error) => new GuestFileError({ name: path, detail: explain(error) })
    })
  )
