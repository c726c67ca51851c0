// The seed of all properties of a test run: one number, from the environment or drawn, that the end of the run names.
import { randomInt } from "node:crypto"

/** The variable that holds the seed, an integer of 32 bits. A run without it draws one. */
export const PROPERTY_SEED_VARIABLE = "TROUPE_PROPERTY_SEED"

/** The seed that `environment` names, or one that is drawn and put there, for the workers of the run. */
export const takePropertySeed = (environment: NodeJS.ProcessEnv): number => {
  const text = environment[PROPERTY_SEED_VARIABLE]
  if (text === undefined || text === "") {
    const drawn = randomInt(-0x8000_0000, 0x8000_0000)
    environment[PROPERTY_SEED_VARIABLE] = String(drawn)
    return drawn
  }
  const seed = Number(text)
  if (!Number.isInteger(seed) || (seed | 0) !== seed) {
    throw new Error(`${PROPERTY_SEED_VARIABLE} is an integer from -2147483648 to 2147483647, not "${text}"`)
  }
  return seed
}
