/** Watches an eventfd in a process of its own: `node poll-main.ts BACK_END throw|unref|exit`. */
import process from "node:process"
import { EFD_NONBLOCK, POLL_READABLE } from "../../src/internal/ForeignFunctions.ts"
import { load } from "./contract.ts"

const [, , name, scenario] = process.argv
if (name !== "node:ffi" && name !== "koffi") throw new Error(`no such back end: ${name}`)
const functions = load(name)
const fd = functions.eventfd(0, EFD_NONBLOCK)
const handle = functions.poll(fd, POLL_READABLE, () => {
  functions.eventfdRead(fd)
  if (scenario === "throw") throw new Error("thrown in a poll callback")
  if (scenario === "exit") process.exit(7)
})
if (typeof handle === "number") throw new Error(`poll failed: ${handle}`)
process.on("uncaughtException", (error) => {
  process.stdout.write(`uncaught: ${error.message}\n`)
  handle.close()
})
if (scenario === "unref") handle.unref()
else functions.eventfdWrite(fd)
