/** The Effect face of the FFI module: typed failures, and resources that end with their scope. */
import { assert, describe, it } from "@effect/vitest"
import { Deferred, Effect, Exit, Fiber, Scope } from "effect"
import * as fc from "fast-check"
import { readdirSync, readlinkSync } from "node:fs"
import * as Ffi from "../src/Ffi.ts"
import { MADV_DONTNEED, O_RDONLY, POLL_READABLE } from "../src/internal/ForeignFunctions.ts"

/** The descriptors of this process that look like `pattern`. */
const descriptors = (pattern: RegExp): number =>
  readdirSync("/proc/self/fd").filter((fd) => {
    try {
      return pattern.test(readlinkSync(`/proc/self/fd/${fd}`))
    } catch {
      return false
    }
  }).length

const layers = [["node:ffi", Ffi.layerWith({ backEnds: ["node:ffi"], quiet: true })], [
  "koffi",
  Ffi.layerKoffi
]] as const

for (const [name, layer] of layers) {
  describe(`Ffi on ${name}`, () => {
    it.layer(layer)((it) => {
      it.effect("names the call, its arguments and the errno of a failure", () =>
        Effect.gen(function*() {
          const ffi = yield* Ffi.Ffi
          const missing = yield* Effect.flip(ffi.open("/nowhere/at/all", O_RDONLY))
          assert.strictEqual(missing._tag, "FfiError")
          assert.strictEqual(missing.message, "open(\"/nowhere/at/all\", 0x0): no such file or directory (ENOENT)")
          const unknown = yield* Effect.flip(ffi.ioctl(0xfff, { name: "KVM_RUN", request: 0xae80 }, 16n))
          assert.strictEqual(unknown.message, "KVM_RUN(4095, 0x10): bad file descriptor (EBADF)")
          assert.deepStrictEqual(unknown.errno, { number: 9, name: "EBADF" })
          const structure = yield* Effect.flip(
            ffi.ioctl(0xfff, { name: "KVM_GET_REGS", request: 0x8090_ae81 }, new DataView(new ArrayBuffer(144)))
          )
          assert.strictEqual(structure.arguments, "4095, 144 bytes")
          const mapping = yield* Effect.flip(ffi.mapShared(0xfff, 4096))
          assert.strictEqual(mapping.operation, "mmap")
          assert.strictEqual(mapping.errno.name, "EBADF")
        }))

      it.effect("gives everything back with its scope", () =>
        Effect.gen(function*() {
          const ffi = yield* Ffi.Ffi
          const scope = yield* Scope.make()
          const before = descriptors(/eventfd|memfd:scoped/)
          const { event, memory, shared } = yield* Effect.gen(function*() {
            const fd = yield* ffi.memfd("scoped", 8192)
            const event = yield* ffi.eventFd
            yield* event.onSignal(() => {})
            return { event, memory: yield* ffi.mapAnonymous(4096), shared: yield* ffi.mapShared(fd, 8192) }
          }).pipe(Scope.provide(scope))
          assert.strictEqual(descriptors(/eventfd|memfd:scoped/), before + 2)
          const bytes = new Uint8Array(memory.buffer)
          yield* Scope.close(scope, Exit.void)
          assert.strictEqual(descriptors(/eventfd|memfd:scoped/), before)
          assert.strictEqual(bytes.length, 0)
          for (const mapping of [memory, shared]) assert.throws(() => mapping.buffer, Ffi.UseAfterUnmap)
          assert.strictEqual((yield* Effect.flip(ffi.madvise(memory, 0, 4096, MADV_DONTNEED))).errno.name, "EINVAL")
          // The number of the closed descriptor belongs to somebody else now, whom a late trigger must not reach.
          const other = yield* ffi.eventFd
          event.trigger()
          assert.strictEqual(event.drain(), 0)
          assert.strictEqual(other.drain(), 0)
        }))

      it.effect("leaves nothing behind when an acquisition fails half way", () =>
        Effect.gen(function*() {
          const ffi = yield* Ffi.Ffi
          for (const size of [2 ** 63, -1, 0.5, Number.NaN]) {
            const error = yield* Effect.flip(Effect.scoped(ffi.memfd("too-large", size)))
            assert.strictEqual(error.operation, "ftruncate")
            assert.strictEqual(descriptors(/memfd:too-large/), 0)
          }
          for (const length of [0, 2 ** 52, 2 ** 63, -4096, 0.5, Number.NaN]) {
            const error = yield* Effect.flip(Effect.scoped(ffi.mapAnonymous(length)))
            assert.include(["EINVAL", "ENOMEM"], error.errno.name)
          }
        }))

      it.effect("maps large memory where huge pages can back it", () =>
        Effect.gen(function*() {
          const ffi = yield* Ffi.Ffi
          const size = 3 * Ffi.HUGE_PAGE_SIZE
          const mappings = yield* Effect.all(Array.from({ length: 5 }, () => ffi.mapAnonymous(size)))
          for (const mapping of mappings) {
            assert.strictEqual(mapping.address % BigInt(Ffi.HUGE_PAGE_SIZE), 0n)
            const bytes = new Uint8Array(mapping.buffer)
            bytes[0] = 1
            bytes[size - 1] = 2
            assert.strictEqual(bytes.length, size)
          }
        }))

      it.effect("refuses advice outside the mapping", () =>
        Effect.gen(function*() {
          const ffi = yield* Ffi.Ffi
          const mapping = yield* ffi.mapAnonymous(8192)
          new Uint8Array(mapping.buffer).fill(1)
          for (const [offset, length] of [[0, 12288], [8192, 4096], [-4096, 4096], [4096, -4096]] as const) {
            assert.strictEqual(
              (yield* Effect.flip(ffi.madvise(mapping, offset, length, MADV_DONTNEED))).errno.name,
              "EINVAL"
            )
          }
          yield* ffi.madvise(mapping, 4096, 4096, MADV_DONTNEED)
          assert.strictEqual(new Uint8Array(mapping.buffer)[4095], 1)
          assert.strictEqual(new Uint8Array(mapping.buffer)[4096], 0)
        }))

      it.effect("counts triggers: what is taken is what was added, in any order of the two", () =>
        Effect.gen(function*() {
          const ffi = yield* Ffi.Ffi
          const event = yield* ffi.eventFd
          fc.assert(
            fc.property(fc.array(fc.constantFrom("trigger", "drain"), { maxLength: 50 }), (steps) => {
              event.drain()
              let pending = 0
              for (const step of steps) {
                if (step === "trigger") {
                  event.trigger()
                  pending++
                } else {
                  assert.strictEqual(event.drain(), pending)
                  pending = 0
                }
              }
            })
          )
        }))

      it.effect("resumes a fiber from the event loop when an eventfd is signalled", () =>
        Effect.gen(function*() {
          const ffi = yield* Ffi.Ffi
          const event = yield* ffi.eventFd
          const seen = Deferred.makeUnsafe<number>()
          yield* event.onSignal((count) => Deferred.doneUnsafe(seen, Effect.succeed(count)))
          event.trigger()
          event.trigger()
          assert.strictEqual(yield* Deferred.await(seen), 2)
        }))

      it.effect("stops watching when the watching fiber is interrupted", () =>
        Effect.gen(function*() {
          const ffi = yield* Ffi.Ffi
          const event = yield* ffi.eventFd
          const watch = Effect.scoped(Effect.andThen(event.onSignal(() => {}), Effect.never))
          const fiber = yield* Effect.forkChild(watch, { startImmediately: true })
          const busy = yield* Effect.flip(Effect.scoped(ffi.poll(event.fd, POLL_READABLE, () => {})))
          assert.strictEqual(busy.errno.name, "EEXIST")
          assert.match(busy.message, /watched already/)
          yield* Fiber.interrupt(fiber)
          yield* Effect.scoped(ffi.poll(event.fd, POLL_READABLE, () => {}))
        }))

      it.effect("installs the kick signal once", () =>
        Effect.gen(function*() {
          const ffi = yield* Ffi.Ffi
          const signal = yield* ffi.kickSignal
          assert.isAbove(signal, 32)
          assert.strictEqual(yield* ffi.kickSignal, signal)
        }))
    })
  })
}
