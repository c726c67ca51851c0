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
 * Counts tests, and everything else that must not get lost: an error outside a test is a failure, so is a test that never
 * ended since its process did, and a tier that was left out counts as one skipped test, or as a failure where the
 * environment requires it.
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
      else if (state === "skipped") skipped++
      else failed++
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

/** What is quoted of an error: its name and message, and those of what caused it. */
export interface QuotedError {
  readonly name?: string
  readonly message: string
  readonly cause?: QuotedError
}

/** A failure: the file and name of the test, or what failed outside any test, and why. */
export interface Failure {
  readonly where: string
  readonly errors: ReadonlyArray<QuotedError>
}

/**
 * The cause is what names the file and the signal where the process of a test file has ended. Vitest's own reporter writes
 * `Caused by: ` into its name.
 */
const quoted = ({ cause, message, name }: SerializedError): QuotedError => ({
  ...(name === undefined ? {} : { name: name.replace(/^Caused by: /, "") }),
  message,
  ...(cause === undefined ? {} : { cause: quoted(cause) })
})

const outsideAnyTest = (where: string, errors: ReadonlyArray<SerializedError>): ReadonlyArray<Failure> =>
  errors.length === 0 ? [] : [{ where: `${where} (outside any test)`, errors: errors.map(quoted) }]

const failuresOf = (module: TestModule): ReadonlyArray<Failure> => {
  const file = module.relativeModuleId
  const failures: Array<Failure> = [...outsideAnyTest(file, module.errors())]
  for (const suite of module.children.allSuites()) {
    failures.push(...outsideAnyTest(`${file} > ${suite.fullName}`, suite.errors()))
  }
  for (const test of module.children.allTests()) {
    const { errors, state } = test.result()
    const where = `${file} > ${test.fullName}`
    if (state === "failed") failures.push({ where, errors: errors.map(quoted) })
    else if (state === "pending") failures.push({ where, errors: [{ message: "The test never ended." }] })
  }
  return failures
}

/** The most lines, and characters of a line, that the summary quotes of an error: the log above has the whole. */
const QUOTED_LINES = 8
const QUOTED_COLUMNS = 160

const describeError = ({ cause, message, name }: QuotedError): ReadonlyArray<string> => {
  const lines = stripVTControlCharacters(`${name ?? "Error"}: ${message}`).split("\n").filter((line) =>
    line.trim() !== ""
  )
  const left = lines.length - QUOTED_LINES
  return [
    ...(left > 0 ? [...lines.slice(0, QUOTED_LINES), `(${left} more lines)`] : lines),
    ...(cause === undefined ? [] : ["Caused by:", ...describeError(cause)])
  ]
}

/** The failures in short, each under a line `Failed: ...`. */
export const describeFailures = (failures: ReadonlyArray<Failure>): string =>
  failures.map(({ errors, where }) => {
    const lines = errors.flatMap(describeError)
    return [`Failed: ${where}`, ...lines.map((line) => `    ${line.slice(0, QUOTED_COLUMNS)}`), ""].join("\n")
  }).join("")

/** Prints the failures in short, the seed of the properties, and the closing line `N passed, N failed, N skipped`. */
export default class SummaryReporter implements Reporter {
  onTestRunEnd(modules: ReadonlyArray<TestModule>, unhandledErrors: ReadonlyArray<SerializedError>) {
    const tiers = tiersFromEnvironment()
    const failures = [
      ...modules.flatMap(failuresOf),
      ...unhandledErrors.map((error) => ({ where: "outside any file", errors: [quoted(error)] }))
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
