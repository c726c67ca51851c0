import { GuestMemory, MemoryRegion, PAGE_SIZE } from "@troupe/core/GuestMemory"
import * as fc from "fast-check"
import { assert, describe, it } from "vitest"

const LOW = 0
const HIGH = 0x1_0000_0000
const makeMemory = () =>
  new GuestMemory([
    new MemoryRegion(HIGH, new ArrayBuffer(2 * PAGE_SIZE)),
    new MemoryRegion(LOW, new ArrayBuffer(4 * PAGE_SIZE))
  ])
const near = (point: number) => fc.integer({ min: Math.max(0, point - 20), max: point + 20 })
const address = fc.oneof(
  near(0),
  near(4 * PAGE_SIZE),
  near(HIGH),
  near(HIGH + 2 * PAGE_SIZE),
  fc.maxSafeNat(),
  fc.integer()
)
const length = fc.oneof(
  fc.integer({ min: 0, max: 40 }),
  near(2 * PAGE_SIZE),
  near(4 * PAGE_SIZE),
  fc.maxSafeNat(),
  fc.integer()
)

describe("GuestMemory", () => {
  it("gives a view exactly when one region holds the whole range, and the view is that range", () => {
    const memory = makeMemory()
    fc.assert(fc.property(address, length, (address, length) => {
      const inside = length >= 0 &&
        ((address >= LOW && address + length <= 4 * PAGE_SIZE) ||
          (address >= HIGH && address + length <= HIGH + 2 * PAGE_SIZE))
      const view = memory.slice(address, length)
      assert.strictEqual(view !== undefined, inside)
      if (view === undefined) return
      assert.strictEqual(view.length, length)
      const region = memory.regionOf(address, length)
      assert.strictEqual(view.byteOffset, address - (region?.guestAddress ?? -1))
    }))
  })

  it("writes all of a block or nothing of it", () => {
    fc.assert(fc.property(address, fc.uint8Array({ minLength: 1, maxLength: 64 }), (address, bytes) => {
      const memory = makeMemory()
      const written = memory.write(address, bytes)
      const sum = memory.regions.reduce((sum, region) => sum + region.bytes.reduce((a, b) => a + b, 0), 0)
      assert.strictEqual(sum, written ? bytes.reduce((a, b) => a + b, 0) : 0)
      assert.strictEqual(memory.slice(address, bytes.length) !== undefined, written)
    }))
  })

  it("gives back whole pages of one region, or nothing", () => {
    const pages = fc.nat({ max: 6 }).map((pages) => pages * PAGE_SIZE)
    const range = fc.tuple(fc.oneof(pages, address), fc.oneof(pages, fc.nat({ max: 3 * PAGE_SIZE })))
    fc.assert(fc.property(range, ([address, length]) => {
      const memory = makeMemory()
      for (const region of memory.regions) region.bytes.fill(1)
      const allowed = address % PAGE_SIZE === 0 && length % PAGE_SIZE === 0 &&
        memory.regionOf(address, length) !== undefined
      assert.strictEqual(memory.discard(address, length), allowed)
      const zeros = memory.regions.reduce((sum, region) => sum + region.bytes.reduce((a, b) => a + 1 - b, 0), 0)
      assert.strictEqual(zeros, allowed ? length : 0)
      if (allowed) assert.isTrue(memory.slice(address, length)?.every((byte) => byte === 0))
    }))
  })

  it("refuses regions that overlap", () => {
    const region = (address: number) => new MemoryRegion(address, new ArrayBuffer(PAGE_SIZE))
    assert.throws(() => new GuestMemory([region(0), region(PAGE_SIZE - 1)]), "overlap")
    assert.strictEqual(new GuestMemory([region(PAGE_SIZE), region(0)]).size, 2 * PAGE_SIZE)
  })

  it("leaves views empty, not dangling, when a region's buffer is detached", () => {
    const buffer = new ArrayBuffer(PAGE_SIZE)
    const memory = new GuestMemory([new MemoryRegion(0, buffer)])
    const view = memory.slice(0, 16)
    buffer.transfer(0)
    assert.strictEqual(view?.length, 0)
    assert.isUndefined(memory.slice(0, 16))
    assert.isFalse(memory.write(0, new Uint8Array(16)))
  })
})
