// Every test that the coverage table of virtio names exists, and every statement in it names one.
import { assert, describe, it } from "@effect/vitest"
import { globSync, readFileSync } from "node:fs"
import { join } from "node:path"
import { root } from "./support.ts"

const TABLE = "docs/devices/virtio-coverage.md"

/** A file as the table names it, `VirtioPci` or `kvm/Pci`: without its ending, with as much of its path as it needs. */
const filesOf = (name: string): ReadonlyArray<string> =>
  globSync([`packages/*/test/**/*.test.ts`, `test/**/*.test.ts`], { cwd: root }).filter((path) =>
    `/${path}`.endsWith(`/${name}.test.ts`)
  )

/** The words of the tests of a file, as they are written in its source. */
const testsOf = (file: string): ReadonlySet<string> =>
  new Set(
    Array.from(
      readFileSync(join(root, file), "utf8").matchAll(
        /\bit(?:\.\w+)*(?:\([^"`(]*\))?\(\s*("(?:[^"\\]|\\.)*"|`[^`]*`)/g
      ),
      ([, words = ""]) => words.slice(1, -1).replaceAll("\\\"", "\"").replaceAll("\\\\", "\\")
    )
  )

/** Each `file`: "words" in a text. */
const namedIn = (text: string) =>
  Array.from(text.matchAll(/`([\w/.-]+)`:\s+"([^"]+)"/g), ([, name = "", words = ""]) => ({ name, words }))

describe("The coverage table of virtio", () => {
  const text = readFileSync(join(root, TABLE), "utf8")

  it("names tests that exist, each in one file", () => {
    const named = namedIn(text.replaceAll(/\s+/g, " "))
    assert.isAbove(named.length, 30)
    const missing = named.flatMap(({ name, words }) => {
      const files = filesOf(name)
      if (files.length !== 1) return [`${name} is ${files.length} files`]
      return files.some((file) => testsOf(file).has(words)) ? [] : [`${name}: ${words}`]
    })
    assert.deepStrictEqual([...new Set(missing)], [])
  })

  it("names one for every statement", () => {
    const rows = text.split("\n").filter((line) => line.startsWith("|") && !/^\|[\s|-]*$/.test(line))
    const empty = rows.filter((row) => !row.includes("shown by") && namedIn(row).length === 0)
    assert.deepStrictEqual(empty, [])
  })
})
