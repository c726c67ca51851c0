/** The worker thread of the contract: does one task with its own foreign functions and reports a number. */
import { parentPort, workerData } from "node:worker_threads"
import { type ForeignFunctionsName, POLL_READABLE } from "../../src/internal/ForeignFunctions.ts"
import { loadForeignFunctions } from "../../src/internal/loadForeignFunctions.ts"
import { ForeignView } from "../../src/internal/Mapping.ts"

/** What the worker is to do. */
export interface WorkerRequest {
  readonly backEnd: ForeignFunctionsName
  readonly task:
    | { readonly kind: "add"; readonly address: bigint; readonly length: number; readonly rounds: number }
    | { readonly kind: "poll" }
    | { readonly kind: "block" }
}

const { backEnd, task }: WorkerRequest = workerData
const functions = loadForeignFunctions(backEnd, { quiet: true })
if (typeof functions === "string") throw new Error(functions)

const run = (): number => {
  const fd = functions.eventfd(0, 0)
  switch (task.kind) {
    case "add": {
      const view = new ForeignView(functions, task.address, task.length)
      const words = new Int32Array(view.buffer)
      for (let i = 0; i < task.rounds; i++) Atomics.add(words, 0, 1)
      return view.release() && words.length === 0 ? 0 : 1
    }
    case "poll": {
      const handle = functions.poll(fd, POLL_READABLE, () => {})
      return typeof handle === "number" ? handle : 0
    }
    case "block":
      return functions.eventfdRead(fd)
  }
}

parentPort?.postMessage({ ready: functions.gettid() })
parentPort?.postMessage({ result: run() })
