// Cases of hostile drivers: each is a number, from which the device's transport and the script follow. A case that fails is repeated
// on a fresh rig and made smaller.
import { Choice } from "@troupe/core/testing/drivers/HostileChoice"
import { hostileScript, type HostileStep } from "@troupe/core/testing/drivers/HostileScript"
import { HOSTILE_SUBJECTS, type HostileChoices } from "./HostileDevices.ts"
import { HOSTILE_MEMORY, HostileRig } from "./HostileRig.ts"

/** Cases whose numbers begin alike are played on one rig, one after the other. */
export const CASES_PER_RIG = 256
/** One rig in so many is a PCI function. */
const PCI_EVERY = 4
/** The most steps of a script. */
const STEPS_MAX = 40
const HOSTILITIES = [0, 0.1, 0.3, 0.6, 1] as const

/** The names of all devices. */
export const HOSTILE_DEVICES: ReadonlyArray<string> = Object.keys(HOSTILE_SUBJECTS)

const subjectOf = (device: string) => {
  const subject = HOSTILE_SUBJECTS[device]
  if (subject === undefined) throw new Error(`there is no device ${JSON.stringify(device)}`)
  return subject
}

/** The rig that a case is played on. */
export const rigOf = (seed: number): { readonly first: number; readonly choices: HostileChoices } => {
  const rig = Math.floor(seed / CASES_PER_RIG)
  const transport = rig % PCI_EVERY === PCI_EVERY - 1 ? "pci" : "mmio"
  return { first: rig * CASES_PER_RIG, choices: { transport, packed: Math.floor(rig / PCI_EVERY) % 2 === 1 } }
}

/** The script of a case. */
export const scriptOf = (device: string, seed: number): ReadonlyArray<HostileStep> => {
  const { profile } = subjectOf(device)
  const choice = new Choice(seed)
  const hostility = choice.of(HOSTILITIES)
  return hostileScript(profile, { memory: HOSTILE_MEMORY }, choice, 1 + choice.below(STEPS_MAX), hostility)
}

/** A case that fails. */
export interface HostileFailure {
  readonly device: string
  readonly seed: number
  readonly choices: HostileChoices
  readonly cause: unknown
  /** The smallest script that was found to fail on a fresh rig; `undefined` when it takes the cases before this one. */
  readonly script: ReadonlyArray<HostileStep> | undefined
}

/** What goes wrong with a script on a fresh rig. */
export const tryScript = (
  device: string,
  choices: HostileChoices,
  script: ReadonlyArray<HostileStep>
): unknown => {
  try {
    new HostileRig(subjectOf(device).make, choices).play(script)
    return undefined
  } catch (cause) {
    return cause
  }
}

/** Leaves steps out, and then descriptors of requests, as long as the rest still fails. */
export const shrink = (
  device: string,
  choices: HostileChoices,
  script: ReadonlyArray<HostileStep>
): ReadonlyArray<HostileStep> => {
  let smallest = script
  const fails = (candidate: ReadonlyArray<HostileStep>) => tryScript(device, choices, candidate) !== undefined
  for (let size = Math.ceil(script.length / 2); size >= 1; size = size === 1 ? 0 : Math.ceil(size / 2)) {
    for (let at = 0; at < smallest.length;) {
      const candidate = smallest.toSpliced(at, size)
      if (fails(candidate)) smallest = candidate
      else at += size
    }
  }
  for (let at = 0; at < smallest.length; at++) {
    const step = smallest[at]
    if (step === undefined || step.do !== "request") continue
    let descriptors = step.descriptors
    for (let i = 0; i < descriptors.length && descriptors.length > 1;) {
      const fewer = descriptors.toSpliced(i, 1)
      if (fails(smallest.with(at, { ...step, descriptors: fewer }))) descriptors = fewer
      else i++
    }
    smallest = smallest.with(at, { ...step, descriptors })
  }
  return smallest
}

/** Plays cases of one device, whose numbers follow each other. `beforeEach` may end it by returning `false`. */
export const playCases = (
  device: string,
  seed: number,
  count: number,
  beforeEach: (seed: number) => boolean = () => true
): HostileFailure | undefined => {
  let rig: HostileRig | undefined
  for (let number = seed; number < seed + count; number++) {
    if (!beforeEach(number)) return undefined
    const { choices, first } = rigOf(number)
    if (rig === undefined || number === first) rig = new HostileRig(subjectOf(device).make, choices)
    const script = scriptOf(device, number)
    try {
      rig.play(script)
    } catch (cause) {
      const alone = tryScript(device, choices, script) !== undefined
      return {
        device,
        seed: number,
        choices,
        cause,
        script: alone ? shrink(device, choices, script) : undefined
      }
    }
  }
  return undefined
}

/** A failure in words: what went wrong, the script, and how to repeat it. */
export const describeFailure = (failure: HostileFailure): string => {
  const { cause, choices, device, script, seed } = failure
  const reasons: Array<string> = []
  for (let error = cause; error instanceof Error; error = error.cause) reasons.push(error.stack ?? error.message)
  const { first } = rigOf(seed)
  return [
    `The device ${device} (virtio-${choices.transport}) does not stand case ${seed}:`,
    reasons.length === 0 ? String(cause) : reasons.join("\ncaused by "),
    script === undefined
      ? `It takes the cases before it. Repeat it: npm run fuzz -- --device ${device} --seed ${first} --cases ${
        seed - first + 1
      }`
      : `The smallest script that fails:\n${script.map((step) => `  ${JSON.stringify(step)}`).join("\n")}\n` +
        `Repeat it: npm run fuzz -- --device ${device} --seed ${seed} --cases 1`
  ].join("\n")
}
