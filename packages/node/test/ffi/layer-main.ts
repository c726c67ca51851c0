/** Says which back end a layer of the FFI module takes here: its name, or the failure. */
import * as Effect from "effect/Effect"
import process from "node:process"
import * as Ffi from "../../src/Ffi.ts"

const layers = {
  layer: Ffi.layer,
  layerNodeFfi: Ffi.layerNodeFfi,
  layerKoffi: Ffi.layerKoffi,
  quiet: Ffi.layerWith({ quiet: true })
}
const name = process.argv[2] ?? ""
const layer = Object.entries(layers).find(([key]) => key === name)?.[1]
if (layer === undefined) throw new Error(`no such layer: ${name}`)
await Effect.runPromise(
  Ffi.Ffi.pipe(
    Effect.map((ffi) => ffi.functions.name),
    Effect.provide(layer),
    Effect.catch((error) => Effect.succeed(`${error._tag}: ${error.message}`)),
    Effect.map((text) => process.stdout.write(`${text}\n`))
  )
)
process.emitWarning("a warning of the program's own")
