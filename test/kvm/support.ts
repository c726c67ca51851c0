/** What the tests on a real KVM share: whether there is one here. */
import { closeSync, openSync } from "node:fs"

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
