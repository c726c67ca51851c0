// The one error of the lab scripts: what could not be done, and what the user can do about it.

/** A failure of the lab or of kernel provisioning, worded for the person who typed the command. */
export class LabError extends Error {
  /** What the user can do about it, in one sentence. */
  readonly hint: string | undefined

  constructor(message: string, hint?: string) {
    super(hint === undefined ? message : `${message}\n  ${hint}`)
    this.name = "LabError"
    this.hint = hint
  }
}
