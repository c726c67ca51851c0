/** The balloon on a real KVM, driven by the small guest: what it gives up is measured in the resident memory of the guest. */
import { assert, describe, it } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import { Effect, Exit, Stream } from "effect"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm, residentBytesIn } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))
const MEBIBYTE = 2 ** 20
const MEMORY = 64 * MEBIBYTE
const PAGES = 32 * MEBIBYTE / 4096
/** How long the guest may take to answer, on a host that has much else to do. */
const PATIENCE_MILLIS = 30_000

describe.skipIf(kvmObstacle !== undefined).each(["mmio", "pci"] as const)(
  onKvm("the balloon over virtio-%s"),
  (virtioTransport) => {
    it.layer(KvmGuestLifecycle.layer, { excludeTestServices: true })("of the small guest", (it) => {
      it.effect(
        "gives memory back for real, by inflation and by reports, and says how much the guest has",
        () =>
          Effect.gen(function*() {
            const lifecycle = yield* GuestLifecycle
            yield* lifecycle.create({
              kernelType: "LINUX",
              kernel: fromPath(ELF),
              cmdline: "quiet balloon=32",
              cpus: 1,
              virtioTransport,
              guestMemory: MEMORY,
              virtioBalloon: true
            })
            const guest = yield* lifecycle.bind
            const serial = yield* guest.getSerial
            const balloon = yield* guest.getBalloonController
            const resident: Array<readonly [string, number]> = []
            let free = 0
            /** Returns when the guest has printed the line, and notes what this process has then. */
            const printed = (line: string) =>
              Stream.runHead(Stream.filter(serial.output, () => serial.log().some((text) => text.includes(line)))).pipe(
                Effect.andThen(Effect.sync(() => resident.push([line, residentBytesIn(MEMORY) / MEBIBYTE])))
              )
            const host = Effect.gen(function*() {
              yield* printed("balloon before")
              yield* balloon.requestNumPages(PAGES)
              yield* balloon.changes.pipe(Stream.filter((size) => size.currentNumPages === PAGES), Stream.runHead)
              yield* printed("balloon inflated")
              const { ageMillis, stats } = yield* balloon.getMemStatsWithin(PATIENCE_MILLIS)
              assert.isAtMost(ageMillis, PATIENCE_MILLIS)
              free = stats.find(({ tag }) => tag === 4)?.val ?? -1
              yield* balloon.requestNumPages(0)
              yield* printed("balloon deflated")
              yield* printed("balloon answers")
              yield* balloon.requestNumPages(1)
              yield* printed("balloon reported")
              yield* balloon.requestNumPages(0)
            })
            // Both: when one of them ends too early, the other's end does not say why.
            const [stop, hosted] = yield* Effect.all([Effect.exit(lifecycle.run), Effect.exit(host)], {
              concurrency: "unbounded"
            })
            assert.deepStrictEqual(stop, Exit.succeed({ _tag: "PowerOff" }), serial.log().join("\n"))
            assert.deepStrictEqual(hosted, Exit.void, serial.log().join("\n"))
            assert.deepStrictEqual(
              serial.log().map((line) => line.replace("troupe-guest: balloon ", "")).slice(2, -1),
              [
                `before ${PAGES} pages zero ${PAGES} own 0`,
                `inflated ${PAGES} pages`,
                `deflated ${PAGES} pages zero ${PAGES} own 0`,
                "answers 1",
                `reported ${PAGES} pages`,
                `after ${PAGES} pages zero ${PAGES} own 0`,
                "ok"
              ]
            )
            assert.strictEqual(free, 0)
            // The guest has stacks and queues as well.
            const at = Object.fromEntries(resident)
            const drop = (from: string, to: string) => (at[from] ?? 0) - (at[to] ?? 0)
            assert.isAbove(drop("balloon before", "balloon inflated"), 30)
            assert.isAbove(drop("balloon deflated", "balloon inflated"), 30)
            assert.isAbove(drop("balloon deflated", "balloon reported"), 30)
            const { badRequests, discardedBytes, discards, inflatedPages, reportedPages } = balloon.counters()
            assert.deepStrictEqual([badRequests, inflatedPages, reportedPages], [0, PAGES, PAGES])
            assert.strictEqual(discardedBytes, 2 * PAGES * 4096)
            // A request has 256 pages in a row, upwards or downwards: one call to the host for each, and one for each report.
            assert.isAtMost(discards, PAGES / 256 + 16)
          }),
        60_000
      )
    })
  }
)
