/** What a guest was told to be flushed survives a kill of the process that its machine is in. */
import { assert, describe, it } from "@effect/vitest"
import { blockEffect } from "@troupe/core/BlockBackend"
import { openDisk } from "@troupe/devices/Block"
import * as BlockFile from "@troupe/node/BlockFile"
import { Effect } from "effect"
import { spawn, spawnSync } from "node:child_process"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))
const TROUPE = fileURLToPath(new URL("../../packages/node/src/bin/troupe.ts", import.meta.url))
const SECTOR = 512
/** Sectors of each round, and rounds. */
const PART = 64
const ROUNDS = 30
const SIZE = ROUNDS * PART * SECTOR

/** The bytes of sectors that have the guest's pattern (see test/guest/README.md). */
const pattern = (sector: number, sectors: number, seed: number): Uint8Array => {
  const first = (sector * SECTOR) / 4
  return new Uint8Array(
    Uint32Array.from({ length: (sectors * SECTOR) / 4 }, (_, i) => Math.imul(first + i + seed, 2654435761)).buffer
  )
}

const directory = Effect.acquireRelease(
  Effect.sync(() => mkdtempSync(join(tmpdir(), "troupe-durable-"))),
  (directory) => Effect.sync(() => rmSync(directory, { recursive: true }))
)

/** Writes and flushes part after part, and says which is done. It never ends by itself, however long it takes to kill it. */
const words = Array.from(
  { length: ROUNDS },
  (_, round) => `blk=write,${round * PART},${PART},${round + 1} blk=flush say=${round}`
).join(" ").concat(" idle")

/** Runs the guest in a process of its own and kills that after so many rounds. Returns the last round that the guest has said. */
const runUntilKilled = (disk: string, rounds: number) =>
  Effect.callback<number>((resume) => {
    const child = spawn(
      process.execPath,
      [
        "--disable-warning=ExperimentalWarning",
        TROUPE,
        "run",
        "-q",
        "-k",
        ELF,
        "-d",
        disk,
        "--cmdline",
        `quiet ${words}`
      ],
      { stdio: ["ignore", "pipe", "inherit"] }
    )
    let output = ""
    const last = () => Number(Array.from(output.matchAll(/say (\d+)\r?\n/g)).at(-1)?.[1] ?? -1)
    child.stdout.on("data", (chunk: Buffer) => {
      output += chunk.toString()
      if (last() >= rounds) child.kill("SIGKILL")
    })
    child.on("close", (_, signal) => {
      resume(
        signal === "SIGKILL" ? Effect.succeed(last()) : Effect.die(new Error(`it ended by itself: ${output}`))
      )
    })
    return Effect.sync(() => void child.kill("SIGKILL"))
  })

describe.skipIf(kvmObstacle !== undefined)(onKvm("a disk of a machine that is killed"), () => {
  for (const format of ["FILE", "QCOW"] as const) {
    const missing = format === "QCOW" && spawnSync("qemu-img", ["--version"]).status !== 0
    const title = `has what its guest flushed: ${format}`
    it.live.skipIf(missing)(
      missing ? `${title} (skipped: there is no qemu-img (package qemu-utils))` : title,
      () =>
        Effect.gen(function*() {
          const path = join(yield* directory, "disk")
          if (format === "FILE") writeFileSync(path, new Uint8Array(SIZE))
          else spawnSync("qemu-img", ["create", "-q", "-f", "qcow2", path, String(SIZE)])
          const last = yield* runUntilKilled(format === "FILE" ? path : `${path},qcow2`, 10)
          assert.isAtLeast(last, 10)
          const disk = yield* openDisk({ id: "disk", mode: "READ_WRITE", format, client: BlockFile.fromPath(path) })
          for (let round = 0; round <= last; round++) {
            const bytes = new Uint8Array(PART * SECTOR)
            yield* blockEffect((done) => disk.read(round * PART * SECTOR, [bytes], done))
            assert.deepStrictEqual(bytes, pattern(round * PART, PART, round + 1), `round ${round} of ${last}`)
          }
        }),
      60_000
    )
  }
})
