// `npm run demo`: boots a small virtual machine on this host's KVM and tells what happens, step by step. Without a usable
// /dev/kvm the same scenario runs on the fake. `npm run demo -- linux` boots a real distribution kernel.
import type { GuestError } from "@troupe/core/GuestError"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import type { GuestStop } from "@troupe/core/GuestStop"
import { FakeHypervisor, GuestProgram } from "@troupe/core/testing"
import { layer as layerDevices } from "@troupe/devices"
import { EntropySource } from "@troupe/devices/EntropySource"
import { fromPath } from "@troupe/node/HostFile"
import * as KvmGuestLifecycle from "@troupe/node/KvmGuestLifecycle"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"
import { readdirSync, readlinkSync } from "node:fs"
import { relative } from "node:path"
import { fakeGuest } from "./demo/FakeGuest.ts"
import { explain } from "./demo/Narration.ts"
import { runLinuxDemo } from "./lab/LinuxDemo.ts"
import { whyNoKvm } from "./tiers.ts"
import { root } from "./tools.ts"

const USAGE = `Shows a virtual machine that boots, works and turns itself off.

  npm run demo                                a small guest on this host's /dev/kvm, or on the fake where there is none
  npm run demo -- fake                        the same guest on the fake
  npm run demo -- linux [--kernel BZIMAGE]    an unmodified Linux: Debian's cloud kernel, or the one that you give
`

const CPUS = 2
const MEMORY = "128M"
/** What the guest does: words that test/guest/README.md explains. */
const COMMAND_LINE = "smp timer rng poweroff"
const GUEST = `${root}/test/guest/troupe-guest.elf`

const print = (text: string): void => void process.stdout.write(`${text}\n`)

let steps = 0
const step = (text: string): void => print(`\n${++steps}. ${text}`)
const note = (text: string): void => print(`   ${text}`)

const since = (begun: number): string => `${(performance.now() - begun).toFixed(0)} ms`

/** Prints the serial port line by line, with words between the lines. */
const showConsole = (output: Stream.Stream<Uint8Array>): Effect.Effect<void> =>
  output.pipe(
    Stream.decodeText,
    Stream.splitLines,
    Stream.runForEach((line) =>
      Effect.sync(() => {
        print(`   | ${line}`)
        const words = explain(line)
        if (words !== undefined) print(`   -> ${words}`)
      })
    )
  )

interface Scenario {
  readonly place: string
  readonly kernel: Uint8Array | ReturnType<typeof fromPath>
  readonly kernelName: string
}

const boot = Effect.fnUntraced(function*({ place, kernel, kernelName }: Scenario) {
  const lifecycle = yield* GuestLifecycle
  step(`Create: a machine ${place}, with ${CPUS} processors, ${MEMORY} of memory, a serial port and an entropy device.`)
  note(`Kernel: ${kernelName}, command line: "${COMMAND_LINE}".`)
  const begun = performance.now()
  yield* lifecycle.create({
    kernelType: "LINUX",
    kernel,
    cmdline: COMMAND_LINE,
    cpus: CPUS,
    guestMemory: MEMORY,
    virtioRng: true
  })
  note(`Done in ${since(begun)}. Nothing of it runs yet.`)
  step("Run: the guest's serial port is shown behind `|`.")
  const guest = yield* lifecycle.bind
  const serial = yield* guest.getSerial
  const output = yield* Effect.forkScoped(showConsole(serial.output))
  const started = performance.now()
  const stop = yield* lifecycle.run
  const ran = since(started)
  yield* Fiber.join(output)
  step(`The end: ${describe(stop)}. It ran for ${ran}.`)
  return stop
}, Effect.scoped)

const describe = (stop: GuestStop): string => {
  switch (stop._tag) {
    case "PowerOff":
      return "`run` returned PowerOff, which is a success"
    case "Reset":
      return `the guest asked for a reset (${stop.by})`
    case "Halt":
      return "the guest halted with interrupts off"
  }
}

/** How many descriptors of KVM this process has open. */
const kvmDescriptors = (): number =>
  readdirSync("/proc/self/fd").filter((fd) => {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`).includes("kvm")
    } catch {
      return false
    }
  }).length

const onKvm = boot({
  place: "on this host's /dev/kvm",
  kernel: fromPath(GUEST),
  kernelName: relative(process.cwd(), GUEST)
}).pipe(
  Effect.provide(KvmGuestLifecycle.layer),
  Effect.tap(() => {
    const open = kvmDescriptors()
    note(
      open === 0
        ? "Its scope is closed, and no descriptor of KVM is left open."
        : `${open} descriptors of KVM are still open: this is a bug.`
    )
    return Effect.void
  })
)

const onFake = boot({
  place: "on the fake hypervisor, which is made for tests and needs no hardware",
  kernel: GuestProgram.kernel(fakeGuest),
  kernelName: "the same guest as a program in TypeScript (scripts/demo/FakeGuest.ts)"
}).pipe(
  Effect.provide(
    GuestLifecycle.layer.pipe(
      Layer.provide(layerDevices),
      Layer.provide(EntropySource.layerRandom),
      Layer.provide(FakeHypervisor.layer())
    )
  ),
  Effect.tap(() => {
    note("The devices and everything above them were the real ones: only the hypervisor was not.")
    return Effect.void
  })
)

/** A machine that cannot be made at all on this host's KVM is no reason to show nothing. */
const isUnusable = (error: GuestError): boolean => error.reason._tag === "GUEST_INITIALIZATION_FAILURE"

const instead = (reason: string): Effect.Effect<GuestStop, GuestError> => {
  print(`No usable KVM here: ${reason}. The same scenario runs on the fake instead.`)
  steps = 0
  return onFake
}

const scenario = (): Effect.Effect<GuestStop, GuestError> => {
  const reason = whyNoKvm()
  if (reason !== undefined) return instead(reason)
  return onKvm.pipe(
    Effect.catchTag(["HypervisorError", "FfiUnavailable", "CpuFeatureUnknown"], (error) => instead(error.message)),
    Effect.catchTag("GuestError", (error) => isUnusable(error) ? instead(error.message) : Effect.fail(error))
  )
}

const runDemo = async (effect: Effect.Effect<GuestStop, GuestError>): Promise<number> => {
  const abort = new AbortController()
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.once(signal, () => abort.abort())
  // Nobody reads on (`| head`): the machine ends in order, without words.
  process.stdout.on("error", () => abort.abort())
  print("Troupe demo: a virtual machine boots, works and turns itself off.")
  const exit = await Effect.runPromiseExit(effect, { signal: abort.signal })
  if (Exit.isSuccess(exit)) return exit.value._tag === "PowerOff" ? 0 : 1
  if (Cause.hasInterruptsOnly(exit.cause)) {
    print("\nStopped. Nothing of the machine is left.")
    return 130
  }
  const error = Cause.squash(exit.cause)
  print(`\nThe demo failed: ${error instanceof Error ? error.message : String(error)}`)
  return 1
}

const linuxDemo = async (args: ReadonlyArray<string>): Promise<number> => {
  try {
    const code = await runLinuxDemo(args)
    if (code === 130) print("\nStopped. Nothing of the machine is left.")
    return code
  } catch (cause) {
    const wrongArguments = cause instanceof Error && "code" in cause && String(cause.code).startsWith("ERR_PARSE_ARGS")
    if (!wrongArguments) throw cause
    process.stderr.write(`${cause.message}\n\n${USAGE}`)
    return 2
  }
}

const [what, ...rest] = process.argv.slice(2)
switch (what) {
  case undefined:
    process.exitCode = await runDemo(Effect.suspend(scenario))
    break
  case "fake":
    process.exitCode = await runDemo(onFake)
    break
  case "linux":
    process.exitCode = await linuxDemo(rest)
    break
  default:
    process.stdout.write(USAGE)
    process.exitCode = what === "--help" || what === "-h" ? 0 : 2
}
