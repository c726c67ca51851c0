// An unmodified distribution kernel whose devices are on PCI, driven by its own virtio_pci.
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { watched } from "../../scripts/lab/ExitWatch.ts"
import { Lab } from "../../scripts/lab/Lab.ts"
import { missingForLab } from "../../scripts/lab/Requirements.ts"

const whyNot = await missingForLab()
const title = "unmodified Linux with virtio-pci"
if (whyNot !== undefined) console.warn(`SKIPPED: ${title}: ${whyNot}`)

describe.skipIf(whyNot !== undefined)(whyNot === undefined ? title : `${title} (skipped: ${whyNot})`, () => {
  let lab: Lab

  beforeAll(async () => {
    lab = await Lab.start({ name: "test-pci" })
  })

  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]()
  })

  it("finds the functions through ACPI, drives them with MSI-X, moves vectors, lets go and takes them again", async () => {
    const { code, output } = await lab.run({
      script: watched("node test/lab/hosts/Pci.ts")
    })
    for (const step of ["boot", "enumeration", "entropy", "move", "again", "poweroff"]) {
      assert.match(output, new RegExp(`^ok ${step} `, "m"), output)
    }
    assert.strictEqual(code, 0, output)
  })
})
