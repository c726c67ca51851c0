/** TAP interfaces, in a network namespace of their own, and their numbers against the system's headers. */
import { assert, describe, it } from "@effect/vitest"
import { execFile, execFileSync, spawnSync } from "node:child_process"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import process from "node:process"
import { fileURLToPath } from "node:url"
import { IFREQ_SIZE, IFREQ_VALUE, IOVEC_MAX, IOVEC_SIZE, NetIoctl, NetValue } from "../src/net/TunIoctl.ts"

/** Why TAP interfaces cannot be made here, or `undefined`. */
const tapObstacle = (): string | undefined => {
  const script = "ip tuntap add probe0 mode tap vnet_hdr"
  const { error, status, stderr } = spawnSync("unshare", ["-rn", "sh", "-c", script], { encoding: "utf8" })
  if (error !== undefined) return "there is no unshare (package util-linux)"
  return status === 0 ? undefined : `no TAP interface in a network namespace: ${stderr.trim()}`
}
const noTap = tapObstacle()

describe(noTap === undefined ? "Tap" : `Tap (skipped: ${noTap})`, { timeout: 120_000 }, () => {
  it.skipIf(noTap !== undefined)(
    "does with the kernel what it says",
    async () => {
      const script = fileURLToPath(new URL("net/tap-main.ts", import.meta.url))
      const { held, output } = await new Promise<{ held: number; output: string }>((resolve) => {
        execFile("unshare", ["-rn", process.execPath, script], { timeout: 100_000 }, (error, stdout, stderr) => {
          const held = stdout.split("\n").filter((line) => line.startsWith("held: ")).length
          resolve({ held, output: `${error?.message ?? ""}\n${stdout}\n${stderr}` })
        })
      })
      assert.strictEqual(held, 10, output)
    }
  )

  const privileged = process.getuid?.() === 0 ? undefined : "only root can become nobody"
  it.skipIf(noTap !== undefined || privileged !== undefined)(
    `says what to do without the privilege${privileged === undefined ? "" : ` (skipped: ${privileged})`}`,
    () => {
      const script = `
        import * as Effect from "effect/Effect"
        import { NetBackend } from "@troupe/core/NetBackend"
        import * as Tap from "${new URL("../src/net/Tap.ts", import.meta.url).href}"
        const request = { index: 0, name: "net0", macAddress: "02:00:00:00:00:01", enableBridge: false }
        const open = Effect.flatMap(NetBackend, (backend) => Effect.scoped(backend.open(request)))
        console.log((await Effect.runPromise(Effect.flip(Effect.provide(open, Tap.layer())))).message)
      `
      const cwd = fileURLToPath(new URL("..", import.meta.url))
      // In a namespace without capabilities the device can be opened, and no interface made.
      const output = execFileSync("setpriv", [
        "--bounding-set",
        "-all",
        "--inh-caps",
        "-all",
        process.execPath,
        "--input-type=module",
        "-e",
        script
      ], { cwd, encoding: "utf8" })
      assert.match(output, /TUNSETIFF troupe%d: .*EPERM.*ip tuntap add|open .*(EACCES|EPERM)/)
    }
  )
})

const gcc = spawnSync("gcc", ["-fsyntax-only", "-x", "c", "-"], { input: "#include <linux/if_tun.h>\n" })
const noHeader = process.arch !== "x64"
  ? `the tables are for x86-64, not ${process.arch}`
  : gcc.error !== undefined
  ? "there is no gcc"
  : gcc.status === 0
  ? undefined
  : "there is no linux/if_tun.h (package linux-libc-dev)"

describe("TunIoctl", () => {
  it.skipIf(noHeader !== undefined)(
    `has the numbers of the headers${noHeader === undefined ? "" : ` (skipped: ${noHeader})`}`,
    () => {
      const names = new Map<string, number>([
        ...Object.entries(NetIoctl).map(([name, { request }]) => [name, request] as const),
        ...Object.entries<number>(NetValue),
        ["sizeof(struct ifreq)", IFREQ_SIZE],
        ["offsetof(struct ifreq, ifr_ifru)", IFREQ_VALUE],
        ["sizeof(struct iovec)", IOVEC_SIZE],
        ["UIO_MAXIOV", IOVEC_MAX]
      ])
      const directory = mkdtempSync(join(tmpdir(), "troupe-tun-"))
      try {
        const lines = [...names.keys()].map((name) =>
          /^[A-Z0-9_]+$/.test(name)
            ? `#ifdef ${name}\nprintf("%s %llu\\n", "${name}", (unsigned long long)${name});\n#endif`
            : `printf("%s %llu\\n", "${name}", (unsigned long long)${name});`
        )
        const headers = ["stddef", "stdio", "sys/ioctl", "sys/uio", "linux/if", "linux/if_tun", "linux/sockios"]
        const source = `${headers.map((name) => `#include <${name}.h>`).join("\n")}\nint main(void)\n{\n${
          lines.join("\n")
        }\nreturn 0;\n}\n`
        writeFileSync(join(directory, "tun.c"), source)
        execFileSync("gcc", ["-D_GNU_SOURCE", "-o", join(directory, "tun"), join(directory, "tun.c")])
        const facts = execFileSync(join(directory, "tun"), { encoding: "utf8" }).trimEnd().split("\n").map((line) => {
          const at = line.lastIndexOf(" ")
          return [line.slice(0, at), Number(line.slice(at + 1))] as const
        })
        assert.isAbove(facts.length, 15)
        for (const [name, value] of facts) assert.strictEqual(names.get(name), value, name)
        const known = new Set(facts.map(([name]) => name))
        // Flags of `enum net_device_flags`, and offloads that are younger than some headers.
        const unknown = [...names.keys()].filter((name) => !known.has(name))
        assert.includeMembers(["IFF_UP", "TUN_F_USO4", "TUN_F_USO6"], unknown)
      } finally {
        rmSync(directory, { recursive: true })
      }
    }
  )
})
