// The direction of imports between packages is kept by the linter: these sources break it, and must not pass.
import { assert, describe, it } from "@effect/vitest"
import { readdirSync, readFileSync } from "node:fs"
import { join } from "node:path"
import { root, runTool, Scratch } from "./support.ts"

/** What each package may import of ours. */
const ALLOWED: Readonly<Record<string, ReadonlyArray<string>>> = {
  core: [],
  devices: ["core"],
  vsock: ["core", "devices"],
  node: ["core", "devices", "vsock"]
}
const NAMES = Object.keys(ALLOWED)

const lint = async (sources: Readonly<Record<string, string>>) => {
  using scratch = new Scratch([".oxlintrc.json"], sources)
  return await runTool(scratch.folder, "oxlint", ["--format=unix"])
}

/** The files in which the linter finds a forbidden import. */
const lintFiles = async (sources: Readonly<Record<string, string>>) => {
  const { output } = await lint(sources)
  return new Set(
    output.split("\n").filter((line) => line.includes("no-restricted-imports")).map((line) => line.split(":", 1)[0])
  )
}

const importOf = (specifier: string): string => `import * as Thing from "${specifier}"\nexport const thing = Thing\n`

describe("Directions of imports", () => {
  it("a package imports only what the directions allow", async () => {
    const sources: Record<string, string> = {}
    const forbidden = new Set<string>()
    for (const from of NAMES) {
      for (const to of NAMES) {
        for (const [index, specifier] of [`@troupe/${to}`, `@troupe/${to}/Thing`].entries()) {
          const path = `packages/${from}/src/from-${from}-to-${to}-${index}.ts`
          sources[path] = importOf(specifier)
          if (!ALLOWED[from]!.includes(to)) forbidden.add(path)
        }
      }
    }
    assert.deepStrictEqual(await lintFiles(sources), forbidden)
  })

  it("nobody reaches into another package", async () => {
    const bad = [
      "@troupe/core/internal/Secret",
      "@troupe/core/src/Bus.ts",
      "@troupe/core/dist/Bus.js",
      "../../core/src/Bus.ts",
      "../../../core/src/internal/Secret.ts"
    ]
    const sources: Record<string, string> = {}
    for (const [index, specifier] of bad.entries()) {
      sources[`packages/devices/src/Bad${index}.ts`] = importOf(specifier)
      sources[`packages/node/src/Bad${index}.ts`] = importOf(specifier)
      sources[`packages/devices/test/Bad${index}.test.ts`] = importOf(specifier)
    }
    sources["test/fake/Bad.test.ts"] = importOf("../../packages/core/src/Bus.ts")
    sources["scripts/Bad.ts"] = importOf("../packages/core/src/Bus.ts")
    assert.deepStrictEqual(await lintFiles(sources), new Set(Object.keys(sources)))
  })

  it("core, devices and vsock know nothing of Node, and library code nothing of the fake", async () => {
    const sources: Record<string, string> = {}
    for (const name of ["core", "devices", "vsock"]) {
      sources[`packages/${name}/src/Prefixed.ts`] = importOf("node:fs")
      sources[`packages/${name}/src/Bare.ts`] = importOf("fs")
      sources[`packages/${name}/src/Platform.ts`] = importOf("@effect/platform-node")
    }
    for (const name of ["devices", "vsock", "node"]) {
      sources[`packages/${name}/src/Fake.ts`] = importOf("@troupe/core/testing")
    }
    assert.deepStrictEqual(await lintFiles(sources), new Set(Object.keys(sources)))
  })

  it("no modules import each other in a circle", async () => {
    const { code, output } = await lint({
      "packages/core/src/A.ts": importOf("./B.ts"),
      "packages/core/src/B.ts": importOf("./C.ts"),
      "packages/core/src/C.ts": importOf("./A.ts")
    })
    assert.notStrictEqual(code, 0)
    assert.match(output, /no-cycle/)
  })

  it("what follows the directions passes", async () => {
    const verdict = await lint({
      "packages/core/src/Fine.ts": importOf("./Other.ts"),
      "packages/core/src/Other.ts": importOf("effect/Effect"),
      "packages/devices/src/Fine.ts": importOf("@troupe/core/Bus"),
      "packages/vsock/src/Fine.ts": importOf("@troupe/devices/Serial"),
      "packages/node/src/Fine.ts": importOf("@troupe/vsock"),
      "packages/node/test/Fine.test.ts": importOf("../src/Fine.ts"),
      "test/fake/Fine.test.ts": importOf("@troupe/core/testing")
    })
    assert.strictEqual(verdict.code, 0, verdict.output)
  })

  it("manifests declare no dependency against the directions", () => {
    assert.deepStrictEqual(readdirSync(join(root, "packages")).toSorted(), NAMES.toSorted())
    for (const [name, allowed] of Object.entries(ALLOWED)) {
      const manifest = JSON.parse(readFileSync(join(root, "packages", name, "package.json"), "utf8"))
      const declared = Object.keys({
        ...manifest.dependencies,
        ...manifest.peerDependencies,
        ...manifest.devDependencies
      })
      const ours = declared.filter((dependency) => dependency.startsWith("@troupe/")).map((it) => it.slice(8))
      assert.deepStrictEqual(ours.filter((dependency) => !allowed.includes(dependency)), [], name)
    }
  })
})
