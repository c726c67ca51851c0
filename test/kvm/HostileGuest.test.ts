/** A guest whose driver breaks the rules, in machine code on a real /dev/kvm: the device asks for a reset, and everything else goes on. */
import { assert, describe, it } from "@effect/vitest"
import { type GuestConfigInput, GuestLifecycle } from "@troupe/core"
import { blockClientFromBytes } from "@troupe/core/BlockClient"
import * as NetStreams from "@troupe/core/NetStreams"
import { DeviceDefects } from "@troupe/core/testing"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import { Effect, Exit, Fiber, Layer, Logger, Stream } from "effect"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))

/** What `hostile=storm` and `hostile=registers` do, of one of which a write of 8 bytes is two. */
const KICKS = 20_000
const REGISTER_WRITES = 2000
/** Lines that a device logs about its drivers. */
const REPORTS_MAX = 16
const ROUNDS = 3
/** What a process may have grown by for other reasons, in bytes. */
const MEMORY_SLACK = 64 * 2 ** 20

const MACHINES = [
  { cpus: 1, virtioTransport: "mmio", virtioPackedRing: false },
  { cpus: 1, virtioTransport: "mmio", virtioPackedRing: true },
  { cpus: 2, virtioTransport: "pci", virtioPackedRing: false }
] as const

/** What needs links between descriptors, indices of rings, or flags in tables, which packed queues do not have; or is not tried on them. */
const ONLY_SPLIT = new Set([
  "loop",
  "self",
  "next",
  "head",
  "jump",
  "back",
  "nested",
  "table-loop",
  "rings-outside",
  "rings-overlap",
  "reset",
  "stop-queue",
  "change"
])

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

/** What is attacked, and what it is seen to do afterwards: virtio type and queue, configuration, and words with their lines. */
interface Target {
  readonly name: string
  readonly target: string
  readonly config: Partial<GuestConfigInput>
  readonly words?: string
  readonly line?: string
}

const targets: ReadonlyArray<Target> = [
  { name: "entropy", target: "4", config: {}, words: "rng=64,2", line: "rng ok" },
  {
    name: "a disk",
    target: "2",
    config: {
      blockDevices: [{
        id: "a-disk",
        mode: "READ_WRITE",
        format: "FILE",
        client: blockClientFromBytes("memory", new Uint8Array(2 ** 20))
      }]
    },
    words: "blk=write,0,64,7 blk=verify,0,64,7",
    line: "blk verify 64 sectors ok"
  },
  { name: "the network", target: "1,1", config: { defaultNet: true } },
  { name: "the console", target: "3,1", config: { virtioConsole: true } },
  { name: "the balloon", target: "5", config: { virtioBalloon: true } },
  {
    name: "hot-pluggable memory",
    target: "24",
    config: { virtioMem: true, virtioMemBlockSize: 2 ** 21, virtioMemRegionSize: 2 ** 24 }
  },
  { name: "the socket device", target: "19,1", config: { virtioVsock: true } }
]

const cases = targets.flatMap((target) =>
  MACHINES.map(({ cpus, virtioPackedRing, virtioTransport }) => ({
    name: target.name,
    attacked: target,
    cpus,
    virtioPackedRing,
    virtioTransport
  }))
)

/** Frames come back to who sent them. */
const network = NetStreams.layer(({ fromGuest, toGuest }) => Stream.run(fromGuest, toGuest))

const lifecycle = GuestLifecycle.layer.pipe(
  Layer.provide(KvmGuestLifecycle.layerCatalog.pipe(Layer.provide(network))),
  Layer.provide(KvmGuestLifecycle.layerHypervisor())
)

describe.skipIf(kvmObstacle !== undefined)(onKvm("a hostile guest"), () => {
  it.layer(lifecycle, isolated)((it) => {
    it.effect.each(cases)(
      "does its worst to $name, and the rest goes on: $cpus vCPU, $virtioTransport, packed $virtioPackedRing",
      ({ attacked: { config: fields, line, target, words }, cpus, virtioPackedRing, virtioTransport }) =>
        Effect.gen(function*() {
          const lines = yield* runGuest(
            config(`${virtioPackedRing ? "packed" : "split"} target=${target} hostile ${words ?? ""}`, {
              ...fields,
              cpus,
              virtioPackedRing,
              virtioTransport
            })
          ).pipe(Effect.provide(Logger.layer([])))
          // Where there is another device, it works after each attack.
          const end = target === "4" ? ", recovered" : ", recovered, other device works"
          const outcomes = new Map(lines.flatMap((text) => {
            const [, attack, seen] = /^hostile ([\w-]+) (.*)$/.exec(text) ?? []
            return attack === undefined || seen?.endsWith(end) !== true ? [] : [[attack, seen.slice(0, -end.length)]]
          }))
          for (const [attack, seen] of SEEN) {
            if (virtioPackedRing && ONLY_SPLIT.has(attack)) continue
            assert.match(outcomes.get(attack) ?? "nothing", seen, attack)
          }
          assert.include(lines, "hostile done")
          if (line !== undefined) assert.include(lines, line)
        })
    )
  })

  it.layer(KvmGuestLifecycle.layer, isolated)((it) => {
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
        // As much as what is measured: the heap has the size for it then.
        yield* attack(ROUNDS)
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
