// The newc form of cpio, which Linux takes as initramfs, busybox reads and writes, and the lab uses to move files.

/** One entry of an archive. Paths have no leading slash. */
export type CpioEntry =
  | { readonly type: "directory"; readonly path: string; readonly mode?: number }
  | { readonly type: "file"; readonly path: string; readonly data: Uint8Array; readonly mode?: number }
  | { readonly type: "link"; readonly path: string; readonly target: string }
  | { readonly type: "device"; readonly path: string; readonly major: number; readonly minor: number }

const S_IFDIR = 0o040000
const S_IFREG = 0o100000
const S_IFLNK = 0o120000
const S_IFCHR = 0o020000
const S_IFMT = 0o170000

const MAGIC = "070701"
const HEADER_BYTES = 110
const TRAILER = "TRAILER!!!"

const padding = (length: number): Buffer => Buffer.alloc((4 - (length % 4)) % 4)

const encodeEntry = (
  inode: number,
  path: string,
  mode: number,
  data: Uint8Array,
  device: readonly [major: number, minor: number] = [0, 0]
): ReadonlyArray<Uint8Array> => {
  const name = Buffer.from(`${path}\0`)
  const links = (mode & S_IFMT) === S_IFDIR ? 2 : 1
  // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
  const fields = [inode, mode, 0, 0, links, 0, data.length, 0, 0, device[0], device[1], name.length, 0]
  const header = Buffer.from(MAGIC + fields.map((field) => field.toString(16).padStart(8, "0")).join(""), "latin1")
  return [header, name, padding(HEADER_BYTES + name.length), data, padding(data.length)]
}

const empty = new Uint8Array(0)

/** An archive of `entries`, in their order; the same entries always give the same bytes. */
export const encodeCpio = (entries: Iterable<CpioEntry>): Buffer => {
  const parts: Array<Uint8Array> = []
  let inode = 1
  for (const entry of entries) {
    switch (entry.type) {
      case "directory":
        parts.push(...encodeEntry(inode, entry.path, S_IFDIR | (entry.mode ?? 0o755), empty))
        break
      case "file":
        parts.push(...encodeEntry(inode, entry.path, S_IFREG | (entry.mode ?? 0o644), entry.data))
        break
      case "link":
        parts.push(...encodeEntry(inode, entry.path, S_IFLNK | 0o777, Buffer.from(entry.target)))
        break
      case "device":
        parts.push(...encodeEntry(inode, entry.path, S_IFCHR | 0o600, empty, [entry.major, entry.minor]))
        break
    }
    inode++
  }
  parts.push(...encodeEntry(0, TRAILER, 0, empty))
  return Buffer.concat(parts)
}

/** The regular files of an archive by path; a damaged archive yields what stands before the damage. */
export const filesOfCpio = (archive: Buffer): ReadonlyMap<string, Buffer> => {
  const files = new Map<string, Buffer>()
  let at = 0
  while (at + HEADER_BYTES <= archive.length && archive.toString("latin1", at, at + 6) === MAGIC) {
    const field = (index: number) =>
      Number.parseInt(archive.toString("latin1", at + 6 + index * 8, at + 14 + index * 8), 16)
    const nameLength = field(11)
    const dataLength = field(6)
    const nameAt = at + HEADER_BYTES
    const dataAt = nameAt + nameLength + padding(HEADER_BYTES + nameLength).length
    if (!(dataAt + dataLength <= archive.length)) break
    const name = archive.toString("utf8", nameAt, nameAt + nameLength - 1)
    if (name === TRAILER) break
    if ((field(1) & S_IFMT) === S_IFREG) {
      files.set(name.replace(/^\.\//, ""), archive.subarray(dataAt, dataAt + dataLength))
    }
    at = dataAt + dataLength + padding(dataLength).length
  }
  return files
}
