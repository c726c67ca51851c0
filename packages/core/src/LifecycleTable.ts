/** The state table of `GuestLifecycle`: what each method does in each state. The lifecycle obeys it, and tests walk it. */

/**
 * The states of a lifecycle.
 *
 * - `Empty`: there is no guest
 * - `Created`: a guest has been built and has not run
 * - `Running`: `run` has been called and has not returned
 */
export type LifecycleState = "Empty" | "Created" | "Running"

/** The methods of a lifecycle. */
export type LifecycleMethod = "create" | "bind" | "run" | "stop"

/**
 * What a method does.
 *
 * - `build`: builds a guest; when that fails the state is `Empty`
 * - `replace`: takes the guest apart without an epitaph, then builds another
 * - `connect`: gives a client a handle; the state stays
 * - `start`: runs the guest to its end, which is `Empty`
 * - `discard`: takes the guest apart with the epitaph `ZX_ERR_INTERNAL`
 * - `halt`: ends the running guest; `run` fails with CONTROLLER_FORCED_HALT
 * - `nothing`: succeeds, and does nothing
 * - `NOT_CREATED`, `ALREADY_RUNNING`: fails with that reason, and changes nothing
 */
export type LifecycleTransition =
  | "build"
  | "replace"
  | "connect"
  | "start"
  | "discard"
  | "halt"
  | "nothing"
  | "NOT_CREATED"
  | "ALREADY_RUNNING"

/** What each method does in each state. */
export const LifecycleTable = {
  Empty: { create: "build", bind: "NOT_CREATED", run: "NOT_CREATED", stop: "nothing" },
  Created: { create: "replace", bind: "connect", run: "start", stop: "discard" },
  Running: { create: "ALREADY_RUNNING", bind: "connect", run: "ALREADY_RUNNING", stop: "halt" }
} as const satisfies {
  readonly [state in LifecycleState]: { readonly [method in LifecycleMethod]: LifecycleTransition }
}
