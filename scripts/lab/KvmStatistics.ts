// What the kernel counted for a running virtual machine, read from debugfs; any VMM is measured the same way.
import { readdir, readFile } from "node:fs/promises"
import { join } from "node:path"

/** The folder in which KVM keeps a folder of counters for each machine. */
const KVM_DEBUG = "/sys/kernel/debug/kvm"

/** Counters by KVM's own name, such as `exits`, `io_exits`, `mmio_exits`, `halt_exits`; those at zero left out. */
export type KvmCounters = Readonly<Record<string, number>>

/** The counters of every machine on this host added up, which in the lab is the one machine being measured. */
export const readCounters = async (): Promise<KvmCounters> => {
  const totals: Record<string, number> = {}
  const entries = await readdir(KVM_DEBUG, { withFileTypes: true }).catch(() => [])
  for (const entry of entries) {
    if (!entry.isDirectory()) continue
    const folder = join(KVM_DEBUG, entry.name)
    for (const file of await readdir(folder, { withFileTypes: true }).catch(() => [])) {
      if (!file.isFile()) continue
      // The machine may end while its counters are read.
      const text = await readFile(join(folder, file.name), "utf8").catch(() => "")
      const value = Number(text)
      if (Number.isSafeInteger(value) && value !== 0) totals[file.name] = (totals[file.name] ?? 0) + value
    }
  }
  return totals
}
