/** Files and media that cannot give up room, or make zeros: what a guest asks for is done all the same, as far as it must be. */
import { assert, describe, it, vi } from "@effect/vitest"
import { blockEffect } from "@troupe/core/BlockBackend"
import { openDisk } from "@troupe/devices/Block"
import * as Effect from "effect/Effect"
import * as fc from "fast-check"
import { spawnSync } from "node:child_process"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import * as BlockFile from "../src/BlockFile.ts"
import { ErrnoNumber, FALLOC_FL_PUNCH_HOLE } from "../src/internal/ForeignFunctions.ts"
import { loadForeignFunctions } from "../src/internal/loadForeignFunctions.ts"

const SECTOR = 512
const SIZE = 64 * SECTOR
const LARGE = 24 * 2 ** 20

const directory = Effect.acquireRelease(
  Effect.sync(() => mkdtempSync(join(tmpdir(), "troupe-room-"))),
  (directory) => Effect.sync(() => rmSync(directory, { recursive: true }))
)

const open = (size: number) =>
  Effect.gen(function*() {
    const path = join(yield* directory, "disk")
    writeFileSync(path, new Uint8Array(size).fill(7))
    return yield* openDisk({ id: "disk", mode: "READ_WRITE", format: "FILE", client: BlockFile.fromPath(path) })
  })

const functions = [loadForeignFunctions("node:ffi", { quiet: true }), loadForeignFunctions("koffi", { quiet: true })]
  .find((functions) => typeof functions !== "string")

/** `fallocate` as the plan has it: which result, or `undefined` where it is the real one. */
const withFallocate = (plan: (punch: boolean) => number | undefined) =>
  Effect.acquireRelease(
    Effect.sync(() => {
      if (functions === undefined) return assert.fail("there are no foreign functions")
      const real = functions.fallocate
      return vi.spyOn(functions, "fallocate").mockImplementation((fd, mode, offset, length) =>
        plan((mode & FALLOC_FL_PUNCH_HOLE) !== 0) ?? real(fd, mode, offset, length)
      )
    }),
    (spy) => Effect.sync(() => spy.mockRestore())
  )

const { EINVAL, EIO, ENOSYS, ENOTSUP } = ErrnoNumber

const operation = fc.record({
  discard: fc.boolean(),
  unmap: fc.boolean(),
  first: fc.nat(63),
  sectors: fc.integer({ min: 1, max: 64 }),
  punch: fc.constantFrom(undefined, -ENOTSUP, -ENOSYS, -EINVAL, -EIO),
  zero: fc.constantFrom(undefined, -ENOTSUP, -ENOSYS, -EINVAL, -EIO)
})

describe.skipIf(functions === undefined)("room of files", () => {
  it.live(
    "zeros are made whatever the file system can; a discard fails only where the medium does",
    () =>
      Effect.promise(() =>
        fc.assert(
          fc.asyncProperty(fc.array(operation, { maxLength: 12, size: "max" }), (operations) =>
            Effect.runPromise(Effect.scoped(Effect.gen(function*() {
              const disk = yield* open(SIZE)
              const { discard, writeZeroes } = disk
              if (discard === undefined || writeZeroes === undefined) return assert.fail("it should do both at first")
              let now: (typeof operations)[number] | undefined
              yield* withFallocate((punch) =>
                punch ? now?.punch : now?.zero
              )
              const model = new Uint8Array(SIZE).fill(7)
              let canPunch = true
              for (const one of operations) {
                now = one
                const offset = one.first * SECTOR
                const length = Math.min(one.sectors, 64 - one.first) * SECTOR
                if (!one.discard) {
                  yield* blockEffect((done) => writeZeroes(offset, length, one.unmap, done))
                  model.fill(0, offset, offset + length)
                  if (one.unmap && (one.punch === -ENOTSUP || one.punch === -ENOSYS)) canPunch = false
                } else {
                  const exit = yield* Effect.exit(blockEffect((done) => discard(offset, length, done)))
                  assert.strictEqual(exit._tag, canPunch && one.punch === -EIO ? "Failure" : "Success")
                  if (canPunch && one.punch === undefined) model.fill(0, offset, offset + length)
                  if (one.punch === -ENOTSUP || one.punch === -ENOSYS) canPunch = false
                }
                const bytes = new Uint8Array(SIZE)
                yield* blockEffect((done) => disk.read(0, [bytes], done))
                assert.deepStrictEqual(bytes, model)
              }
            })))),
          { numRuns: 60 }
        )
      ),
    60_000
  )

  it.live("lets others work while it writes many zeros", () =>
    Effect.gen(function*() {
      const disk = yield* open(LARGE)
      yield* withFallocate(() => -ENOTSUP)
      const written = vi.fn()
      const others = { over: false, turns: 0 }
      const turn = (): void => {
        others.turns++
        if (!others.over) setImmediate(turn)
      }
      setImmediate(turn)
      yield* blockEffect((done) =>
        disk.writeZeroes?.(SECTOR, LARGE - 2 * SECTOR, true, (error) => {
          written()
          done(error)
        })
      )
      others.over = true
      assert.isAtLeast(others.turns, 5)
      assert.strictEqual(written.mock.calls.length, 1)
      const bytes = new Uint8Array(LARGE)
      yield* blockEffect((done) => disk.read(0, [bytes], done))
      assert.strictEqual(bytes.findIndex((byte, at) => byte !== (at < SECTOR || at >= LARGE - SECTOR ? 7 : 0)), -1)
    }), 60_000)

  const PROGRAM = fileURLToPath(new URL("disk/withoutHoles.ts", import.meta.url))
  const inNamespace = (directory: string, command: string, ...args: ReadonlyArray<string>) =>
    spawnSync("unshare", ["-rm", "sh", "-c", `mount -t ramfs none "$0" && ${command}`, directory, ...args], {
      encoding: "utf8"
    })
  const probe = mkdtempSync(join(tmpdir(), "troupe-probe-"))
  const canMount = inNamespace(probe, "true").status === 0
  rmSync(probe, { recursive: true })

  it.live.skipIf(!canMount)(
    "a file system that cannot do either offers no discard, and has zeros written",
    () =>
      Effect.gen(function*() {
        const place = yield* directory
        const { status, stderr, stdout } = inNamespace(
          place,
          `exec "$1" --disable-warning=ExperimentalWarning "$2" "$0/disk"`,
          process.execPath,
          PROGRAM
        )
        assert.strictEqual(status, 0, stderr)
        assert.deepStrictEqual(stdout.trim().split("\n"), ["no discard, wrong byte -1", "no discard, wrong byte -1"])
      }),
    60_000
  )
})
