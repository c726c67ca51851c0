/** What `writer.ts` writes. */

/** Length of a block in bytes. */
export const WRITER_BLOCK = 3 * 4096
/** The number of blocks; a number that 37 has no part in. */
export const WRITER_BLOCKS = 500

/** The block of a round. */
export const blockOf = (round: number): Uint8Array<ArrayBuffer> => {
  const words = new Uint32Array(WRITER_BLOCK / 4)
  for (let i = 0; i < words.length; i++) words[i] = Math.imul(round + 1, 2654435761) + i
  return new Uint8Array(words.buffer)
}
