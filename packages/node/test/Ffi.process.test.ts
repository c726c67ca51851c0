/** What the FFI module does in processes of their own: which back end it takes, what it prints, how a process ends. */
import { assert, describe, it } from "@effect/vitest"
import { fileURLToPath } from "node:url"
import { current, older, run, type Runtime } from "./ffi/runtimes.ts"

const withoutKoffi = ["--import", fileURLToPath(new URL("ffi/without-koffi.ts", import.meta.url))]
const firstLine = (text: string) => text.split("\n")[0] ?? ""
const on = ({ name, obstacle }: Runtime, title: string) =>
  obstacle === undefined ? `${title} (${name})` : `${title} (${name}; skipped: ${obstacle})`

describe("layer", { concurrent: true, timeout: 60_000 }, () => {
  it("takes node:ffi where this Node has it", async () => {
    assert.strictEqual(firstLine((await run(current, ["layer-main.ts", "layer"])).stdout), "node:ffi")
  })

  it("takes koffi when node:ffi is switched off", async () => {
    const { stdout } = await run(current, ["layer-main.ts", "layer"], ["--no-experimental-ffi"])
    assert.strictEqual(firstLine(stdout), "koffi")
  })

  for (const runtime of older) {
    it.skipIf(runtime.obstacle !== undefined)(on(runtime, "takes koffi where there is no node:ffi"), async () => {
      assert.strictEqual(firstLine((await run(runtime, ["layer-main.ts", "layer"])).stdout), "koffi")
    })

    it.skipIf(runtime.obstacle !== undefined)(on(runtime, "says what to do where there is neither"), async () => {
      const line = firstLine((await run(runtime, ["layer-main.ts", "layer"], withoutKoffi)).stdout)
      assert.match(line, /^FfiUnavailable: no foreign function interface: /)
      assert.match(line, /node:ffi: this Node \(v2\d\.\d+\.\d+\) has no usable node:ffi/)
      assert.match(line, /koffi: the package koffi is not installed/)
      assert.match(line, /Use Node 26\.1 or later, or install the package koffi$/)
    })

    it.skipIf(runtime.obstacle !== undefined)(on(runtime, "layerNodeFfi alone fails typed"), async () => {
      const line = firstLine((await run(runtime, ["layer-main.ts", "layerNodeFfi"])).stdout)
      assert.match(line, /^FfiUnavailable: .*Use Node 26\.1 or later/)
      assert.notInclude(line, "koffi is not installed")
    })
  }

  it("layerKoffi alone fails typed without koffi", async () => {
    const line = firstLine((await run(current, ["layer-main.ts", "layerKoffi"], withoutKoffi)).stdout)
    assert.match(line, /^FfiUnavailable: .*koffi: the package koffi is not installed/)
  })

  it("prints Node's warning once, or, when quiet, only warnings of others", async () => {
    const plain = await run(current, ["layer-main.ts", "layer"])
    assert.strictEqual(plain.stderr.match(/ExperimentalWarning: FFI/g)?.length, 1)
    assert.include(plain.stderr, "a warning of the program's own")
    const quiet = await run(current, ["layer-main.ts", "quiet"])
    assert.strictEqual(firstLine(quiet.stdout), "node:ffi")
    assert.notInclude(quiet.stderr, "ExperimentalWarning")
    assert.include(quiet.stderr, "a warning of the program's own")
  })
})

for (const name of ["node:ffi", "koffi"]) {
  describe(`a process that watches a descriptor through ${name}`, { concurrent: true, timeout: 60_000 }, () => {
    it("gets an exception in a callback as an uncaught exception", async () => {
      const { code, signal, stderr, stdout } = await run(current, ["poll-main.ts", name, "throw"])
      assert.deepStrictEqual({ code, signal }, { code: 0, signal: null }, stderr)
      assert.strictEqual(stdout, "uncaught: thrown in a poll callback\n")
    })

    it("ends by itself when the watcher is unreferenced", async () => {
      const { code, signal, stderr } = await run(current, ["poll-main.ts", name, "unref"])
      assert.deepStrictEqual({ code, signal }, { code: 0, signal: null }, stderr)
    })

    it("can be ended by process.exit in a callback", async () => {
      const { code, signal, stderr } = await run(current, ["poll-main.ts", name, "exit"])
      assert.deepStrictEqual({ code, signal }, { code: 7, signal: null }, stderr)
    })
  })
}
