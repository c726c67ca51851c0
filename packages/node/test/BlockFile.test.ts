/** Files of the host as disks: real files, real failures, a real kill; and qcow2 images beside QEMU's own tools. */
import { assert, describe, it } from "@effect/vitest"
import { type BlockBackend, type BlockBackendError, blockEffect } from "@troupe/core/BlockBackend"
import type { BlockSpec } from "@troupe/core/GuestConfig"
import { openDisk } from "@troupe/devices/Block"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as fc from "fast-check"
import { spawn, spawnSync } from "node:child_process"
import {
  closeSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync
} from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import * as BlockFile from "../src/BlockFile.ts"
import { blockOf, WRITER_BLOCK, WRITER_BLOCKS } from "./disk/pattern.ts"

const SECTOR = 512

const directory = Effect.acquireRelease(
  Effect.sync(() => mkdtempSync(join(tmpdir(), "troupe-disk-"))),
  (directory) => Effect.sync(() => rmSync(directory, { recursive: true }))
)

const file = (bytes: Uint8Array | number) =>
  Effect.map(directory, (directory) => {
    const path = join(directory, "disk")
    writeFileSync(path, typeof bytes === "number" ? new Uint8Array(0) : bytes)
    if (typeof bytes === "number") truncateSync(path, bytes)
    return path
  })

const random = (length: number): Buffer => {
  const bytes = Buffer.alloc(length)
  let state = 1
  for (let i = 0; i + 4 <= length; i += 4) {
    state = Math.imul(state, 1664525) + 1013904223 | 0
    bytes.writeInt32LE(state, i)
  }
  return bytes
}

const read = (disk: BlockBackend, offset: number, length: number, cut = length) => {
  const bytes = new Uint8Array(length)
  return Effect.as(
    blockEffect((done) => disk.read(offset, [bytes.subarray(0, cut), bytes.subarray(cut)], done)),
    bytes
  )
}
const write = (disk: BlockBackend, offset: number, bytes: Uint8Array<ArrayBuffer>, cut = bytes.length) =>
  blockEffect((done) => disk.write(offset, [bytes.subarray(0, cut), bytes.subarray(cut)], done))

const failureOf = <A>(exit: Exit.Exit<A, BlockBackendError>): BlockBackendError => {
  const failure = Exit.isFailure(exit) ? exit.cause.reasons.find((reason) => reason._tag === "Fail") : undefined
  return failure === undefined ? assert.fail("it should have failed") : failure.error
}

/** Beyond what a file of ext4 or tmpfs can be: a full disk without a full disk. Files of XFS and btrfs can be as large. */
const BOUND = 2 ** 52
const hasBound = ((): boolean => {
  const directory = mkdtempSync(join(tmpdir(), "troupe-bound-"))
  const fd = openSync(join(directory, "file"), "w")
  try {
    writeSync(fd, new Uint8Array(SECTOR), 0, SECTOR, BOUND)
    return false
  } catch {
    return true
  } finally {
    closeSync(fd)
    rmSync(directory, { recursive: true })
  }
})()

const spec = (path: string, more: Partial<BlockSpec> = {}): BlockSpec => ({
  id: "disk",
  mode: "READ_WRITE",
  format: "FILE",
  client: BlockFile.fromPath(path),
  ...more
})

describe("BlockFile", () => {
  it.live("is the bytes of the file, of any length and in any pieces", () =>
    Effect.gen(function*() {
      const size = 3 * 2 ** 20
      const model = random(size)
      const path = yield* file(model)
      const disk = yield* openDisk(spec(path))
      assert.strictEqual(disk.capacity, size)
      for (const [offset, length, cut] of [[0, 512, 512], [4096, 100_000, 77], [0, size, 1000], [512, 0, 0]] as const) {
        assert.isTrue(model.subarray(offset, offset + length).equals(yield* read(disk, offset, length, cut)))
      }
      const bytes = new Uint8Array(random(2 ** 20 + 512))
      yield* write(disk, 1024, bytes, 600)
      model.set(bytes, 1024)
      assert.isTrue(model.equals(yield* read(disk, 0, size)))
      yield* blockEffect((done) => disk.flush(done))
      assert.isTrue(model.equals(readFileSync(path)))
    }))

  it.live("reads many pieces at a time into one buffer, however many there are", () =>
    Effect.gen(function*() {
      const model = random(2 ** 20)
      const disk = yield* openDisk(spec(yield* file(model)))
      for (const pieces of [3, 256, 300, 2048]) {
        const target = new Uint8Array(pieces * SECTOR)
        const buffers = Array.from({ length: pieces }, (_, i) => target.subarray(i * SECTOR, (i + 1) * SECTOR))
        yield* blockEffect((done) => disk.read(0, buffers, done))
        assert.isTrue(model.subarray(0, target.length).equals(target), `${pieces} pieces`)
      }
    }))

  it.live("gives up the room of what is discarded, and makes zeros of either kind", () =>
    Effect.gen(function*() {
      const path = yield* file(random(2 ** 20))
      const disk = yield* openDisk(spec(path))
      const { discard, writeZeroes } = disk
      if (discard === undefined || writeZeroes === undefined) return assert.fail("this file system should do both")
      const before = statSync(path).blocks
      yield* blockEffect((done) => discard(0, 2 ** 18, done))
      assert.isAtMost(statSync(path).blocks, before - 2 ** 18 / SECTOR)
      yield* blockEffect((done) => writeZeroes(2 ** 18, 2 ** 18, false, done))
      yield* blockEffect((done) => writeZeroes(2 ** 19, 2 ** 18 + SECTOR, true, done))
      assert.isTrue((yield* read(disk, 0, 2 ** 19 + 2 ** 18 + SECTOR)).every((byte) => byte === 0))
      assert.isFalse((yield* read(disk, 2 ** 20 - SECTOR, SECTOR)).every((byte) => byte === 0))
      assert.strictEqual(statSync(path).size, 2 ** 20)
    }))

  it.live("lets others work while it gives up much room, or makes much zero", () =>
    Effect.gen(function*() {
      const size = 32 * 2 ** 20
      const path = yield* file(size)
      const disk = yield* openDisk(spec(path))
      const { discard, writeZeroes } = disk
      if (discard === undefined || writeZeroes === undefined) return assert.fail("it can do both")
      yield* write(disk, 0, new Uint8Array(size).fill(7))
      for (
        const operation of [
          blockEffect((done) => writeZeroes(SECTOR, size - 2 * SECTOR, false, done)),
          blockEffect((done) => discard(0, size - SECTOR, done))
        ]
      ) {
        let turns = 0
        let over = false
        const turn = (): void => {
          turns++
          if (!over) setImmediate(turn)
        }
        setImmediate(turn)
        yield* operation
        over = true
        assert.isAtLeast(turns, 7)
      }
      const bytes = yield* read(disk, 0, size)
      assert.isTrue(bytes.subarray(0, size - SECTOR).every((byte) => byte === 0))
      assert.isTrue(bytes.subarray(size - SECTOR).every((byte) => byte === 7))
    }))

  it.live("fails typed when the file has become shorter, and goes on where it is not", () =>
    Effect.gen(function*() {
      const path = yield* file(random(2 ** 20))
      const disk = yield* openDisk(spec(path))
      truncateSync(path, 2 ** 19)
      const error = failureOf(yield* Effect.exit(read(disk, 2 ** 19 - SECTOR, 4 * SECTOR)))
      assert.deepStrictEqual([error.kind, error.operation, error.name], ["vanished", "read", path])
      assert.include(error.message, "shorter than the disk")
      yield* read(disk, 0, SECTOR)
    }))

  it.live.skipIf(!hasBound)(
    `fails typed when there is no room${hasBound ? "" : " (files have no bound here)"}`,
    () =>
      Effect.gen(function*() {
        const path = yield* file(2 ** 20)
        const disk = yield* openDisk(spec(path))
        const error = failureOf(yield* Effect.exit(write(disk, BOUND, new Uint8Array(SECTOR))))
        assert.deepStrictEqual([error.kind, error.operation], ["no-space", "write"])
      })
  )

  it.live("says what is wrong with what cannot be opened", () =>
    Effect.gen(function*() {
      const path = yield* file(SECTOR)
      const open = (path: string, more: Partial<BlockSpec> = {}) =>
        Effect.map(Effect.exit(Effect.scoped(openDisk(spec(path, more)))), (exit) => failureOf(exit).message)
      assert.include(yield* open(`${path}-not`), "there is no such file")
      assert.include(yield* open(tmpdir()), "it is a directory")
      assert.include(yield* open("/dev/null"), "neither a regular file nor a block device")
      assert.include(yield* open(path, { format: "QCOW" }), "Use the format FILE")
    }))

  it.live("is for one writer, or for many readers", () =>
    Effect.gen(function*() {
      const path = yield* file(SECTOR)
      const open = (mode: BlockSpec["mode"]) => Effect.exit(openDisk(spec(path, { mode })))
      yield* Effect.scoped(Effect.gen(function*() {
        assert.isTrue(Exit.isSuccess(yield* open("READ_WRITE")))
        assert.include(failureOf(yield* open("READ_WRITE")).message, "it is in use")
        assert.include(failureOf(yield* open("READ_ONLY")).message, "it is being written to")
      }))
      assert.isTrue(Exit.isSuccess(yield* open("READ_ONLY")))
      assert.isTrue(Exit.isSuccess(yield* open("VOLATILE_WRITE")))
      assert.include(failureOf(yield* open("READ_WRITE")).message, "Stop the machine that has it")
    }))

  it.live("writes nothing where it must not", () =>
    Effect.gen(function*() {
      const bytes = random(2 ** 16)
      const path = yield* file(bytes)
      yield* Effect.scoped(Effect.gen(function*() {
        const disk = yield* openDisk(spec(path, { mode: "READ_ONLY" }))
        assert.strictEqual(failureOf(yield* Effect.exit(write(disk, 0, new Uint8Array(SECTOR)))).kind, "read-only")
        const copy = yield* openDisk(spec(path, { mode: "VOLATILE_WRITE" }))
        yield* write(copy, 0, new Uint8Array(SECTOR))
        assert.isTrue((yield* read(copy, 0, SECTOR)).every((byte) => byte === 0))
      }))
      assert.isTrue(bytes.equals(readFileSync(path)))
    }))

  it.live("is closed when its scope is, after what is under way, and fails typed from then on", () =>
    Effect.gen(function*() {
      const path = yield* file(random(2 ** 22))
      let ended = 0
      const disk = yield* Effect.scoped(Effect.gen(function*() {
        const disk = yield* openDisk(spec(path))
        for (let i = 0; i < 16; i++) disk.read(0, [new Uint8Array(2 ** 22)], () => void ended++)
        return disk
      }))
      assert.strictEqual(ended, 16)
      assert.strictEqual(failureOf(yield* Effect.exit(read(disk, 0, SECTOR))).kind, "closed")
    }))
})

const WRITER = fileURLToPath(new URL("disk/writer.ts", import.meta.url))

/** Runs the writer until it has said so many rounds, and kills it. Returns the last round that it said to be durable. */
const writeUntilKilled = (path: string, format: string, rounds: number) =>
  Effect.callback<number>((resume) => {
    const child = spawn(process.execPath, ["--disable-warning=ExperimentalWarning", WRITER, path, format], {
      stdio: ["ignore", "pipe", "inherit"]
    })
    let output = ""
    child.stdout.on("data", (chunk: Buffer) => {
      output += chunk.toString()
      if (Number(output.split("\n").at(-2)) >= rounds) child.kill("SIGKILL")
    })
    child.on("close", (_, signal) => {
      assert.strictEqual(signal, "SIGKILL")
      resume(Effect.succeed(Number(output.split("\n").at(-2))))
    })
    return Effect.sync(() => void child.kill("SIGKILL"))
  })

const checkRounds = (disk: BlockBackend, last: number) =>
  Effect.gen(function*() {
    // The last round of each block; the one after the last may be there or not.
    for (let round = Math.max(0, last - WRITER_BLOCKS + 2); round <= last; round++) {
      const offset = ((round * 37) % WRITER_BLOCKS) * WRITER_BLOCK
      const bytes = yield* read(disk, offset, WRITER_BLOCK)
      assert.isTrue(Buffer.from(blockOf(round)).equals(bytes), `round ${round} of ${last}`)
    }
  })

const hasQemuImg = spawnSync("qemu-img", ["--version"]).status === 0
const QEMU_MISSING = "skipped: there is no qemu-img (package qemu-utils)"

const qemuImg = (...args: ReadonlyArray<string>): string => {
  const { status, stderr, stdout } = spawnSync("qemu-img", args, { encoding: "utf8" })
  assert.strictEqual(status, 0, `qemu-img ${args.join(" ")}: ${stderr}${stdout}`)
  return stdout
}

describe("a disk whose process is killed", () => {
  it.live("has everything that was flushed: a file", () =>
    Effect.gen(function*() {
      const path = yield* file(WRITER_BLOCK * WRITER_BLOCKS)
      const last = yield* writeUntilKilled(path, "FILE", 40)
      yield* Effect.scoped(Effect.flatMap(openDisk(spec(path)), (disk) => checkRounds(disk, last)))
    }))
})

describe.skipIf(!hasQemuImg)(hasQemuImg ? "qcow2 beside QEMU" : `qcow2 beside QEMU (${QEMU_MISSING})`, () => {
  const size = 8 * 2 ** 20
  const change = fc.record({
    kind: fc.constantFrom("write" as const, "write" as const, "zero" as const, "discard" as const),
    at: fc.nat(size / SECTOR - 1),
    sectors: fc.integer({ min: 1, max: 700 })
  })
  const changes = fc.array(change, { minLength: 1, maxLength: 25, size: "max" })
  const imageOptions = fc.constantFrom(
    "compat=1.1",
    "compat=0.10",
    "compat=1.1,cluster_size=512",
    "compat=1.1,cluster_size=2M",
    "compat=1.1,refcount_bits=1",
    "compat=1.1,refcount_bits=64",
    "compat=1.1,cluster_size=4096,preallocation=metadata",
    "compat=1.1,preallocation=full"
  )

  /** Applies changes to an image and to a model of it. */
  const apply = (
    disk: BlockBackend,
    model: Buffer,
    list: ReadonlyArray<typeof change extends fc.Arbitrary<infer A> ? A : never>
  ) =>
    Effect.gen(function*() {
      for (const { at, kind, sectors } of list) {
        const offset = at * SECTOR
        const length = Math.min(sectors * SECTOR, size - offset)
        if (kind === "write") {
          const bytes = new Uint8Array(random(length).map((byte) => byte ^ at))
          yield* write(disk, offset, bytes)
          model.set(bytes, offset)
        } else if (kind === "zero") {
          yield* blockEffect((done) => disk.writeZeroes?.(offset, length, true, done))
          model.fill(0, offset, offset + length)
        } else {
          yield* blockEffect((done) => disk.discard?.(offset, length, done))
          const now = yield* read(disk, offset, length)
          for (let i = 0; i < length; i++) {
            if (now[i] !== 0 && now[i] !== model[offset + i]) assert.fail(`byte ${offset + i} after a discard`)
          }
          model.set(now, offset)
        }
      }
      yield* blockEffect((done) => disk.flush(done))
    })

  const contentOf = (path: string): Buffer => {
    qemuImg("convert", "-O", "raw", path, `${path}.raw`)
    return readFileSync(`${path}.raw`)
  }

  it("writes images that QEMU finds faultless and reads the same", () =>
    fc.assert(
      fc.asyncProperty(imageOptions, changes, changes, (options, first, second) =>
        Effect.runPromise(Effect.scoped(Effect.gen(function*() {
          const path = join(yield* directory, "image")
          qemuImg("create", "-q", "-f", "qcow2", "-o", options, path, String(size))
          const model = Buffer.alloc(size)
          for (const list of [first, second]) {
            yield* Effect.scoped(
              Effect.flatMap(openDisk(spec(path, { format: "QCOW" })), (disk) =>
                apply(disk, model, list))
            )
            qemuImg("check", "-q", path)
            assert.isTrue(model.equals(contentOf(path)), "QEMU reads something else")
          }
        })))),
      { numRuns: 12 }
    ))

  it("reads and changes what QEMU compressed, and images over others", () =>
    fc.assert(
      fc.asyncProperty(changes, changes, fc.boolean(), (below, above, compressed) =>
        Effect.runPromise(Effect.scoped(Effect.gen(function*() {
          const folder = yield* directory
          const base = join(folder, "base.raw")
          const model = Buffer.alloc(size)
          writeFileSync(base, model)
          yield* Effect.scoped(Effect.flatMap(openDisk(spec(base)), (disk) =>
            apply(disk, model, below)))
          const middle = join(folder, "middle")
          qemuImg("convert", "-O", "qcow2", ...(compressed ? ["-c"] : []), base, middle)
          yield* Effect.scoped(Effect.gen(function*() {
            const disk = yield* openDisk(spec(middle, { format: "QCOW", mode: "READ_ONLY" }))
            assert.isTrue(model.equals(yield* read(disk, 0, size)))
          }))
          // An image over it: what is written is in the one above.
          const over = join(folder, "over")
          qemuImg("create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", over)
          const before = readFileSync(middle)
          const both = Buffer.from(model)
          yield* Effect.scoped(Effect.gen(function*() {
            const disk = yield* openDisk(spec(over, {
              format: "QCOW",
              backing: { client: BlockFile.fromPath(middle), format: "QCOW" }
            }))
            yield* apply(disk, both, above)
            assert.isTrue(both.equals(yield* read(disk, 0, size)))
          }))
          assert.isTrue(before.equals(readFileSync(middle)))
          qemuImg("check", "-q", over)
          assert.isTrue(both.equals(contentOf(over)))
          // And the same in place, over compressed clusters.
          yield* Effect.scoped(
            Effect.flatMap(openDisk(spec(middle, { format: "QCOW" })), (disk) =>
              apply(disk, model, above))
          )
          qemuImg("check", "-q", middle)
          assert.isTrue(model.equals(contentOf(middle)))
        })))),
      { numRuns: 8 }
    ))

  it.live("has everything that was flushed when its process is killed", () =>
    Effect.gen(function*() {
      const path = join(yield* directory, "image")
      qemuImg("create", "-q", "-f", "qcow2", path, String(WRITER_BLOCK * WRITER_BLOCKS))
      let rounds = 0
      for (const until of [15, 40]) {
        const last = yield* writeUntilKilled(path, "QCOW", until)
        rounds = last
        const { status } = spawnSync("qemu-img", ["check", "-q", path])
        // 3: clusters that are counted and not used. Nothing else may be wrong.
        assert.include([0, 3], status)
        yield* Effect.scoped(
          Effect.flatMap(openDisk(spec(path, { format: "QCOW" })), (disk) => checkRounds(disk, last))
        )
      }
      assert.isAtLeast(rounds, 40)
    }))

  it.live("opens no file that an image names, and refuses to write beside snapshots", () =>
    Effect.gen(function*() {
      const folder = yield* directory
      const secret = join(folder, "secret")
      writeFileSync(secret, random(2 ** 16))
      const image = join(folder, "image")
      qemuImg("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", image)
      const refused = failureOf(yield* Effect.exit(Effect.scoped(openDisk(spec(image, { format: "QCOW" })))))
      assert.include(refused.message, secret)
      assert.include(refused.hint, "Name that file in `backing`")
      const plain = join(folder, "plain")
      qemuImg("create", "-q", "-f", "qcow2", plain, "1M")
      qemuImg("snapshot", "-c", "before", plain)
      assert.include(
        failureOf(yield* Effect.exit(Effect.scoped(openDisk(spec(plain, { format: "QCOW" }))))).message,
        "1 internal snapshots"
      )
      yield* openDisk(spec(plain, { format: "QCOW", mode: "VOLATILE_WRITE" }))
    }))
})
