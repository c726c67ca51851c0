/** qcow2 images against a byte array: whatever is asked, whatever is lost. */
import { assert, describe, it } from "@effect/vitest"
import {
  type BlockBackend,
  BlockBackendError,
  type BlockBytes,
  type BlockDone,
  blockEffect,
  makeMemoryBackend
} from "@troupe/core/BlockBackend"
import { Seed } from "@troupe/core/testing/Seed"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as References from "effect/References"
import * as Scope from "effect/Scope"
import * as fc from "fast-check"
import { LEFT_BYTES_MAX } from "../src/block/qcow2/ImageWriter.ts"
import { openQcow2 } from "../src/block/qcow2/Qcow2Backend.ts"
import { SCAN_MAX } from "../src/block/qcow2/Refcounts.ts"
import { checkImage, type ImageOptions, makeImage } from "./Qcow2Images.ts"

const SECTOR = 512

type Action =
  | {
    readonly kind: "write"
    readonly sector: number
    readonly sectors: number
    readonly seed: number
    readonly cut: number
  }
  | { readonly kind: "discard" | "zero" | "read"; readonly sector: number; readonly sectors: number }
  | { readonly kind: "flush" }
  | { readonly kind: "reopen" }

const options: fc.Arbitrary<ImageOptions> = fc.record({
  large: fc.boolean(),
  clusterBits: fc.constantFrom(9, 10, 12, 16),
  version: fc.constantFrom<2 | 3>(2, 3),
  refcountOrder: fc.constantFrom(0, 1, 2, 3, 4, 5, 6),
  sectors: fc.integer({ min: 1, max: 3000 })
}).map(({ clusterBits, large, refcountOrder, sectors, version }) => ({
  clusterBits,
  version,
  // A count of one bit cannot count the two references to a shared cluster, and there are none here.
  refcountOrder: version === 2 ? 4 : refcountOrder,
  // Tables of reference counts become longer in images of some MiB with small clusters.
  size: (large && clusterBits === 9 ? sectors + 5000 : sectors) * SECTOR
}))

const range = {
  sector: fc.nat(1 << 20),
  sectors: fc.oneof(fc.integer({ min: 1, max: 8 }), fc.integer({ min: 1, max: 600 }))
}
const action: fc.Arbitrary<Action> = fc.oneof(
  {
    arbitrary: fc.record({ kind: fc.constant("write" as const), ...range, seed: fc.nat(255), cut: fc.nat(2000) }),
    weight: 6
  },
  { arbitrary: fc.record({ kind: fc.constantFrom("discard" as const, "zero" as const), ...range }), weight: 2 },
  { arbitrary: fc.record({ kind: fc.constant("read" as const), ...range }), weight: 2 },
  { arbitrary: fc.constantFrom<Action>({ kind: "flush" }, { kind: "reopen" }), weight: 1 }
)
const actions = fc.array(action, { minLength: 1, maxLength: 40, size: "max" })

const pattern = (length: number, seed: number): Uint8Array<ArrayBuffer> => {
  const bytes = new Uint8Array(length)
  for (let i = 0; i < length; i++) bytes[i] = (i >> 9) * 31 + i * 7 + seed + 1
  return bytes
}

/** Even numbers from 0 to 1: what fast-check draws prefers the ends. */
const randomOf = (seed: number) => {
  const { next } = new Seed(seed)
  return () => next() / 2 ** 32
}

/** Whether two runs of bytes are the same. */
const same = (a: Uint8Array, b: Uint8Array): void =>
  assert.isTrue(Buffer.from(a.buffer, a.byteOffset, a.length).equals(b))

/** A range of an action, in the disk. */
const place = ({ sector, sectors }: { readonly sector: number; readonly sectors: number }, size: number) => {
  const offset = (sector * SECTOR) % size
  return { offset, length: Math.min(sectors * SECTOR, size - offset) }
}

/** Runs an effect; what it logs about images that could not be stored is the point of some tests. */
const runQuietly = <A, E>(effect: Effect.Effect<A, E>): Promise<A> =>
  Effect.runPromise(Effect.provideService(effect, References.MinimumLogLevel, "None"))

describe("openQcow2", () => {
  it("is a byte array, reopened at any time, and leaves an image without faults and leaks", () =>
    fc.assert(
      fc.asyncProperty(options, fc.boolean(), actions, (options, withBacking, actions) => {
        const { size } = options
        const base = pattern(Math.floor(size * 0.7), 99)
        const file = makeMemoryBackend("image", makeImage(withBacking ? { ...options, backingName: "base" } : options))
        const model = new Uint8Array(size)
        if (withBacking) model.set(base)
        const backing = makeMemoryBackend("base", base, { readOnly: true })
        const cluster = 2 ** options.clusterBits
        const canClear = options.version === 3 || !withBacking
        return runQuietly(Effect.gen(function*() {
          const open = Effect.gen(function*() {
            const scope = yield* Scope.make()
            const backend = { ...file, capacity: file.bytes().length }
            const disk = yield* Scope.provide(
              openQcow2(backend, { readOnly: false, ...(withBacking ? { backing } : {}) }),
              scope
            )
            return { scope, disk }
          })
          let { disk, scope } = yield* open
          const check = () => {
            const { errors, leaks } = checkImage(file.bytes())
            assert.deepStrictEqual(errors, [])
            assert.strictEqual(leaks, 0)
          }
          for (const action of actions) {
            switch (action.kind) {
              case "write": {
                const { length, offset } = place(action, size)
                const bytes = pattern(length, action.seed)
                const cut = Math.min(action.cut, length)
                yield* blockEffect((done) => disk.write(offset, [bytes.subarray(0, cut), bytes.subarray(cut)], done))
                model.set(bytes, offset)
                break
              }
              case "discard": {
                const { length, offset } = place(action, size)
                yield* blockEffect((done) => disk.discard?.(offset, length, done))
                const first = Math.ceil(offset / cluster) * cluster
                const last = Math.floor((offset + length) / cluster) * cluster
                if (canClear && first < last) model.fill(0, first, last)
                break
              }
              case "zero": {
                const { length, offset } = place(action, size)
                yield* blockEffect((done) => disk.writeZeroes?.(offset, length, action.sector % 2 === 0, done))
                model.fill(0, offset, offset + length)
                break
              }
              case "read": {
                const { length, offset } = place(action, size)
                const bytes = new Uint8Array(length)
                yield* blockEffect((done) => disk.read(offset, [bytes.subarray(0, 100), bytes.subarray(100)], done))
                same(bytes, model.subarray(offset, offset + length))
                break
              }
              case "flush":
                yield* blockEffect((done) => disk.flush(done))
                assert.deepStrictEqual(checkImage(file.bytes()).errors, [])
                break
              case "reopen":
                yield* Scope.close(scope, Exit.void)
                check()
                ;({ disk, scope } = yield* open)
            }
          }
          yield* Scope.close(scope, Exit.void)
          check()
          const all = new Uint8Array(size)
          const readOnly = yield* Scope.make()
          const image = { ...file, capacity: file.bytes().length }
          const last = yield* Scope.provide(
            openQcow2(image, { readOnly: true, ...(withBacking ? { backing } : {}) }),
            readOnly
          )
          yield* blockEffect((done) => last.read(0, [all], done))
          same(all, model)
        }))
      }),
      { numRuns: 150 }
    ))

  it("loses only what was not flushed when the power goes, and is never inconsistent", () =>
    fc.assert(
      fc.asyncProperty(
        options,
        fc.boolean(),
        actions,
        fc.integer(),
        (options, withBacking, actions, seed) => {
          const { size } = options
          const chance = randomOf(seed)
          const base = pattern(Math.floor(size * 0.7), 99)
          const image = makeImage(withBacking ? { ...options, backingName: "base" } : options)
          const medium = recording(image)
          const backing = makeMemoryBackend("base", base, { readOnly: true })
          const open = (below: BlockBackend, readOnly: boolean) =>
            openQcow2(below, { readOnly, ...(withBacking ? { backing } : {}) })
          const model = new Uint8Array(size)
          if (withBacking) model.set(base)
          const cluster = 2 ** options.clusterBits
          return runQuietly(Effect.gen(function*() {
            const scope = yield* Scope.make()
            const disk = yield* Scope.provide(open(medium.backend, false), scope)
            medium.log.push({ kind: "flushed", model: model.slice() })
            for (const action of actions) {
              if (action.kind === "read") continue
              if (action.kind === "flush" || action.kind === "reopen") {
                yield* blockEffect((done) => disk.flush(done))
                medium.log.push({ kind: "flushed", model: model.slice() })
                continue
              }
              const { length, offset } = place(action, size)
              medium.log.push({ kind: "touch", from: offset / SECTOR, to: (offset + length) / SECTOR })
              const bytes = action.kind === "write" ? pattern(length, action.seed) : new Uint8Array(length)
              yield* blockEffect((done) =>
                action.kind === "write"
                  ? disk.write(offset, [bytes], done)
                  : action.kind === "zero"
                  ? disk.writeZeroes?.(offset, length, action.sector % 2 === 0, done)
                  : disk.discard?.(offset, length, done)
              )
              if (action.kind === "discard") {
                const first = Math.ceil(offset / cluster) * cluster
                const last = Math.floor((offset + length) / cluster) * cluster
                if (first < last && (options.version === 3 || !withBacking)) model.fill(0, first, last)
              } else {
                model.set(bytes, offset)
              }
            }
            yield* Scope.close(scope, Exit.void)
            for (const loss of medium.losses(chance)) {
              assert.deepStrictEqual(checkImage(loss.bytes).errors, [])
              if (chance() > 0.2) continue
              const again = yield* Scope.make()
              const disk = yield* Scope.provide(open(makeMemoryBackend("again", loss.bytes), true), again)
              const all = new Uint8Array(size)
              yield* blockEffect((done) => disk.read(0, [all], done))
              for (let sector = 0; sector < size / SECTOR; sector++) {
                if (loss.touched[sector] === 1) continue
                const at = sector * SECTOR
                same(all.subarray(at, at + SECTOR), loss.model.subarray(at, at + SECTOR))
              }
            }
          }))
        }
      ),
      { numRuns: 60 }
    ), 120_000)

  it("fails a request when its file does, and goes on", () =>
    fc.assert(
      fc.asyncProperty(
        options,
        actions,
        fc.array(fc.nat(300), { maxLength: 12, size: "max" }),
        (options, actions, failing) => {
          const { size } = options
          const file = makeMemoryBackend("image", makeImage(options))
          const faults = new Set(failing)
          let calls = 0
          const faulty = (call: (done: BlockDone) => void) => (done: BlockDone) =>
            faults.has(calls++)
              ? done(new BlockBackendError({ name: "image", operation: "write", kind: "no-space", detail: "injected" }))
              : call(done)
          const backend: BlockBackend = {
            ...file,
            read: (offset, buffers, done) => faulty((done) => file.read(offset, buffers, done))(done),
            write: (offset, buffers, done) => faulty((done) => file.write(offset, buffers, done))(done),
            flush: (done) => faulty((done) => file.flush(done))(done),
            grow: (capacity, done) => faulty((done) => file.grow?.(capacity, done))(done)
          }
          const model = new Uint8Array(size)
          // Sectors whose last write failed are the one or the other.
          const unknown = new Uint8Array(size / SECTOR)
          return runQuietly(Effect.gen(function*() {
            const scope = yield* Scope.make()
            const opened = yield* Effect.exit(Scope.provide(openQcow2(backend, { readOnly: false }), scope))
            if (Exit.isFailure(opened)) return
            const disk = opened.value
            for (const action of actions) {
              if (action.kind === "flush" || action.kind === "reopen") {
                yield* Effect.ignore(blockEffect((done) => disk.flush(done)))
                continue
              }
              if (action.kind === "discard") continue
              const { length, offset } = place(action, size)
              if (action.kind === "read") {
                const bytes = new Uint8Array(length)
                const exit = yield* Effect.exit(blockEffect((done) => disk.read(offset, [bytes], done)))
                for (let at = 0; Exit.isSuccess(exit) && at < length; at += SECTOR) {
                  if (unknown[(offset + at) / SECTOR] === 1) continue
                  same(bytes.subarray(at, at + SECTOR), model.subarray(offset + at, offset + at + SECTOR))
                }
                continue
              }
              const bytes = action.kind === "write" ? pattern(length, action.seed) : new Uint8Array(length)
              const exit = yield* Effect.exit(blockEffect((done) =>
                action.kind === "write"
                  ? disk.write(offset, [bytes], done)
                  : disk.writeZeroes?.(offset, length, action.sector % 2 === 0, done)
              ))
              model.set(bytes, offset)
              unknown.fill(Exit.isSuccess(exit) ? 0 : 1, offset / SECTOR, (offset + length) / SECTOR)
            }
            faults.clear()
            const flushed = yield* Effect.exit(blockEffect((done) => disk.flush(done)))
            assert.isTrue(Exit.isSuccess(flushed))
            yield* Scope.close(scope, Exit.void)
            assert.deepStrictEqual(checkImage(file.bytes()).errors, [])
          }))
        }
      ),
      { numRuns: 300 }
    ))

  it("keeps requests apart that run at the same time and end in any order", () =>
    fc.assert(
      fc.asyncProperty(
        options,
        fc.array(actions, { minLength: 2, maxLength: 6, size: "max" }),
        fc.integer(),
        (options, lanes, seed) => {
          const { size } = options
          const file = makeMemoryBackend("image", makeImage(options))
          const medium = disordered(file, randomOf(seed))
          const model = new Uint8Array(size)
          const cluster = 2 ** options.clusterBits
          const sectors = Math.floor(size / SECTOR / lanes.length)
          return runQuietly(Effect.gen(function*() {
            const scope = yield* Scope.make()
            const disk = yield* Scope.provide(openQcow2(medium, { readOnly: false }), scope)
            const lane = Effect.fnUntraced(function*(actions: ReadonlyArray<Action>, index: number) {
              if (sectors === 0) return
              const begin = index * sectors * SECTOR
              for (const action of actions) {
                if (action.kind === "flush" || action.kind === "reopen") {
                  yield* blockEffect((done) => disk.flush(done))
                  continue
                }
                const { length, offset: inLane } = place(action, sectors * SECTOR)
                const offset = begin + inLane
                if (action.kind === "read") {
                  const bytes = new Uint8Array(length)
                  yield* blockEffect((done) => disk.read(offset, [bytes], done))
                  same(bytes, model.subarray(offset, offset + length))
                } else if (action.kind === "write") {
                  const bytes = pattern(length, action.seed)
                  yield* blockEffect((done) => disk.write(offset, [bytes], done))
                  model.set(bytes, offset)
                } else if (action.kind === "zero") {
                  yield* blockEffect((done) => disk.writeZeroes?.(offset, length, action.sector % 2 === 0, done))
                  model.fill(0, offset, offset + length)
                } else {
                  yield* blockEffect((done) => disk.discard?.(offset, length, done))
                  const first = Math.ceil(offset / cluster) * cluster
                  const last = Math.floor((offset + length) / cluster) * cluster
                  if (first < last) model.fill(0, first, last)
                }
              }
            })
            yield* Effect.forEach(lanes, lane, { concurrency: "unbounded", discard: true })
            const all = new Uint8Array(size)
            yield* blockEffect((done) => disk.read(0, [all], done))
            same(all, model)
            yield* Scope.close(scope, Exit.void)
            const { errors, leaks } = checkImage(file.bytes())
            assert.deepStrictEqual(errors, [])
            assert.strictEqual(leaks, 0)
          }))
        }
      ),
      { numRuns: 100 }
    ))

  it("makes its table of reference counts longer, and gives the old one back", () =>
    runQuietly(Effect.gen(function*() {
      const size = 6 * 2 ** 20
      const file = makeMemoryBackend("image", makeImage({ clusterBits: 9, version: 3, refcountOrder: 6, size }))
      const before = new DataView(file.bytes().buffer).getUint32(56)
      const scope = yield* Scope.make()
      const disk = yield* Scope.provide(openQcow2(file, { readOnly: false }), scope)
      const bytes = pattern(size, 3)
      for (let at = 0; at < size; at += 2 ** 18) {
        yield* blockEffect((done) => disk.write(at, [bytes.subarray(at, at + 2 ** 18)], done))
      }
      yield* Scope.close(scope, Exit.void)
      assert.isAbove(new DataView(file.bytes().buffer).getUint32(56), before)
      assert.deepStrictEqual(checkImage(file.bytes()), { errors: [], leaks: 0 })
      const again = yield* Scope.make()
      const reopened = yield* Scope.provide(
        openQcow2({ ...file, capacity: file.bytes().length }, { readOnly: false }),
        again
      )
      const all = new Uint8Array(size)
      yield* blockEffect((done) => reopened.read(0, [all], done))
      same(all, bytes)
    })))

  it.effect("lets others work while it looks for a free cluster among millions", () =>
    Effect.gen(function*() {
      const clusterBits = 21
      const cluster = 2 ** clusterBits
      const used = 2 ** 22
      const image = makeImage({ size: cluster, clusterBits, version: 3, refcountOrder: 0 })
      // The counts have a bit each. They are in the third cluster.
      image.fill(0xff, 2 * cluster, 2 * cluster + used / 8)
      const written: Array<number> = []
      const memory = makeMemoryBackend("image", image)
      const disk = yield* openQcow2({
        ...memory,
        write: (offset, buffers, done) => {
          if (offset < image.length) return memory.write(offset, buffers, done)
          written.push(offset)
          done()
        },
        grow: (_, done) => done()
      }, { readOnly: false })
      const work = yield* Effect.forkChild(blockEffect((done) => disk.write(0, [new Uint8Array(SECTOR)], done)))
      let turns = 0
      while (work.pollUnsafe() === undefined) {
        turns++
        yield* Effect.yieldNow
      }
      yield* Fiber.join(work)
      assert.deepStrictEqual(written, [(used + 1) * cluster])
      assert.isAtLeast(turns, used / SCAN_MAX / 2)
    }))

  it("does not become longer and longer for a guest that writes and discards, and never flushes", () => {
    const cluster = 0x1_0000
    const image = makeImage({ size: 16 * cluster, clusterBits: 16, version: 3, refcountOrder: 4 })
    let end = image.length
    const room = makeMemoryBackend("image", new Uint8Array(2 * LEFT_BYTES_MAX))
    room.bytes().set(image)
    const growing: BlockBackend = {
      ...room,
      capacity: end,
      grow: (capacity, done) => {
        end = Math.max(end, capacity)
        done()
      }
    }
    return runQuietly(Effect.gen(function*() {
      yield* Effect.scoped(Effect.gen(function*() {
        const disk = yield* openQcow2(growing, { readOnly: false })
        const { discard } = disk
        if (discard === undefined) return assert.fail("it can discard")
        for (let i = 0; i < LEFT_BYTES_MAX / cluster + 500; i++) {
          yield* blockEffect((done) => disk.write(0, [pattern(SECTOR, i)], done))
          yield* blockEffect((done) => discard(0, cluster, done))
        }
      }))
      assert.isAtMost(end, LEFT_BYTES_MAX + 0x40_0000)
      assert.deepStrictEqual(checkImage(room.bytes().slice(0, end)), { errors: [], leaks: 0 })
    }))
  })

  it("does not use a cluster again while a request is on its way to it", () =>
    runQuietly(Effect.gen(function*() {
      const cluster = 512
      const file = makeMemoryBackend(
        "image",
        makeImage({ clusterBits: 9, version: 3, refcountOrder: 4, size: 64 * cluster })
      )
      let held: (() => void) | undefined
      let hold = false
      const backend: BlockBackend = {
        ...file,
        write: (offset, buffers, done) => {
          if (!hold) return file.write(offset, buffers, done)
          hold = false
          held = () => file.write(offset, buffers, done)
        }
      }
      const scope = yield* Scope.make()
      const disk = yield* Scope.provide(openQcow2(backend, { readOnly: false }), scope)
      yield* blockEffect((done) => disk.write(0, [new Uint8Array(cluster).fill(1)], done))
      yield* blockEffect((done) => disk.flush(done))
      hold = true
      let written = false
      disk.write(0, [new Uint8Array(cluster).fill(2)], () => {
        written = true
      })
      yield* blockEffect((done) => disk.discard?.(0, cluster, done))
      let flushed = false
      disk.flush(() => {
        flushed = true
      })
      for (let i = 0; i < 10; i++) yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
      assert.deepStrictEqual([written, flushed], [false, false])
      held?.()
      for (let i = 0; i < 10; i++) yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
      assert.deepStrictEqual([written, flushed], [true, true])
      // The cluster is free now, and used first.
      yield* blockEffect((done) => disk.write(8 * cluster, [new Uint8Array(cluster).fill(3)], done))
      const bytes = new Uint8Array(cluster)
      yield* blockEffect((done) => disk.read(8 * cluster, [bytes], done))
      same(bytes, new Uint8Array(cluster).fill(3))
      yield* Scope.close(scope, Exit.void)
      assert.deepStrictEqual(checkImage(file.bytes()), { errors: [], leaks: 0 })
    })))

  it("refuses what it does not do, and says what to do instead", () =>
    runQuietly(Effect.gen(function*() {
      const plain = { clusterBits: 12, version: 3 as const, refcountOrder: 4, size: 2 ** 20 }
      const attempt = (
        bytes: BlockBytes,
        change: (view: DataView) => void,
        options: Parameters<typeof openQcow2>[1] = { readOnly: false }
      ) => {
        change(new DataView(bytes.buffer))
        return Effect.map(
          Effect.exit(Effect.scoped(openQcow2(makeMemoryBackend("image", bytes), options))),
          (exit) => {
            if (Exit.isSuccess(exit)) return "opened"
            const failure = exit.cause.reasons.find((reason) => reason._tag === "Fail")
            return failure === undefined ? "died" : failure.error.message
          }
        )
      }
      const nothing = () => undefined
      assert.strictEqual(yield* attempt(makeImage(plain), nothing), "opened")
      assert.include(yield* attempt(new Uint8Array(4096), nothing), "Use the format FILE")
      const backed = { ...plain, backingName: "/etc/pass\x1bwd" }
      assert.include(yield* attempt(makeImage(backed), nothing), "\"/etc/pass?wd\". Name that file in `backing`")
      assert.include(
        yield* attempt(makeImage(plain), nothing, {
          readOnly: true,
          backing: makeMemoryBackend("base", new Uint8Array(512))
        }),
        "Leave `backing` out"
      )
      const set = (at: number, value: number) => (view: DataView) => view.setUint32(at, value)
      assert.include(yield* attempt(makeImage(plain), set(32, 1)), "encrypted")
      assert.include(yield* attempt(makeImage(plain), set(76, 1)), "qemu-img check -r all")
      assert.include(yield* attempt(makeImage(plain), set(76, 2)), "marked as corrupt")
      assert.strictEqual(yield* attempt(makeImage(plain), set(76, 3), { readOnly: true }), "opened")
      assert.include(yield* attempt(makeImage(plain), set(76, 4)), "another file")
      assert.include(yield* attempt(makeImage(plain), set(76, 8)), "deflate")
      assert.include(yield* attempt(makeImage(plain), set(76, 16)), "subclusters")
      assert.include(yield* attempt(makeImage(plain), set(76, 32)), "not known")
      assert.include(yield* attempt(makeImage(plain), set(60, 2)), "qemu-img snapshot -d")
      assert.strictEqual(yield* attempt(makeImage(plain), set(60, 2), { readOnly: true }), "opened")
      assert.include(yield* attempt(makeImage(plain), set(20, 22)), "clusters of 2^22")
      assert.include(yield* attempt(makeImage(plain), set(36, 0)), "table of level 1")
      assert.include(yield* attempt(makeImage(plain), set(44, 100)), "table of level 1 at 100")
      assert.include(yield* attempt(makeImage(plain), set(56, 1 << 20)), "table of reference counts")
      const cleared = makeImage(plain)
      assert.strictEqual(yield* attempt(cleared, set(92, 1)), "opened")
      assert.strictEqual(new DataView(cleared.buffer).getUint32(92), 0, "a feature that a writer would make wrong")
    })))

  it("never dies of an image, whatever its tables say", () =>
    fc.assert(
      fc.asyncProperty(
        options,
        actions,
        fc.array(fc.tuple(fc.nat(1 << 20), fc.constantFrom(0, 1, 0x40, 0x80, 0xff), fc.boolean()), {
          minLength: 1,
          maxLength: 30
        }),
        fc.boolean(),
        (options, actions, damage, readOnly) => {
          const { size } = options
          return runQuietly(Effect.gen(function*() {
            const file = makeMemoryBackend("image", makeImage(options))
            const scope = yield* Scope.make()
            const disk = yield* Scope.provide(openQcow2(file, { readOnly: false }), scope)
            yield* blockEffect((done) => disk.write(0, [pattern(Math.min(size, 0x8000), 1)], done))
            yield* Scope.close(scope, Exit.void)
            const bytes = file.bytes()
            for (const [at, value, inHeader] of damage) bytes[inHeader ? at % 112 : at % bytes.length] = value
            let asked = 0
            const bounded: BlockBackend = {
              ...makeMemoryBackend("image", bytes, { readOnly }),
              capacity: bytes.length
            }
            const memory = makeMemoryBackend("image", bytes, { readOnly })
            const backend: BlockBackend = {
              ...bounded,
              read: (offset, buffers, done) => {
                for (const buffer of buffers) asked = Math.max(asked, buffer.length)
                memory.read(offset, buffers, done)
              },
              write: memory.write,
              grow: (capacity, done) => {
                assert.isTrue(capacity < 2 ** 28, "an image grows as its guest writes")
                memory.grow?.(capacity, done)
              }
            }
            const again = yield* Scope.make()
            const opened = yield* Effect.exit(Scope.provide(openQcow2(backend, { readOnly }), again))
            if (Exit.isSuccess(opened)) {
              const disk = opened.value
              for (const action of actions) {
                const end = (call: (done: BlockDone) => void) => Effect.ignore(blockEffect(call))
                if (action.kind === "flush" || action.kind === "reopen") {
                  yield* end((done) => disk.flush(done))
                  continue
                }
                const { length, offset } = place(action, Math.min(size, disk.capacity) || SECTOR)
                const buffers: ReadonlyArray<BlockBytes> = [new Uint8Array(length)]
                if (action.kind === "read") yield* end((done) => disk.read(offset, buffers, done))
                else if (action.kind === "write") yield* end((done) => disk.write(offset, buffers, done))
                else if (disk.discard !== undefined && disk.writeZeroes !== undefined) {
                  const { discard, writeZeroes } = disk
                  yield* end((done) =>
                    action.kind === "zero" ? writeZeroes(offset, length, true, done) : discard(offset, length, done)
                  )
                }
              }
            } else {
              assert.isUndefined(opened.cause.reasons.find((reason) => reason._tag === "Die"))
            }
            yield* Scope.close(again, Exit.void)
            assert.isTrue(asked <= 4 * 2 ** 20)
          }))
        }
      ),
      { numRuns: 500 }
    ))
})

type Happening =
  | { readonly kind: "write"; readonly offset: number; readonly bytes: BlockBytes }
  | { readonly kind: "sync" }
  | { readonly kind: "grow"; readonly capacity: number }
  /** The disk was flushed, and was like this then. */
  | { readonly kind: "flushed"; readonly model: BlockBytes }
  /** From now on these sectors may be what they were, or what is being done to them. */
  | { readonly kind: "touch"; readonly from: number; readonly to: number }

/** Moments of one history at which the power goes. */
const LOSSES_MAX = 12

/** A medium that remembers all that happens to it, and so knows what a loss of power at any moment leaves. */
const recording = (bytes: BlockBytes) => {
  const log: Array<Happening> = []
  const seen = makeMemoryBackend("seen", bytes.slice())
  const backend: BlockBackend = {
    ...seen,
    write: (offset, buffers, done) => {
      let at = offset
      for (const buffer of buffers) {
        // A sector reaches the medium or not, whatever becomes of the others.
        for (let from = 0; from < buffer.length;) {
          const amount = Math.min(SECTOR - (at + from) % SECTOR, buffer.length - from)
          log.push({ kind: "write", offset: at + from, bytes: buffer.slice(from, from + amount) })
          from += amount
        }
        at += buffer.length
      }
      seen.write(offset, buffers, done)
    },
    flush: (done) => {
      log.push({ kind: "sync" })
      done()
    },
    grow: (capacity, done) => {
      log.push({ kind: "grow", capacity })
      seen.grow?.(capacity, done)
    }
  }
  /** What the medium has after losses at some moments, most of them right before a flush of the medium. */
  function* losses(chance: () => number) {
    const durable = makeMemoryBackend("durable", bytes.slice())
    let waiting: Array<Extract<Happening, { readonly kind: "write" }>> = []
    let model: BlockBytes = new Uint8Array(0)
    let touched = new Uint8Array(0)
    let left = LOSSES_MAX
    for (const happening of log) {
      if (model.length > 0 && left > 0 && chance() < (happening.kind === "sync" ? 0.5 : 0.001)) {
        left--
        const lost = makeMemoryBackend("lost", durable.bytes().slice())
        for (const { bytes, offset } of waiting) {
          if (chance() < 0.5) lost.write(offset, [bytes], () => undefined)
        }
        yield { bytes: lost.bytes(), model, touched }
      }
      if (happening.kind === "write") {
        waiting.push(happening)
      } else if (happening.kind === "sync") {
        for (const { bytes, offset } of waiting) durable.write(offset, [bytes], () => undefined)
        waiting = []
      } else if (happening.kind === "grow") {
        durable.grow?.(happening.capacity, () => undefined)
      } else if (happening.kind === "flushed") {
        model = happening.model
        touched = new Uint8Array(model.length / SECTOR)
      } else {
        touched.fill(1, happening.from, happening.to)
      }
    }
  }
  return { backend, log, losses }
}

/** A medium whose operations end in any order, later. */
const disordered = (below: BlockBackend, chance: () => number): BlockBackend => {
  const waiting: Array<() => void> = []
  const later = (call: () => void): void => {
    waiting.push(call)
    setImmediate(() => waiting.splice(Math.floor(chance() * waiting.length), 1)[0]?.())
  }
  const { grow } = below
  return {
    ...below,
    read: (offset, buffers, done) => later(() => below.read(offset, buffers, done)),
    write: (offset, buffers, done) => later(() => below.write(offset, buffers, done)),
    flush: (done) => later(() => below.flush(done)),
    ...(grow === undefined ? {} : { grow: (capacity: number, done: BlockDone) => later(() => grow(capacity, done)) })
  }
}
