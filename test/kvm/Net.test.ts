/** The network device on a real KVM and a TAP interface, driven by the small guest, in a network namespace of its own. */
import { assert, describe, it } from "@effect/vitest"
import type { GuestStop, NetCounters } from "@troupe/core"
import { execFile, spawnSync } from "node:child_process"
import { fileURLToPath } from "node:url"
import { kvmObstacle } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))
const PROGRAM = fileURLToPath(new URL("./programs/net.ts", import.meta.url))
const CSUM = 1
const GUEST_CSUM = 2
const MRG_RXBUF = 0x8000

/** Why there is no TAP interface here, or `undefined`. */
const tapObstacle = (): string | undefined => {
  const script = "ip tuntap add probe0 mode tap vnet_hdr && test -r /dev/kvm"
  const { error, status, stderr } = spawnSync("unshare", ["-rn", "sh", "-c", script], { encoding: "utf8" })
  if (error !== undefined) return "there is no unshare (package util-linux)"
  return status === 0 ? undefined : `no TAP interface in a network namespace: ${stderr.trim()}`
}
const obstacle = kvmObstacle ?? tapObstacle()

interface Outcome {
  readonly stop: GuestStop
  readonly lines: ReadonlyArray<string>
  readonly counters: NetCounters
  readonly events: ReadonlyArray<string>
  readonly trips: ReadonlyArray<number>
  readonly wrong: number
}

/** Runs the guest with words while the host does a task. */
const run = async (words: string, task = ""): Promise<Outcome> => {
  const output = await new Promise<string>((resolve, reject) => {
    const args = ["-rn", process.execPath, "--disable-warning=ExperimentalWarning", PROGRAM, ELF, task, words]
    execFile("unshare", args, { timeout: 60_000 }, (error, stdout, stderr) => {
      if (error === null) resolve(stdout)
      else reject(new Error(`${error.message}\n${stdout}\n${stderr}`))
    })
  })
  const outcome: Outcome = JSON.parse(output)
  assert.deepStrictEqual(outcome.stop, { _tag: "PowerOff" })
  return outcome
}

/** The numbers of the guest's line about a bench. */
const benchOf = ({ lines }: Outcome) => {
  const line = lines.find((line) => line.startsWith("net bench")) ?? assert.fail(lines.join("\n"))
  const number = (name: string) => Number(new RegExp(`${name}=(\\d+)`).exec(line)?.[1])
  return { frames: number("n"), bytes: number("bytes"), kicks: number("kicks"), interrupts: number("interrupts") }
}

const lost = ({ counters }: Outcome) => Object.values(counters.dropped).reduce((sum, count) => sum + count, 0)

const title = "the network of the small guest, on KVM and TAP"
describe.skipIf(obstacle !== undefined)(
  obstacle === undefined ? title : `${title} (skipped: ${obstacle})`,
  { timeout: 120_000 },
  () => {
    it("has the address, the link and the MTU of its interface, and every offload", async () => {
      const { events, lines } = await run("net")
      const features = BigInt(/features (0x[0-9a-f]+)/.exec(lines.join("\n"))?.[1] ?? "0")
      for (const bit of [0, 1, 2, 3, 5, 7, 8, 11, 12, 15, 16, 17, 18, 23, 28, 29, 32]) {
        assert.strictEqual(features >> BigInt(bit) & 1n, 1n, `feature ${bit}`)
      }
      assert.includeMembers([...lines], ["net mac 02:00:00:00:00:01", "net link up", "net mtu 1500", "net ok"])
      assert.deepStrictEqual(events, ["DriverReady", "DriverGone"])
    })

    it.each([0, GUEST_CSUM, MRG_RXBUF, CSUM | GUEST_CSUM, CSUM | GUEST_CSUM | MRG_RXBUF])(
      "answers ARP, and every datagram as it was sent; without the features %i",
      async (without) => {
        for (const size of [4, 1472]) {
          const outcome = await run(`ip=10.1.0.2 net-without=${without} net=echo,100`, `ask,100,${size}`)
          assert.strictEqual(outcome.wrong, 0)
          assert.strictEqual(outcome.trips.length, 100)
          assert.include(outcome.lines.join("\n"), "net echo 100 udp")
          assert.strictEqual(lost(outcome), 0)
        }
      }
    )

    it("sends frames with few kicks and few interrupts", async () => {
      const outcome = await run("net=send,20000,1514")
      const { bytes, frames, interrupts, kicks } = benchOf(outcome)
      assert.strictEqual(outcome.counters.sentFrames, 20_000)
      assert.strictEqual(outcome.counters.sentBytes, bytes)
      assert.isAtMost(kicks, frames / 10)
      assert.isAtMost(interrupts, frames / 10)
      assert.strictEqual(lost(outcome), 0)
    })

    it("sends frames that the host cuts into segments", async () => {
      const outcome = await run("net=send,2000,65535,1448")
      assert.strictEqual(outcome.counters.sentBytes, 2000 * 65_535)
      assert.strictEqual(lost(outcome), 0)
    })

    it("takes frames with few kicks and few interrupts", async () => {
      const outcome = await run("net=sink,20000", "flood,1400")
      const { frames, interrupts, kicks } = benchOf(outcome)
      assert.isAtLeast(frames, 20_000)
      assert.isAtMost(kicks, frames / 10)
      assert.isAtMost(interrupts, frames / 10)
      assert.strictEqual(lost(outcome), 0)
    })

    it("sees its cable pulled and plugged in, and goes on", async () => {
      const outcome = await run("ip=10.1.0.2 net=echo,5", "cable,5")
      assert.strictEqual(outcome.wrong, 0)
      assert.strictEqual(outcome.events.filter((event) => event === "LinkChanged").length, 2)
    })

    it("works again after every reset", async () => {
      const outcome = await run(`${"net=send,300,60 ".repeat(10)}ip=10.1.0.2 net=echo,5`, "ask,5,100")
      assert.strictEqual(outcome.wrong, 0)
      assert.strictEqual(outcome.lines.filter((line) => line.startsWith("net bench send n=300")).length, 10)
      assert.isAtLeast(outcome.counters.sentFrames, 3005)
    })
  }
)
