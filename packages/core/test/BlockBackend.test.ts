import { assert, describe, it } from "@effect/vitest"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Scope from "effect/Scope"
import { BlockBackendError, blockEffect, makeBlockBackend, makeMemoryBackend } from "../src/BlockBackend.ts"

const bytes = (length: number) => Uint8Array.from({ length }, (_, i) => i * 7)

const failureOf = (exit: Exit.Exit<void, BlockBackendError>): BlockBackendError => {
  const failure = Exit.isFailure(exit) ? exit.cause.reasons.find((reason) => reason._tag === "Fail") : undefined
  return failure === undefined ? assert.fail("it should have failed") : failure.error
}

describe("makeBlockBackend", () => {
  it.effect("gives effects whole requests, whatever their pieces", () =>
    Effect.gen(function*() {
      const store = bytes(2048)
      const asked: Array<readonly [string, number, number]> = []
      const disk = yield* makeBlockBackend({
        name: "effects",
        capacity: store.length,
        read: (offset, target) =>
          Effect.sync(() => {
            asked.push(["read", offset, target.length])
            target.set(store.subarray(offset, offset + target.length))
          }),
        write: (offset, source) =>
          Effect.sync(() => {
            asked.push(["write", offset, source.length])
            store.set(source, offset)
          })
      })
      assert.deepStrictEqual([disk.readOnly, disk.blockSize, disk.discard, disk.writeZeroes], [
        false,
        512,
        undefined,
        undefined
      ])
      const before = store.slice()
      const a = new Uint8Array(100)
      const b = new Uint8Array(412)
      yield* blockEffect((done) => disk.read(512, [a, b], done))
      assert.deepStrictEqual(new Uint8Array([...a, ...b]), before.slice(512, 1024))
      yield* blockEffect((done) => disk.write(0, [b, a], done))
      assert.deepStrictEqual(store.slice(0, 512), new Uint8Array([...b, ...a]))
      yield* blockEffect((done) => disk.flush(done))
      assert.deepStrictEqual(asked, [["read", 512, 512], ["write", 0, 512]])
    }))

  it.effect("fails typed: with an effect's own error, with its defect, without a write", () =>
    Effect.gen(function*() {
      const own = new BlockBackendError({ name: "effects", operation: "read", kind: "no-space", detail: "its own" })
      const disk = yield* makeBlockBackend({
        name: "effects",
        capacity: 1024,
        read: (offset) => offset === 0 ? Effect.fail(own) : Effect.die(new Error("a defect")),
        flush: Effect.die("odd")
      })
      const read = (offset: number) =>
        Effect.exit(blockEffect((done) => disk.read(offset, [new Uint8Array(512)], done)))
      assert.strictEqual(failureOf(yield* read(0)), own)
      const defect = failureOf(yield* read(512))
      assert.deepStrictEqual([defect.kind, defect.detail], ["io", "a defect"])
      assert.strictEqual(failureOf(yield* Effect.exit(blockEffect(disk.flush))).kind, "io")
      assert.isTrue(disk.readOnly)
      const refused = failureOf(yield* Effect.exit(blockEffect((done) => disk.write(0, [new Uint8Array(512)], done))))
      assert.strictEqual(refused.kind, "read-only")
      assert.include(refused.message, "READ_WRITE")
    }))

  it.effect("is over with its scope: what runs is interrupted and reported, what comes later fails", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const interrupted = yield* Deferred.make<void>()
      const disk = yield* Scope.provide(
        makeBlockBackend({
          name: "effects",
          capacity: 1024,
          read: () => Effect.onInterrupt(Effect.never, () => Deferred.succeed(interrupted, undefined))
        }),
        scope
      )
      const errors: Array<string | undefined> = []
      for (let i = 0; i < 3; i++) disk.read(0, [new Uint8Array(512)], (error) => void errors.push(error?.kind))
      yield* Effect.yieldNow
      yield* Scope.close(scope, Exit.void)
      assert.deepStrictEqual(errors, ["closed", "closed", "closed"])
      assert.isTrue(yield* Deferred.isDone(interrupted))
      disk.read(0, [new Uint8Array(512)], (error) => void errors.push(error?.detail))
      assert.strictEqual(errors[3], "the disk is closed")
    }))

  it.effect("reports an operation that its scope ends before it has begun", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const disk = yield* Scope.provide(
        makeBlockBackend({ name: "effects", capacity: 1024, read: () => Effect.never }),
        scope
      )
      let kind: string | undefined
      disk.read(0, [new Uint8Array(512)], (error) => {
        kind = error?.kind
      })
      yield* Scope.close(scope, Exit.void)
      assert.strictEqual(kind, "closed")
    }))
})

describe("makeMemoryBackend", () => {
  it.effect("refuses what is not in it, and grows", () =>
    Effect.gen(function*() {
      const disk = makeMemoryBackend("memory", bytes(1024))
      const outside = failureOf(yield* Effect.exit(blockEffect((done) => disk.read(1000, [new Uint8Array(100)], done))))
      assert.deepStrictEqual([outside.kind, outside.offset, outside.length], ["range", 1000, 100])
      assert.strictEqual(outside.message, "memory: read of 100 bytes at 1000: not in the disk")
      yield* blockEffect((done) => disk.grow?.(2048, done))
      yield* blockEffect((done) => disk.write(1536, [new Uint8Array(512).fill(9)], done))
      assert.strictEqual(disk.bytes().length, 2048)
      assert.deepStrictEqual(disk.bytes().slice(0, 1024), bytes(1024))
    }))
})
