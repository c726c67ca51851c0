// `npm run check`: everything that must hold of the sources without running them. All checks run, then the verdict.
import { runTool, toolPath } from "./tools.ts"

interface Check {
  readonly name: string
  readonly tool: string
  readonly args: ReadonlyArray<string>
}

const CHECKS: ReadonlyArray<Check> = [
  { name: "types", tool: "tsc", args: ["-b"] },
  { name: "lint and directions of imports", tool: "oxlint", args: ["--type-aware"] },
  { name: "format", tool: "dprint", args: ["check"] },
  {
    name: "determinism guard",
    tool: "effect-tsgo",
    args: ["diagnostics", "--project", "tsconfig.effect.json", "--format", "text", "--strict"]
  }
]

const failed: Array<string> = []
for (const { name, tool, args } of CHECKS) {
  const begun = performance.now()
  process.stdout.write(`- ${name}\n`)
  const code = await runTool(toolPath(tool), args)
  const seconds = ((performance.now() - begun) / 1000).toFixed(1)
  process.stdout.write(`  ${code === 0 ? "ok" : `FAILED (exit code ${code})`}, ${seconds} s\n`)
  if (code !== 0) failed.push(name)
  if (code > 128) break
}
process.stdout.write(failed.length === 0 ? "All checks passed.\n" : `Failed: ${failed.join(", ")}.\n`)
process.exitCode = failed.length === 0 ? 0 : 1
