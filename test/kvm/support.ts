/** What the tests on a real KVM share: whether there is one here, and how much memory guests have. */
import { closeSync, openSync, readFileSync } from "node:fs"

const findObstacle = (): string | undefined => {
  try {
    closeSync(openSync("/dev/kvm", "r+"))
    return undefined
  } catch (cause) {
    return `/dev/kvm cannot be opened: ${cause instanceof Error ? cause.message : String(cause)}`
  }
}

/** Why no test can use KVM here, or `undefined` when it can be used. */
export const kvmObstacle: string | undefined = findObstacle()

/** The title of a suite on KVM: names the reason when it is skipped. */
export const onKvm = (title: string): string => kvmObstacle === undefined ? title : `${title} (skipped: ${kvmObstacle})`

/**
 * Memory of this process that is really there in private mappings of at least this many bytes, in bytes: that of guests, and nothing of
 * what Node takes and gives back meanwhile. V8 marks its heap so that it is not inherited (`dc`).
 */
export const residentBytesIn = (mappingSize: number): number => {
  let resident = 0
  for (const mapping of readFileSync("/proc/self/smaps", "utf8").split(/^(?=[0-9a-f]+-[0-9a-f]+ )/m)) {
    const [, from = "", to = ""] = /^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *\n/.exec(mapping) ?? []
    if (Number(`0x${to}`) - Number(`0x${from}`) < mappingSize || /^VmFlags:.* dc\b/m.test(mapping)) continue
    resident += 1024 * Number(/^Rss: +(\d+) kB$/m.exec(mapping)?.[1] ?? 0)
  }
  return resident
}
