/**
 * Finds an FFI back end by name, for the main thread and for vCPU threads alike. Imports nothing of Effect; the back end that
 * is not asked for costs one small module and is never initialised.
 */
import process from "node:process"
import type { ForeignFunctions, ForeignFunctionsName } from "./ForeignFunctions.ts"
import { makeKoffiFfi } from "./KoffiFfi.ts"
import { makeNodeFfi } from "./NodeFfi.ts"

/** The functions of this thread: they are made once, because neither back end gives its bindings back. */
const loaded = new Map<ForeignFunctionsName, ForeignFunctions>()

const make = (name: ForeignFunctionsName, quiet: boolean): ForeignFunctions | string => {
  if (process.platform !== "linux") return `it is used on Linux only, this is ${process.platform}`
  try {
    if (name === "node:ffi") {
      return makeNodeFfi({ quiet }) ??
        `this Node (${process.version}) has no usable node:ffi; it came with Node 26.1 and can be switched off`
    }
    return makeKoffiFfi() ?? "the package koffi is not installed"
  } catch (cause) {
    return `it did not load: ${cause instanceof Error ? cause.message : String(cause)}`
  }
}

/**
 * The calling thread's functions on the named back end, or a text that says why they cannot be had. `quiet` holds back the
 * `ExperimentalWarning` of `node:ffi`, and only that.
 */
export const loadForeignFunctions = (
  name: ForeignFunctionsName,
  options: { readonly quiet: boolean }
): ForeignFunctions | string => {
  const functions = loaded.get(name) ?? make(name, options.quiet)
  if (typeof functions !== "string") loaded.set(name, functions)
  return functions
}
