/** The user-mode network with the kernel's own TCP and UDP as its guest, in a network namespace of its own. */
import { assert, describe, it } from "@effect/vitest"
import { execFile, spawnSync } from "node:child_process"
import process from "node:process"
import { fileURLToPath } from "node:url"

/** Why TAP interfaces cannot be made here, or `undefined`. */
const tapObstacle = (): string | undefined => {
  const { error, status, stderr } = spawnSync("unshare", ["-rn", "ip", "tuntap", "add", "probe0", "mode", "tap"], {
    encoding: "utf8"
  })
  if (error !== undefined) return "there is no unshare (package util-linux)"
  return status === 0 ? undefined : `no TAP interface in a network namespace: ${stderr.trim()}`
}
const noTap = tapObstacle()
const CHECKS = 12

describe("user-mode network", { timeout: 120_000 }, () => {
  it.skipIf(noTap !== undefined)(
    `serves Linux as its guest${noTap === undefined ? "" : ` (skipped: ${noTap})`}`,
    async () => {
      const script = fileURLToPath(new URL("net/linux-guest.ts", import.meta.url))
      const { held, output } = await new Promise<{ held: number; output: string }>((resolve) => {
        execFile("unshare", ["-rn", process.execPath, script], { timeout: 100_000 }, (error, stdout, stderr) => {
          const held = stdout.split("\n").filter((line) => line.startsWith("held: ")).length
          resolve({ held, output: `${error?.message ?? ""}\n${stdout}\n${stderr}` })
        })
      })
      assert.strictEqual(held, CHECKS, output)
    }
  )
})
