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

const make = (name: string, read: Effect.Effect<Uint8Array, GuestFileError>): GuestFile => ({
  [TypeId]: TypeId,
  name,
  read
})

const isGuestFile = (u: unknown): u is GuestFile => typeof u === "object" && u !== null && TypeId in u

/** Makes files, and is their Schema. */
export const GuestFile = Object.assign(
  Schema.declare<GuestFile>(isGuestFile, {
    identifier: "GuestFile",
    expected: "a file (GuestFile.fromBytes, GuestFile.make, or a path through @troupe/node)"
  }),
  {
    make,
    /** A file whose bytes are at hand. */
    fromBytes: (name: string, bytes: Uint8Array): GuestFile => make(name, Effect.succeed(bytes))
  }
)
