/** A process with a guest that spins in a vCPU thread; ends in the way that its argument names. See `KvmProcess.test.ts`. */
import { Effect, Fiber } from "effect"
import { kvmLayer, tinyMachine } from "../TinyMachine.ts"

const program = Effect.gen(function*() {
  const machine = yield* tinyMachine({ code: [0xeb, 0xfe] })
  const fiber = yield* Effect.forkChild(machine.vcpu.run)
  yield* Effect.sleep("50 millis")
  process.stdout.write("running\n")
  switch (process.argv[2]) {
    case "exit":
      return process.exit(7)
    case "throw":
      setImmediate(() => {
        throw new Error("nobody catches this")
      })
      return yield* Effect.never
    case "hang":
      return yield* Effect.never
    default:
      yield* Fiber.interrupt(fiber)
  }
})

await Effect.runPromise(Effect.provide(Effect.scoped(program), kvmLayer()))
// Nothing that keeps a process alive is left, so this is its last line.
process.stdout.write("closed\n")
