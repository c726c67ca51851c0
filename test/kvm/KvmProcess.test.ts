/** A process ends when it wants to, whatever its guests are doing. */
import { assert, describe, it } from "@effect/vitest"
import { spawn } from "node:child_process"
import { once } from "node:events"
import { existsSync } from "node:fs"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const PROGRAM = fileURLToPath(new URL("./programs/spinner.ts", import.meta.url))

/** Runs the program until it ends by itself, or is killed once its guest runs. Its end is that of its output: it may be told of the exit before. */
const run = async (how: string, signal?: NodeJS.Signals) => {
  const child = spawn(process.execPath, [PROGRAM, how], { stdio: ["ignore", "pipe", "ignore"] })
  let output = ""
  child.stdout.setEncoding("utf8")
  child.stdout.on("data", (text: string) => {
    output += text
    if (signal !== undefined && output.includes("running")) child.kill(signal)
  })
  const [code, killedBy]: Array<unknown> = await once(child, "close")
  return { output, code, killedBy, pid: child.pid }
}

describe.skipIf(kvmObstacle !== undefined)(onKvm("a process with a spinning guest"), () => {
  it("ends by itself when the machine's scope is closed", async () => {
    const { code, output } = await run("close")
    assert.strictEqual(output, "running\nclosed\n")
    assert.strictEqual(code, 0)
  })

  it("ends by process.exit", async () => {
    assert.deepInclude(await run("exit"), { code: 7, output: "running\n" })
  })

  it("ends by an exception that nobody catches", async () => {
    assert.deepInclude(await run("throw"), { code: 1, output: "running\n" })
  })

  it("ends by SIGTERM and SIGKILL", async () => {
    for (const signal of ["SIGTERM", "SIGKILL"] as const) {
      const { killedBy, pid } = await run("hang", signal)
      assert.strictEqual(killedBy, signal)
      assert.isFalse(existsSync(`/proc/${pid}`), "the process and its threads are gone")
    }
  })
})
