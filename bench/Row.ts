// What a measurement is, how the results file is kept, and the table for people.
import { existsSync } from "node:fs"
import { mkdir, readFile, rename, writeFile } from "node:fs/promises"
import { dirname, join } from "node:path"
import { fileURLToPath } from "node:url"

/** The root of the clone. */
export const root = fileURLToPath(new URL("..", import.meta.url)).replace(/\/$/, "")

/** Where the results are kept. */
export const RESULTS_FILE = join(root, "bench", "results.json")

/** One measurement beside what it is compared with; both are medians of repeated runs that took turns. */
export interface Row {
  readonly name: string
  readonly value: number
  readonly unit: string
  /** What it is compared with. */
  readonly anchor: string
  readonly anchorValue: number
  /** `value` divided by `anchorValue`. */
  readonly ratio: number
  /** What is aimed at, in words; `null` where nothing is. */
  readonly goal: string | null
  /** Whether that was reached; `null` where nothing is aimed at. */
  readonly met: boolean | null
  /** Where the value comes from: the spread, the parts of it, the circumstances. */
  readonly detail?: Readonly<Record<string, string | number>>
}

/** How much is measured. */
export interface Effort {
  /** A look that takes seconds, for CI: the numbers are rough. */
  readonly quick: boolean
}

/** A measurement could not be made. */
export class BenchError extends Error {
  override readonly name = "BenchError"
}

/** What a measurement is compared with is not here. */
export class BenchSkipped extends Error {
  override readonly name = "BenchSkipped"
}

/** The least digits that say what there is to say. */
export const format = (value: number): string => {
  if (!Number.isFinite(value)) return String(value)
  const size = Math.abs(value)
  if (size >= 1000) return Math.round(value).toLocaleString("en-US")
  if (size >= 100) return value.toFixed(0)
  if (size >= 10) return value.toFixed(1)
  if (size >= 1) return value.toFixed(2)
  return size === 0 ? "0" : value.toPrecision(2)
}

const HEAD = ["name", "value", "anchor", "anchor's", "ratio", "goal", "met"]

const cells = (row: Row): ReadonlyArray<string> => [
  row.name,
  `${format(row.value)} ${row.unit}`,
  row.anchor,
  `${format(row.anchorValue)} ${row.unit}`,
  format(row.ratio),
  row.goal ?? "-",
  row.met === null ? "-" : row.met ? "yes" : "no"
]

/** The rows as a table of Markdown, whose columns also line up on a terminal. */
export const table = (rows: ReadonlyArray<Row>): string => {
  const lines = [HEAD, ...rows.map(cells)]
  const widths = HEAD.map((_, column) => Math.max(...lines.map((line) => line[column]?.length ?? 0)))
  const text = (line: ReadonlyArray<string>) => `| ${line.map((cell, i) => cell.padEnd(widths[i] ?? 0)).join(" | ")} |`
  const [head = HEAD, ...body] = lines
  return [text(head), `| ${widths.map((width) => "-".repeat(width)).join(" | ")} |`, ...body.map(text)].join("\n")
}

const isRow = (value: unknown): value is Row =>
  typeof value === "object" && value !== null && "name" in value && typeof value.name === "string"

/** The rows of the results file; none when there is no such file. */
export const readResults = async (file: string = RESULTS_FILE): Promise<ReadonlyArray<Row>> => {
  if (!existsSync(file)) return []
  try {
    const parsed: unknown = JSON.parse(await readFile(file, "utf8"))
    return Array.isArray(parsed) ? parsed.filter(isRow) : []
  } catch (cause) {
    throw new BenchError(`${file} is not a results file: ${String(cause)}. Remove it to begin a new one.`)
  }
}

/** Puts new rows in the place of those of the same name and leaves the others alone. Sorted by `order`. */
export const mergeResults = async (
  rows: ReadonlyArray<Row>,
  order: ReadonlyArray<string>,
  file: string = RESULTS_FILE
): Promise<ReadonlyArray<Row>> => {
  const merged = new Map((await readResults(file)).map((row) => [row.name, row]))
  for (const row of rows) merged.set(row.name, row)
  const place = (row: Row) => (order.indexOf(row.name) + order.length + 1) % (order.length + 1)
  const all = Array.from(merged.values()).toSorted((a, b) => place(a) - place(b))
  await mkdir(dirname(file), { recursive: true })
  await writeFile(`${file}.new`, `${JSON.stringify(all, undefined, 2)}\n`)
  await rename(`${file}.new`, file)
  return all
}
