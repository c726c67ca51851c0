// `npm test`: runs every tier of the tests that this machine can run; `npm test -- ARGUMENTS` hands arguments to Vitest.
import { SKIPPED_TIERS_VARIABLE, skippedTiers, TIERS } from "./tiers.ts"
import { runTool, toolPath } from "./tools.ts"

const args = process.argv.slice(2)
const choosesProjects = args.some((arg) => arg === "--project" || arg.startsWith("--project="))
const skipped = choosesProjects ? [] : await skippedTiers()
const projects = choosesProjects
  ? []
  : TIERS.filter((tier) => !skipped.some((skip) => skip.name === tier)).map((tier) => `--project=${tier}`)

for (const { name, reason } of skipped) process.stderr.write(`Tier ${name} is left out: ${reason}\n`)
const code = await runTool(toolPath("vitest"), ["run", ...projects, ...args], {
  [SKIPPED_TIERS_VARIABLE]: JSON.stringify(skipped)
})
process.exitCode = code === 0 && skipped.some((skip) => skip.required) ? 1 : code
