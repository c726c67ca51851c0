/** What a configuration names as a disk: something that can be opened when the machine is made. */
import * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import { type BlockBackend, type BlockBackendError, type BlockBytes, makeMemoryBackend } from "./BlockBackend.ts"

const TypeId = "~@troupe/core/BlockClient"

/** How a disk is opened: whether anything will be written. */
export type BlockAccess = "read-only" | "read-write"

/** A disk that can be opened. Hosts make one from anything; `@troupe/node` makes one from a path. */
export interface BlockClient {
  readonly [TypeId]: typeof TypeId
  /** What reports call it. */
  readonly name: string
  /**
   * Opens it, once for each `create`; what it holds belongs to the machine's scope. Opened `read-only`, it writes nothing. It
   * should fail when another machine writes to it.
   */
  readonly open: (access: BlockAccess) => Effect.Effect<BlockBackend, BlockBackendError, Scope.Scope>
}

const isBlockClient = (u: unknown): u is BlockClient => typeof u === "object" && u !== null && TypeId in u

/** The Schema of disks: made by {@link makeBlockClient} or {@link blockClientFromBytes}, or of a path by `@troupe/node`. */
export const BlockClient = Schema.declare<BlockClient>(isBlockClient, {
  identifier: "BlockClient",
  expected: "a disk (made by makeBlockClient, blockClientFromBytes, or of a path by @troupe/node)"
})

/** A disk that is opened by an effect. */
export const makeBlockClient = (name: string, open: BlockClient["open"]): BlockClient => ({
  [TypeId]: TypeId,
  name,
  open
})

/** A disk whose bytes are at hand. A guest that may write changes them in place; an image in them may grow into others. */
export const blockClientFromBytes = (name: string, bytes: BlockBytes): BlockClient =>
  makeBlockClient(
    name,
    (access) => Effect.succeed(makeMemoryBackend(name, bytes, { readOnly: access === "read-only" }))
  )
