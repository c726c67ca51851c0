// The lab's root file system: Node, QEMU, npm packages, kernels. Built once, read-only, the same for every run.
import { createHash } from "node:crypto"
import { existsSync } from "node:fs"
import { copyFile, cp, mkdir, readdir, readFile, rm, stat, symlink, truncate, writeFile } from "node:fs/promises"
import { basename, dirname, join } from "node:path"
import { cachePath, cloneRoot, once } from "./Cache.ts"
import { dependencyFolders, isRuntimeFile } from "./Checkout.ts"
import { run, runOk } from "./Command.ts"
import { buildGuestInitramfs, DEVICE_MODULES } from "./GuestInitramfs.ts"
import type { LinuxKernel } from "./LinuxKernel.ts"
import type { Progress } from "./Progress.ts"
import { EMULATOR, firmwareFolders } from "./Requirements.ts"

/** Where things are inside the lab. */
export const labPaths = {
  bzImage: "/lab/bzImage",
  vmlinux: "/lab/vmlinux",
  initrd: "/lab/guest.cpio.gz",
  /** The clone's sources, writable, gone after the run. */
  repository: "/repo",
  node: "/usr/bin/node",
  busybox: "/bin/busybox",
  /** The distribution's socat with its libraries, for guests, as a tar archive. */
  socat: "/lab/socat.tar",
  /** The modules of all virtio devices, uncompressed. */
  modules: "/lab/modules"
} as const

/** Raised when the layout of the image changes, so that older ones are built anew. */
const LAYOUT = 6

/** The firmware of QEMU's microvm and q35 machines with a kernel given. */
const FIRMWARE = ["bios-microvm.bin", "qboot.rom", "pvh.bin", "linuxboot_dma.bin", "kvmvapic.bin", "bios-256k.bin"]

const commandPath = async (command: string): Promise<string> =>
  (await runOk("/bin/sh", ["-c", `command -v "$1"`, "sh", command])).stdout.toString().trim()

const librariesOf = async (binary: string): Promise<ReadonlyArray<string>> => {
  const listed = (await run("ldd", [binary])).stdout.toString()
  return [...listed.matchAll(/(?:=> )?(\/\S+) \(0x/g)].map((match) => match[1]!)
}

const copyTo = async (root: string, from: string, to: string): Promise<void> => {
  const target = join(root, to)
  if (existsSync(target)) return
  await mkdir(dirname(target), { recursive: true })
  await copyFile(from, target)
}

const stage = async (root: string, kernel: LinuxKernel, initrd: Buffer): Promise<void> => {
  for (const folder of ["bin", "dev", "lab", "proc", "repo", "run", "sys", "tmp", "root", "deps", "usr/bin"]) {
    await mkdir(join(root, folder), { recursive: true })
  }
  await copyTo(root, kernel.busybox, "bin/busybox")
  const applets = (await runOk(kernel.busybox, ["--list"])).stdout.toString().split("\n").filter(Boolean)
  for (const applet of applets) if (applet !== "busybox") await symlink("busybox", join(root, "bin", applet))
  const binaries = [[process.execPath, labPaths.node], [await commandPath(EMULATOR), `/usr/bin/${EMULATOR}`]] as const
  for (const [from, to] of binaries) {
    await copyTo(root, from, to)
    for (const library of await librariesOf(from)) await copyTo(root, library, library)
  }
  for (const file of FIRMWARE) {
    const folder = firmwareFolders.find((candidate) => existsSync(join(candidate, file)))
    if (folder !== undefined) await copyTo(root, join(folder, file), `usr/share/qemu/${file}`)
  }
  await copyTo(root, kernel.bzImage, labPaths.bzImage)
  await copyTo(root, kernel.vmlinux, labPaths.vmlinux)
  await writeFile(join(root, labPaths.initrd), initrd)
  const socat = await commandPath("socat")
  const files = [socat, ...await librariesOf(socat)].map((path) => path.slice(1))
  await runOk("tar", ["--create", "--dereference", "--file", join(root, labPaths.socat), "--directory", "/", ...files])
  await mkdir(join(root, labPaths.modules))
  await writeFile(join(root, labPaths.modules, "modules.builtin"), kernel.modules?.builtin ?? "")
  for (const { data, name } of await kernel.modules?.load(DEVICE_MODULES) ?? []) {
    await writeFile(join(root, labPaths.modules, `${name}.ko`), data)
  }
  for (const folder of await dependencyFolders()) {
    await cp(join(cloneRoot, folder), join(root, "deps", folder), {
      recursive: true,
      verbatimSymlinks: true,
      filter: (source) => isRuntimeFile(source.slice(cloneRoot.length))
    })
  }
  // What the clone's own scripts import: Effect, and the packages of the clone, which come with the sources.
  await cp(join(cloneRoot, "node_modules/effect"), join(root, "deps/node_modules/effect"), { verbatimSymlinks: true })
  await mkdir(join(root, "deps/node_modules/@troupe"))
  for (const name of await readdir(join(cloneRoot, "packages"))) {
    await symlink(`${labPaths.repository}/packages/${name}`, join(root, "deps/node_modules/@troupe", name))
  }
}

const sizeOf = async (folder: string): Promise<number> => {
  let bytes = 0
  for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
    // A whole number of blocks for each file, and its share of the inode table.
    bytes += 8192
    if (entry.isFile()) bytes += (await stat(join(entry.parentPath, entry.name))).size
  }
  return bytes
}

/** A cheap name for the content: everything that goes into the image, by version or by size and time. */
const keyOf = async (kernel: LinuxKernel, initrd: Buffer): Promise<string> => {
  const hash = createHash("sha256")
  // The ELF kernel's name has a digest of the bzImage in it.
  hash.update(`${LAYOUT} ${process.version} ${basename(kernel.vmlinux)}`)
  hash.update(initrd)
  hash.update(DEVICE_MODULES.join())
  hash.update(await readFile(join(cloneRoot, "pnpm-lock.yaml")))
  const emulator = await stat(await commandPath(EMULATOR))
  hash.update(`${emulator.size} ${emulator.mtimeMs}`)
  return hash.digest("hex").slice(0, 16)
}

/** The path of the image, built now if there is none for this Node, kernel, QEMU and lockfile. */
export const provideRootImage = async (kernel: LinuxKernel, progress: Progress): Promise<string> => {
  const initrd = await buildGuestInitramfs(kernel)
  const folder = cachePath("lab")
  const path = join(folder, `root-${await keyOf(kernel, initrd)}.img`)
  if (existsSync(path)) return path
  await once(path, async (temporary) => {
    progress("building the lab's root image (once)")
    const root = `${temporary}.root`
    try {
      await mkdir(root, { recursive: true })
      await stage(root, kernel, initrd)
      const bytes = Math.ceil((await sizeOf(root) * 1.1 + (64 << 20)) / (1 << 20)) * (1 << 20)
      await writeFile(temporary, "")
      await truncate(temporary, bytes)
      await runOk("mkfs.ext4", [
        "-q",
        "-F",
        "-b",
        "4096",
        "-O",
        "^has_journal",
        "-m",
        "0",
        "-E",
        "root_owner=0:0",
        "-d",
        root,
        temporary
      ])
    } finally {
      await rm(root, { recursive: true, force: true })
    }
  })
  // An image of an older lockfile or kernel is of no more use, and they are large.
  for (const file of await readdir(folder)) {
    if (/^root-.*\.img$/.test(file) && file !== basename(path)) await rm(join(folder, file), { force: true })
  }
  return path
}
