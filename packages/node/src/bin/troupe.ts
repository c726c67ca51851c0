#!/usr/bin/env -S node --disable-warning=ExperimentalWarning
/** The `troupe` command. */
import * as NodeRuntime from "@effect/platform-node/NodeRuntime"
import * as NodeServices from "@effect/platform-node/NodeServices"
import * as Command from "effect/cli/Command"
import * as Effect from "effect/Effect"
import { doctorCommand } from "../cli/DoctorCommand.ts"
import { runCommand } from "../cli/RunCommand.ts"
import { forceOnSecondSignal } from "../cli/Signals.ts"
import { surviveLostStreams } from "../cli/Terminal.ts"
import { version } from "../version.ts"

const troupe = Command.make("troupe").pipe(
  Command.withDescription("Run virtual machines on KVM, each a tree of supervised fibers"),
  Command.withSubcommands([runCommand, doctorCommand])
)

forceOnSecondSignal()
surviveLostStreams()
troupe.pipe(
  Command.run({ version }),
  Effect.provide(NodeServices.layer),
  NodeRuntime.runMain
)
