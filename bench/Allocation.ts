// `npm run bench -- --check-allocation`: once it is warm, the way of an access from the guest to its device allocates nothing, on
// the vCPU's thread and on the main thread; neither does the way of a chain through its queue, or of a frame
// through the network device.
import { spawn } from "node:child_process"
import { join } from "node:path"
import { root } from "./Row.ts"

const run = (program: string, args: ReadonlyArray<string>): Promise<number> =>
  new Promise((resolve, reject) => {
    const child = spawn(process.execPath, [
      "--expose-gc",
      "--disable-warning=ExperimentalWarning",
      join(root, "bench", program),
      ...args
    ], { stdio: "inherit" })
    child.on("error", reject)
    child.on("close", (code) => resolve(code ?? 1))
  })

/** Prints what was found; the exit code says whether nothing was allocated. */
export const checkAllocation = async (): Promise<number> => {
  const chains = await run("allocation-chains.ts", [])
  const net = await run("allocation-net.ts", [])
  const host = await run("allocation-host.ts", [])
  const thread = await run("allocation-thread.ts", [])
  return chains === 0 && net === 0 && host === 0 && thread === 0 ? 0 : 1
}
