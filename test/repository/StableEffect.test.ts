// core, devices and vsock use only what Effect itself calls stable: its declarations carry a `@stability` tag.
import { assert, describe, it } from "@effect/vitest"
import { existsSync, globSync, readFileSync } from "node:fs"
import { join } from "node:path"
import { root } from "./support.ts"

const IMPORT = /^import (?:type )?\* as (\w+) from "effect\/([\w/]+)"$/gm
const ANY_IMPORT = /from "(effect(?:\/[\w/]+)?)"/g
const DECLARATION =
  /\/\*\*((?:(?!\*\/)[\s\S])*)\*\/\s*(?:export (?:declare )?(?:abstract )?(?:const|function|class|interface|type|namespace|let) (\w+)|(\w+) as (\w+))/g

/** The stability of each name that a module of Effect exports; several where it is declared several times. */
const stabilities = (module: string): ReadonlyMap<string, ReadonlySet<string>> => {
  const file = join(root, "node_modules/effect/dist", `${module}.d.ts`)
  const found = new Map<string, Set<string>>()
  if (!existsSync(file)) return found
  for (const [, comment, declared, , alias] of readFileSync(file, "utf8").matchAll(DECLARATION)) {
    const name = declared ?? alias
    const stability = /@stability (\w+)/.exec(comment ?? "")?.[1]
    if (name === undefined || stability === undefined) continue
    const all = found.get(name) ?? new Set()
    found.set(name, all.add(stability))
  }
  return found
}

const cache = new Map<string, ReturnType<typeof stabilities>>()
const stabilitiesOf = (module: string) => {
  const known = cache.get(module) ?? stabilities(module)
  cache.set(module, known)
  return known
}

/** What a source uses of Effect that is not stable, `module.name`; names whose stability is not known count as well. */
const unstableUses = (source: string): ReadonlyArray<string> => {
  const code = source.replaceAll(/\/\*[\s\S]*?\*\/|\/\/.*$/gm, "")
  const uses: Array<string> = []
  const namespaces = new Set<string>()
  for (const [, alias, module] of code.matchAll(IMPORT)) {
    namespaces.add(`effect/${module}`)
    for (const [, name] of code.matchAll(new RegExp(`(?<![\\w.])${alias}\\.(\\w+)`, "g"))) {
      if (name !== undefined && stabilitiesOf(module ?? "").get(name)?.has("stable") !== true) {
        uses.push(`${module}.${name}`)
      }
    }
  }
  for (const [, module] of code.matchAll(ANY_IMPORT)) {
    if (module !== undefined && !namespaces.has(module)) uses.push(`${module}, not imported as a namespace`)
  }
  return [...new Set(uses)]
}

describe("Stable parts of Effect", () => {
  it("finds what is not stable", () => {
    assert.deepStrictEqual(
      unstableUses("import * as Stream from \"effect/Stream\"\nexport const s = Stream.never\n"),
      []
    )
    assert.deepStrictEqual(
      unstableUses("import * as Command from \"effect/cli/Command\"\nexport const c = Command.make(\"c\")\n"),
      ["cli/Command.make"]
    )
    assert.deepStrictEqual(
      unstableUses("import { Effect } from \"effect\"\nexport const e = Effect.void\n"),
      ["effect, not imported as a namespace"]
    )
  })

  const sources = ["core", "devices", "vsock"].flatMap((name) =>
    globSync(`packages/${name}/src/**/*.ts`, { cwd: root })
  )

  it("core, devices and vsock use nothing else", () => {
    const uses = sources.flatMap((path) =>
      unstableUses(readFileSync(join(root, path), "utf8")).map((use) => `${path}: ${use}`)
    )
    assert.deepStrictEqual(uses, [])
  })
})
