// Run in a new process: what an idle Worker of Node costs that does nothing at all, started with the options of our vCPU threads.
// Prints lines as machines-memory.ts does.
//
//   node --expose-gc bench/workers-memory.ts 1,10,20,30,40,50
import { once } from "node:events"
import { setTimeout } from "node:timers/promises"
import { Worker } from "node:worker_threads"
import { readMemory } from "./ProcessMemory.ts"

const PROGRAM = `
  const { parentPort } = require("node:worker_threads")
  parentPort.on("message", () => {})
  parentPort.postMessage(1)
`
const OPTIONS = {
  eval: true,
  execArgv: [],
  env: {},
  stdin: false,
  trackUnmanagedFds: false,
  resourceLimits: { maxYoungGenerationSizeMb: 1, stackSizeMb: 1 }
}

const collect = globalThis.gc
if (collect === undefined) throw new Error("run this with --expose-gc")
const workers: Array<Worker> = []
for (const step of (process.argv[2] ?? "1,10,20,30,40,50").split(",").map(Number)) {
  while (workers.length < step) {
    const worker = new Worker(PROGRAM, OPTIONS)
    workers.push(worker)
    await once(worker, "message")
  }
  await setTimeout(500)
  collect()
  await setTimeout(200)
  process.stdout.write(`${JSON.stringify({ machines: workers.length, ...readMemory(0) })}\n`)
}
process.exit(0)
