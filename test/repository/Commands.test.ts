// The commands of the clone: what the closing line counts, which tiers run, and what the bootstrap says when it cannot go on.
import { assert, describe, it } from "@effect/vitest"
import * as fc from "fast-check"
import { spawnSync } from "node:child_process"
import { existsSync, mkdirSync, readdirSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import { explain } from "../../scripts/demo/Narration.ts"
import { PROPERTY_SEED_VARIABLE, takePropertySeed } from "../../scripts/property-seed.ts"
import { count, describeFailures } from "../../scripts/summary-reporter.ts"
import { requiredTiers, whyNoKvm } from "../../scripts/tiers.ts"
import { Scratch } from "./support.ts"

const moduleOf = fc.record({
  tests: fc.array(fc.constantFrom("passed", "failed", "skipped", "pending"), { maxLength: 20 }),
  errors: fc.nat(3)
})
const tierOf = fc.record({
  name: fc.constantFrom("packages", "kvm", "lab"),
  reason: fc.string(),
  required: fc.boolean()
})

describe("The closing line", () => {
  it("counts every test, every error outside a test and every tier that does not run, each once", () => {
    fc.assert(fc.property(fc.array(moduleOf), fc.nat(3), fc.array(tierOf), (modules, unhandled, tiers) => {
      const counts = count(modules, unhandled, tiers)
      const things = modules.reduce(
        (sum, module) => sum + module.tests.length + module.errors,
        unhandled + tiers.length
      )
      assert.strictEqual(counts.passed + counts.failed + counts.skipped, things)
      const good = modules.flatMap((module) => module.tests).filter((state) => state === "passed").length
      assert.strictEqual(counts.passed, good)
      const bad = modules.some((module) =>
        module.errors > 0 || module.tests.some((test) =>
          test === "failed" || test === "pending"
        )
      ) || unhandled > 0 ||
        tiers.some((tier) => tier.required)
      assert.strictEqual(counts.failed > 0, bad)
    }))
  })
})

describe("The failures before it", () => {
  it("are named, each with the beginning of its reason, on lines of a bounded length", () => {
    const text = describeFailures([
      {
        where: "a.test.ts > A > holds",
        errors: [{ name: "AssertionError", message: "\x1b[31mexpected 1\x1b[39m\n\nto equal 2" }]
      },
      {
        where: "b.test.ts (outside any test)",
        errors: [{ message: Array.from({ length: 20 }, (_, i) => `line ${i}`).join("\n") }]
      },
      { where: "c.test.ts > C", errors: [{ message: "x".repeat(5000) }] },
      {
        where: "outside any file",
        errors: [{ message: "Worker emitted error", cause: { name: "ExitError", message: "ended with SIGSEGV" } }]
      }
    ])
    const lines = text.split("\n")
    assert.deepStrictEqual(lines.slice(0, 4), [
      "Failed: a.test.ts > A > holds",
      "    AssertionError: expected 1",
      "    to equal 2",
      "Failed: b.test.ts (outside any test)"
    ])
    assert.include(text, "    line 7\n    (12 more lines)\nFailed: c.test.ts > C\n")
    assert.include(text, "    Error: Worker emitted error\n    Caused by:\n    ExitError: ended with SIGSEGV\n")
    assert.isTrue(lines.every((line) => line.length <= 200))
  })
})

describe("The seed of the properties", () => {
  it("is the one that the environment names, or one that is drawn once and left there for the workers", () => {
    fc.assert(fc.property(fc.integer(), (seed) => {
      assert.strictEqual(takePropertySeed({ [PROPERTY_SEED_VARIABLE]: String(seed) }), seed)
    }))
    const environment: NodeJS.ProcessEnv = {}
    const drawn = takePropertySeed(environment)
    assert.strictEqual(takePropertySeed(environment), drawn)
    for (const wrong of ["x", "1.5", "4294967296"]) {
      assert.throws(() => takePropertySeed({ [PROPERTY_SEED_VARIABLE]: wrong }), `not "${wrong}"`)
    }
  })

  it("is what the properties of this run take", () => {
    assert.strictEqual(fc.readConfigureGlobal().seed, takePropertySeed(process.env))
  })
})

describe("Tiers", () => {
  it("takes no unknown name for a tier that is required", () => {
    assert.deepStrictEqual([...requiredTiers("kvm, lab")], ["kvm", "lab"])
    assert.strictEqual(requiredTiers(undefined).size, 0)
    assert.throws(() => requiredTiers("kvn"), /"kvn"/)
  })

  it.skipIf(process.arch !== "x64")("says why KVM cannot be used", () => {
    assert.match(whyNoKvm("/dev/there-is-no-such-device") ?? "", /there is no \/dev\/there-is-no-such-device/)
    assert.isUndefined(whyNoKvm("/dev/null"))
  })
})

describe("The demo", () => {
  it("tells what the guest's lines mean, and says nothing of other lines", () => {
    assert.match(explain("troupe-guest: smp 2 of 2 up") ?? "", /2 of 2 processors/)
    assert.isUndefined(explain("troupe-guest: smp counter 2000 ok"))
    assert.isUndefined(explain("[    0.000000] Linux version"))
  })
})

describe("The bootstrap", () => {
  const files = ["package.json", "pnpm-lock.yaml", "pnpm-workspace.yaml", "scripts/bootstrap.mjs"]
  /** Runs it in a folder that is like a fresh clone. */
  const bootstrap = (environment: Readonly<Record<string, string>>) => {
    using scratch = new Scratch(files, { "packages/core/package.json": "{}" })
    const home = join(scratch.folder, "home")
    mkdirSync(home)
    const result = spawnSync(process.execPath, [join(scratch.folder, "scripts/bootstrap.mjs")], {
      encoding: "utf8",
      timeout: 60_000,
      env: { PATH: process.env["PATH"] ?? "", HOME: home, ...environment }
    })
    return { ...result, home: readdirSync(home), lock: existsSync(join(scratch.folder, ".cache/bootstrap.lock")) }
  }

  it("says that the first run needs the registry, and writes nothing into the home", () => {
    const result = bootstrap({ npm_config_registry: "http://127.0.0.1:9/", npm_config_fetch_retry_mintimeout: "1" })
    assert.strictEqual(result.status, 1, result.stderr)
    assert.match(result.stderr, /The npm registry cannot be reached, and the first run needs it/)
    assert.deepStrictEqual(result.home, [])
    assert.isFalse(result.lock)
  })

  it("says that there is no npm", () => {
    const result = bootstrap({ PATH: "/nonexistent" })
    assert.strictEqual(result.status, 1)
    assert.match(result.stderr, /There is no npm here/)
  })

  it("says that npm is too old", () => {
    using scratch = new Scratch([], {})
    const npm = join(scratch.folder, "npm")
    writeFileSync(npm, "#!/bin/sh\necho 6.14.18\n", { mode: 0o755 })
    const result = bootstrap({ PATH: `${scratch.folder}:/usr/bin:/bin` })
    assert.strictEqual(result.status, 1)
    assert.match(result.stderr, /npm 6\.14\.18 is too old/)
  })
})
