// The end of a test run: tiers that were skipped, by name and reason, and the one plain closing line that CI reads.
import type { Reporter, SerializedError, TestModule } from "vitest/node"
import { type SkippedTier, tiersFromEnvironment } from "./tiers.ts"

/** What the closing line counts. */
export interface Counts {
  readonly passed: number
  readonly failed: number
  readonly skipped: number
}

/** The part of a test module that is counted. */
export interface CountedModule {
  readonly tests: ReadonlyArray<"passed" | "failed" | "skipped" | "pending">
  /** Errors outside any test: the module could not be loaded, or a hook failed. */
  readonly errors: number
}

/**
 * Counts tests, and everything else that must not get lost: an error outside a test is a failure, and a tier that was
 * left out counts as one skipped test, or as a failure where the environment requires it.
 */
export const count = (
  modules: ReadonlyArray<CountedModule>,
  unhandledErrors: number,
  tiers: ReadonlyArray<SkippedTier>
): Counts => {
  let passed = 0
  let failed = unhandledErrors
  let skipped = 0
  for (const module of modules) {
    failed += module.errors
    for (const state of module.tests) {
      if (state === "passed") passed++
      else if (state === "failed") failed++
      else skipped++
    }
  }
  for (const tier of tiers) {
    if (tier.required) failed++
    else skipped++
  }
  return { passed, failed, skipped }
}

const errorsOutsideTests = (module: TestModule): number => {
  let errors = module.errors().length
  for (const suite of module.children.allSuites()) errors += suite.errors().length
  return errors
}

/** Prints the closing line `N passed, N failed, N skipped`. */
export default class SummaryReporter implements Reporter {
  onTestRunEnd(modules: ReadonlyArray<TestModule>, unhandledErrors: ReadonlyArray<SerializedError>) {
    const tiers = tiersFromEnvironment()
    const counts = count(
      modules.map((module) => ({
        tests: Array.from(module.children.allTests(), (test) => test.result().state),
        errors: errorsOutsideTests(module)
      })),
      unhandledErrors.length,
      tiers
    )
    for (const tier of tiers) {
      const how = tier.required ? "could not run, and is required" : "SKIPPED"
      process.stdout.write(`\nTier ${tier.name} ${how}: ${tier.reason}\n`)
    }
    process.stdout.write(`\n${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped\n`)
  }
}
