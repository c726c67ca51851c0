// The end of a test run: what failed, in short, tiers that were skipped, by name and reason, and the one plain closing line
// that CI reads.
import { stripVTControlCharacters } from "node:util"
import type { Reporter, SerializedError, TestModule } from "vitest/node"
import { PROPERTY_SEED_VARIABLE } from "./property-seed.ts"
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

/** A failure: the file and name of the test, or what failed outside any test, and why. */
export interface Failure {
  readonly where: string
  readonly errors: ReadonlyArray<Pick<SerializedError, "message" | "name">>
}

const failuresOf = (module: TestModule): ReadonlyArray<Failure> => {
  const file = module.relativeModuleId
  const failures: Array<Failure> = [{ where: `${file} (outside any test)`, errors: module.errors() }]
  for (const suite of module.children.allSuites()) {
    failures.push({ where: `${file} > ${suite.fullName} (outside any test)`, errors: suite.errors() })
  }
  for (const test of module.children.allTests("failed")) {
    failures.push({ where: `${file} > ${test.fullName}`, errors: test.result().errors ?? [] })
  }
  return failures.filter(({ errors, where }) => errors.length > 0 || !where.endsWith("(outside any test)"))
}

/** The most lines, and characters of a line, that the summary quotes of an error: the log above has the whole. */
const QUOTED_LINES = 8
const QUOTED_COLUMNS = 160

/** The failures in short, each under a line `Failed: ...`. */
export const describeFailures = (failures: ReadonlyArray<Failure>): string =>
  failures.map(({ errors, where }) => {
    const quoted = errors.flatMap(({ message, name }) => {
      const lines = stripVTControlCharacters(`${name ?? "Error"}: ${message}`).split("\n").filter((line) =>
        line.trim() !== ""
      )
      const left = lines.length - QUOTED_LINES
      return left > 0 ? [...lines.slice(0, QUOTED_LINES), `(${left} more lines)`] : lines
    })
    return [`Failed: ${where}`, ...quoted.map((line) => `    ${line.slice(0, QUOTED_COLUMNS)}`), ""].join("\n")
  }).join("")

/** Prints the failures in short, the seed of the properties, and the closing line `N passed, N failed, N skipped`. */
export default class SummaryReporter implements Reporter {
  onTestRunEnd(modules: ReadonlyArray<TestModule>, unhandledErrors: ReadonlyArray<SerializedError>) {
    const tiers = tiersFromEnvironment()
    const failures = [
      ...modules.flatMap(failuresOf),
      ...unhandledErrors.map((error) => ({ where: "outside any file", errors: [error] }))
    ]
    const seed = process.env[PROPERTY_SEED_VARIABLE] ?? ""
    process.stdout.write(`\n${describeFailures(failures)}Properties ran with ${PROPERTY_SEED_VARIABLE}=${seed}\n`)
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
