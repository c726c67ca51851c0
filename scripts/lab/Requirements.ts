// What the lab needs from the host, checked before anything is started.
import { existsSync } from "node:fs"
import { readFile } from "node:fs/promises"
import { hasCommand } from "./Command.ts"
import { LabError } from "./LabError.ts"

/** The Debian packages that the lab needs installed, one a line. */
export const packagesFile = new URL("packages.txt", import.meta.url)

/** The names in {@link packagesFile}. */
export const debianPackages = async (): Promise<ReadonlyArray<string>> =>
  (await readFile(packagesFile, "utf8")).split("\n").map((line) => line.trim()).filter((line) => line !== "")

/** The folders in which QEMU's firmware files are found on Debian. */
export const firmwareFolders: ReadonlyArray<string> = ["/usr/share/qemu", "/usr/share/seabios"]

/** The emulator, which is both the outer machine and the anchor that boots are measured against. */
export const EMULATOR = "qemu-system-x86_64"

const means: ReadonlyArray<{ readonly package: string; readonly present: () => boolean | Promise<boolean> }> = [
  { package: "qemu-system-x86", present: () => hasCommand(EMULATOR) },
  { package: "seabios", present: () => firmwareFolders.some((folder) => existsSync(`${folder}/bios-256k.bin`)) },
  { package: "e2fsprogs", present: () => hasCommand("mkfs.ext4") },
  { package: "util-linux", present: () => hasCommand("setpriv") },
  { package: "socat", present: () => hasCommand("socat") }
]

/** Why the lab cannot run on this host, in one line; undefined when it can. */
export const missingForLab = async (): Promise<string | undefined> => {
  if (process.platform !== "linux" || process.arch !== "x64") {
    return `the nested lab needs Linux on x86-64, and this is ${process.platform} on ${process.arch}`
  }
  const missing: Array<string> = []
  for (const mean of means) if (!await mean.present()) missing.push(mean.package)
  return missing.length === 0
    ? undefined
    : `the nested lab needs Debian packages that are not installed: apt-get install ${missing.join(" ")}`
}

/** Fails with the line of {@link missingForLab}. */
export const requireLab = async (): Promise<void> => {
  const missing = await missingForLab()
  if (missing !== undefined) throw new LabError(missing)
}
