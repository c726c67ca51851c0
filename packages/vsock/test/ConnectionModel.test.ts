/** The protocol under every schedule: see `ConnectionModel.ts`. */
import { assert, describe, it } from "@effect/vitest"
import * as fc from "fast-check"
import { ConnectionModel, makeCoverage, script } from "./ConnectionModel.ts"

/** Schedules of a run: fewer than in continuous integration when a developer waits for them. `npm run fuzz` plays more. */
const SCHEDULES = Number(process.env["TROUPE_VSOCK_SCHEDULES"] ?? (process.env["CI"] === undefined ? 10_000 : 100_000))

/** Packets that a guest which keeps to the protocol sends, by the state in which they meet their connection. */
const PACKETS: Readonly<Record<string, ReadonlyArray<string>>> = {
  none: ["REQUEST", "RESPONSE", "RST", "SHUTDOWN", "RW", "CREDIT_UPDATE", "CREDIT_REQUEST"],
  GuestInitiated: ["RST"],
  ClientInitiated: ["RESPONSE"],
  ReadWrite: ["RST", "SHUTDOWN", "RW", "CREDIT_UPDATE", "CREDIT_REQUEST"],
  ClientInitiatedShutdown: ["RST", "SHUTDOWN", "RW", "CREDIT_UPDATE", "CREDIT_REQUEST"]
}
/** What a host does with a connection in any of these states. */
const COMMANDS = [
  "hostWrites",
  "hostReads",
  "hostShutsSend",
  "hostShutsReceive",
  "hostCloses",
  "hostResets",
  "hostWaits"
]
const HOST_STATES = ["ClientInitiated", "ReadWrite", "ClientInitiatedShutdown", "ShutdownClean", "ShutdownForced"]

/** Each of these is met some hundred times in 10,000 schedules. */
const MEETINGS = [
  ...Object.entries(PACKETS).flatMap(([state, packets]) => packets.map((packet) => `${state}: ${packet}`)),
  ...HOST_STATES.flatMap((state) => COMMANDS.map((command) => `${state}: ${command}`))
]

describe("Connections", () => {
  it(`lose nothing, repeat nothing and keep nothing, in ${SCHEDULES} schedules`, { timeout: 600_000 }, () => {
    const coverage = makeCoverage()
    fc.assert(fc.property(script, (steps) => new ConnectionModel(coverage).run(steps)), { numRuns: SCHEDULES })
    // Schedules in which little happens would hold by themselves.
    assert.isAtLeast(coverage.commands / coverage.schedules, 10, "commands of a schedule that do something")
    assert.isAtLeast(coverage.packets / coverage.schedules, 4, "packets of the guest in a schedule")
    if (SCHEDULES < 5000) return
    assert.deepStrictEqual(MEETINGS.filter((meeting) => !coverage.met.has(meeting)), [])
  })
})
