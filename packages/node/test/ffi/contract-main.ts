/** The contract as a script: `node contract-main.ts BACK_END` prints one line of JSON per check. */
import process from "node:process"
import { contract, load } from "./contract.ts"

const name = process.argv[2]
if (name !== "node:ffi" && name !== "koffi") throw new Error(`no such back end: ${name}`)
const functions = load(name)
for (const check of contract) {
  let error: string | null = null
  try {
    await check.run(functions)
  } catch (cause) {
    error = cause instanceof Error ? cause.stack ?? cause.message : String(cause)
  }
  process.stdout.write(`${JSON.stringify({ check: check.name, error })}\n`)
}
