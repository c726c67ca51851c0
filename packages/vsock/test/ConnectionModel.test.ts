/** The protocol under every schedule: see `ConnectionModel.ts`. */
import { describe, it } from "@effect/vitest"
import * as fc from "fast-check"
import { ConnectionModel, script } from "./ConnectionModel.ts"

/** Schedules of a run: fewer than in continuous integration when a developer waits for them. `npm run fuzz` plays more. */
const SCHEDULES = Number(process.env["TROUPE_VSOCK_SCHEDULES"] ?? (process.env["CI"] === undefined ? 10_000 : 100_000))

describe("Connections", () => {
  it(`lose nothing, repeat nothing and keep nothing, in ${SCHEDULES} schedules`, { timeout: 600_000 }, () => {
    fc.assert(fc.property(script, (steps) => new ConnectionModel().run(steps)), { numRuns: SCHEDULES })
  })
})
