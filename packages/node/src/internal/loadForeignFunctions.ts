/**
 * Finds an FFI back end by name, for the main thread and for vCPU threads alike. Imports nothing of Effect; the back end that
 * is not asked for costs one small module and is never initialised.
 */
import process from "node:process"
import type { ForeignFunctions, ForeignFunctionsName } from "./ForeignFunctions.ts"
import { makeKoffiFfi } from "./KoffiFfi.ts"
import { makeNodeFfi } from "./NodeFfi.ts"

/** Makes the calling thread's functions on the named back end, or says with text why that cannot be. */
export const loadForeignFunctions = (
  name: ForeignFunctionsName,
  options: { readonly quiet: boolean }
): ForeignFunctions | string => {
  if (process.platform !== "linux") return `${name} is used on Linux only, this is ${process.platform}`
  try {
    if (name === "node:ffi") {
      return makeNodeFfi(options) ??
        `this Node (${process.version}) has no usable node:ffi; it came with Node 26.1 and can be switched off`
    }
    return makeKoffiFfi() ?? "the package koffi is not installed"
  } catch (cause) {
    return `${name} did not load: ${cause instanceof Error ? cause.message : String(cause)}`
  }
}
