// An unmodified distribution kernel with what a small guest needs beside it: modules and a static busybox.
import { createHash } from "node:crypto"
import { existsSync } from "node:fs"
import { readdir, readFile, writeFile } from "node:fs/promises"
import { join, resolve } from "node:path"
import { extractVmlinux, releaseOf } from "./BzImage.ts"
import { cachePath, once } from "./Cache.ts"
import { run } from "./Command.ts"
import { fetchFirstDependency, fetchPackage } from "./DebianPackages.ts"
import { KernelModules } from "./KernelModules.ts"
import { LabError } from "./LabError.ts"
import type { Progress } from "./Progress.ts"

/** Debian's package that depends on the newest kernel for virtual machines. */
export const CLOUD_KERNEL_PACKAGE = "linux-image-cloud-amd64"

/** Debian's package of the one-file userspace. */
export const BUSYBOX_PACKAGE = "busybox-static"

/** A kernel and its surroundings, as paths on the host. */
export interface LinuxKernel {
  /** What `uname -r` will say. */
  readonly release: string
  /** Where it came from, for messages. */
  readonly origin: string
  readonly bzImage: string
  /** The uncompressed ELF kernel. */
  readonly vmlinux: string
  readonly busybox: string
  /** Undefined for a kernel that the user gave and whose modules are nowhere to be found. */
  readonly modules: KernelModules | undefined
}

export interface LinuxKernelOptions {
  readonly progress: Progress
  /** A bzImage to use instead of Debian's; see {@link givenKernel}. */
  readonly kernel?: string | undefined
  /** A static busybox to use instead of Debian's; the variable `TROUPE_BUSYBOX` says the same. */
  readonly busybox?: string | undefined
}

/** The bzImage that the user wants for guests, if any: the variable `TROUPE_KERNEL`. */
export const givenKernel = (): string | undefined => process.env["TROUPE_KERNEL"] || undefined

const provideBusybox = async (given: string | undefined, progress: Progress): Promise<string> => {
  if (given === undefined) {
    const { root } = await fetchPackage(BUSYBOX_PACKAGE, progress)
    const path = ["bin/busybox", "usr/bin/busybox"].map((file) => join(root, file)).find((file) => existsSync(file))
    if (path === undefined) throw new LabError(`the Debian package ${BUSYBOX_PACKAGE} has no busybox in it`)
    return path
  }
  const probe = await run(given, ["true"]).catch(() => undefined)
  if (probe?.code !== 0) throw new LabError(`${given} is not a busybox that runs here`)
  return resolve(given)
}

const read = (path: string): Promise<Buffer> =>
  readFile(path).catch((cause: unknown) => {
    throw new LabError(`the kernel ${path} cannot be read: ${cause instanceof Error ? cause.message : String(cause)}`)
  })

/** Puts the file's name before what is wrong with it. */
const named = <A>(path: string, look: () => A): A => {
  try {
    return look()
  } catch (cause) {
    throw new LabError(`the kernel ${path}: ${cause instanceof Error ? cause.message : String(cause)}`)
  }
}

/** The kernel that the user named, or Debian's cloud kernel, fetched at first use. */
export const provideKernel = async (options: LinuxKernelOptions): Promise<LinuxKernel> => {
  const { progress } = options
  const given = options.kernel
  const busybox = await provideBusybox(options.busybox ?? (process.env["TROUPE_BUSYBOX"] || undefined), progress)
  let bzImage: string
  let modulesRoot: string
  let origin: string
  if (given === undefined) {
    const unpacked = await fetchFirstDependency(CLOUD_KERNEL_PACKAGE, progress)
    const boot = join(unpacked.root, "boot")
    const image = (await readdir(boot)).find((file) => file.startsWith("vmlinuz-"))
    if (image === undefined) throw new LabError(`the Debian package ${unpacked.name} has no boot/vmlinuz in it`)
    bzImage = join(boot, image)
    const usrMerged = join(unpacked.root, "usr/lib/modules")
    modulesRoot = existsSync(usrMerged) ? usrMerged : join(unpacked.root, "lib/modules")
    origin = `Debian package ${unpacked.name} ${unpacked.version}`
  } else {
    bzImage = resolve(given)
    modulesRoot = "/lib/modules"
    origin = bzImage
  }
  const image = await read(bzImage)
  const release = named(bzImage, () => releaseOf(image))
  const digest = createHash("sha256").update(image).digest("hex").slice(0, 16)
  const vmlinux = await once(cachePath("linux", `vmlinux-${release}-${digest}`), async (temporary) => {
    progress(`unpacking the ELF kernel out of ${bzImage}`)
    await writeFile(temporary, named(bzImage, () => extractVmlinux(image)))
  })
  const folder = join(modulesRoot, release)
  const modules = existsSync(folder) ? await KernelModules.open(folder, busybox) : undefined
  return { release, origin, bzImage, vmlinux, busybox, modules }
}
