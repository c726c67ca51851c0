import { ADDRESS_LIMIT, addressEnd, addressFromHalves, INVALID_ADDRESS } from "@troupe/core/GuestAddress"
import * as fc from "fast-check"
import { assert, describe, it } from "vitest"

const uint32 = fc.integer({ min: 0, max: 0xffff_ffff })
const address = fc.oneof(fc.maxSafeNat(), fc.integer({ min: -10, max: 10 }), fc.constant(ADDRESS_LIMIT), fc.double())

describe("GuestAddress", () => {
  it("makes the same address of two halves as 64-bit arithmetic, or none", () => {
    fc.assert(fc.property(uint32, uint32, (low, high) => {
      const exact = (BigInt(high) << 32n) | BigInt(low)
      const expected = exact < BigInt(ADDRESS_LIMIT) ? Number(exact) : INVALID_ADDRESS
      assert.strictEqual(addressFromHalves(low, high), expected)
      // A half that was read as a signed number means the same.
      assert.strictEqual(addressFromHalves(low | 0, high | 0), expected)
    }))
  })

  it("never wraps: the end of a range is the exact sum, or no address", () => {
    fc.assert(fc.property(address, address, (base, length) => {
      const end = addressEnd(base, length)
      if (end === INVALID_ADDRESS) {
        const legal = Number.isSafeInteger(base) && Number.isSafeInteger(length) && base >= 0 && length >= 0
        assert.isTrue(!legal || BigInt(base) + BigInt(length) > BigInt(ADDRESS_LIMIT))
      } else {
        assert.strictEqual(BigInt(end), BigInt(base) + BigInt(length))
      }
    }))
  })
})
