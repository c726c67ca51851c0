// What code that runs again and again allocates for each thing that it does, once it is warm: for the programs of
// `npm run bench -- --check-allocation`, each in a process of its own.
import { getHeapStatistics } from "node:v8"

const SMALL_ROUNDS = 50
const LARGE_ROUNDS = 2000
const WARM_UP = 5
const BATCHES = 20
/** Less than this for each thing is what the measurement itself costs: the smallest object has 16 bytes. */
const LIMIT_BYTES = 1

/** Work in rounds, each of which does something to `things` things. */
export interface SteadyWork {
  readonly things: number
  readonly round: () => void
}

/**
 * Prints how many bytes are allocated for each thing; whether that is nothing. To ask costs something itself, so what each further
 * thing costs is the difference between batches of two sizes. The least of many batches counts, as the compiler allocates now and
 * then.
 */
export const allocatesNothing = (name: string, { round, things }: SteadyWork): boolean => {
  const allocated = (rounds: number): number => {
    const before = getHeapStatistics().total_allocated_bytes
    for (let done = 0; done < rounds; done++) round()
    return getHeapStatistics().total_allocated_bytes - before
  }
  for (let batch = 0; batch < WARM_UP; batch++) allocated(LARGE_ROUNDS)
  let small = Number.POSITIVE_INFINITY
  let large = Number.POSITIVE_INFINITY
  for (let batch = 0; batch < BATCHES; batch++) {
    small = Math.min(small, allocated(SMALL_ROUNDS))
    large = Math.min(large, allocated(LARGE_ROUNDS))
  }
  const least = (large - small) / ((LARGE_ROUNDS - SMALL_ROUNDS) * things)
  const nothing = least < LIMIT_BYTES
  process.stdout.write(`${name}: ${least.toFixed(3)} bytes for each: ${nothing ? "ok" : "allocates"}\n`)
  return nothing
}
