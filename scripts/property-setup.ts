// Runs before each file of tests: properties take the run's seed, unless one brings its own.
import * as fc from "fast-check"
import { takePropertySeed } from "./property-seed.ts"

fc.configureGlobal({ ...fc.readConfigureGlobal(), seed: takePropertySeed(process.env) })
