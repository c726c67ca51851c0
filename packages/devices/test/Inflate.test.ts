import { assert, describe, it } from "@effect/vitest"
import * as fc from "fast-check"
import { constants, deflateRawSync } from "node:zlib"
import { inflateRaw } from "../src/block/qcow2/Inflate.ts"

/** Bytes with repetitions, as compressors see them. */
const text = fc.array(
  fc.oneof(
    fc.uint8Array({ minLength: 1, maxLength: 300, size: "max" }),
    fc.record({ byte: fc.nat(255), times: fc.integer({ min: 1, max: 3000 }) }).map(({ byte, times }) =>
      new Uint8Array(times).fill(byte)
    )
  ),
  { maxLength: 30, size: "max" }
).map((pieces) => Buffer.concat([...pieces, ...pieces.slice(0, 3)]))

describe("inflateRaw", () => {
  it("is the inverse of every level and strategy of deflate", () => {
    fc.assert(
      fc.property(
        text,
        fc.integer({ min: 0, max: 9 }),
        fc.constantFrom(constants.Z_DEFAULT_STRATEGY, constants.Z_FIXED, constants.Z_HUFFMAN_ONLY, constants.Z_RLE),
        fc.integer({ min: 9, max: 15 }),
        (data, level, strategy, windowBits) => {
          const input = deflateRawSync(data, { level, strategy, windowBits })
          const output = new Uint8Array(data.length)
          assert.isTrue(inflateRaw(Buffer.concat([input, Buffer.alloc(40, 0xff)]), output))
          assert.isTrue(data.equals(output))
          assert.isFalse(inflateRaw(input, new Uint8Array(data.length + 1)), "more than there is")
        }
      ),
      { numRuns: 500 }
    )
  })

  it("ends, in its output, whatever the input is", () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 2000, size: "max" }), fc.nat(5000), (input, length) => {
        const room = new Uint8Array(length + 2).fill(0xee)
        inflateRaw(input, room.subarray(1, length + 1))
        assert.deepStrictEqual([room[0], room[length + 1]], [0xee, 0xee])
      }),
      { numRuns: 2000 }
    )
    fc.assert(
      fc.property(text, fc.array(fc.tuple(fc.nat(5000), fc.nat(7)), { minLength: 1 }), (data, flips) => {
        const input = deflateRawSync(data)
        for (const [at, bit] of flips) input[at % input.length] = (input[at % input.length] ?? 0) ^ 1 << bit
        inflateRaw(input, new Uint8Array(data.length))
      }),
      { numRuns: 500 }
    )
  })
})
