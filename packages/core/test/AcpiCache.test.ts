import { assert, it } from "@effect/vitest"
import { provideAcpi } from "@troupe/core/acpi/AcpiCache"
import { serialPortDevice } from "@troupe/core/acpi/AcpiDevices"
import { type AcpiInput, buildAcpi } from "@troupe/core/acpi/AcpiTables"
import { Aml } from "@troupe/core/acpi/Aml"
import * as Result from "effect/Result"
import * as fc from "fast-check"

const input = (cpus: number, id: number, bytes: ReadonlyArray<number>): AcpiInput => ({
  cpus,
  sleepControl: { space: "pio", address: 0x600 },
  sleepStatus: { space: "pio", address: 0x601 },
  reset: { register: { space: "pio", address: 0x602 }, value: 1 },
  devices: [
    serialPortDevice(),
    Aml.device("DEV0", [
      Aml.name("_UID", Aml.integer(id)),
      Aml.name("DATA", Aml.buffer(Uint8Array.from(bytes)))
    ])
  ]
})

it("gives for each description what building its tables gives, whatever came before", () => {
  const arbitrary = fc.tuple(
    fc.integer({ min: 1, max: 3 }),
    fc.integer({ min: 0, max: 2 }),
    fc.array(fc.integer({ min: 0, max: 1 }), { maxLength: 2 })
  )
  fc.assert(fc.property(fc.array(arbitrary, { minLength: 2, maxLength: 10 }), (descriptions) => {
    for (const [cpus, id, bytes] of descriptions) {
      assert.deepStrictEqual(
        Result.getOrThrow(provideAcpi(input(cpus, id, bytes))),
        Result.getOrThrow(buildAcpi(input(cpus, id, bytes)))
      )
    }
  }))
})
