/**
 * Readiness of a descriptor on Node's own event loop: libuv's `uv_poll`, driven through foreign calls. Both back ends use it,
 * because the node executable exports libuv.
 */
import { isMainThread } from "node:worker_threads"
import { ErrnoNumber, type PollCallback, type PollHandle } from "./ForeignFunctions.ts"

/** The part of libuv that watching needs, as a back end provides it. Handles are addresses. */
export interface UvPollFunctions {
  /** Zeroed C memory for a `uv_poll_t`; 0 when there is none. */
  readonly allocate: () => bigint
  readonly free: (handle: bigint) => void
  /** `uv_poll_init` on this thread's loop. */
  readonly init: (handle: bigint, fd: number) => number
  /** `uv_poll_start` with the callback given to {@link makePoll}'s `register`. */
  readonly start: (handle: bigint, events: number) => number
  readonly stop: (handle: bigint) => void
  readonly ref: (handle: bigint) => void
  readonly unref: (handle: bigint) => void
  /** `uv_close` with the callback given to {@link makePoll}'s `register`. */
  readonly close: (handle: bigint) => void
}

/** The two callbacks of this module, for a back end to make callable from C, once. */
export interface UvPollCallbacks {
  readonly onPoll: (handle: bigint, status: number, events: number) => void
  readonly onClosed: (handle: bigint) => void
}

/** Makes `ForeignFunctions.poll`. `register` is called when the first descriptor is watched. */
export const makePoll = (register: (callbacks: UvPollCallbacks) => UvPollFunctions) => {
  const watchers = new Map<bigint, PollCallback>()
  let uv: UvPollFunctions | undefined
  let drainScheduled = false
  const drained = (): void => {
    drainScheduled = false
  }

  /*
   * libuv calls this outside of Node's own callback scopes. Two things follow. An exception would end the process without a
   * word, so it is thrown again from the event loop proper, as an uncaught exception. And promise continuations that the
   * callback makes ready would wait until something else happens on the loop, so an immediate is scheduled (one per turn of
   * the loop), after which Node runs them.
   */
  const onPoll = (handle: bigint, status: number, events: number): void => {
    const watcher = watchers.get(handle)
    if (watcher === undefined) return
    try {
      watcher(status, events)
    } catch (cause) {
      setImmediate(() => {
        throw cause
      })
    }
    if (!drainScheduled) {
      drainScheduled = true
      setImmediate(drained)
    }
  }

  return (fd: number, events: number, callback: PollCallback): PollHandle | number => {
    // A worker that is terminated while libuv watches a descriptor for it aborts the process.
    if (!isMainThread) return -ErrnoNumber.ENOTSUP
    uv ??= register({ onPoll, onClosed: (handle) => uv?.free(handle) })
    const { allocate, close, free, init, ref, start, stop, unref } = uv
    const handle = allocate()
    if (handle === 0n) return -ErrnoNumber.ENOMEM
    const initialised = init(handle, fd)
    if (initialised < 0) {
      free(handle)
      return initialised
    }
    watchers.set(handle, callback)
    const started = start(handle, events)
    if (started < 0) {
      watchers.delete(handle)
      close(handle)
      return started
    }
    // `watchers` decides whether this handle is open; the address is used again only after `onClosed`.
    let open = true
    return {
      ref: () => {
        if (open) ref(handle)
      },
      unref: () => {
        if (open) unref(handle)
      },
      watch: (next) => {
        if (!open) return
        if (next === 0) stop(handle)
        else start(handle, next)
      },
      close: () => {
        if (!open) return
        open = false
        watchers.delete(handle)
        stop(handle)
        close(handle)
      }
    }
  }
}

/** `UV_POLL` of libuv's `uv_handle_type`, part of its stable ABI. */
export const UV_POLL = 8
