// The clone's own `troupe run`, as a command line for the host or for the lab.
import { join } from "node:path"
import { cloneRoot } from "./Cache.ts"

/** The command's source, relative to the clone. */
export const TROUPE_SOURCE = "packages/node/src/bin/troupe.ts"

/** What a guest is started with. */
export interface TroupeRun {
  readonly kernel: string
  readonly initrd: string
  readonly cmdline: string
  readonly cpus: number
  /** MiB. */
  readonly memory: number
  readonly bootProtocol: "auto" | "linux64" | "pvh"
}

/** The arguments after `node`, for a clone at `root`. */
export const troupeArguments = (run: TroupeRun, root: string = cloneRoot): ReadonlyArray<string> => [
  "--disable-warning=ExperimentalWarning",
  join(root, TROUPE_SOURCE),
  "run",
  "--kernel",
  run.kernel,
  "--initrd",
  run.initrd,
  "--cmdline",
  run.cmdline,
  "--cpus",
  String(run.cpus),
  "--memory",
  `${run.memory}M`,
  "--boot-protocol",
  run.bootProtocol
]

/** A word as the shell reads it back unchanged. */
export const quoted = (word: string): string => `'${word.replaceAll("'", "'\\''")}'`
