/** An unmodified Linux that is offered packed virtqueues, takes them, and works through them. */
import { blockClientFromBytes } from "@troupe/core/BlockClient"
import { KvmGuestLifecycle } from "@troupe/node"
import * as Effect from "effect/Effect"
import * as assert from "node:assert"
import { createHash } from "node:crypto"
import { runHost, startLinux } from "./LinuxHost.ts"

const DISK_SIZE = 0x40_0000
const FEATURE_RING_PACKED = 34

const program = Effect.gen(function*() {
  const disk = Uint8Array.from({ length: DISK_SIZE }, (_, i) => i ^ (i >> 7) ^ (i >> 15))
  const { attempt, end, run, step } = yield* startLinux({
    virtioRng: true,
    virtioPackedRing: true,
    blockDevices: [{ id: "disk", mode: "READ_WRITE", format: "FILE", client: blockClientFromBytes("disk", disk) }]
  })
  yield* step(
    "negotiation",
    Effect.gen(function*() {
      const features = (yield* run("cat /sys/bus/virtio/devices/virtio*/features")).trim().split("\n")
      assert.strictEqual(features.length, 2)
      for (const bits of features) assert.strictEqual(bits.trim()[FEATURE_RING_PACKED], "1", bits)
    })
  )
  yield* step(
    "entropy",
    Effect.gen(function*() {
      const sums = yield* run("for i in 1 2 3 4; do dd if=/dev/hwrng bs=512 count=1 2>/dev/null | md5sum; done")
      assert.strictEqual(new Set(sums.trim().split("\n")).size, 4)
    })
  )
  yield* step(
    "disk",
    Effect.gen(function*() {
      const sum = createHash("md5").update(disk).digest("hex")
      assert.match(yield* run("md5sum /dev/vda"), new RegExp(`^${sum} `))
      // Around the ring many times: requests of all sizes, and back from the disk rather than the cache.
      yield* run("dd if=/dev/hwrng of=/tmp/noise bs=4096 count=64 2>/dev/null")
      yield* run(
        "for i in 0 1 2 3; do dd if=/tmp/noise of=/dev/vda bs=512 seek=$((i * 1024)) conv=fsync 2>/dev/null; done"
      )
      yield* run("echo 3 > /proc/sys/vm/drop_caches")
      const noise = (yield* run("md5sum < /tmp/noise")).trim()
      const back = yield* run(
        "for i in 0 1 2 3; do dd if=/dev/vda bs=512 skip=$((i * 1024)) count=512 2>/dev/null | md5sum; done"
      )
      assert.deepStrictEqual(back.trim().split("\n").map((line) => line.trim()), [noise, noise, noise, noise])
    })
  )
  yield* step(
    "poweroff",
    Effect.gen(function*() {
      yield* Effect.forkScoped(Effect.ignore(attempt("poweroff -f")))
      assert.deepStrictEqual(yield* end, { _tag: "PowerOff" })
    })
  )
})

runHost(program, KvmGuestLifecycle.layer)
