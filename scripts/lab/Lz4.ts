// Decoder for the LZ4 legacy frame, the form in which Linux stores itself inside a bzImage.
import { LabError } from "./LabError.ts"

/** The frame's first four bytes, little-endian (LZ4 frame format, "Legacy frame"). */
export const LZ4_LEGACY_MAGIC = 0x184c2102

/** A block of a legacy frame holds at most this many bytes once decoded. */
const LEGACY_BLOCK_BYTES = 8 << 20

const MINIMUM_MATCH = 4

const damaged = (): LabError => new LabError("the LZ4 data is damaged")

/** Decodes one block from `input[from, to)` into `output` at `at`; returns where it ended. */
const decodeBlock = (input: Uint8Array, from: number, to: number, output: Uint8Array, at: number): number => {
  let source = from
  let target = at
  const limit = Math.min(output.length, at + LEGACY_BLOCK_BYTES)
  while (source < to) {
    const token = input[source++]!
    let literals = token >>> 4
    if (literals === 15) {
      let more = 255
      while (more === 255) {
        if (source >= to) throw damaged()
        more = input[source++]!
        literals += more
      }
    }
    if (source + literals > to || target + literals > limit) throw damaged()
    output.set(input.subarray(source, source + literals), target)
    source += literals
    target += literals
    // The last sequence of a block has literals only.
    if (source >= to) break
    if (source + 2 > to) throw damaged()
    const distance = input[source]! | (input[source + 1]! << 8)
    source += 2
    let length = token & 15
    if (length === 15) {
      let more = 255
      while (more === 255) {
        if (source >= to) throw damaged()
        more = input[source++]!
        length += more
      }
    }
    length += MINIMUM_MATCH
    const start = target - distance
    if (distance === 0 || start < at || target + length > limit) throw damaged()
    if (distance >= length) output.copyWithin(target, start, start + length)
    // A match may overlap what it produces, so it is copied byte by byte.
    else for (let i = 0; i < length; i++) output[target + i] = output[start + i]!
    target += length
  }
  return target
}

/** Decodes a legacy frame that holds `size` bytes. */
export const decodeLegacy = (frame: Uint8Array, size: number): Uint8Array => {
  const view = new DataView(frame.buffer, frame.byteOffset, frame.byteLength)
  if (frame.length < 8 || view.getUint32(0, true) !== LZ4_LEGACY_MAGIC) throw new LabError("not an LZ4 legacy frame")
  const output = new Uint8Array(size)
  let source = 4
  let target = 0
  while (source + 4 <= frame.length && target < size) {
    const length = view.getUint32(source, true)
    source += 4
    if (length === LZ4_LEGACY_MAGIC) continue
    if (source + length > frame.length) throw damaged()
    target = decodeBlock(frame, source, source + length, output, target)
    source += length
  }
  if (target !== size) throw damaged()
  return output
}
