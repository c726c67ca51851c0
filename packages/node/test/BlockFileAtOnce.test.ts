/** Writes that are done at once where a file system takes them so, and by the thread pool where it takes none or a part. */
import { assert, describe, it, vi } from "@effect/vitest"
import { type BlockBackend, blockEffect } from "@troupe/core/BlockBackend"
import { openDisk } from "@troupe/devices/Block"
import * as Effect from "effect/Effect"
import * as fc from "fast-check"
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import * as BlockFile from "../src/BlockFile.ts"
import { ErrnoNumber, RWF_NOWAIT } from "../src/internal/ForeignFunctions.ts"
import { loadForeignFunctions } from "../src/internal/loadForeignFunctions.ts"

const SECTOR = 512
const SECTORS = 64
const { EAGAIN, EIO, ENOSYS, ENOTSUP } = ErrnoNumber

/** A disk of ones, and where its file is. */
const open = (size: number) =>
  Effect.gen(function*() {
    const directory = yield* Effect.acquireRelease(
      Effect.sync(() => mkdtempSync(join(tmpdir(), "troupe-at-once-"))),
      (directory) => Effect.sync(() => rmSync(directory, { recursive: true }))
    )
    const path = join(directory, "disk")
    writeFileSync(path, new Uint8Array(size).fill(1))
    const client = BlockFile.fromPath(path)
    return { path, disk: yield* openDisk({ id: "disk", mode: "READ_WRITE", format: "FILE", client }) }
  })

const functions = [loadForeignFunctions("node:ffi", { quiet: true }), loadForeignFunctions("koffi", { quiet: true })]
  .find((functions) => typeof functions !== "string")

/** What a file system that is asked not to wait does: takes so many of the pieces, or answers with an error. */
type Answer = { readonly pieces: number } | { readonly error: number }

/** A file system whose answers are as they come. */
const withAnswers = (next: (pieces: number) => Answer) =>
  Effect.acquireRelease(
    Effect.sync(() => {
      if (functions === undefined) return assert.fail("there are no foreign functions")
      const real = functions.pwritev2
      return vi.spyOn(functions, "pwritev2").mockImplementation((fd, vectors, count, offset, flags) => {
        assert.strictEqual(flags, RWF_NOWAIT)
        const answer = next(count)
        // Whether the real one can do without waiting is not known here: it may wait.
        return "error" in answer ? -answer.error : real(fd, vectors, Math.min(count, answer.pieces), offset, 0)
      })
    }),
    (spy) => Effect.sync(() => spy.mockRestore())
  )

const write = (disk: BlockBackend, offset: number, bytes: Uint8Array<ArrayBuffer>, cuts: ReadonlyArray<number>) => {
  const edges = [0, ...cuts.map((cut) => cut % (bytes.length + 1)).toSorted((a, b) => a - b), bytes.length]
  const pieces = edges.slice(1).map((edge, index) => bytes.subarray(edges[index], edge))
  return blockEffect((done) => disk.write(offset, pieces, done))
}

const answer: fc.Arbitrary<Answer> = fc.oneof(
  fc.record({ pieces: fc.integer({ min: 1, max: 4 }) }),
  fc.record({ error: fc.constantFrom(EAGAIN, EIO) })
)
const change = fc.record({
  first: fc.nat(SECTORS - 1),
  sectors: fc.integer({ min: 1, max: SECTORS }),
  cuts: fc.array(fc.nat(SECTORS * SECTOR), { maxLength: 3 }),
  answer
})

describe.skipIf(functions === undefined)("writes of files at once", () => {
  it.live("are the bytes of the file, however much of each the file system takes", () =>
    Effect.promise(() =>
      fc.assert(
        fc.asyncProperty(
          fc.array(change, { minLength: 1, maxLength: 20, size: "max" }),
          fc.option(fc.record({ after: fc.nat(20), error: fc.constantFrom(ENOTSUP, ENOSYS) }), { nil: undefined }),
          (changes, end) =>
            Effect.gen(function*() {
              const { disk, path } = yield* open(SECTORS * SECTOR)
              const model = new Uint8Array(SECTORS * SECTOR).fill(1)
              let asked = 0
              let now = 0
              yield* withAnswers(() =>
                end !== undefined && asked++ === end.after
                  ? { error: end.error }
                  : changes[now]?.answer ?? assert.fail("nothing is being written")
              )
              for (const [index, { cuts, first, sectors }] of changes.entries()) {
                now = index
                const bytes = new Uint8Array(Math.min(sectors, SECTORS - first) * SECTOR).fill(index + 2)
                model.set(bytes, first * SECTOR)
                yield* write(disk, first * SECTOR, bytes, cuts)
              }
              assert.isTrue(readFileSync(path).equals(model))
              // One that says that it cannot is not asked again.
              if (end !== undefined) assert.isAtMost(asked, end.after + 1)
            }).pipe(Effect.scoped, Effect.runPromise)
        ),
        { numRuns: 60 }
      )
    ))

  it.live("have ended when they return, if they are small", () =>
    Effect.gen(function*() {
      const { disk } = yield* open(2 ** 20)
      let asked = 0
      yield* withAnswers((pieces) => {
        asked++
        return { pieces }
      })
      const outcome = (length: number) => {
        let ended = false
        return blockEffect((done) => {
          disk.write(0, [new Uint8Array(length)], (error) => {
            ended = true
            done(error)
          })
          assert.strictEqual(ended, length <= 2 ** 18)
        })
      }
      yield* outcome(4096)
      yield* outcome(2 ** 18)
      assert.strictEqual(asked, 2)
      yield* outcome(2 ** 18 + SECTOR)
      assert.strictEqual(asked, 2)
    }))

  it.live("are tried again after one that would have had to wait", () =>
    Effect.gen(function*() {
      const { disk } = yield* open(2 ** 20)
      let asked = 0
      yield* withAnswers((pieces) => asked++ % 2 === 0 ? { error: EAGAIN } : { pieces })
      for (let i = 0; i < 6; i++) yield* write(disk, i * SECTOR, new Uint8Array(SECTOR), [])
      assert.strictEqual(asked, 6)
    }))
})
