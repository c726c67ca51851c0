/** Preloaded (`--import`) to make koffi look as if it were not installed. */
import { registerHooks } from "node:module"

registerHooks({
  resolve: (specifier, context, next) => {
    if (specifier === "koffi") throw new Error("Cannot find module 'koffi'")
    return next(specifier, context)
  }
})
