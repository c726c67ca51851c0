/** The guest of `test/guest` on a real /dev/kvm through the public API: it boots, finds its machine, works, and ends in every way. */
import { assert, describe, it } from "@effect/vitest"
import { type GuestConfigInput, type GuestError, GuestLifecycle, type GuestStop, MachinePolicy } from "@troupe/core"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import { Deferred, Effect, Exit, Fiber, Stream } from "effect"
import { readdirSync, readFileSync, readlinkSync } from "node:fs"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const image = (name: string): string => fileURLToPath(new URL(`../guest/${name}`, import.meta.url))
const ELF = image("troupe-guest.elf")
const BZIMAGE = image("troupe-guest.bzimage")

const config = (cmdline: string, fields: Partial<GuestConfigInput> = {}): GuestConfigInput => ({
  kernelType: "LINUX",
  kernel: fromPath(ELF),
  cmdline,
  cpus: 1,
  guestMemory: "32M",
  ...fields
})

/** Runs a guest to its end: how it ended and the lines that it wrote. */
const runGuest = Effect.fnUntraced(function*(input: GuestConfigInput) {
  const lifecycle = yield* GuestLifecycle
  yield* lifecycle.create(input)
  const guest = yield* lifecycle.bind
  const serial = yield* guest.getSerial
  const exit = yield* Effect.exit(lifecycle.run)
  const epitaph = yield* guest.epitaph
  return { exit, epitaph, lines: serial.log().map((line) => line.replace("troupe-guest: ", "")) }
})

const reasonOf = (exit: Exit.Exit<unknown, GuestError>) => {
  const error = Exit.findErrorOption(exit)
  if (error._tag === "None") return assert.fail("the run should have failed")
  return error.value.reason
}

/** What a symbolic link points to; nothing when it is gone. */
const linkOf = (path: string): string => {
  try {
    return readlinkSync(path)
  } catch {
    return ""
  }
}

const isolated = { excludeTestServices: true }

describe.skipIf(kvmObstacle !== undefined)(onKvm("the small guest"), () => {
  it.layer(KvmGuestLifecycle.layer, isolated)("finds its machine", (it) => {
    it.effect("through PVH: memory map, command line, ACPI tables, devices", () =>
      Effect.gen(function*() {
        const { exit, epitaph, lines } = yield* runGuest(
          config("say=hello", { cmdlineAdd: ["say=again"], cpus: 3, guestMemory: "128M", virtioRng: true })
        )
        assert.deepStrictEqual(exit, Exit.succeed({ _tag: "PowerOff" }))
        assert.deepStrictEqual(epitaph, { _tag: "ZX_OK" })
        for (
          const line of [
            "entry pvh",
            "cmdline say=hello say=again",
            "memory 128 MiB in 2 ranges",
            "range 0x0000000000100000-0x0000000007ffffff ram",
            "acpi hw-reduced yes",
            "acpi sleep-control io 0x600",
            "acpi reset io 0x602 value 0x6",
            "acpi s5 5",
            "acpi serial 0x3f8 irq 4",
            "acpi virtio-mmio 0xd0000000 4096 bytes irq 5 edge",
            "cpus 3",
            "say hello",
            "say again"
          ]
        ) {
          assert.include(lines, line)
        }
        assert.deepStrictEqual(lines.filter((line) => line.includes("checksum bad")), [])
      }))

    it.effect("through the 64-bit Linux entry of an ELF file, and of a bzImage", () =>
      Effect.gen(function*() {
        for (const fields of [{ bootProtocol: "linux64" }, { kernel: fromPath(BZIMAGE) }] as const) {
          const { exit, lines } = yield* runGuest(config("fill", { ...fields, guestMemory: "64M" }))
          assert.deepStrictEqual(exit, Exit.succeed({ _tag: "PowerOff" }))
          assert.include(lines, "entry linux64")
          assert.include(lines, "memory 64 MiB in 2 ranges")
          assert.isTrue(lines.some((line) => /^fill \d+ MiB \d+ pages ok$/.test(line)))
        }
      }))

    it.effect("with memory on both sides of the device window", () =>
      Effect.gen(function*() {
        const { lines } = yield* runGuest(config("", { guestMemory: "3584M" }))
        assert.include(lines, "memory 3584 MiB in 3 ranges")
        assert.include(lines, "range 0x0000000100000000-0x000000011fffffff ram")
      }))

    it.effect("and an initial RAM disk, byte for byte", () =>
      Effect.gen(function*() {
        const ramdisk = Uint8Array.from({ length: 12_345 }, (_, i) => (i * 7) & 0xff)
        const sum = ramdisk.reduce((a, b) => a + b, 0)
        const { lines } = yield* runGuest(config("initrd", { ramdisk }))
        assert.include(lines, `initrd sum 0x${sum.toString(16)}`)
      }))
  })

  it.layer(KvmGuestLifecycle.layer, isolated)("works", (it) => {
    it.effect("starts its other processors, which count with it", () =>
      Effect.gen(function*() {
        const { lines } = yield* runGuest(config("smp", { cpus: 2 }))
        assert.include(lines, "cpu 1 up apic 1 ipi ok")
        assert.include(lines, "smp 2 of 2 up")
        assert.include(lines, "smp counter 2000 ok")
      }))

    it.effect("takes timer interrupts", () =>
      Effect.gen(function*() {
        const { lines } = yield* runGuest(config("timer timer=late pit"))
        assert.include(lines, "timer 10 ticks")
        assert.include(lines, "timer 10 late ticks cut 0 waits")
        assert.include(lines, "pit 10 ticks")
      }))

    it.effect("sends by transmit interrupts, and by string instructions", () =>
      Effect.gen(function*() {
        const { lines } = yield* runGuest(config("serial-tx string-io"))
        assert.include(lines, "serial-tx The quick brown fox jumps over the lazy dog")
        assert.include(lines, "string-io The quick brown fox jumps over the lazy dog")
        assert.include(lines, "string-io 64 bytes ok")
      }))

    it.effect.each(["echo", "echo=poll"])("receives what the host types (%s)", (word) =>
      Effect.gen(function*() {
        const lifecycle = yield* GuestLifecycle
        yield* lifecycle.create(config(`quiet ${word}`))
        const serial = yield* (yield* lifecycle.bind).getSerial
        const typed = ["one", "two words", "x".repeat(200), "quit"]
        const typing = yield* Effect.forkChild(serial.write(new TextEncoder().encode(`${typed.join("\n")}\n`)))
        assert.deepStrictEqual(yield* lifecycle.run, { _tag: "PowerOff" })
        yield* Fiber.join(typing)
        const lines = serial.log().map((line) => line.replace("troupe-guest: ", ""))
        for (const line of typed.slice(0, -1)) assert.include(lines, `echo ${line}`)
        assert.include(lines, "echo quit")
      }))

    it.effect("reads ones where nothing is, at every width, and writes there do nothing", () =>
      Effect.gen(function*() {
        const { lines } = yield* runGuest(config("unmapped"))
        assert.include(lines, "unmapped ok")
      }))

    it.effect("finds the entropy device through ACPI and drives it", () =>
      Effect.gen(function*() {
        const { lines } = yield* runGuest(config("virtio rng=64,8", { virtioRng: true }))
        assert.isTrue(lines.some((line) => line.startsWith("virtio 0xd0000000 magic 0x74726976 version 2 device 4 ")))
        const requests = lines.flatMap((line) =>
          /^rng request \d 64 bytes \d+ interrupts ([0-9a-f]{128})$/.exec(line)?.[1] ?? []
        )
        assert.strictEqual(requests.length, 8)
        assert.strictEqual(new Set(requests).size, 8)
        assert.include(lines, "rng ok")
      }))

    it.effect("finds it as a function on PCI too, and drives it by messages", () =>
      Effect.gen(function*() {
        const { lines } = yield* runGuest(config("virtio rng=64,8", { virtioRng: true, virtioTransport: "pci" }))
        assert.include(lines, "acpi ecam 0xe0000000 buses 0-0")
        assert.isTrue(lines.some((line) => /^virtio 0xe000[0-9a-f]000 pci vendor 0x1af4 device 4$/.test(line)))
        const requests = lines.filter((line) => /^rng request \d 64 bytes \d+ interrupts [0-9a-f]{128}$/.test(line))
        assert.strictEqual(requests.length, 8)
        assert.include(lines, "rng ok")
      }))

    it.effect("goes to user mode and comes back", () =>
      Effect.gen(function*() {
        const { lines } = yield* runGuest(config("user-mode"))
        assert.include(lines, "user-mode cpl 3 returned")
      }))
  })

  it.layer(KvmGuestLifecycle.layer, isolated)("ends", (it) => {
    const ends: ReadonlyArray<{ readonly word: string; readonly stop: GuestStop }> = [
      { word: "poweroff", stop: { _tag: "PowerOff" } },
      { word: "reset=acpi", stop: { _tag: "Reset", by: "acpi" } },
      { word: "reset=kbd", stop: { _tag: "Reset", by: "keyboard-controller" } },
      { word: "halt", stop: { _tag: "Halt" } }
    ]
    it.effect.each(ends)("by its own will: $word", ({ stop, word }) =>
      Effect.gen(function*() {
        const { exit, epitaph } = yield* runGuest(config(`quiet ${word}`))
        assert.deepStrictEqual(exit, Exit.succeed(stop))
        assert.deepStrictEqual(epitaph, { _tag: "ZX_OK" })
      }))

    it.effect("in a triple fault, with the registers", () =>
      Effect.gen(function*() {
        const { exit, epitaph } = yield* runGuest(config("quiet triplefault"))
        const reason = reasonOf(exit)
        assert.strictEqual(reason._tag, "VCPU_RUNTIME_FAILURE")
        assert.strictEqual(reason.vcpu, 0)
        if (reason.failure?._tag !== "TripleFault") return assert.fail("not a triple fault")
        assert.match(reason.failure.registers["rip"] ?? "", /^0x20[0-9a-f]{4}$/)
        assert.deepStrictEqual(reason.serialLog, ["troupe-guest: triplefault"])
        assert.deepStrictEqual(epitaph, { _tag: "ZX_ERR_INTERNAL", reason })
      }))

    it.effect("in an internal error of KVM, with the instruction", () =>
      Effect.gen(function*() {
        const reason = reasonOf((yield* runGuest(config("quiet internal-error"))).exit)
        if (reason._tag !== "VCPU_RUNTIME_FAILURE" || reason.failure?._tag !== "HypervisorInternalError") {
          return assert.fail(reason._tag)
        }
        assert.strictEqual(reason.failure.suberror, 1)
        assert.match(reason.failure.instructionBytes, /^f3 0f b8 /)
      }))

    it.effect("in a kernel panic that it announces, with its last words", () =>
      Effect.gen(function*() {
        const reason = reasonOf((yield* runGuest(config("quiet panic-line"))).exit)
        assert.strictEqual(reason._tag, "VCPU_RUNTIME_FAILURE")
        assert.strictEqual(reason.failure?._tag, "GuestPanic")
        assert.include(reason.serialLog ?? [], "Kernel panic - not syncing: troupe-guest was asked to")
      }))

    it.effect.each(["hang", "idle"])(
      "when the host stops it while it does: %s",
      (word) =>
        Effect.gen(function*() {
          const lifecycle = yield* GuestLifecycle
          yield* lifecycle.create(config(word, { cpus: 2 }))
          const guest = yield* lifecycle.bind
          const serial = yield* guest.getSerial
          const running = yield* Effect.forkChild(Effect.exit(lifecycle.run), { startImmediately: true })
          yield* serial.output.pipe(
            Stream.decodeText,
            Stream.splitLines,
            Stream.takeUntil((line) => line === `troupe-guest: ${word}`),
            Stream.runDrain
          )
          yield* lifecycle.stop
          assert.strictEqual(reasonOf(yield* Fiber.join(running))._tag, "CONTROLLER_FORCED_HALT")
          assert.strictEqual((yield* guest.epitaph)._tag, "ZX_ERR_INTERNAL")
        })
    )

    it.effect("and runs again after a reset when the policy says so", () =>
      Effect.gen(function*() {
        const lifecycle = yield* GuestLifecycle
        yield* lifecycle.create(config("say=life reset=acpi"))
        const guest = yield* lifecycle.bind
        const serial = yield* guest.getSerial
        const third = yield* Deferred.make<void>()
        yield* Effect.forkChild(serial.output.pipe(
          Stream.decodeText,
          Stream.splitLines,
          Stream.filter((line) => line === "troupe-guest: say life"),
          Stream.take(3),
          Stream.runDrain,
          Effect.andThen(Deferred.succeed(third, undefined))
        ))
        const running = yield* Effect.forkChild(Effect.exit(lifecycle.run), { startImmediately: true })
        yield* Deferred.await(third)
        yield* lifecycle.stop
        assert.strictEqual(reasonOf(yield* Fiber.join(running))._tag, "CONTROLLER_FORCED_HALT")
      }).pipe(
        Effect.provideService(MachinePolicy, {
          reset: "run-again",
          device: { _tag: "escalate" }
        })
      ))
  })

  it.live("lives on when another machine in the process dies", () =>
    Effect.gen(function*() {
      const one = Effect.fnUntraced(function*(cmdline: string) {
        return yield* runGuest(config(cmdline)).pipe(Effect.provide(KvmGuestLifecycle.layer, { local: true }))
      })
      const [survivor, faulty] = yield* Effect.all([one("timer timer timer"), one("quiet triplefault")], {
        concurrency: 2
      })
      assert.deepStrictEqual(survivor.exit, Exit.succeed({ _tag: "PowerOff" }))
      assert.strictEqual(survivor.lines.filter((line) => line === "timer 10 ticks").length, 3)
      assert.strictEqual(reasonOf(faulty.exit)._tag, "VCPU_RUNTIME_FAILURE")
    }))

  it.live("leaves no descriptor and no memory behind, however it ends", () =>
    Effect.gen(function*() {
      // Threads are kept for later guests, with descriptors of their own.
      const descriptors = () =>
        readdirSync("/proc/self/fd").filter((fd) => linkOf(`/proc/self/fd/${fd}`).includes("kvm")).length
      const kvmMappings = () =>
        readFileSync("/proc/self/maps", "utf8").split("\n").filter((line) => line.includes("kvm")).length
      const round = Effect.gen(function*() {
        for (const word of ["poweroff", "triplefault", "reset=acpi"]) {
          yield* runGuest(config(`quiet ${word}`, { cpus: 2 }))
        }
        const lifecycle = yield* GuestLifecycle
        yield* lifecycle.create(config("quiet hang"))
        const running = yield* Effect.forkChild(lifecycle.run, { startImmediately: true })
        yield* Fiber.interrupt(running)
        yield* lifecycle.create(config("never run"))
        yield* lifecycle.stop
      })
      yield* round
      const before = [descriptors(), kvmMappings()]
      yield* round
      assert.deepStrictEqual([descriptors(), kvmMappings()], before)
    }).pipe(Effect.provide(KvmGuestLifecycle.layer)))
})
