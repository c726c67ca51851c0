/** A guest whose driver breaks the rules, in machine code on a real /dev/kvm: the device asks for a reset, and everything else goes on. */
import { assert, describe, it } from "@effect/vitest"
import { type GuestConfigInput, GuestLifecycle } from "@troupe/core"
import { blockClientFromBytes } from "@troupe/core/BlockClient"
import { DeviceDefects } from "@troupe/core/testing"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import { Effect, Exit, Fiber, Layer, Logger } from "effect"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))

/** What `hostile=storm` and `hostile=registers` do, of one of which a write of 8 bytes is two. */
const KICKS = 20_000
const REGISTER_WRITES = 2000
/** Lines that a device logs about its drivers. */
const REPORTS_MAX = 16
const ROUNDS = 10
/** What a process may have grown by for other reasons, in bytes. */
const MEMORY_SLACK = 64 * 2 ** 20

const MACHINES = [
  { cpus: 1, virtioTransport: "mmio" },
  { cpus: 2, virtioTransport: "mmio" },
  { cpus: 2, virtioTransport: "pci" }
] as const

const NEEDS_RESET = [
  "loop",
  "self",
  "wrap",
  "cross",
  "outside",
  "mmio",
  "length",
  "direction",
  "next",
  "head",
  "jump",
  "back",
  "nested",
  "table-next",
  "table-size",
  "table-empty",
  "table-huge",
  "table-outside",
  "table-loop"
]
const SEEN: ReadonlyArray<readonly [attack: string, seen: RegExp]> = [
  ...NEEDS_RESET.map((attack) => [attack, /^needs-reset$/] as const),
  ["rings-outside", /^refused$/],
  ["rings-overlap", /^survived$/],
  ["late-queue", /^(refused|does not apply)$/],
  ["features", /^refused$/],
  ["status", /^refused$/],
  ["registers", /^survived$/],
  ["config", /^survived$/],
  ["notify", /^ignored$/],
  ["storm", /^ignored$/],
  ["reset", /^survived$/],
  ["stop-queue", /^(stopped|does not apply)$/],
  ["change", /^(survived [1-9]\d* resets|no second processor 0 resets)$/]
]

const config = (cmdline: string, fields: Partial<GuestConfigInput> = {}): GuestConfigInput => ({
  kernelType: "LINUX",
  kernel: fromPath(ELF),
  cmdline: `quiet ${cmdline}`,
  cpus: 1,
  guestMemory: "32M",
  virtioRng: true,
  ...fields
})

const runGuest = Effect.fnUntraced(function*(input: GuestConfigInput) {
  const lifecycle = yield* GuestLifecycle
  yield* lifecycle.create(input)
  const serial = yield* (yield* lifecycle.bind).getSerial
  const exit = yield* Effect.exit(lifecycle.run)
  assert.deepStrictEqual(exit, Exit.succeed({ _tag: "PowerOff" }))
  return serial.log().map((line) => line.replace("troupe-guest: ", ""))
})

const isolated = { excludeTestServices: true, timeout: 60_000 }

describe.skipIf(kvmObstacle !== undefined)(onKvm("a hostile guest"), () => {
  it.layer(KvmGuestLifecycle.layer, isolated)((it) => {
    const outcomesOf = (lines: ReadonlyArray<string>, end: string) => {
      const outcomes = lines.flatMap((line) => new RegExp(`^hostile (\\S+) (.*), ${end}$`).exec(line)?.slice(1) ?? [])
      SEEN.forEach(([attack, seen], index) => {
        assert.strictEqual(outcomes[2 * index], attack)
        assert.match(outcomes[2 * index + 1] ?? "", seen, attack)
      })
      assert.include(lines, "hostile done")
    }

    it.effect.each(MACHINES)(
      "does its worst to the entropy device: $cpus vCPU, $virtioTransport",
      (machine) =>
        Effect.gen(function*() {
          const lines = yield* runGuest(config("hostile rng=64,2", machine)).pipe(Effect.provide(Logger.layer([])))
          outcomesOf(lines, "recovered")
          // The device itself is none the worse for it.
          assert.include(lines, "rng ok")
        })
    )

    it.effect.each(MACHINES)(
      "does its worst to a disk, and the other devices go on: $cpus vCPU, $virtioTransport",
      (machine) =>
        Effect.gen(function*() {
          const disk = {
            id: "a-disk",
            mode: "READ_WRITE",
            format: "FILE",
            client: blockClientFromBytes("memory", new Uint8Array(2 ** 20))
          } as const
          const words = "target=2 hostile blk=write,0,64,7 blk=verify,0,64,7"
          const lines = yield* runGuest(config(words, { ...machine, blockDevices: [disk] })).pipe(
            Effect.provide(Logger.layer([]))
          )
          outcomesOf(lines, "recovered, other device works")
          assert.include(lines, "blk verify 64 sectors ok")
        })
    )

    it.effect("costs the host what an honest one does: turns, log lines, memory", () =>
      Effect.gen(function*() {
        const rng = new DeviceDefects.DeviceDefects()
        const reports: Array<string> = []
        const logger = Logger.make(({ message }) => void reports.push(String(message)))
        const layer = GuestLifecycle.layer.pipe(
          Layer.provide(
            DeviceDefects.layer((device) => device.name === "rng0" ? DeviceDefects.breaking(device, rng) : device)
          ),
          Layer.provide(KvmGuestLifecycle.layerCatalog),
          Layer.provide(KvmGuestLifecycle.layerHypervisor())
        )
        // What else the event loop does: it is never kept from it.
        let ticks = 0
        const ticking = yield* Effect.forkChild(
          Effect.forever(Effect.andThen(Effect.sync(() => ticks++), Effect.sleep("1 millis")))
        )
        const attack = (times: number) =>
          runGuest(
            config(Array.from({ length: times }, () => "hostile=storm hostile=registers hostile=jump").join(" "))
          )
            .pipe(Effect.provide(layer, { local: true }), Effect.provide(Logger.layer([logger])))
        yield* attack(1)
        const [memory, doorbells, writes] = [process.memoryUsage.rss(), rng.points("doorbell"), rng.points("write")]
        reports.length = 0
        ticks = 0
        yield* attack(ROUNDS)
        yield* Fiber.interrupt(ticking)
        // Kicks that come before the device has looked are one.
        assert.isAtMost(rng.points("doorbell") - doorbells, ROUNDS * (KICKS + REGISTER_WRITES))
        assert.isAtMost(rng.points("write") - writes, ROUNDS * 2 * REGISTER_WRITES)
        assert.isAbove(reports.length, 0)
        assert.isAtMost(reports.length, REPORTS_MAX)
        assert.isAbove(ticks, ROUNDS)
        assert.isBelow(process.memoryUsage.rss() - memory, MEMORY_SLACK)
      }))
  })
})
