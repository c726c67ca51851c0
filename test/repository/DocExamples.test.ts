// The examples in README and docs are programs: all are type-checked, and those marked `run` are run as well.
//
// Fences: ```ts is type-checked, ```ts run is also run and must succeed; what it prints must be what its `// =>` comments
// say, in order. ```ts kvm is run where /dev/kvm opens. ```ts sketch is neither: it is for pieces that stand for something.
// Examples in the comments of library code are type-checked when they are whole, which they are when they begin with an import.
import { assert, beforeAll, describe, it } from "@effect/vitest"
import { execFile } from "node:child_process"
import { globSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { join, relative } from "node:path"
import { whyNoKvm } from "../../scripts/tiers.ts"
import { root, runTool, type Verdict } from "./support.ts"

interface Example {
  /** Where it stands, for people. */
  readonly place: string
  readonly file: string
  readonly source: string
  readonly mark: string | undefined
}

const FENCE = /^```ts(?: (\w+))?\n([\s\S]*?)^```$/gm

/** Inside the clone, so that the packages are found as a user's project finds them. */
const folder = join(root, ".cache", "doc-examples")

/** The comments of a source as text, line by line, with nothing in the other lines. */
const commentsOf = (source: string): string =>
  source.split("\n").map((line) => /^\s*\* ?(.*)$/.exec(line)?.[1] ?? "").join("\n")

const examplesIn = (path: string): ReadonlyArray<Example> => {
  const isSource = path.endsWith(".ts")
  const content = readFileSync(path, "utf8")
  const text = isSource ? commentsOf(content) : content
  const name = relative(root, path)
  return Array.from(text.matchAll(FENCE)).flatMap((match) => {
    const [, mark, source] = match
    if (mark === "sketch" || (isSource && source?.startsWith("import ") !== true)) return []
    const line = text.slice(0, match.index).split("\n").length
    const file = join(folder, `${name.replaceAll(/[^\w]/g, "-")}-${line}.ts`)
    return [{ place: `${name}:${line}`, file, source: source ?? "", mark }]
  })
}

const documents = [
  join(root, "README.md"),
  ...readdirSync(join(root, "docs"), { recursive: true, encoding: "utf8" })
    .filter((path) => path.endsWith(".md"))
    .toSorted()
    .map((path) => join(root, "docs", path))
]
const sources = globSync("packages/*/src/**/*.ts", { cwd: root }).toSorted().map((path) => join(root, path))
const examples = [...documents, ...sources].flatMap(examplesIn)

const runExample = (file: string): Promise<Verdict> =>
  new Promise((resolve) => {
    const args = ["--disable-warning=ExperimentalWarning", file]
    execFile(process.execPath, args, { cwd: root, timeout: 30_000 }, (error, stdout, stderr) => {
      resolve({ code: error === null ? 0 : 1, output: error === null ? stdout : `${stdout}${stderr}` })
    })
  })

describe("Examples in the documentation", () => {
  let types: Verdict = { code: 0, output: "" }

  beforeAll(async () => {
    rmSync(folder, { recursive: true, force: true })
    mkdirSync(folder, { recursive: true })
    for (const { file, source } of examples) writeFileSync(file, source)
    writeFileSync(
      join(folder, "tsconfig.json"),
      JSON.stringify({
        extends: "../../tsconfig.base.json",
        include: ["*.ts"],
        compilerOptions: {
          rootDir: "../..",
          composite: false,
          incremental: false,
          declaration: false,
          declarationMap: false,
          noEmit: true,
          rewriteRelativeImportExtensions: false,
          allowImportingTsExtensions: true,
          types: ["node"]
        }
      })
    )
    types = await runTool(folder, "tsc", ["-p", "."])
  }, 120_000)

  it("there are some", () => {
    assert.isTrue(examples.some((example) => example.mark === "run"))
  })

  it.each(examples)("$place has the right types", ({ file }) => {
    const wrong = types.output.split("\n").filter((line) => line.startsWith(relative(folder, file)))
    assert.deepStrictEqual(wrong, [])
  })

  it("nothing else is wrong with their types", () => {
    assert.strictEqual(types.code, 0, types.output)
  })

  const check = async ({ file, source }: Example) => {
    const expected = Array.from(source.matchAll(/\/\/ => (.*)$/gm), ([, text]) => text)
    const { code, output } = await runExample(file)
    assert.strictEqual(code, 0, output)
    if (expected.length > 0) assert.deepStrictEqual(output.trimEnd().split("\n"), expected)
  }

  it.each(examples.filter(({ mark }) => mark === "run"))("$place runs", check)

  it.skipIf(whyNoKvm() !== undefined).each(examples.filter(({ mark }) => mark === "kvm"))("$place runs on KVM", check)
})
