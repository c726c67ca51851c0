// Run in a new process: how much is allocated for each chain that goes through a queue, and through a device's loop behind the
// state machine of its transport. To ask costs something itself, so what each further chain costs is the difference between
// batches of two sizes. The least of many batches counts, as the compiler allocates now and then.
import { getHeapStatistics } from "node:v8"
import { CHAIN_SHAPES, makeChainsWorkload } from "./ChainsWorkload.ts"

const SMALL_ROUNDS = 50
const LARGE_ROUNDS = 2000
const WARM_UP = 5
const BATCHES = 20
/** Less than this for each chain is what the measurement itself costs: the smallest object has 16 bytes. */
const LIMIT_BYTES = 1

let failed = false
for (
  const [name, options] of [
    ["split", { packed: false, device: false }],
    ["packed", { packed: true, device: false }],
    ["split, through a device's loop", { packed: false, device: true }],
    ["packed, through a device's loop", { packed: true, device: true }]
  ] as const
) {
  for (const shape of CHAIN_SHAPES) {
    const { chains, fill, serve } = makeChainsWorkload(shape, options)
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
    const least = (large - small) / ((LARGE_ROUNDS - SMALL_ROUNDS) * chains)
    failed ||= least >= LIMIT_BYTES
    process.stdout.write(
      `chains, ${name}, ${shape}: ${least.toFixed(3)} bytes for each: ${least < LIMIT_BYTES ? "ok" : "allocates"}\n`
    )
  }
}
process.exitCode = failed ? 1 : 0
