// Run in a new process: creates one guest and prints, as a line of JSON, how long it took to its first instruction.
import * as Effect from "effect/Effect"
import { layer, toFirstInstruction } from "./MarkedLifecycle.ts"

const first = await Effect.runPromise(toFirstInstruction.pipe(Effect.provide(layer)))
// The stop comes after the first instruction and is no part of the way there.
const fromProcessStart = performance.now() - first.stop
process.stdout.write(`${JSON.stringify({ ...first, fromProcessStart })}\n`)
