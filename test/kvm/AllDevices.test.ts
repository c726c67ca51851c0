/** Every virtio device in one machine on a real KVM, on either transport, with one processor and with two: they do not get in each other's way. */
import { assert, describe, it } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core"
import { blockClientFromBytes } from "@troupe/core/BlockClient"
import * as NetStreams from "@troupe/core/NetStreams"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import { Effect, Fiber, Layer, Stream } from "effect"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))
const FRAMES = 200
const MEBIBYTE = 2 ** 20
const WANTED = 8 * MEBIBYTE

const MACHINES = [
  { cpus: 1, virtioTransport: "mmio", virtioPackedRing: false },
  { cpus: 2, virtioTransport: "mmio", virtioPackedRing: true },
  { cpus: 1, virtioTransport: "pci", virtioPackedRing: true },
  { cpus: 2, virtioTransport: "pci", virtioPackedRing: false }
] as const

/** What the guest does, and what it must say of it. */
const WORDS: ReadonlyArray<readonly [word: string, line: RegExp]> = [
  ["smp", /^smp [12] of [12] up$/],
  ["rng=64,4", /^rng ok$/],
  ["blk=write,0,256,7", /^blk write 256 sectors sum 0x[0-9a-f]+$/],
  [`net=send,${FRAMES},200`, new RegExp(`^net bench send .*n=${FRAMES} `)],
  ["console", /^console echoed 4 bytes/],
  ["mem", /^mem ok$/],
  ["blk=verify,0,256,7", /^blk verify 256 sectors ok$/],
  ["rng=32,1", /^rng ok$/]
]

describe.skipIf(kvmObstacle !== undefined)(onKvm("a machine with every virtio device"), () => {
  it.live.each(MACHINES)("works: $cpus vCPU, $virtioTransport, packed $virtioPackedRing", (machine) => {
    let frames = 0
    const network = NetStreams.layer(({ fromGuest }) => Stream.runForEach(fromGuest, () => Effect.sync(() => frames++)))
    return Effect.gen(function*() {
      const lifecycle = yield* GuestLifecycle
      yield* lifecycle.create({
        ...machine,
        kernelType: "LINUX",
        kernel: fromPath(ELF),
        cmdline: `quiet ${machine.virtioPackedRing ? "packed" : "split"} virtio ${
          WORDS.map(([word]) => word).join(" ")
        }`,
        guestMemory: "32M",
        virtioRng: true,
        virtioBalloon: true,
        virtioConsole: true,
        virtioVsock: true,
        defaultNet: true,
        virtioMem: true,
        virtioMemBlockSize: 2 * MEBIBYTE,
        virtioMemRegionSize: 64 * MEBIBYTE,
        blockDevices: [{
          id: "disk",
          mode: "READ_WRITE",
          format: "FILE",
          client: blockClientFromBytes("memory", new Uint8Array(MEBIBYTE))
        }]
      })
      const guest = yield* lifecycle.bind
      const serial = yield* guest.getSerial
      const console = yield* guest.getConsole
      const memory = yield* guest.getMemController
      yield* memory.requestSize(WANTED)
      // All lines: the serial log keeps only the last ones.
      const lines: Array<string> = []
      const listening = yield* serial.output.pipe(
        Stream.decodeText,
        Stream.splitLines,
        Stream.takeUntil((text) => text.endsWith("poweroff")),
        Stream.runForEach((text) => {
          const line = text.replace("troupe-guest: ", "")
          lines.push(line)
          return line === "mem full" ? memory.requestSize(0) : Effect.void
        }),
        Effect.forkChild({ startImmediately: true })
      )
      const host = yield* Effect.forkChild(
        Effect.andThen(console.write(new TextEncoder().encode("quit")), Stream.runDrain(console.output))
      )
      assert.deepStrictEqual(yield* lifecycle.run, { _tag: "PowerOff" })
      yield* Fiber.join(listening)
      yield* Fiber.interrupt(host)
      const found = lines.flatMap((line) => /^virtio 0x.* device (\d+)( vendor .*)?$/.exec(line)?.[1] ?? [])
      assert.sameMembers(found, ["1", "2", "3", "4", "5", "19", "24"])
      for (const [word, line] of WORDS) {
        assert.isTrue(lines.some((text) => line.test(text)), `${word}: ${lines.join("\n")}`)
      }
      assert.deepStrictEqual(lines.filter((line) => /\b(failed|bad|none)\b/.test(line)), [])
      assert.strictEqual(frames, FRAMES)
    }).pipe(Effect.provide(
      GuestLifecycle.layer.pipe(
        Layer.provide(KvmGuestLifecycle.layerCatalog.pipe(Layer.provide(network))),
        Layer.provide(KvmGuestLifecycle.layerHypervisor())
      )
    ))
  }, 60_000)
})
