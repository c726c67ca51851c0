/** The console on a real KVM, driven by the small guest: an echo on every port. */
import { assert, describe, it } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import { Effect, Exit, Fiber, Option, Stream } from "effect"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))

const pattern = (length: number) => Uint8Array.from({ length }, (_, i) => (i * 167 + (i >> 8)) & 0x7f)
const text = (value: string) => new TextEncoder().encode(value)

/** Everything up to `length` bytes. */
const collect = (output: Stream.Stream<Uint8Array>, length: number) =>
  output.pipe(
    Stream.scan((): Uint8Array => new Uint8Array(), (all, bytes) => {
      const both = new Uint8Array(all.length + bytes.length)
      both.set(all)
      both.set(bytes, all.length)
      return both
    }),
    Stream.filter((all) => all.length >= length),
    Stream.runHead
  )

const lines = (log: ReadonlyArray<string>) =>
  log.map((line) => line.replace("troupe-guest: console ", "")).filter((line) =>
    !/^(device|features|troupe)/.test(line)
  )

describe.skipIf(kvmObstacle !== undefined).each(["mmio", "pci"] as const)(
  onKvm("the console over virtio-%s"),
  (virtioTransport) => {
    it.layer(KvmGuestLifecycle.layer, { excludeTestServices: true })("of the small guest", (it) => {
      it.effect("gives back every byte in order, with the size of the terminal", () =>
        Effect.gen(function*() {
          const lifecycle = yield* GuestLifecycle
          yield* lifecycle.create({
            kernelType: "LINUX",
            kernel: fromPath(ELF),
            cmdline: "quiet console",
            cpus: 1,
            virtioTransport,
            guestMemory: "32M",
            virtioConsole: true
          })
          const guest = yield* lifecycle.bind
          const serial = yield* guest.getSerial
          const console = yield* guest.getConsole
          yield* console.resize({ cols: 80, rows: 25 })
          const sent = pattern(5000)
          const host = Effect.gen(function*() {
            const reader = yield* Effect.forkChild(collect(console.output, 1 + sent.length + 4))
            for (let at = 0; at < sent.length; at += 1300) yield* console.write(sent.slice(at, at + 1300))
            yield* console.resize({ cols: 132, rows: 43 })
            yield* Stream.runHead(
              Stream.filter(serial.output, () => serial.log().some((line) => line.includes("size 132 by 43")))
            )
            yield* console.write(text("quit"))
            return yield* Fiber.join(reader)
          })
          // Both: when one of them ends too early, the other's end does not say why.
          const [run, echoed] = yield* Effect.all([Effect.exit(lifecycle.run), Effect.exit(host)], {
            concurrency: "unbounded"
          })
          assert.deepStrictEqual(run, Exit.succeed({ _tag: "PowerOff" }), serial.log().join("\n"))
          assert.deepStrictEqual(
            echoed,
            Exit.succeed(Option.some(Uint8Array.of(...text("!"), ...sent, ...text("quit"))))
          )
          const [first, second, echo, ok] = lines(serial.log())
          assert.deepStrictEqual([first, second, ok], ["size 80 by 25", "size 132 by 43", "ok"])
          assert.match(echo ?? "", /^echoed 5004 bytes in \d+ chains/)
        }), 60_000)

      it.effect("has further ports by their names, each with its own bytes", () =>
        Effect.gen(function*() {
          const lifecycle = yield* GuestLifecycle
          yield* lifecycle.create({
            kernelType: "LINUX",
            kernel: fromPath(ELF),
            cmdline: "quiet console=ports",
            cpus: 1,
            virtioTransport,
            guestMemory: "32M",
            virtioConsole: true,
            consolePorts: ["agent"],
            consolePortsMax: 3
          })
          const guest = yield* lifecycle.bind
          const serial = yield* guest.getSerial
          const console = yield* guest.getConsole
          yield* console.resize({ cols: 80, rows: 25 })
          const exchange = (port: Pick<typeof console, "output" | "write">, said: string) =>
            Effect.gen(function*() {
              const reader = yield* Effect.forkChild(collect(port.output, said.length))
              yield* port.write(text(said))
              const heard = yield* Fiber.join(reader)
              assert.strictEqual(new TextDecoder().decode(heard._tag === "Some" ? heard.value : undefined), said)
            })
          const host = Effect.gen(function*() {
            yield* exchange(yield* console.port("agent"), "hello agent")
            yield* Effect.scoped(Effect.gen(function*() {
              yield* exchange(yield* console.addPort("late"), "hello late")
            }))
            yield* Stream.runHead(
              Stream.filter(serial.output, () => serial.log().some((line) => line.includes("port 2 removed")))
            )
            yield* console.write(text("quit"))
          })
          const [stop, hosted] = yield* Effect.all([Effect.exit(lifecycle.run), Effect.exit(host)], {
            concurrency: "unbounded"
          })
          assert.deepStrictEqual(stop, Exit.succeed({ _tag: "PowerOff" }), serial.log().join("\n"))
          assert.deepStrictEqual(hosted, Exit.void, serial.log().join("\n"))
          const log = lines(serial.log())
          for (
            const line of [
              "port 0 added",
              "port 0 console",
              "port 0 size 80 by 25",
              "port 1 added",
              "port 1 name agent",
              "port 1 host open",
              "port 2 added",
              "port 2 name late",
              "port 2 removed",
              "ok"
            ]
          ) assert.include(log, line)
        }), 60_000)
    })
  }
)
