/** A host that tries every device with the drivers of an unmodified Linux: the transport is the command line's. */
import { KvmGuestLifecycle } from "@troupe/node"
import * as Effect from "effect/Effect"
import * as assert from "node:assert"
import { type LinuxGuest, runHost, startLinux, until } from "./LinuxHost.ts"

const MEBIBYTE = 2 ** 20
const MEM_BLOCK = 8 * MEBIBYTE
const MEM_REGION = 512 * MEBIBYTE

/** A number of `/proc/meminfo`, in bytes. */
const meminfo = (linux: LinuxGuest, field: string) =>
  Effect.map(linux.run(`grep ^${field}: /proc/meminfo`), (line) => Number(/(\d+) kB/.exec(line)?.[1]) * 1024)

const entropy = Effect.fnUntraced(function*(linux: LinuxGuest) {
  assert.match(yield* linux.run("cat /sys/class/misc/hw_random/rng_current"), /^virtio_rng\.0$/)
  const bytes = yield* linux.run("dd if=/dev/hwrng bs=4096 count=1 2>/dev/null | sha256sum")
  assert.match(bytes, /^[0-9a-f]{64} /)
})

const memory = Effect.fnUntraced(function*(linux: LinuxGuest) {
  const controller = yield* linux.guest.getMemController
  const before = yield* meminfo(linux, "MemTotal")
  const plugged = (bytes: number) =>
    Effect.gen(function*() {
      yield* controller.requestSize(bytes)
      yield* until(controller.getMemSize, (size) => size.pluggedSize === bytes)
    })
  yield* plugged(256 * MEBIBYTE)
  const grown = yield* meminfo(linux, "MemTotal")
  assert.ok(grown - before > 240 * MEBIBYTE, `${before} grew to ${grown}`)
  // More than the guest had at first; what it writes there comes back.
  yield* linux.run("mount -o remount,size=700m /tmp")
  const sum = yield* linux.run(
    "dd if=/dev/zero bs=1M count=500 2>/dev/null | tr '\\0' 'x' > /tmp/big; sha256sum < /tmp/big"
  )
  assert.match(sum, /^[0-9a-f]{64} /)
  assert.strictEqual(yield* linux.run("sha256sum < /tmp/big; rm /tmp/big"), sum)
  yield* plugged(0)
  const shrunk = yield* meminfo(linux, "MemTotal")
  assert.ok(Math.abs(shrunk - before) < 8 * MEBIBYTE, `${before} became ${shrunk} again`)
})

const main = Effect.gen(function*() {
  const linux = yield* startLinux({
    virtioRng: true,
    virtioMem: true,
    virtioMemBlockSize: MEM_BLOCK,
    virtioMemRegionSize: MEM_REGION
  })
  yield* linux.step("entropy", entropy(linux))
  yield* linux.step("memory", memory(linux))
  yield* linux.step(
    "poweroff",
    Effect.gen(function*() {
      yield* Effect.forkScoped(Effect.ignore(linux.attempt("poweroff -f")))
      assert.deepStrictEqual(yield* linux.end, { _tag: "PowerOff" })
    })
  )
})

runHost(main, KvmGuestLifecycle.layer)
