// The memory of this process as the kernel counts it, that of guests left out.
import { readFileSync } from "node:fs"

const KIB = 1024
/** What may have been merged with the mapping of a guest's memory: register pages. */
const SLACK = 64 * KIB

/** In bytes. */
export interface ProcessMemory {
  readonly rss: number
  readonly privateDirty: number
  /** The part of guest memory that is resident. It is in neither of the others. */
  readonly guest: number
}

/** Whether a mapping is the memory of one or more guests of this size: no other mapping has it. */
const isGuestMemory = (permissions: string, size: number, guestMemory: number): boolean => {
  if (guestMemory === 0 || permissions !== "rw-p" || size < guestMemory) return false
  return size % guestMemory <= SLACK * Math.floor(size / guestMemory)
}

/** Sums over the mappings of this process; `guestMemory` is the size of each guest's memory, 0 when there are none. */
export const readMemory = (guestMemory: number): ProcessMemory => {
  let rss = 0
  let privateDirty = 0
  let guest = 0
  let isGuest = false
  for (const line of readFileSync("/proc/self/smaps", "utf8").split("\n")) {
    const range = /^([0-9a-f]+)-([0-9a-f]+) (....)/.exec(line)
    if (range !== null) {
      const size = Number.parseInt(range[2] ?? "", 16) - Number.parseInt(range[1] ?? "", 16)
      isGuest = isGuestMemory(range[3] ?? "", size, guestMemory)
      continue
    }
    const field = /^(Rss|Private_Dirty): +(\d+) kB/.exec(line)
    if (field === null) continue
    const bytes = Number(field[2]) * KIB
    if (field[1] === "Rss") {
      if (isGuest) guest += bytes
      else rss += bytes
    } else if (!isGuest) privateDirty += bytes
  }
  return { rss, privateDirty, guest }
}
