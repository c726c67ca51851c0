// The determinism guard: clocks, randomness, timers and Node's modules are refused in core, devices and vsock.
import { assert, describe, it } from "@effect/vitest"
import { runTool, Scratch } from "./support.ts"

const CONFIGURATION = ["tsconfig.base.json", "tsconfig.effect.json"]

/** One forbidden thing a file, and the rule that finds it. */
const FORBIDDEN: Readonly<Record<string, readonly [rule: string, source: string]>> = {
  Now: ["globalDate", "export const now = () => Date.now()"],
  NewDate: ["globalDate", "export const date = () => new Date()"],
  Random: ["globalRandom", "export const random = () => Math.random()"],
  Timeout: ["globalTimers", "export const later = (f: () => void) => setTimeout(f, 1)"],
  Interval: ["globalTimers", "export const often = (f: () => void) => setInterval(f, 1)"],
  Console: ["globalConsole", "export const log = (text: string) => console.log(text)"],
  Async: ["asyncFunction", "export const go = async () => 1"],
  Promises: ["newPromise", "export const wait = new Promise<void>((resolve) => resolve())"],
  Environment: ["processEnv", "export const home = process.env[\"HOME\"]"],
  Builtin: ["nodeBuiltinImport", "import * as fs from \"node:fs\"\nexport const read = fs.readFileSync"],
  RandomInEffect: [
    "globalRandomInEffect",
    "import * as Effect from \"effect/Effect\"\nexport const f = Effect.gen(function*() {\n  yield* Effect.void\n  return Math.random()\n})"
  ],
  NowInEffect: [
    "globalDateInEffect",
    "import * as Effect from \"effect/Effect\"\nexport const f = Effect.gen(function*() {\n  yield* Effect.void\n  return Date.now()\n})"
  ],
  Floating: [
    "floatingEffect",
    "import * as Effect from \"effect/Effect\"\nexport const f = () => {\n  Effect.log(\"lost\")\n}"
  ]
}

/** The rules that found something, `file rule`. */
const guard = async (sources: Readonly<Record<string, string>>) => {
  using scratch = new Scratch(CONFIGURATION, sources, { withModules: true })
  const verdict = await runTool(scratch.folder, "effect-tsgo", [
    "diagnostics",
    "--project",
    "tsconfig.effect.json",
    "--format",
    "text",
    "--strict"
  ])
  const found = verdict.output.matchAll(/packages\/(\w+)\/src\/(\w+)\.ts\(\d+,\d+\): error effect\((\w+)\)/g)
  return { ...verdict, found: new Set(Array.from(found, ([, name, file, rule]) => `${name}/${file} ${rule}`)) }
}

describe("Determinism guard", () => {
  it("finds every forbidden thing in core, devices and vsock", async () => {
    const sources: Record<string, string> = {}
    const expected = new Set<string>()
    for (const name of ["core", "devices", "vsock"]) {
      for (const [file, [rule, source]] of Object.entries(FORBIDDEN)) {
        sources[`packages/${name}/src/${file}.ts`] = `${source}\n`
        expected.add(`${name}/${file} ${rule}`)
      }
    }
    const { code, found } = await guard(sources)
    assert.notStrictEqual(code, 0)
    assert.deepStrictEqual(new Set([...expected].filter((finding) => !found.has(finding))), new Set())
  })

  it("lets the node package use Node, and still not clocks or randomness", async () => {
    const sources = Object.fromEntries(
      Object.entries(FORBIDDEN).map(([file, [, source]]) => [`packages/node/src/${file}.ts`, `${source}\n`])
    )
    const { found } = await guard(sources)
    assert.isTrue(found.has("node/Now globalDate"))
    assert.isTrue(found.has("node/Random globalRandom"))
    assert.isTrue(found.has("node/Floating floatingEffect"))
    for (const allowed of ["Builtin", "Timeout", "Interval", "Async", "Promises", "Environment"]) {
      assert.deepStrictEqual([...found].filter((finding) => finding.startsWith(`node/${allowed} `)), [])
    }
  })

  it("passes what is deterministic", async () => {
    const { code, output } = await guard({
      "packages/core/src/Fine.ts":
        "import * as Effect from \"effect/Effect\"\nexport const nap = Effect.sleep(\"1 second\")\n"
    })
    assert.strictEqual(code, 0, output)
  })
})
