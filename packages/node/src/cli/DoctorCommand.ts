/** `troupe doctor`: says in plain words what this host can run, and why. */
import * as Command from "effect/cli/Command"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import { EMULATED_RATE, type HostReport, probeHost } from "../doctor/HostProbe.ts"
import { Ffi, layerWith as layerFfiWith } from "../Ffi.ts"
import * as KvmHypervisor from "../kvm/KvmHypervisor.ts"
import type { KvmCapName } from "../kvm/KvmIoctl.ts"
import * as KvmSystem from "../kvm/KvmSystem.ts"
import * as VcpuThreads from "../kvm/VcpuThreads.ts"
import { ExitCode } from "./ExitCode.ts"
import { ExitStatus } from "./ExitStatus.ts"

const say = (text: string) => Effect.sync(() => process.stdout.write(`${text}\n`))
const ok = (text: string) => say(`  ok       ${text}`)
const missing = (text: string) => say(`  missing  ${text}`)
const note = (text: string) => say(`           ${text}`)

const capNames = (table: { readonly [name in KvmCapName]?: string }): ReadonlyArray<readonly [KvmCapName, string]> =>
  Object.entries(table).filter((entry): entry is [KvmCapName, string] => entry[1] !== undefined)

const reportCapabilities = Effect.gen(function*() {
  const kvm = yield* KvmSystem.KvmSystem
  yield* say("\nCapabilities")
  for (const [name, purpose] of capNames(KvmSystem.requiredCapabilities)) yield* ok(`${name}: ${purpose}`)
  for (const [name, purpose] of capNames(KvmSystem.optionalCapabilities)) {
    yield* kvm.capability(name) > 0 ? ok(`${name}: ${purpose}`) : missing(`${name}: ${purpose} (optional)`)
  }
  yield* note(`at most ${kvm.maxVcpus} vCPUs in a machine`)
})

const rate = (perSecond: number): string =>
  perSecond === 0
    ? "did not finish"
    : perSecond >= 1e9
    ? `${(perSecond / 1e9).toFixed(1)} G instructions a second`
    : `${(perSecond / 1e6).toFixed(1)} M instructions a second`

const reportProbe = Effect.fnUntraced(function*(report: HostReport) {
  yield* say("\nSpeed of guest code")
  yield* (report.kernelRate >= EMULATED_RATE ? ok : missing)(
    `kernel mode: ${rate(report.kernelRate)}${report.kernelRate < EMULATED_RATE ? " (KVM emulates it)" : ""}`
  )
  yield* (report.userRate >= EMULATED_RATE ? ok : missing)(`user mode: ${rate(report.userRate)}`)
  yield* say("\nInstructions in kernel mode")
  for (const { instruction, result } of report.instructions) {
    switch (result._tag) {
      case "Ran":
        yield* ok(instruction.name)
        break
      case "Faulted":
        yield* ok(`${instruction.name} (this processor has no such instruction: exception ${result.vector})`)
        break
      case "Missing":
        yield* missing(
          `${instruction.name}: KVM cannot run it${
            result.exit._tag === "HypervisorInternalError"
              ? ` (bytes ${result.exit.instructionBytes})`
              : ` (${result.exit._tag})`
          }`
        )
    }
  }
})

/** Whether an unmodified Linux kernel gets through its start-up: it needs every probed instruction that cannot be hidden. */
export const canBootLinux = (report: HostReport): boolean =>
  report.instructions.every(({ instruction, result }) => result._tag !== "Missing" || instruction.feature !== undefined)

const conclude = Effect.fnUntraced(function*(report: HostReport) {
  const lacking = report.instructions.filter(({ result }) => result._tag === "Missing")
  const hidden = lacking.flatMap(({ instruction }) => instruction.feature ?? [])
  const fatal = lacking.filter(({ instruction }) => instruction.feature === undefined)
  yield* say("\nIn short")
  if (canBootLinux(report)) {
    yield* say("  This host can run unmodified Linux kernels.")
  } else {
    yield* say("  This host can run small guests made for it, such as Troupe's own test guest.")
    yield* say(
      `  It cannot boot an unmodified Linux kernel: in kernel mode its KVM lacks ${
        fatal.map(({ instruction }) => instruction.name).join(", ")
      }.`
    )
    yield* say("  Boot Linux on a host whose processor virtualises (VMX or SVM), or in the nested lab (docs/lab.md).")
  }
  if (report.kernelRate < EMULATED_RATE) {
    yield* say("  Kernel-mode code is emulated one instruction at a time here; user-mode code runs at full speed.")
  }
  if (hidden.length > 0) yield* say(`  Guests are not shown ${hidden.join(" and ")}: KVM cannot run what they promise.`)
})

const diagnose = Effect.gen(function*() {
  const ffi = yield* Ffi
  yield* ok(`foreign functions through ${ffi.functions.name} on Node ${process.versions.node}`)
  yield* ok(`${KvmSystem.KVM_DEVICE} opens, interface version 12`)
  yield* reportCapabilities
  const report = yield* probeHost
  yield* reportProbe(report)
  yield* conclude(report)
})

const layer = KvmHypervisor.layer.pipe(
  Layer.provideMerge(KvmSystem.layer),
  Layer.provide(VcpuThreads.layer),
  Layer.provideMerge(layerFfiWith({ quiet: true }))
)

/** `troupe doctor`. */
export const doctorCommand = Command.make("doctor", {}, () =>
  say("Host").pipe(
    Effect.andThen(Effect.provide(diagnose, layer)),
    Effect.catch((error) =>
      Effect.andThen(
        missing(error instanceof Error ? error.message : String(error)),
        ExitStatus.set(ExitCode.FAILURE)
      )
    )
  )).pipe(
    Command.withDescription("Check this host: /dev/kvm, its capabilities, and what kind of guest code it can run")
  )
