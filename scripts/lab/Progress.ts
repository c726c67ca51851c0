// Progress lines: everything slow says on standard error what it is doing.

/** Says what is being done. */
export type Progress = (line: string) => void

/** Writes to standard error, so that standard output stays the command's own. */
export const toStandardError: Progress = (line) => {
  process.stderr.write(`- ${line}\n`)
}

/** A size in the unit that a reader likes. */
export const megabytes = (bytes: number): string => `${(bytes / 1e6).toFixed(1)} MB`
