// A guest lifecycle on KVM whose guest is heard at its first instruction: the small guest's entry begins with a write to port 0x80.
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import * as KvmGuestLifecycle from "@troupe/node/KvmGuestLifecycle"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import { readFileSync } from "node:fs"
import { join } from "node:path"
import { BenchError, root } from "./Row.ts"

const MARK_PORT = 0x80

/** The small guest. */
export const GUEST_FILE = join(root, "test", "guest", "troupe-guest.elf")

/** Memory of the guest in bytes. */
export const GUEST_MEMORY = 16 * 2 ** 20

/** When the last guest's first mark came, and who waits for it. */
const heard: { at: number; wake: (() => void) | undefined } = { at: 0, wake: undefined }

/** The device at the port of the marks. It is a call, so that the time includes nobody's laziness. */
const layerMark = DeviceCatalog.layerAdd(Effect.succeed({
  provides: "power" as const,
  devices: () =>
    Effect.succeed([{
      name: "mark",
      ranges: [{ space: "pio" as const, base: MARK_PORT, size: 1, read: "call" as const, write: "call" as const }],
      interrupts: [],
      start: () =>
        Effect.succeed({
          read: () => 0xff,
          write: () => {
            if (heard.at !== 0) return
            heard.at = performance.now()
            heard.wake?.()
          }
        })
    }])
}))

/** A lifecycle on this host's KVM with all devices and the marks. */
export const layer = GuestLifecycle.layer.pipe(
  Layer.provide(layerMark.pipe(Layer.provide(KvmGuestLifecycle.layerCatalog))),
  Layer.provide(KvmGuestLifecycle.layerHypervisor())
)

const kernel = readFileSync(GUEST_FILE)

/** How long a guest took to its first instruction, in milliseconds. */
export interface FirstInstruction {
  /** From `create` on. */
  readonly total: number
  /** The part of it until `create` returned. */
  readonly create: number
  /** How long `stop` took afterwards. */
  readonly stop: number
}

/** Creates a guest, runs it to its first instruction and stops it. */
export const toFirstInstruction: Effect.Effect<FirstInstruction, unknown, GuestLifecycle> = Effect.gen(function*() {
  const lifecycle = yield* GuestLifecycle
  heard.at = 0
  const begun = performance.now()
  yield* lifecycle.create({
    kernelType: "LINUX",
    kernel,
    cmdline: "quiet idle",
    cpus: 1,
    guestMemory: GUEST_MEMORY,
    virtioRng: true,
    bootProtocol: "linux64"
  })
  const created = performance.now()
  const running = yield* Effect.forkChild(lifecycle.run, { startImmediately: true })
  const mark = Effect.callback<void>((resume) => {
    if (heard.at !== 0) return resume(Effect.void)
    heard.wake = () => resume(Effect.void)
  })
  const ended = Effect.flatMap(
    Effect.exit(Fiber.join(running)),
    (exit) => Effect.fail(new BenchError(`the guest ended before its first instruction: ${JSON.stringify(exit)}`))
  )
  yield* Effect.raceFirst(mark, ended)
  heard.wake = undefined
  const marked = performance.now()
  yield* lifecycle.stop
  const stopped = performance.now()
  yield* Effect.exit(Fiber.join(running))
  return { total: heard.at - begun, create: created - begun, stop: stopped - marked }
})
