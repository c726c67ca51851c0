// Run in a new process: how much is allocated for each frame that the network device takes from a TAP interface or gives to it, as
// allocation-chains.ts measures it for chains.
import { getHeapStatistics } from "node:v8"
import { makeNetWorkload } from "./NetWorkload.ts"

const SMALL_ROUNDS = 50
const LARGE_ROUNDS = 2000
const WARM_UP = 5
const BATCHES = 20
/** Less than this for each frame is what the measurement itself costs: the smallest object has 16 bytes. */
const LIMIT_BYTES = 1

let failed = false
for (const direction of ["receive", "send"] as const) {
  const { fill, frames, serve } = makeNetWorkload(direction)
  const allocated = (rounds: number): number => {
    const before = getHeapStatistics().total_allocated_bytes
    for (let round = 0; round < rounds; round++) {
      fill()
      serve()
    }
    return getHeapStatistics().total_allocated_bytes - before
  }
  for (let batch = 0; batch < WARM_UP; batch++) allocated(LARGE_ROUNDS)
  let small = Number.POSITIVE_INFINITY
  let large = Number.POSITIVE_INFINITY
  for (let batch = 0; batch < BATCHES; batch++) {
    small = Math.min(small, allocated(SMALL_ROUNDS))
    large = Math.min(large, allocated(LARGE_ROUNDS))
  }
  const least = (large - small) / ((LARGE_ROUNDS - SMALL_ROUNDS) * frames)
  failed ||= least >= LIMIT_BYTES
  process.stdout.write(
    `frames, ${direction}: ${least.toFixed(3)} bytes for each: ${least < LIMIT_BYTES ? "ok" : "allocates"}\n`
  )
}
process.exitCode = failed ? 1 : 0
