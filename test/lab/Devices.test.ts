// Every device of a machine, driven by the drivers of an unmodified distribution kernel, over both transports.
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { type LinuxRunner, missingForLinux, openLinuxRunner } from "../../scripts/lab/LinuxRunner.ts"

const whyNot = await missingForLinux()
const title = "all devices with Linux's own drivers"
if (whyNot !== undefined) console.warn(`SKIPPED: ${title}: ${whyNot}`)

/** Two minutes on a quiet host; this is for what hangs. */
const JOB_SECONDS = 2400
const TEST_MILLIS = 2_700_000

/** What `hosts/Devices.ts` does, in its order. */
const STEPS = [
  "boot",
  "entropy",
  "memory: grow",
  "memory: shrink",
  "memory",
  "balloon: free pages",
  "balloon: inflate",
  "balloon: deflate",
  "balloon",
  "block",
  "network: user mode",
  "network: TAP",
  "network",
  "console",
  "failure: entropy",
  "failure: network",
  "failure",
  "poweroff"
]

describe.skipIf(whyNot !== undefined)(whyNot === undefined ? title : `${title} (skipped: ${whyNot})`, () => {
  let runner: LinuxRunner

  beforeAll(async () => {
    runner = await openLinuxRunner({ name: "test-devices" })
  })

  afterAll(async () => {
    await runner?.[Symbol.asyncDispose]()
  })

  for (const transport of ["mmio", "pci"] as const) {
    it(`works over virtio-${transport}`, async () => {
      // A TAP interface of a host that is not ours to change is none of ours to make.
      const inLab = runner.lab !== undefined
      const outcome = await runner.runHost({
        source: "test/lab/hosts/Devices.ts",
        args: ["--transport", transport, ...(inLab ? ["--tap"] : [])],
        timeoutSeconds: JOB_SECONDS
      })
      process.stderr.write(`- all devices over virtio-${transport}: ${outcome.seconds.toFixed(1)} s\n`)
      assert.strictEqual(outcome.code, 0, outcome.output)
      assert.deepStrictEqual(outcome.steps, STEPS.filter((step) => inLab || step !== "network: TAP"), outcome.output)
    }, TEST_MILLIS)
  }
})
