/** Aligned mappings: what is kept and what is given back. */
import * as fc from "fast-check"
import { assert, describe, it } from "vitest"
import { ErrnoNumber, type ForeignFunctions } from "../src/internal/ForeignFunctions.ts"
import { map } from "../src/internal/Mapping.ts"

const PAGE = 4096
const ALIGNMENT = 0x20_0000

/** Foreign functions that map at a chosen address and note what is unmapped; the `failing`th unmapping fails. */
const scripted = (address: bigint, failing = -1) => {
  const mapped: Array<readonly [bigint, number]> = []
  const unmapped: Array<readonly [bigint, number]> = []
  let calls = 0
  const functions = {
    mmap: (length: number) => {
      mapped.push([address, length])
      return address
    },
    munmap: (start: bigint, length: number) => {
      if (calls++ === failing) return -ErrnoNumber.ENOMEM
      unmapped.push([start, length])
      return 0
    }
  }
  // Only these two are called.
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion
  return { functions: functions as unknown as ForeignFunctions, mapped, unmapped }
}

const options = { protection: 3, flags: 0x22, fd: -1, offset: 0, alignment: ALIGNMENT }
const pages = fc.integer({ min: 1, max: 2000 })

describe("map with an alignment", () => {
  it("keeps an aligned piece of the length asked for, and unmaps exactly the rest", () => {
    fc.assert(fc.property(fc.nat(2 ** 30), pages, (page, count) => {
      const address = BigInt(page) * BigInt(PAGE)
      const length = count * PAGE
      const { functions, mapped, unmapped } = scripted(address)
      const mapping = map(functions, { ...options, length })
      if (typeof mapping === "number") return assert.fail(`errno ${mapping}`)
      assert.strictEqual(mapping.address % BigInt(ALIGNMENT), 0n)
      assert.strictEqual(mapping.length, length)
      const pieces = [...unmapped, [mapping.address, length] as const].toSorted(([a], [b]) => a < b ? -1 : 1)
      let end = address
      for (const [start, size] of pieces) {
        assert.strictEqual(start, end)
        end = start + BigInt(size)
      }
      assert.strictEqual(end, address + BigInt(mapped[0]?.[1] ?? 0))
    }))
  })

  it("gives all of it back when a part cannot be unmapped", () => {
    const { functions, mapped, unmapped } = scripted(BigInt(PAGE), 0)
    assert.strictEqual(map(functions, { ...options, length: ALIGNMENT }), -ErrnoNumber.ENOMEM)
    assert.deepStrictEqual(unmapped, mapped)
  })
})
