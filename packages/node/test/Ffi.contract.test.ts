/** The contract of the FFI back ends: both in this Node, and koffi in the Nodes that need it. */
import { assert, beforeAll, describe, it } from "@effect/vitest"
import { type Check, contract, load } from "./ffi/contract.ts"
import { older, run } from "./ffi/runtimes.ts"

for (const name of ["node:ffi", "koffi"] as const) {
  describe(`${name} keeps the contract`, () => {
    const functions = load(name)
    for (const check of contract) it(check.name, () => check.run(functions))
  })
}

for (const runtime of older) {
  const { name, obstacle } = runtime
  const title = `koffi keeps the contract under ${name}`
  describe.skipIf(obstacle !== undefined)(obstacle === undefined ? title : `${title} (skipped: ${obstacle})`, () => {
    const errors = new Map<Check["name"], string | null>()
    let stderr = ""
    beforeAll(async () => {
      const outcome = await run(runtime, ["contract-main.ts", "koffi"])
      stderr = outcome.stderr
      for (const line of outcome.stdout.split("\n").filter((line) => line !== "")) {
        const { check, error }: { readonly check: string; readonly error: string | null } = JSON.parse(line)
        errors.set(check, error)
      }
    }, 120_000)
    for (const check of contract) {
      it(check.name, () => {
        assert.isTrue(errors.has(check.name), `the script ended before this check:\n${stderr}`)
        assert.isNull(errors.get(check.name))
      })
    }
  })
}
