/** The memory device on a real KVM, driven by the small guest: what is plugged works, what is not is nothing, and the host gets it back. */
import { assert, describe, it } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import { Effect, Fiber, Stream } from "effect"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm, residentBytesIn } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))
const MEBIBYTE = 2 ** 20
const BLOCK = 2 * MEBIBYTE
const WANTED = 64 * MEBIBYTE
const REGION = 128 * MEBIBYTE

/** Memory of the region that is really there, in bytes. */
const residentBytes = (): number => residentBytesIn(REGION)

describe.skipIf(kvmObstacle !== undefined)(onKvm("hot-pluggable memory"), () => {
  it.layer(KvmGuestLifecycle.layer, { excludeTestServices: true })("of the small guest", (it) => {
    it.effect("is plugged, used, unplugged, and really gone", () =>
      Effect.gen(function*() {
        const lifecycle = yield* GuestLifecycle
        yield* lifecycle.create({
          kernelType: "LINUX",
          kernel: fromPath(ELF),
          cmdline: "quiet mem",
          cpus: 1,
          guestMemory: "32M",
          virtioMem: true,
          virtioMemBlockSize: BLOCK,
          virtioMemRegionSize: REGION
        })
        const guest = yield* lifecycle.bind
        const serial = yield* guest.getSerial
        const memory = yield* guest.getMemController
        yield* memory.requestSize(WANTED)
        const before = residentBytes()
        let full = 0
        let text = ""
        const host = yield* serial.output.pipe(
          Stream.runForEach((bytes) => {
            text += new TextDecoder().decode(bytes)
            if (full !== 0 || !text.includes("mem full")) return Effect.void
            full = residentBytes()
            return memory.requestSize(0)
          }),
          Effect.forkChild
        )
        const empty = yield* memory.changes.pipe(
          Stream.dropUntil((size) => size.pluggedSize === WANTED),
          Stream.filter((size) => size.pluggedSize === 0),
          Stream.map(() => residentBytes()),
          Stream.runHead,
          Effect.forkChild
        )
        assert.deepStrictEqual(yield* lifecycle.run, { _tag: "PowerOff" })
        yield* Fiber.interrupt(host)
        assert.deepStrictEqual(
          serial.log().map((line) => line.replace("troupe-guest: mem ", "")).filter((line) =>
            !line.startsWith("troupe")
          ),
          [
            "region 0x100000000 128 MiB in blocks of 2048 KiB",
            "before 512 pages zero 0 ones 512 own 0",
            "plug 32 blocks at 0 answer 0 state 0 plugged 64 MiB",
            "plug 1 blocks at 32 answer 1 state 0 plugged 64 MiB",
            "fresh 16384 pages zero 16384 ones 0 own 0",
            "written 16384 pages zero 0 ones 0 own 16384",
            "kept 16384 pages zero 0 ones 0 own 16384",
            "behind ones",
            "unplug 1 blocks at 1 answer 0 state 0 plugged 62 MiB",
            "gap ones",
            "state 32 blocks at 0 answer 0 state 2 plugged 62 MiB",
            "neighbour 512 pages zero 0 ones 0 own 512",
            "plug 1 blocks at 1 answer 0 state 0 plugged 64 MiB",
            "fresh 512 pages zero 512 ones 0 own 0",
            "written 512 pages zero 0 ones 0 own 512",
            "full",
            "requested 0 MiB",
            "unplug all 0 blocks at 0 answer 0 state 0 plugged 0 MiB",
            "after 512 pages zero 0 ones 512 own 0",
            "ok"
          ]
        )
        assert.isAtLeast(full - before, WANTED - BLOCK)
        const gone = yield* Fiber.join(empty)
        assert.isTrue(gone._tag === "Some" && full - gone.value >= WANTED - BLOCK)
      }))
  })
})
