/** The bzImage loader: every rule of the setup header, and where kernels go. */
import { assert, describe, it } from "@effect/vitest"
import { BootParamsOffset, SETUP_HEADER_LIMIT, SETUP_HEADER_START } from "@troupe/core/boot/BootParams"
import { type BzImage, isBzImage, parseBzImage, placeBzImage } from "@troupe/core/boot/BzImage"
import type { KernelImageError } from "@troupe/core/boot/KernelImageError"
import { makeBzImage } from "@troupe/core/testing/KernelImages"
import type * as Result from "effect/Result"
import * as fc from "fast-check"

const at = BootParamsOffset
const kernel = new Uint8Array(4096).fill(0x90)

const spoiled = (spoil: (view: DataView) => void, options = {}): Uint8Array => {
  const image = makeBzImage({ kernel, ...options })
  spoil(new DataView(image.buffer))
  return image
}

const refusal = <A>(result: Result.Result<A, KernelImageError>): KernelImageError => {
  if (result._tag === "Success") throw new Error("the image was accepted")
  return result.failure
}

const parsed = (image: Uint8Array): BzImage => {
  const result = parseBzImage(image)
  if (result._tag === "Failure") throw new Error(result.failure.message)
  return result.success
}

describe("parseBzImage", () => {
  it("reads what the header says", () => {
    const image = makeBzImage({
      kernel,
      prefAddress: 0x300_0000,
      initSize: 0x9_0000,
      cmdlineSize: 77,
      initrdAddrMax: 5
    })
    assert.isTrue(isBzImage(image))
    const result = parsed(image)
    assert.strictEqual(result.prefAddress, 0x300_0000)
    assert.strictEqual(result.kernelAlignment, 0x20_0000)
    assert.strictEqual(result.initSize, 0x9_0000)
    assert.strictEqual(result.cmdlineSize, 77)
    assert.strictEqual(result.initrdAddrMax, 5)
    assert.isTrue(result.relocatable)
    assert.deepStrictEqual(result.kernel, kernel)
    assert.strictEqual(result.kernel.buffer, image.buffer, "the kernel is a view of the file")
    assert.strictEqual(result.setupHeader[0], 4, "the setup header starts at setup_sects")
  })

  it("takes setup_sects 0 as 4", () => {
    const result = parsed(spoiled((view) => view.setUint8(at.setup_sects, 0)))
    assert.deepStrictEqual(result.kernel, kernel)
  })

  it("never takes more of the setup header than boot_params has room for", () => {
    const result = parsed(spoiled((view) => view.setUint8(at.jump + 1, 0xff)))
    assert.strictEqual(result.setupHeader.length, SETUP_HEADER_LIMIT - SETUP_HEADER_START)
  })

  it("takes the shortest setup header of protocol 2.12", () => {
    const result = parsed(spoiled((view) => view.setUint8(at.jump + 1, 0x66)))
    assert.strictEqual(result.setupHeader.length, 0x268 - SETUP_HEADER_START)
  })

  it("takes a kernel that needs no more memory than its own size", () => {
    assert.strictEqual(parsed(makeBzImage({ kernel, initSize: kernel.length })).initSize, kernel.length)
  })

  it("leaves what follows the kernel, such as a signature, out", () => {
    const image = makeBzImage({ kernel })
    const signed = new Uint8Array(image.length + 1000)
    signed.set(image)
    assert.strictEqual(parsed(signed).kernel.length, kernel.length)
  })

  const rules: ReadonlyArray<[field: string, spoil: (view: DataView) => void, options?: object]> = [
    ["boot_flag", (view) => view.setUint16(at.boot_flag, 0xaa54, true)],
    ["header", (view) => view.setUint32(at.header, 0x5372_6449, true)],
    ["version", (view) => view.setUint16(at.version, 0x020b, true)],
    ["loadflags", (view) => view.setUint8(at.loadflags, 0xfe)],
    ["xloadflags", (view) => view.setUint16(at.xloadflags, 0xfffe, true)],
    ["setup_sects", (view) => view.setUint8(at.setup_sects, 255)],
    ["jump", (view) => view.setUint8(at.jump, 0xe9)],
    ["jump", (view) => view.setUint8(at.jump + 1, 0x65)],
    ["syssize", (view) => view.setUint32(at.syssize, 0, true)],
    ["syssize", (view) => view.setUint32(at.syssize, 0x20, true)],
    ["syssize", (view) => view.setUint32(at.syssize, kernel.length / 16 + 1, true)],
    ["syssize", (view) => view.setUint32(at.syssize, 0xffff_ffff, true)],
    ["kernel_alignment", (view) => view.setUint32(at.kernel_alignment, 0, true)],
    ["kernel_alignment", (view) => view.setUint32(at.kernel_alignment, 0x30_0000, true)],
    ["pref_address", (view) => view.setUint32(at.pref_address + 4, 0xffff_ffff, true)],
    ["init_size", (view) => view.setUint32(at.init_size, kernel.length - 1, true)]
  ]
  for (const [index, [field, spoil]] of rules.entries()) {
    it(`names ${field} when it is wrong (${index})`, () => {
      const error = refusal(parseBzImage(spoiled(spoil)))
      assert.strictEqual(error.field, field)
      assert.strictEqual(error.part, "bzImage")
      assert.match(error.message, new RegExp(`^bzImage: ${field} must .*, found `))
    })
  }

  it("says of every truncation that the file is too short", () => {
    const image = makeBzImage({ kernel })
    fc.assert(fc.property(fc.integer({ min: 0, max: image.length - 1 }), (length) => {
      const error = refusal(parseBzImage(image.subarray(0, length)))
      assert.include(["file size", "setup_sects", "syssize"], error.field)
    }))
  })
})

describe("placeBzImage", () => {
  const lowTop = 0x1000_0000
  const place = (options: object, top = lowTop) => placeBzImage(parsed(makeBzImage({ kernel, ...options })), top)
  const placed = (options: object, top = lowTop) => {
    const result = place(options, top)
    if (result._tag === "Failure") throw new Error(result.failure.message)
    return result.success
  }

  it("takes the preferred address and reserves init_size", () => {
    assert.deepStrictEqual(placed({ initSize: 0x12_3456 }), { guestAddress: 0x100_0000, size: 0x12_3456 })
  })

  it("aligns a relocatable kernel and keeps it above 1 MiB", () => {
    assert.strictEqual(placed({ prefAddress: 0x100_1000 }).guestAddress, 0x120_0000)
    assert.strictEqual(placed({ prefAddress: 0 }).guestAddress, 0x20_0000)
    assert.strictEqual(placed({ prefAddress: 0, kernelAlignment: 0x1000 }).guestAddress, 0x10_0000)
  })

  it("loads any other kernel exactly where it was built to run", () => {
    assert.strictEqual(placed({ prefAddress: 0x123_4000, relocatable: false }).guestAddress, 0x123_4000)
    assert.strictEqual(refusal(place({ prefAddress: 0xf_f000, relocatable: false })).field, "pref_address")
  })

  it("wants init_size bytes of memory behind the load address", () => {
    assert.strictEqual(placed({ initSize: lowTop - 0x100_0000 }).size, lowTop - 0x100_0000)
    assert.strictEqual(refusal(place({ initSize: lowTop - 0x100_0000 + 1 })).field, "init_size")
    assert.strictEqual(refusal(place({ prefAddress: 2 ** 51 })).field, "init_size")
  })
})
