// An unmodified distribution kernel with its own vsock modules, and a small program of ours in it, against the host's endpoint.
import { afterAll, assert, beforeAll, describe, it } from "vitest"
import { watched } from "../../scripts/lab/ExitWatch.ts"
import { Lab } from "../../scripts/lab/Lab.ts"
import { missingForLab } from "../../scripts/lab/Requirements.ts"

const whyNot = await missingForLab()
const title = "unmodified Linux with vsock"
if (whyNot !== undefined) console.warn(`SKIPPED: ${title}: ${whyNot}`)

const STEPS = [
  "guest to host",
  "host to guest",
  "\\d+ connections of the guest",
  "messages",
  "a port that nobody listens on",
  "connections of the host",
  "socat, both ways",
  "a handler that dies",
  "a program of the guest that is killed",
  "the driver leaves and comes back",
  "poweroff"
]

describe.skipIf(whyNot !== undefined)(whyNot === undefined ? title : `${title} (skipped: ${whyNot})`, () => {
  let lab: Lab

  beforeAll(async () => {
    lab = await Lab.start({ name: "test-vsock" })
  })

  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]()
  })

  it("moves bytes both ways, makes a thousand connections, and ends each as it should", async () => {
    const { code, output } = await lab.run({
      script: watched("node test/lab/hosts/Vsock.ts")
    })
    for (const step of STEPS) assert.match(output, new RegExp(`^ok ${step}`, "m"), output)
    assert.strictEqual(code, 0, output)
  })

  it("does the same on virtio-pci", async () => {
    const { code, output } = await lab.run({
      script: watched(
        "TROUPE_VSOCK_BYTES=8388608 TROUPE_VSOCK_CONNECTIONS=100 node test/lab/hosts/Vsock.ts --transport pci"
      )
    })
    for (const step of STEPS) assert.match(output, new RegExp(`^ok ${step}`, "m"), output)
    assert.strictEqual(code, 0, output)
  })
})
