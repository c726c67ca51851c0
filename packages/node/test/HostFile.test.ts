/** Files of the host as guest files: what is there is read, what cannot be read is named, and nothing waits for ever. */
import { assert, describe, it } from "@effect/vitest"
import { GuestFileError } from "@troupe/core/GuestFile"
import { fromPath } from "@troupe/node/HostFile"
import * as Effect from "effect/Effect"
import { execFileSync } from "node:child_process"
import { mkdtempSync, readdirSync, readlinkSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll } from "vitest"

const folder = mkdtempSync(join(tmpdir(), "troupe-host-file-"))
afterAll(() => rmSync(folder, { recursive: true }))

/** Descriptors of this process that are open on something in the folder. */
const openHere = () =>
  readdirSync("/proc/self/fd").flatMap((fd) => {
    try {
      const target = readlinkSync(`/proc/self/fd/${fd}`)
      return target.startsWith(folder) ? [target] : []
    } catch {
      return []
    }
  })

describe("fromPath", () => {
  it.live("reads the whole file, each time anew", () =>
    Effect.gen(function*() {
      const path = join(folder, "kernel")
      const file = fromPath(path)
      for (const bytes of [new Uint8Array(0), Uint8Array.of(1, 2, 3), new Uint8Array(300_000).fill(7)]) {
        writeFileSync(path, bytes)
        const read = yield* file.read
        assert.isTrue(Buffer.from(bytes).equals(read))
      }
      assert.deepStrictEqual(openHere(), [])
    }))

  const fifo = join(folder, "fifo")
  execFileSync("mkfifo", [fifo])
  const bad: ReadonlyArray<readonly [path: string, words: RegExp]> = [
    [join(folder, "missing"), /there is no such file/],
    [folder, /it is a directory/],
    [fifo, /not a regular file/],
    ["/dev/zero", /not a regular file/]
  ]
  it.live.each(bad)("says why it cannot be read: %s", ([path, words]) =>
    Effect.gen(function*() {
      const error = yield* Effect.flip(fromPath(path).read)
      assert.instanceOf(error, GuestFileError)
      assert.strictEqual(error.name, path)
      assert.match(error.detail, words)
      assert.deepStrictEqual(openHere(), [])
    }))
})
