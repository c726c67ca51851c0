// Links between the documents lead somewhere.
import { assert, describe, it } from "@effect/vitest"
import { existsSync, globSync, readFileSync } from "node:fs"
import { dirname, join } from "node:path"
import { root } from "./support.ts"

const documents = ["*.md", "docs/**/*.md", "packages/*/*.md", "test/guest/*.md"].flatMap((pattern) =>
  globSync(pattern, { cwd: root })
)

/** The headings of a document as the anchors that they become. */
const anchors = (text: string): ReadonlySet<string> =>
  new Set(
    Array.from(
      text.matchAll(/^#+ (.*)$/gm),
      ([, heading]) => (heading ?? "").toLowerCase().replaceAll(/[^\p{L}\p{N} _-]/gu, "").replaceAll(" ", "-")
    )
  )

describe("Documents", () => {
  it.each(documents)("the links of %s lead somewhere", (document) => {
    const text = readFileSync(join(root, document), "utf8")
    const broken: Array<string> = []
    for (const [, target] of text.matchAll(/\]\(([^)\s]+)\)/g)) {
      if (target === undefined || /^[a-z]+:/.test(target)) continue
      const [path, anchor] = target.split("#", 2)
      const file = path === "" ? join(root, document) : join(root, dirname(document), path ?? "")
      const found = existsSync(file) && (anchor === undefined || anchors(readFileSync(file, "utf8")).has(anchor))
      if (!found) broken.push(target)
    }
    assert.deepStrictEqual(broken, [])
  })
})
