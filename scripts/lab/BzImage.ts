// What is inside a bzImage: its version, and the uncompressed ELF kernel (vmlinux) in its payload.
import { gunzipSync, zstdDecompressSync } from "node:zlib"
import { LabError } from "./LabError.ts"
import { decodeLegacy, LZ4_LEGACY_MAGIC } from "./Lz4.ts"

// Offsets in the set-up header (Linux x86 boot protocol, section "The Real-Mode Kernel Header").
const SETUP_SECTS = 0x1f1
const HEADER = 0x202
const KERNEL_VERSION = 0x20e
const PAYLOAD_OFFSET = 0x248
const PAYLOAD_LENGTH = 0x24c
const HDRS_MAGIC = 0x53726448
const SECTOR = 512

/** No kernel is larger than this; it bounds what a damaged size field can make us allocate. */
const LARGEST_KERNEL = 512 << 20

const headerOf = (image: Buffer): Buffer => {
  if (image.length < 0x260 || image.readUInt32LE(HEADER) !== HDRS_MAGIC) {
    throw new LabError("not a bzImage: the boot protocol's magic \"HdrS\" is not at 0x202")
  }
  return image
}

/** The release that the image says it is, such as `6.1.0-9-cloud-amd64`. */
export const releaseOf = (image: Buffer): string => {
  const at = headerOf(image).readUInt16LE(KERNEL_VERSION) + SECTOR
  const end = image.indexOf(0, at)
  return image.toString("latin1", at, end < 0 ? at : Math.min(end, at + 256)).split(" ", 1)[0] ?? ""
}

/** The uncompressed ELF kernel out of a bzImage that is compressed with LZ4, gzip or zstd. */
export const extractVmlinux = (image: Buffer): Uint8Array => {
  headerOf(image)
  // 0 stands for 4, says the protocol.
  const sectors = image.readUInt8(SETUP_SECTS) || 4
  const start = (sectors + 1) * SECTOR + image.readUInt32LE(PAYLOAD_OFFSET)
  const length = image.readUInt32LE(PAYLOAD_LENGTH)
  const payload = image.subarray(start, start + length)
  if (length < 16 || payload.length < length) {
    throw new LabError("the bzImage is cut short: its payload is not all there")
  }
  const magic = payload.readUInt32LE(0)
  if ((magic & 0xffff) === 0x8b1f) return checked(gunzipSync(payload, { maxOutputLength: LARGEST_KERNEL }))
  // The kernel's build appends the size of what was compressed, where the format itself does not say it.
  const size = payload.readUInt32LE(payload.length - 4)
  if (size > LARGEST_KERNEL) throw new LabError(`the bzImage says that its kernel has ${size} bytes`)
  const packed = payload.subarray(0, payload.length - 4)
  if (magic === LZ4_LEGACY_MAGIC) return checked(decodeLegacy(packed, size))
  if (magic === 0xfd2fb528) return checked(zstdDecompressSync(packed, { maxOutputLength: LARGEST_KERNEL }))
  throw new LabError(
    `the bzImage's payload is compressed in a way that is not supported (magic 0x${magic.toString(16)})`
  )
}

const checked = (elf: Uint8Array): Uint8Array => {
  if (elf[0] !== 0x7f || elf[1] !== 0x45 || elf[2] !== 0x4c || elf[3] !== 0x46) {
    throw new LabError("the bzImage's payload is not an ELF file")
  }
  return elf
}
