/** What a machine tells its kernel, read by guest programs through both boot protocols. */
import { assert, describe, it } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { GuestAcpi, GuestBoot, GuestProgram, Simulation } from "@troupe/core/testing"
import * as Effect from "effect/Effect"
import * as fc from "fast-check"
import { goodConfig, layerLifecycle } from "./TestGuest.ts"

const PAGE = 4096
const RAM = 1

describe("a kernel", () => {
  it("finds its command line, memory, processors and initial RAM disk by either protocol", () => {
    fc.assert(
      fc.property(
        fc.record({
          format: fc.constantFrom<GuestProgram.KernelFormat>("pvh", "elf64"),
          address: fc.constantFrom(0x10_0000, 0x20_0000, 0x20_3000),
          pages: fc.integer({ min: 0x240, max: 0x600 }),
          cpus: fc.integer({ min: 1, max: 20 }),
          cmdline: fc.stringMatching(/^[a-z=., ]{0,60}$/),
          ramdisk: fc.option(fc.uint8Array({ minLength: 1, maxLength: 5000 }))
        }),
        fc.integer(),
        Simulation.property(({ address, cmdline, cpus, format, pages, ramdisk }) =>
          Effect.gen(function*() {
            let found: GuestBoot.GuestBoot | undefined
            let initrd: Uint8Array | undefined
            let apicIds: ReadonlyArray<number> = []
            const program = GuestProgram.make(function*(cpu) {
              const boot = GuestBoot.read(cpu)
              const acpi = GuestAcpi.read(cpu.memory, boot.rsdp)
              found = boot
              apicIds = acpi.apicIds
              if (boot.initrd !== undefined) initrd = cpu.memory.slice(boot.initrd.address, boot.initrd.size)?.slice()
              yield* GuestAcpi.powerOff(cpu, acpi)
            })
            const lifecycle = yield* GuestLifecycle
            yield* lifecycle.create({
              ...goodConfig,
              cpus,
              cmdline,
              guestMemory: pages * PAGE,
              kernel: GuestProgram.kernel(program, { format, address }),
              ...(ramdisk === null ? {} : { ramdisk })
            })
            assert.strictEqual((yield* lifecycle.run)._tag, "PowerOff")
            assert.strictEqual(found?.protocol, format === "pvh" ? "pvh" : "linux64")
            assert.strictEqual(found?.commandLine, cmdline)
            assert.deepStrictEqual(apicIds, Array.from({ length: cpus }, (_, id) => id))
            assert.deepStrictEqual(initrd ?? null, ramdisk)
            const ram = found?.memoryMap.filter((entry) => entry.type === RAM) ?? []
            const top = Math.max(...ram.map((entry) => entry.address + entry.size))
            assert.strictEqual(top, pages * PAGE)
          }).pipe(Effect.provide(layerLifecycle([])))
        )
      ),
      { numRuns: 60 }
    )
  })

  it("keeps its program for as long as a machine may still start it", () => {
    Simulation.check(
      Effect.gen(function*() {
        const lifecycle = yield* GuestLifecycle
        const images = Array.from({ length: 300 }, (_, i) =>
          GuestProgram.kernel(GuestProgram.make(function*(cpu) {
            if (i % 2 === 0) yield* GuestAcpi.powerOff(cpu)
          })))
        for (const [i, kernel] of images.entries()) {
          yield* lifecycle.create({ ...goodConfig, cpus: 1, kernel })
          assert.strictEqual((yield* lifecycle.run)._tag, i % 2 === 0 ? "PowerOff" : "Halt")
        }
      }).pipe(Effect.provide(layerLifecycle([])))
    )
  })
})
