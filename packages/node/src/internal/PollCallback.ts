/**
 * Makes a callback safe to be called by libuv's `uv_poll` through a foreign function interface.
 */
import type { PollCallback } from "./ForeignFunctions.ts"

let drainScheduled = false
const drained = (): void => {
  drainScheduled = false
}

/**
 * Wraps a poll callback.
 *
 * Such callbacks are called by libuv itself, outside of Node's own callback scopes. Two things follow. An exception would
 * end the process without a word, so it is thrown again from the event loop proper, as an uncaught exception. And promise
 * continuations that the callback makes ready would wait until something else happens on the loop, so an immediate is
 * scheduled (one per turn of the loop), after which Node runs them.
 */
export const guardedPollCallback = (callback: PollCallback): PollCallback => (status, events) => {
  try {
    callback(status, events)
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
