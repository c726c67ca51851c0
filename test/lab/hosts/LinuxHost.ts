/**
 * What the host programs of the lab share: a machine with an unmodified Linux whose shell they hold, and steps with names.
 *
 * A host program is an application as anybody's: it makes a machine with the library, lets it run, and uses the guest's
 * endpoints, while the guest does what it is told over the serial port. It prints `ok STEP SECONDS` for each step that went well, and
 * ends with code 0 when all did.
 */
import { type Guest, type GuestConfigInput, GuestLifecycle, type GuestStop } from "@troupe/core"
import * as Console from "effect/Console"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import type * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import { readFileSync } from "node:fs"
import { parseArgs } from "node:util"
import { DEVICE_MODULES } from "../../../scripts/lab/GuestInitramfs.ts"
import { buildShellInitramfs, type GuestShell, openGuestShell } from "../../../scripts/lab/GuestShell.ts"

/** Where the guest's files are, and how its devices are reached. */
const { values: options } = parseArgs({
  options: {
    kernel: { type: "string", default: "/lab/vmlinux" },
    busybox: { type: "string", default: "/bin/busybox" },
    modules: { type: "string", default: "/lab/modules" },
    transport: { type: "string", default: "mmio" },
    /** Make a TAP interface on the host, and give it an address: for hosts on which nobody minds. */
    tap: { type: "boolean", default: false },
    /** Names of the steps to do, with commas; all unless given. */
    steps: { type: "string" },
    /** Print what the guest prints. */
    verbose: { type: "boolean", default: false }
  }
})

/** The transport of the command line. */
export const transport = options.transport === "pci" ? "pci" : "mmio"

/** Whether there may be a TAP interface. */
export const mayTap = options.tap

/** Whether the command line wants this step. */
export const isWanted = (step: string): boolean =>
  options.steps === undefined || options.steps.split(",").includes(step)

/** A Linux that runs. */
export interface LinuxGuest extends GuestShell {
  readonly guest: Guest
  /** Does something and says that it went well, and how long it took. */
  readonly step: <A, E, R>(name: string, effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>
  /** The guest's end, once it has been told to end. */
  readonly end: Effect.Effect<GuestStop, unknown>
}

const step: LinuxGuest["step"] = (name, effect) =>
  Effect.gen(function*() {
    const begun = performance.now()
    const result = yield* Effect.onError(effect, () => Console.log(`failed ${name}`))
    yield* Console.log(`ok ${name} ${((performance.now() - begun) / 1000).toFixed(1)} s`)
    return result
  })

/** Starts a Linux with these devices, and all modules in it. */
export const startLinux = Effect.fnUntraced(function*(config: Partial<GuestConfigInput>) {
  const lifecycle = yield* GuestLifecycle
  const { initramfs, order } = yield* Effect.promise(() =>
    buildShellInitramfs({ busybox: options.busybox, modules: options.modules }, DEVICE_MODULES)
  )
  yield* lifecycle.create({
    kernelType: "LINUX",
    kernel: new Uint8Array(readFileSync(options.kernel)),
    ramdisk: initramfs,
    // Nothing of the kernel's among the output of commands: neither messages, nor its complaint of a processor that got no time.
    cmdline: "console=ttyS0 quiet loglevel=3 nowatchdog panic=-1 memhp_default_state=online_movable",
    cpus: 1,
    guestMemory: "512M",
    virtioTransport: transport,
    ...config
  })
  const guest = yield* lifecycle.bind
  const run = yield* Effect.forkScoped(lifecycle.run)
  const echo = options.verbose ? (text: string) => void process.stdout.write(text) : undefined
  const shell = yield* step(
    "boot",
    Effect.gen(function*() {
      const shell = yield* openGuestShell(yield* guest.getSerial, echo)
      // Each with what it prints, or the first that fails says nothing about itself.
      yield* shell.run(`for module in ${order.join(" ")}; do insmod /lib/modules/$module.ko || echo $module; done`)
      return shell
    })
  )
  return { ...shell, guest, step, end: Fiber.join(run) } satisfies LinuxGuest
})

/** Runs a host program to its end and leaves the process with its outcome. */
export const runHost = (
  program: Effect.Effect<unknown, unknown, GuestLifecycle | Scope.Scope>,
  layer: Layer.Layer<GuestLifecycle, unknown>
): void => {
  void Effect.runPromiseExit(Effect.scoped(program).pipe(Effect.provide(layer))).then((exit) => {
    if (Exit.isFailure(exit)) console.error(exit.cause)
    process.exitCode = Exit.isSuccess(exit) ? 0 : 1
  })
}

/** Asks again, half a second apart, until the answer is what is wanted. Fails with the last answer. */
export const until = <A, E, R>(
  ask: Effect.Effect<A, E, R>,
  wanted: (answer: A) => boolean,
  tries = 240
): Effect.Effect<A, E | Error, R> =>
  Effect.gen(function*() {
    let answer = yield* ask
    for (let i = 1; i < tries && !wanted(answer); i++) {
      yield* Effect.sleep("500 millis")
      answer = yield* ask
    }
    if (!wanted(answer)) return yield* Effect.fail(new Error(`it stayed at ${JSON.stringify(answer)}`))
    return answer
  })
