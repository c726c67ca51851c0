/**
 * The threads that run vCPUs: a pool of Workers that is warm before it is needed and grows on demand.
 *
 * A thread costs about 6 MiB and 20 ms to start, so it goes back to the pool after use. No
 * thread keeps the process alive, and a process that exits takes its vCPUs out of the guest first.
 */
import { HypervisorError } from "@troupe/core/Hypervisor"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import process from "node:process"
import { setTimeout } from "node:timers"
import { Worker } from "node:worker_threads"
import { Ffi } from "../Ffi.ts"
import { ErrnoNumber } from "../internal/ForeignFunctions.ts"
import { kvmError } from "./KvmError.ts"
import { threadProgram } from "./thread/ThreadProgram.ts"
import {
  CONTROL_REQUEST,
  CONTROL_STOP,
  CONTROL_THREAD,
  openGate,
  REQUEST_STOP,
  STOP_CRASHED,
  THREAD_END,
  THREAD_STOPPED
} from "./thread/VcpuControl.ts"
import type { VcpuJob } from "./thread/VcpuLoop.ts"
import type { VcpuThreadData } from "./thread/VcpuThreadMain.ts"

/** A thread that somebody holds. */
export interface VcpuThread {
  /**
   * Has the thread run a vCPU until it stops for good: the thread word of the control block says when. `leaveGuest` sets
   * `immediate_exit`. One job at a time.
   */
  readonly start: (job: VcpuJob, leaveGuest: () => void) => void
  /** Makes a request (`REQUEST_*`) of the running job and takes the thread out of the guest, or out of its wait. */
  readonly request: (request: number) => void
}

/** How many threads there are. */
export interface VcpuThreadCounts {
  readonly idle: number
  readonly held: number
}

/** The pool. */
export class VcpuThreads extends Context.Service<VcpuThreads, {
  /** A thread for as long as the scope is open. Its job has stopped when the scope closes. */
  readonly acquire: Effect.Effect<VcpuThread, HypervisorError, Scope.Scope>
  readonly counts: () => VcpuThreadCounts
}>()("@troupe/node/VcpuThreads") {}

/** Choices for {@link layerWith}. */
export interface VcpuThreadsOptions {
  /** Threads kept ready; as many are started with the layer, in the background. Default: 1. */
  readonly warm?: number
  /** Threads kept at most after use. Default: 8. */
  readonly idle?: number
}

/**
 * What a thread is given. Its heap is small and lives long. A small limit of the old generation has V8 use its built-in code
 * where it lies, which saves 1.9 MiB of resident memory. Nothing else helps: about 6.0 MiB stay private (4.6 MiB of them are
 * Node's own JavaScript), with any heap limits, code range, stack size, environment, full collections and `malloc_trim`.
 */
const WORKER_OPTIONS = {
  execArgv: [],
  env: {},
  stdin: false,
  trackUnmanagedFds: false,
  resourceLimits: { maxYoungGenerationSizeMb: 1, maxOldGenerationSizeMb: 16, stackSizeMb: 1 }
}

/** How long after a refused kick the next one comes, in milliseconds. */
const KICK_RETRY_MS = 1

/**
 * How long the exit of the process waits for a thread at most, in milliseconds. Node waits for its Workers when it exits, and a
 * Worker in the guest does not hear it; one that Node stops while it loads a native module, or calls it, aborts the process now
 * and then.
 */
const EXIT_PATIENCE_MS = 2000

/** What threads have to do at the exit of the process. Without threads the process has no listener of ours. */
const atExit = new Set<() => void>()

const runAtExit = (): void => {
  for (const call of atExit) call()
}

const addAtExit = (call: () => void): void => {
  if (atExit.size === 0) process.on("exit", runAtExit)
  atExit.add(call)
}

const removeAtExit = (call: () => void): void => {
  atExit.delete(call)
  if (atExit.size === 0) process.off("exit", runAtExit)
}

/** One Worker and what it is doing. */
class PooledThread implements VcpuThread {
  readonly worker: Worker
  readonly threadId: number
  readonly #kick: (threadId: number) => number
  alive = true
  #control: Int32Array<SharedArrayBuffer> | undefined
  #leaveGuest: (() => void) | undefined

  constructor(worker: Worker, threadId: number, kick: (threadId: number) => number) {
    this.worker = worker
    this.threadId = threadId
    this.#kick = kick
    // An error that a Worker reports ends it; a vCPU on it has crashed.
    const ended = () => {
      this.alive = false
      if (this.#control === undefined || this.idle) return
      this.#control[CONTROL_STOP] = STOP_CRASHED
      Atomics.store(this.#control, CONTROL_THREAD, THREAD_STOPPED)
      Atomics.notify(this.#control, CONTROL_THREAD)
    }
    worker.on("error", ended)
    worker.on("exit", ended)
  }

  get idle(): boolean {
    return this.#control === undefined || Atomics.load(this.#control, CONTROL_THREAD) === THREAD_STOPPED
  }

  start(job: VcpuJob, leaveGuest: () => void): void {
    this.#control = new Int32Array(job.control)
    this.#leaveGuest = leaveGuest
    this.worker.postMessage(job)
  }

  request(request: number): void {
    const control = this.#control
    if (control === undefined || this.idle) return
    // The request stands before the thread is told to look for one. The flag covers a thread that is about to enter the
    // guest, the signal one that is in it, the gate one that waits.
    Atomics.or(control, CONTROL_REQUEST, request)
    this.#leaveGuest?.()
    openGate(control)
    this.#kickUntilSent(control)
  }

  /**
   * The kernel keeps each realtime signal that waits, up to a limit for all processes of a user (`RLIMIT_SIGPENDING`). There may
   * be no room for ours, and a thread in the guest hears of nothing else.
   */
  #kickUntilSent(control: Int32Array<SharedArrayBuffer>): void {
    if (this.#control !== control || this.idle || this.#kick(this.threadId) !== -ErrnoNumber.EAGAIN) return
    setTimeout(() => this.#kickUntilSent(control), KICK_RETRY_MS)
  }

  /** Takes the thread out of its job and waits for it, where nothing else runs any more. */
  readonly stopSync = (): void => {
    const control = this.#control
    if (control === undefined) return
    for (let waited = 0; waited < EXIT_PATIENCE_MS && !this.idle; waited++) {
      this.request(REQUEST_STOP)
      Atomics.wait(control, CONTROL_THREAD, Atomics.load(control, CONTROL_THREAD), 1)
    }
  }

  /** Forgets the job, which has stopped. */
  finish(): void {
    this.#control = undefined
    this.#leaveGuest = undefined
  }
}

/**
 * Has a Worker without a job end by itself, as soon as it has started. `terminate` would stop its JavaScript anywhere, and Node
 * or a native module that is just being loaded there may then abort the process.
 */
const end = (worker: Worker): Effect.Effect<void> =>
  Effect.callback((resume) => {
    if (worker.threadId < 0) return resume(Effect.void)
    worker.once("exit", () => resume(Effect.void))
    worker.ref()
    worker.postMessage(THREAD_END)
  })

const startFailure = (cause: unknown): HypervisorError =>
  new HypervisorError({
    operation: "Worker",
    detail: `a vCPU thread did not start: ${cause instanceof Error ? cause.message : String(cause)}`
  })

const make = Effect.fnUntraced(function*(options: VcpuThreadsOptions) {
  const ffi = yield* Ffi
  const signal = yield* Effect.mapError(ffi.kickSignal, kvmError)
  const warm = options.warm ?? 1
  const idleLimit = Math.max(options.idle ?? 8, warm)
  const idle: Array<PooledThread> = []
  let held = 0
  let starting = 0
  const state = { open: true }

  const kick = (threadId: number) => ffi.functions.tgkill(threadId, signal)

  /** Starts a thread. A Worker that starts cannot be stopped safely, so this is not interrupted. */
  const spawn = Effect.uninterruptible(Effect.callback<PooledThread, HypervisorError>((resume) => {
    const extension = import.meta.url.endsWith(".ts") ? "ts" : "js"
    const program = threadProgram(new URL(`./thread/VcpuThreadMain.${extension}`, import.meta.url))
    const started = new Int32Array(new SharedArrayBuffer(4))
    const data: VcpuThreadData = { backEnd: ffi.functions.name, started: started.buffer }
    let worker: Worker
    try {
      worker = new Worker(program.source, {
        ...WORKER_OPTIONS,
        eval: program.isScript,
        workerData: data,
        name: "vcpu"
      })
    } catch (cause) {
      // The operating system gives no more threads.
      return resume(Effect.fail(startFailure(cause)))
    }
    worker.unref()
    const waitForStart = () => void Atomics.wait(started, 0, 0, EXIT_PATIENCE_MS)
    addAtExit(waitForStart)
    const settle = (result: Effect.Effect<PooledThread, HypervisorError>): void => {
      removeAtExit(waitForStart)
      worker.off("error", failed)
      worker.off("exit", ended)
      resume(result)
    }
    const failed = (cause: unknown) => settle(Effect.fail(startFailure(cause)))
    const ended = (code: number) => failed(new Error(`it ended with code ${code} before it was ready`))
    worker.once("error", failed)
    worker.once("exit", ended)
    worker.once("message", (threadId: number) => settle(Effect.succeed(new PooledThread(worker, threadId, kick))))
  }))

  const release = Effect.fnUntraced(function*(thread: PooledThread) {
    held--
    removeAtExit(thread.stopSync)
    thread.finish()
    if (!thread.alive) return
    if (state.open && idle.length < idleLimit) idle.push(thread)
    else yield* end(thread.worker)
  })

  /** Starts a thread that waits, where the pool's finalizer finds it. */
  const startIdle = Effect.uninterruptible(
    Effect.suspend(() => {
      starting++
      return spawn
    }).pipe(
      Effect.tap((thread) => Effect.sync(() => idle.push(thread))),
      Effect.ensuring(Effect.sync(() => {
        starting--
      }))
    )
  )

  /** Starts threads until enough of them wait. */
  const replenish = Effect.fnUntraced(function*() {
    while (state.open && idle.length + starting < warm) yield* startIdle
  })

  const scope = yield* Effect.scope
  const acquire = Effect.acquireRelease(
    Effect.suspend(() => {
      for (let thread = idle.pop(); thread !== undefined; thread = idle.pop()) {
        if (thread.alive) return Effect.succeed(thread)
      }
      return spawn
    }).pipe(Effect.tap((thread) =>
      Effect.sync(() => {
        held++
        addAtExit(thread.stopSync)
      })
    )),
    release
  ).pipe(Effect.tap(() =>
    idle.length + starting < warm
      // Later, so that the new thread does not start while the machine that took the last one does.
      ? Effect.forkIn(Effect.ignore(Effect.delay(replenish(), "100 millis")), scope)
      : Effect.void
  ))

  yield* Effect.addFinalizer(() =>
    Effect.suspend(() => {
      state.open = false
      return Effect.forEach(idle.splice(0), (thread) => end(thread.worker), { discard: true, concurrency: "unbounded" })
    })
  )
  yield* Effect.forkScoped(Effect.ignore(replenish()))
  return VcpuThreads.of({ acquire, counts: () => ({ idle: idle.length, held }) })
})

/** The pool. */
export const layerWith = (options: VcpuThreadsOptions): Layer.Layer<VcpuThreads, HypervisorError, Ffi> =>
  Layer.effect(VcpuThreads, make(options))

/** The pool with its defaults. */
export const layer: Layer.Layer<VcpuThreads, HypervisorError, Ffi> = layerWith({})
