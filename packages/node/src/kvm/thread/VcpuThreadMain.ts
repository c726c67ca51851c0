/**
 * The program of a vCPU thread: a Worker that takes one job after the other and runs each to its end by synchronous calls.
 * Imports nothing of Effect.
 */
import process from "node:process"
import { parentPort, workerData } from "node:worker_threads"
import type { ForeignFunctionsName } from "../../internal/ForeignFunctions.ts"
import { loadForeignFunctions } from "../../internal/loadForeignFunctions.ts"
import { ForeignView } from "../../internal/Mapping.ts"
import {
  CONTROL_STOP,
  CONTROL_THREAD,
  STOP_CRASHED,
  THREAD_END,
  THREAD_RUNNING,
  THREAD_STOPPED
} from "./VcpuControl.ts"
import { type VcpuJob, VcpuLoop } from "./VcpuLoop.ts"

/** What a thread is started with. */
export interface VcpuThreadData {
  readonly backEnd: ForeignFunctionsName
  /** One word, 0 until the thread has loaded all that it needs. */
  readonly started: SharedArrayBuffer
}

const { backEnd, started }: VcpuThreadData = workerData
const functions = loadForeignFunctions(backEnd, { quiet: true })
if (typeof functions === "string") throw new Error(functions)
const port = parentPort
if (port === null) throw new Error(`process ${process.pid} has started a vCPU thread's program outside a Worker`)

port.on("message", (job: VcpuJob | typeof THREAD_END) => {
  if (job === THREAD_END) return port.close()
  const control = new Int32Array(job.control)
  const view = new ForeignView(functions, job.run.address, job.run.length)
  control[CONTROL_STOP] = STOP_CRASHED
  try {
    Atomics.store(control, CONTROL_THREAD, THREAD_RUNNING)
    new VcpuLoop(functions, job, view.buffer).enter()
  } finally {
    view.release()
    // From here on the thread touches nothing that belongs to the machine but this word.
    Atomics.store(control, CONTROL_THREAD, THREAD_STOPPED)
    Atomics.notify(control, CONTROL_THREAD)
  }
})
port.postMessage(functions.gettid())
const startedWord = new Int32Array(started)
Atomics.store(startedWord, 0, 1)
Atomics.notify(startedWord, 0)
