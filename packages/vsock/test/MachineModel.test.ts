/** The protocol in whole machines, under schedules of fibers, failures and time: see `MachineModel.ts`. */
import { assert, describe, it } from "@effect/vitest"
import * as fc from "fast-check"
import { type Happened, machineScript, runMachine } from "./MachineModel.ts"

/** Each is a machine from its making to its end, some milliseconds: as many as a minute of continuous integration has room for. */
const SCHEDULES = Number(process.env["TROUPE_VSOCK_MACHINES"] ?? (process.env["CI"] === undefined ? 300 : 10_000))

/** What happens in many of a hundred schedules. */
const OFTEN = [
  "guest connects",
  "host connects",
  "guest is refused",
  "connect2: CONNECTION_REFUSED",
  "guest send",
  "guest hears of the end of data",
  "write: done",
  "write: BAD_STATE",
  "write: PEER_CLOSED",
  "read: bytes",
  "read: ended",
  "read: PEER_CLOSED",
  "device breaks",
  "driver hears of a failure",
  "driver restarts"
]
/** What happens in some of a thousand. */
const SELDOM = [
  "connect2: given up",
  "driver is refused",
  "guest shutSend",
  "guest shutReceive",
  "guest close",
  "guest reset",
  "host waits no longer for a mute guest",
  "host gives a write up"
]

describe("Connections of a machine", () => {
  it(`keep what is promised in ${SCHEDULES} schedules`, { timeout: 600_000 }, () => {
    const happened: Happened = new Map()
    fc.assert(
      fc.property(machineScript, fc.integer(), (script, seed) => runMachine(script, seed, happened)),
      { numRuns: SCHEDULES }
    )
    const expected = SCHEDULES < 300 ? [] : SCHEDULES < 5000 ? OFTEN : [...OFTEN, ...SELDOM]
    assert.deepStrictEqual(expected.filter((what) => !happened.has(what)), [])
  })
})
