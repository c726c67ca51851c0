/** Opens a disk on a file system that can do little, and says what it does of zeros. Argument: path. */
import { blockEffect } from "@troupe/core/BlockBackend"
import { openDisk } from "@troupe/devices/Block"
import * as Effect from "effect/Effect"
import { writeFileSync } from "node:fs"
import * as BlockFile from "../../src/BlockFile.ts"

const [path = ""] = process.argv.slice(2)
const SIZE = 10 * 2 ** 20
const FIRST = 4096

await Effect.runPromise(Effect.scoped(Effect.gen(function*() {
  writeFileSync(path, new Uint8Array(SIZE).fill(7))
  const disk = yield* openDisk({ id: "disk", mode: "READ_WRITE", format: "FILE", client: BlockFile.fromPath(path) })
  for (const unmap of [false, true]) {
    const bytes = new Uint8Array(SIZE)
    yield* blockEffect((done) => disk.write(0, [new Uint8Array(SIZE).fill(7)], done))
    yield* blockEffect((done) => disk.writeZeroes?.(FIRST, SIZE - 2 * FIRST, unmap, done))
    yield* blockEffect((done) => disk.read(0, [bytes], done))
    const wrong = bytes.findIndex((byte, at) => byte !== (at < FIRST || at >= SIZE - FIRST ? 7 : 0))
    console.log(`${disk.discard === undefined ? "no discard" : "discard"}, wrong byte ${wrong}`)
  }
})))
