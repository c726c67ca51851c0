/** Nothing that a guest wrote before its end is lost, however it ends. */
import { assert, describe, it } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Option from "effect/Option"
import * as fc from "fast-check"
import { goodConfig, layerLifecycle } from "./TestGuest.ts"

const COM1 = 0x3f8
const ends = ["power-off", "acpi-reset", "keyboard-reset", "halt", "triple-fault", "internal-error", "panic"] as const

/** Writes a line, as fast as it can, and ends. */
const writeAndEnd = (text: string, end: (typeof ends)[number]) =>
  GuestProgram.make(function*(cpu) {
    const acpi = GuestAcpi.find(cpu)
    for (const byte of new TextEncoder().encode(text)) yield* cpu.out8(COM1, byte)
    switch (end) {
      case "power-off":
        return yield* GuestAcpi.powerOff(cpu, acpi)
      case "acpi-reset":
        return yield* GuestAcpi.reset(cpu, acpi)
      case "keyboard-reset":
        return yield* cpu.out8(0x64, 0xfe)
      case "halt":
        return yield* cpu.halt()
      case "triple-fault":
        return yield* cpu.tripleFault()
      case "internal-error":
        return yield* cpu.internalError()
      case "panic":
        return yield* cpu.out8(0x505, 1)
    }
  })

describe("the last words of a guest", () => {
  for (const end of ends) {
    it(`are in the serial log, and in the error if there is one: ${end}`, () => {
      fc.assert(
        fc.property(
          fc.stringMatching(/^[a-z]{1,80}$/),
          fc.integer(),
          Simulation.property((text) =>
            Effect.gen(function*() {
              const lifecycle = yield* GuestLifecycle
              yield* lifecycle.create({ ...goodConfig, cpus: 1, kernel: GuestProgram.kernel(writeAndEnd(text, end)) })
              const serial = yield* (yield* lifecycle.bind).getSerial
              const exit = yield* Effect.exit(lifecycle.run)
              assert.deepStrictEqual(serial.log(), [text])
              if (Exit.isSuccess(exit)) return
              const error = Option.getOrUndefined(Exit.findErrorOption(exit))
              assert.deepStrictEqual(error?.reason.serialLog, [text])
            }).pipe(Effect.provide(layerLifecycle([])))
          )
        ),
        { numRuns: 30 }
      )
    })
  }
})
