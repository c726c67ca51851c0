// The lab's small decoders: LZ4 legacy frames, bzImage payloads, cpio archives, Debian's package records.
import * as fc from "fast-check"
import { gzipSync, zstdCompressSync } from "node:zlib"
import { assert, describe, it } from "vitest"
import { extractVmlinux, releaseOf } from "../../scripts/lab/BzImage.ts"
import { type CpioEntry, encodeCpio, filesOfCpio } from "../../scripts/lab/Cpio.ts"
import { parseRecord } from "../../scripts/lab/DebianPackages.ts"
import { dependenciesOf } from "../../scripts/lab/KernelModules.ts"
import { LabError } from "../../scripts/lab/LabError.ts"
import { decodeLegacy, LZ4_LEGACY_MAGIC } from "../../scripts/lab/Lz4.ts"

/** Little-endian 32 bits. */
const word = (value: number): Buffer => {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32LE(value)
  return bytes
}

/** One LZ4 sequence: some literal bytes, then a copy of earlier output, unless it is a block's last. */
interface Sequence {
  readonly literals: Uint8Array
  readonly match: { readonly back: number; readonly length: number }
}

const lengthBytes = (length: number): ReadonlyArray<number> => {
  if (length < 15) return []
  const rest = length - 15
  return [...Array.from({ length: Math.floor(rest / 255) }, () => 255), rest % 255]
}

/** A block and what it stands for, computed the plain way. */
const blockOf = (
  sequences: ReadonlyArray<Sequence>
): { readonly block: Buffer; readonly plain: ReadonlyArray<number> } => {
  const block: Array<number> = []
  const plain: Array<number> = []
  for (const [index, { literals, match }] of sequences.entries()) {
    const last = index === sequences.length - 1
    plain.push(...literals)
    const length = match.length - 4
    block.push((Math.min(literals.length, 15) << 4) | (last ? 0 : Math.min(length, 15)))
    block.push(...lengthBytes(literals.length), ...literals)
    if (last) break
    const distance = 1 + (match.back % plain.length)
    block.push(distance & 0xff, distance >>> 8, ...lengthBytes(length))
    for (let i = 0; i < match.length; i++) plain.push(plain[plain.length - distance]!)
  }
  return { block: Buffer.from(block), plain }
}

const sequence: fc.Arbitrary<Sequence> = fc.record({
  literals: fc.uint8Array({ minLength: 1, maxLength: 300 }),
  match: fc.record({ back: fc.nat(60_000), length: fc.integer({ min: 4, max: 600 }) })
})
const blocks = fc.array(fc.array(sequence, { minLength: 1, maxLength: 8 }).map(blockOf), { minLength: 1, maxLength: 3 })

const frameOf = (parts: ReadonlyArray<{ readonly block: Buffer }>): Buffer =>
  Buffer.concat([word(LZ4_LEGACY_MAGIC), ...parts.flatMap(({ block }) => [word(block.length), block])])

/** A file with as much of the boot protocol's header as is looked at. */
const imageOf = (payload: Buffer): Buffer => {
  const header = Buffer.alloc(1024)
  header.writeUInt8(1, 0x1f1)
  header.writeUInt32LE(0x53726448, 0x202)
  header.writeUInt16LE(0x100, 0x20e)
  header.write("6.1.0-test (someone) #1\0", 0x300, "latin1")
  header.writeUInt32LE(16, 0x248)
  header.writeUInt32LE(payload.length, 0x24c)
  return Buffer.concat([header, Buffer.alloc(16), payload])
}

/** Only errors that are meant for the user may come out. */
const onlyLabErrors = (action: () => unknown): void => {
  try {
    action()
  } catch (cause) {
    if (!(cause instanceof LabError)) throw cause
  }
}

describe("LZ4 legacy frames", () => {
  it("decode to what their sequences say", () => {
    fc.assert(fc.property(blocks, (parts) => {
      const plain = parts.flatMap((part) => part.plain)
      assert.deepStrictEqual([...decodeLegacy(frameOf(parts), plain.length)], plain)
    }))
  })

  it("when damaged give wrong bytes or a LabError, and nothing else", () => {
    fc.assert(fc.property(blocks, fc.nat(), fc.integer({ min: 0, max: 255 }), fc.nat(5000), (parts, at, byte, size) => {
      const frame = frameOf(parts)
      frame[4 + (at % (frame.length - 4))] = byte
      onlyLabErrors(() => decodeLegacy(frame, size))
    }))
  })
})

describe("bzImage", () => {
  const elf = Buffer.concat([Buffer.from("\x7fELF"), Buffer.alloc(500, 0x5a)])

  it("gives the ELF kernel out of an LZ4, gzip or zstd payload", () => {
    const lz4 = frameOf([blockOf([{ literals: elf, match: { back: 0, length: 4 } }])])
    for (
      const payload of [
        Buffer.concat([lz4, word(elf.length)]),
        gzipSync(elf),
        Buffer.concat([zstdCompressSync(elf), word(elf.length)])
      ]
    ) {
      assert.deepStrictEqual(Buffer.from(extractVmlinux(imageOf(payload))), elf)
    }
  })

  it("says its release", () => {
    assert.strictEqual(releaseOf(imageOf(Buffer.alloc(16))), "6.1.0-test")
  })

  it("that is not one, is cut short, or has something else in it is refused with a reason", () => {
    const whole = imageOf(
      Buffer.concat([frameOf([blockOf([{ literals: elf, match: { back: 0, length: 4 } }])]), word(elf.length)])
    )
    assert.throws(() => extractVmlinux(Buffer.alloc(4096)), LabError, "HdrS")
    assert.throws(() => extractVmlinux(whole.subarray(0, -1)), LabError, "cut short")
    assert.throws(() => extractVmlinux(imageOf(Buffer.alloc(64))), LabError, "compressed in a way")
    assert.throws(() => extractVmlinux(imageOf(gzipSync(Buffer.alloc(64)))), LabError, "not an ELF file")
  })
})

describe("cpio", () => {
  const name = fc.stringMatching(/^[a-z0-9._-]{1,12}$/).filter((text) => !/^\.+$/.test(text) && text !== "TRAILER!!!")
  const path = fc.array(name, { minLength: 1, maxLength: 3 }).map((parts) => parts.join("/"))
  const files = fc.uniqueArray(fc.record({ path, data: fc.uint8Array({ maxLength: 50 }) }), {
    selector: (file) => file.path
  })

  it("gives back the files that were put in", () => {
    fc.assert(fc.property(files, (given) => {
      const entries = given.flatMap(({ data, path }): ReadonlyArray<CpioEntry> => [
        { type: "file", path, data },
        { type: "link", path: `${path}.link`, target: "elsewhere" }
      ])
      const archive = encodeCpio([{ type: "directory", path: "dev" }, {
        type: "device",
        path: "dev/x",
        major: 5,
        minor: 1
      }, ...entries])
      assert.strictEqual(archive.length % 4, 0)
      const found = [...filesOfCpio(archive)].map(([path, data]) => ({ path, data: new Uint8Array(data) }))
      assert.deepStrictEqual(found, given.map(({ data, path }) => ({ path, data: new Uint8Array(data) })))
    }))
  })

  it("that is cut anywhere gives the files before the cut", () => {
    fc.assert(fc.property(files, fc.nat(), (given, cut) => {
      const archive = encodeCpio(given.map(({ data, path }) => ({ type: "file", path, data })))
      const found = [...filesOfCpio(archive.subarray(0, cut % archive.length)).keys()]
      assert.deepStrictEqual(found, given.slice(0, found.length).map(({ path }) => path))
    }))
  })
})

describe("Debian packages", () => {
  it("are read from apt's records", () => {
    const record = parseRecord(
      "Package: linux-image-x\nVersion: 6.1-2\nDepends: linux-image-6.1 (= 6.1-2), kmod:any | other\nSize: 1504\n\nPackage: y\n"
    )
    assert.deepStrictEqual(record, {
      name: "linux-image-x",
      version: "6.1-2",
      depends: ["linux-image-6.1", "kmod"],
      size: 1504
    })
  })

  it("that are unknown have no record", () => {
    assert.isUndefined(parseRecord(""))
  })
})

describe("kernel modules", () => {
  it("name what they depend on", () => {
    assert.deepStrictEqual(dependenciesOf(Buffer.from("x\0depends=virtio,virtio_ring\0name=virtio_mmio\0")), [
      "virtio",
      "virtio_ring"
    ])
    assert.deepStrictEqual(dependenciesOf(Buffer.from("x\0depends=\0name=virtio\0")), [])
    assert.deepStrictEqual(dependenciesOf(Buffer.from("nothing")), [])
  })
})
