/** `troupe run`: one guest on this host's KVM, its serial port or its console on the terminal. */
import type { GuestConfigInput } from "@troupe/core/GuestConfig"
import type { GuestError } from "@troupe/core/GuestError"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { VsockError } from "@troupe/core/HostVsockEndpoint"
import { MachinePolicy } from "@troupe/core/MachinePolicy"
import * as Command from "effect/cli/Command"
import * as Flag from "effect/cli/Flag"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import { fromPath } from "../HostFile.ts"
import * as KvmGuestLifecycle from "../KvmGuestLifecycle.ts"
import * as VsockUnixSockets from "../vsock/VsockUnixSockets.ts"
import { diskSyntax, parseDisk } from "./DiskOption.ts"
import { describeStop, ExitCode, exitCodeHelp, exitCodeOfError, exitCodeOfStop } from "./ExitCode.ts"
import { ExitStatus } from "./ExitStatus.ts"
import { layerNets, netSyntax, parseNet } from "./NetOption.ts"
import { makeProgress } from "./Progress.ts"
import { followSize, OutputLost, showOutput, typeInput } from "./Terminal.ts"

const flags = {
  kernel: Flag.String("kernel").pipe(
    Flag.withAlias("k"),
    Flag.withDescription("The kernel: a bzImage, or an ELF file with a PVH note or a 64-bit Linux entry")
  ),
  initrd: Flag.String("initrd").pipe(
    Flag.withDescription("The initial RAM disk"),
    Flag.optional
  ),
  cmdline: Flag.String("cmdline").pipe(
    Flag.withDescription(
      "The kernel's command line; default: console=ttyS0 panic=-1, with --console virtio console=hvc0 panic=-1"
    ),
    Flag.optional
  ),
  console: Flag.Literals("console", ["serial", "virtio"]).pipe(
    Flag.withDescription("What is on this terminal: the serial port (ttyS0), or a virtio console (hvc0)"),
    Flag.withDefault("serial")
  ),
  cpus: Flag.Int("cpus").pipe(
    Flag.withAlias("c"),
    Flag.withDescription("Virtual processors"),
    Flag.withDefault(1)
  ),
  memory: Flag.String("memory").pipe(
    Flag.withAlias("m"),
    Flag.withDescription("Memory: bytes, or a number with k, M or G"),
    Flag.withDefault("256M")
  ),
  bootProtocol: Flag.Literals("boot-protocol", ["auto", "linux64", "pvh"]).pipe(
    Flag.withDescription("Which entry of the kernel is used"),
    Flag.withDefault("auto")
  ),
  onReset: Flag.Literals("on-reset", ["stop", "run-again"]).pipe(
    Flag.withDescription("What the guest's reset does"),
    Flag.withDefault("stop")
  ),
  transport: Flag.Literals("transport", ["mmio", "pci"]).pipe(
    Flag.withDescription("How the guest finds and drives its virtio devices"),
    Flag.withDefault("mmio")
  ),
  rng: Flag.Boolean("rng").pipe(
    Flag.withDescription("Give the guest an entropy device"),
    Flag.withDefault(true)
  ),
  disk: Flag.String("disk").pipe(
    Flag.withAlias("d"),
    Flag.withMetavar(diskSyntax),
    Flag.withDescription(
      "A disk: a file or block device, with how the guest gets it (ro: read-only, volatile: changes are lost at the end, " +
        "qcow2: it is an image). More than one with more flags"
    ),
    Flag.atLeast(0)
  ),
  net: Flag.String("net").pipe(
    Flag.withAlias("n"),
    Flag.withMetavar(netSyntax),
    Flag.withDescription(
      "A network interface: on a network that this process plays (user: needs no privilege), or a TAP interface of the host, " +
        "which may be in a bridge. More than one with more flags"
    ),
    Flag.atLeast(0)
  ),
  vsock: Flag.String("vsock").pipe(
    Flag.withMetavar("path"),
    Flag.withDescription(
      "Give the guest a socket device, with its ports as Unix sockets: connect to the path and send `CONNECT port` for a port of " +
        "the guest; listen on path_port for a port of the host"
    ),
    Flag.optional
  ),
  cpuidMask: Flag.String("cpuid-mask").pipe(
    Flag.withDescription("CPU features to hide from the guest, e.g. cx16,popcnt; without it, what this KVM cannot run"),
    Flag.optional
  ),
  quiet: Flag.Boolean("quiet").pipe(
    Flag.withAlias("q"),
    Flag.withDescription("Print nothing but what the guest prints"),
    Flag.withDefault(false)
  )
}

/** `troupe run`. */
export const runCommand = Command.make("run", flags, (input) => {
  const nets = input.net.map(parseNet)
  const wrong = nets.filter((net) => typeof net === "string")
  if (wrong.length > 0) return ExitStatus.fail(ExitCode.BAD_INPUT, wrong.join("\n"))
  const interfaces = nets.filter((net) => typeof net === "object")
  const config: GuestConfigInput = {
    kernelType: "LINUX",
    kernel: fromPath(input.kernel),
    ...(Option.isSome(input.initrd) ? { ramdisk: fromPath(input.initrd.value) } : {}),
    cmdline: Option.getOrElse(
      input.cmdline,
      () => `console=${input.console === "virtio" ? "hvc0" : "ttyS0"} panic=-1`
    ),
    virtioConsole: input.console === "virtio",
    cpus: input.cpus,
    guestMemory: input.memory,
    virtioRng: input.rng,
    virtioTransport: input.transport,
    virtioVsock: Option.isSome(input.vsock),
    blockDevices: input.disk.map(parseDisk),
    netDevices: interfaces.map(({ spec }) => spec),
    bootProtocol: input.bootProtocol
  }
  const hiddenCpuFeatures = Option.match(input.cpuidMask, {
    onNone: () => "probe" as const,
    onSome: (features) => features.split(",").filter((feature) => feature !== "")
  })
  return runGuest(config, input.kernel, input.quiet, Option.getOrUndefined(input.vsock)).pipe(
    Effect.updateService(MachinePolicy, ({ device }) => ({ device, reset: input.onReset })),
    Effect.provide(KvmGuestLifecycle.layerWith({ hiddenCpuFeatures }).pipe(Layer.provide(layerNets(interfaces)))),
    Effect.catchTag(
      ["HypervisorError", "FfiUnavailable", "CpuFeatureUnknown"],
      (error) => ExitStatus.fail(1, error.message)
    )
  )
}).pipe(
  Command.withDescription(
    `Run a guest on this host's KVM with its serial port on this terminal. Ctrl-C stops it, twice at once. ${exitCodeHelp}`
  ),
  Command.withExamples([
    {
      command: "troupe run --kernel vmlinuz --initrd initrd.img --memory 512M",
      description: "Boot a distribution kernel"
    },
    {
      command: "troupe run --kernel vmlinuz --initrd initrd.img --disk root.qcow2,qcow2 --disk data.img,ro",
      description: "The same with two disks"
    },
    {
      command: "troupe run --kernel vmlinuz --initrd initrd.img --net user",
      description: "The same with a network"
    }
  ])
)

/** How long a guest that is gone may keep the command waiting for its output to be written. */
const SHOW_REST_LIMIT = "2 seconds"

const runGuest = Effect.fnUntraced(function*(
  config: GuestConfigInput,
  kernel: string,
  quiet: boolean,
  vsockPath: string | undefined
) {
  const lifecycle = yield* GuestLifecycle
  const progress = yield* makeProgress(quiet)
  const started = yield* Clock.currentTimeMillis
  yield* progress.line(
    `creating a machine: ${config.cpus} vCPU${
      config.cpus === 1 ? "" : "s"
    }, memory ${config.guestMemory}, kernel ${kernel}`
  )
  const result = yield* Effect.gen(function*() {
    yield* lifecycle.create(config)
    const guest = yield* lifecycle.bind
    const console = config.virtioConsole === true ? yield* guest.getConsole : undefined
    const port = console ?? (yield* guest.getSerial)
    if (console !== undefined) yield* followSize(console)
    if (vsockPath !== undefined) yield* VsockUnixSockets.serve(yield* guest.getHostVsockEndpoint, vsockPath)
    yield* progress.wait("running; no output yet")
    const shown = yield* Effect.forkScoped(showOutput(port, progress.done))
    yield* typeInput(port)
    // What the guest wrote last is still to be shown when it is gone, unless nobody reads it.
    const showRest = Fiber.await(shown).pipe(Effect.timeoutOption(SHOW_REST_LIMIT))
    // A guest that nobody hears is stopped.
    const unheard = Effect.andThen(Fiber.join(shown), Effect.never)
    return yield* Effect.ensuring(Effect.raceFirst(lifecycle.run, unheard), showRest)
  }).pipe(
    Effect.scoped,
    Effect.ensuring(progress.done),
    Effect.result
  )
  const seconds = (((yield* Clock.currentTimeMillis) - started) / 1000).toFixed(1)
  if (result._tag === "Success") {
    yield* progress.line(`${describeStop(result.success)} after ${seconds} s`)
    return yield* ExitStatus.set(exitCodeOfStop(result.success))
  }
  const error: GuestError | OutputLost | VsockError | VsockUnixSockets.VsockUnixSocketError = result.failure
  if (error instanceof VsockUnixSockets.VsockUnixSocketError) {
    return yield* ExitStatus.fail(ExitCode.BAD_INPUT, error.message)
  }
  if (error instanceof OutputLost || error instanceof VsockError) {
    return yield* ExitStatus.fail(ExitCode.FAILURE, error.message)
  }
  return yield* ExitStatus.fail(exitCodeOfError(error), error.message)
})
