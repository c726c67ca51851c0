// An unmodified distribution kernel when something goes wrong: devices that break, memory that runs out.
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { watched } from "../../scripts/lab/ExitWatch.ts"
import { Lab } from "../../scripts/lab/Lab.ts"
import { missingForLab } from "../../scripts/lab/Requirements.ts"

const whyNot = await missingForLab()
const title = "unmodified Linux when something goes wrong"
if (whyNot !== undefined) console.warn(`SKIPPED: ${title}: ${whyNot}`)

describe.skipIf(whyNot !== undefined)(whyNot === undefined ? title : `${title} (skipped: ${whyNot})`, () => {
  let lab: Lab

  beforeAll(async () => {
    lab = await Lab.start({ name: "test-failure" })
  })

  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]()
  })

  it("takes console and sockets up again, lives without a disk, gets memory back from the balloon, and ends when a device says so", async () => {
    const { code, output } = await lab.run({
      script: watched("node test/lab/hosts/Failure.ts")
    })
    for (const step of ["boot", "console", "sockets", "out of memory", "disk", "escalates"]) {
      assert.match(output, new RegExp(`^ok ${step} `, "m"), output)
    }
    assert.strictEqual(code, 0, output)
  })
})
