/** A file that a configuration names: a kernel or an initial RAM disk, read when the guest is created. */
import * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"

/** A file could not be read. */
export class GuestFileError extends Schema.TaggedError<GuestFileError>()("GuestFileError", {
  /** The file's name, e.g. its path. */
  name: Schema.String,
  /** Why, in a sentence. */
  detail: Schema.String
}) {
  override get message(): string {
    return `${this.name}: ${this.detail}`
  }
}

const TypeId = "~@troupe/core/GuestFile"

/** A readable file. Hosts make one from anything that gives bytes; `@troupe/node` makes one from a path. */
export interface GuestFile {
  readonly [TypeId]: typeof TypeId
  /** What reports call it. */
  readonly name: string
  /** The whole content. Read once for each `create`. */
  readonly read: Effect.Effect<Uint8Array, GuestFileError>
}

const isGuestFile = (u: unknown): u is GuestFile => typeof u === "object" && u !== null && TypeId in u

/** The Schema of files: made by {@link makeGuestFile} or {@link guestFileFromBytes}, or of a path by `@troupe/node`. */
export const GuestFile = Schema.declare<GuestFile>(isGuestFile, {
  identifier: "GuestFile",
  expected: "a file (made by makeGuestFile, guestFileFromBytes, or of a path by @troupe/node)"
})

/** A file that is read by an effect. */
export const makeGuestFile = (name: string, read: Effect.Effect<Uint8Array, GuestFileError>): GuestFile => ({
  [TypeId]: TypeId,
  name,
  read
})

/** A file whose bytes are at hand. */
export const guestFileFromBytes = (name: string, bytes: Uint8Array): GuestFile =>
  makeGuestFile(name, Effect.succeed(bytes))
