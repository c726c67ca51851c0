// The tiers of the tests: which of them this machine can run, and why not the others.
import { closeSync, constants, openSync } from "node:fs"
import { missingForLinux } from "./lab/LinuxRunner.ts"

/** The tiers, which are the projects of vitest.config.ts. */
export const TIERS = ["packages", "kvm", "lab"] as const
export type Tier = (typeof TIERS)[number]

/** A tier that does not run. */
export interface SkippedTier {
  readonly name: Tier
  readonly reason: string
  /** Whether its absence is a failure. */
  readonly required: boolean
}

/** The variable that carries the skipped tiers to the reporter. */
export const SKIPPED_TIERS_VARIABLE = "TROUPE_SKIPPED_TIERS"
/** Names tiers, with commas between them, that must run: where one of them cannot, the tests fail. */
export const REQUIRED_TIERS_VARIABLE = "TROUPE_REQUIRE_TIERS"

const isTier = (name: string): name is Tier => TIERS.some((tier) => tier === name)

/** Why this machine's KVM cannot be used, in a sentence; undefined when it can, as far as opening it tells. */
export const whyNoKvm = (path = "/dev/kvm"): string | undefined => {
  if (process.arch !== "x64") return `guests are x86-64, and this machine is ${process.arch}`
  try {
    closeSync(openSync(path, constants.O_RDWR))
    return undefined
  } catch (cause) {
    const code = cause instanceof Error && "code" in cause ? String(cause.code) : String(cause)
    switch (code) {
      case "ENOENT":
        return `there is no ${path} (no KVM in this kernel, or not passed into this container)`
      case "EACCES":
      case "EPERM":
        return `no permission to open ${path} (on Debian: add yourself to the group kvm, or run as root)`
      case "ENODEV":
      case "ENXIO":
        return `${path} is there, but the processor's virtualization is off or taken`
      default:
        return `${path} cannot be opened (${code})`
    }
  }
}

/** Reads {@link REQUIRED_TIERS_VARIABLE}. Throws on a name that is no tier: a typing error must not switch a rule off. */
export const requiredTiers = (text: string | undefined): ReadonlySet<Tier> => {
  const names = (text ?? "").split(",").map((name) => name.trim()).filter((name) => name !== "")
  return new Set(names.map((name) => {
    if (isTier(name)) return name
    throw new Error(`${REQUIRED_TIERS_VARIABLE} names ${JSON.stringify(name)}, and the tiers are ${TIERS.join(", ")}`)
  }))
}

/** The tiers that cannot run on this machine. */
export const skippedTiers = async (): Promise<ReadonlyArray<SkippedTier>> => {
  const required = requiredTiers(process.env[REQUIRED_TIERS_VARIABLE])
  const reasons = [["kvm", whyNoKvm()], ["lab", await missingForLinux()]] as const
  return reasons.flatMap(([name, reason]) =>
    reason === undefined ? [] : [{ name, reason, required: required.has(name) }]
  )
}

/** What `npm test` told the reporter. */
export const tiersFromEnvironment = (): ReadonlyArray<SkippedTier> => {
  const text = process.env[SKIPPED_TIERS_VARIABLE]
  return text === undefined || text === "" ? [] : JSON.parse(text)
}
