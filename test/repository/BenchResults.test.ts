/** The results file of the benches: one row measured anew leaves the others alone. */
import { assert, describe, it } from "@effect/vitest"
import * as fc from "fast-check"
import { spawnSync } from "node:child_process"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { mergeResults, readResults, root, type Row, table } from "../../bench/Row.ts"
import { median, quantile, slope } from "../../bench/Statistics.ts"

const ORDER = ["a", "b", "c", "d"]

const row = (name: string, value: number): Row => ({
  name,
  value,
  unit: "us",
  anchor: "a loop",
  anchorValue: 2,
  ratio: value / 2,
  goal: null,
  met: null
})

const withFolder = async <A>(use: (file: string) => Promise<A>): Promise<A> => {
  const folder = mkdtempSync(join(tmpdir(), "bench-results-"))
  try {
    return await use(join(folder, "results.json"))
  } finally {
    rmSync(folder, { recursive: true })
  }
}

describe("bench results", () => {
  it("hold the last measurement of each row, in the table's order", async () => {
    const measurements = fc.array(fc.record({ name: fc.constantFrom(...ORDER), value: fc.integer() }), {
      maxLength: 12
    })
    await fc.assert(
      fc.asyncProperty(measurements, (measured) =>
        withFolder(async (file) => {
          const last = new Map<string, number>()
          for (const { name, value } of measured) {
            last.set(name, value)
            await mergeResults([row(name, value)], ORDER, file)
          }
          const kept = await readResults(file)
          assert.deepStrictEqual(
            kept.map(({ name, value }) => [name, value]),
            Array.from(last).toSorted((a, b) => ORDER.indexOf(a[0]) - ORDER.indexOf(b[0]))
          )
        })),
      { numRuns: 30 }
    )
  })

  it("are refused by name when the file is something else", () =>
    withFolder(async (file) => {
      writeFileSync(file, "{ half a fi")
      const message = await readResults(file).then(() => "read", (cause: unknown) => String(cause))
      assert.include(message, file)
    }))

  it("are a table with a line for each row", () => {
    const lines = table([row("a", 1), row("b", 12_345)]).split("\n")
    assert.strictEqual(lines.length, 4)
    assert.strictEqual(new Set(lines.map((line) => line.length)).size, 1)
  })
})

describe("bench statistics", () => {
  it("find the middle whatever the order, between the quartiles", () => {
    fc.assert(fc.property(fc.array(fc.double({ min: -1e6, max: 1e6, noNaN: true }), { minLength: 1 }), (values) => {
      assert.strictEqual(median(values), median(values.toReversed()))
      assert.isAtMost(quantile(values, 0.25), median(values))
      assert.isAtMost(median(values), quantile(values, 0.75))
    }))
    assert.strictEqual(median([3, 1, 2]), 2)
    assert.strictEqual(median([4, 1, 2, 3]), 2.5)
  })

  it("find the slope of a line", () => {
    assert.closeTo(slope([[1, 5], [10, 14], [50, 54]]), 1, 1e-9)
  })
})

describe("npm run bench", () => {
  it("names the rows when it does not know one", () => {
    const { status, stderr } = spawnSync(process.execPath, [join(root, "bench", "main.ts"), "no-such-row"], {
      encoding: "utf8"
    })
    assert.strictEqual(status, 2)
    assert.include(stderr, "no-such-row")
    assert.include(stderr, "posted-write, shadowed-read, call, register-read")
  })
})
