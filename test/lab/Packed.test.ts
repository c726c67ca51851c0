// An unmodified distribution kernel that is offered packed virtqueues, and takes them.
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { watched } from "../../scripts/lab/ExitWatch.ts"
import { Lab } from "../../scripts/lab/Lab.ts"
import { missingForLab } from "../../scripts/lab/Requirements.ts"

const whyNot = await missingForLab()
const title = "unmodified Linux with packed virtqueues"
if (whyNot !== undefined) console.warn(`SKIPPED: ${title}: ${whyNot}`)

describe.skipIf(whyNot !== undefined)(whyNot === undefined ? title : `${title} (skipped: ${whyNot})`, () => {
  let lab: Lab

  beforeAll(async () => {
    lab = await Lab.start({ name: "test-packed" })
  })

  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]()
  })

  it("takes them where they are offered, and draws random bytes and reads and writes a disk through them", async () => {
    const { code, output } = await lab.run({
      script: watched("node test/lab/hosts/Packed.ts")
    })
    for (const step of ["boot", "negotiation", "entropy", "disk", "poweroff"]) {
      assert.match(output, new RegExp(`^ok ${step} `, "m"), output)
    }
    assert.strictEqual(code, 0, output)
  })
})
