/** Writes a disk until it is killed, and says on standard output what is durable. Arguments: path, format. */
import { blockEffect } from "@troupe/core/BlockBackend"
import { openDisk } from "@troupe/devices/Block"
import * as Effect from "effect/Effect"
import { writeSync } from "node:fs"
import * as BlockFile from "../../src/BlockFile.ts"
import { blockOf, WRITER_BLOCK, WRITER_BLOCKS } from "./pattern.ts"

const [path = "", format = "FILE"] = process.argv.slice(2)

await Effect.runPromise(Effect.scoped(Effect.gen(function*() {
  const disk = yield* openDisk({
    id: "disk",
    mode: "READ_WRITE",
    format: format === "QCOW" ? "QCOW" : "FILE",
    client: BlockFile.fromPath(path)
  })
  for (let round = 0;; round++) {
    // Blocks all over the disk, so that images take clusters in every round.
    const offset = ((round * 37) % WRITER_BLOCKS) * WRITER_BLOCK
    yield* blockEffect((done) => disk.write(offset, [blockOf(round)], done))
    yield* blockEffect((done) => disk.flush(done))
    writeSync(1, `${round}\n`)
  }
})))
