import { assert, describe, it } from "@effect/vitest"
import * as fc from "fast-check"
import { BlockMap } from "../src/BlockMap.ts"
import { GuestMemory, MemoryRegion, PAGE_SIZE } from "../src/GuestMemory.ts"

const COUNT = 24
const SIZE = 2 * PAGE_SIZE
const steps = fc.array(fc.tuple(fc.nat({ max: COUNT - 1 }), fc.nat({ max: COUNT }), fc.boolean()), {
  size: "max",
  maxLength: 40
})

describe("BlockMap", () => {
  it("is the set of the blocks that were plugged, whatever came and went in which order", () => {
    fc.assert(
      fc.property(
        steps,
        fc.integer({ min: 0, max: COUNT * SIZE }),
        fc.nat({ max: COUNT * SIZE }),
        (steps, at, length) => {
          const map = new BlockMap(COUNT, SIZE)
          const model = new Set<number>()
          for (const [first, count, plugged] of steps) {
            for (let block = first; block < Math.min(COUNT, first + count); block++) {
              map.set(block, plugged)
              if (plugged) model.add(block)
              else model.delete(block)
            }
            assert.strictEqual(map.plugged, model.size)
          }
          for (let block = 0; block < COUNT; block++) assert.strictEqual(map.isPlugged(block), model.has(block))
          let covered = length > 0 || model.has(Math.floor(at / SIZE))
          for (let byte = at; byte < at + length; byte++) covered &&= model.has(Math.floor(byte / SIZE))
          assert.strictEqual(map.covers(at, length), covered)
          assert.strictEqual(map.pluggedAmong(0, COUNT), model.size)
        }
      ),
      { numRuns: 300 }
    )
  })

  it("decides what guest memory there is: a range that touches an unplugged block is none", () => {
    const blocks = new BlockMap(4, PAGE_SIZE)
    const region = new MemoryRegion(0x1_0000, new ArrayBuffer(4 * PAGE_SIZE), undefined, blocks)
    const memory = new GuestMemory([region])
    assert.isUndefined(memory.slice(0x1_0000, 1))
    blocks.set(1, true)
    blocks.set(2, true)
    assert.strictEqual(memory.slice(0x1_1000, 2 * PAGE_SIZE)?.length, 2 * PAGE_SIZE)
    assert.isUndefined(memory.slice(0x1_0fff, 2))
    assert.isUndefined(memory.slice(0x1_2fff, 2))
    assert.isUndefined(memory.regionOf(0x1_3000, 1))
    assert.isFalse(memory.discard(0x1_0000, 2 * PAGE_SIZE))
    blocks.set(1, false)
    assert.isUndefined(memory.slice(0x1_1000, 1))
    assert.isDefined(memory.slice(0x1_2000, 1))
  })
})
