/**
 * What a guest has sent on one connection and its host has not read yet: bytes, and where messages end.
 *
 * Memory is about what it holds, however small the packets are in which it came: small ones share a chunk, and a message is a
 * number. The sender's credit bounds it.
 */

/** Bytes of a chunk that packets share. */
const SHARED_CHUNK_SIZE = 4096

/** Bytes that wait to be read. */
export class Inbox {
  /** Chunks, oldest first; of the last one only {@link #used} bytes are filled. */
  #chunks: Array<Uint8Array> = []
  #used = 0
  /** Bytes of the oldest chunk that were read already. */
  #skip = 0
  /** Lengths of the messages that are whole, oldest first, from {@link #firstMessage} on. */
  #messages: Array<number> = []
  #firstMessage = 0
  /** Bytes of the message that is not whole yet. */
  #partial = 0
  /** The number of bytes. */
  length = 0

  /** A place for `length` bytes at the end, for the caller to fill at once. */
  append(length: number): Uint8Array {
    this.length += length
    this.#partial += length
    const last = this.#chunks.at(-1)
    if (last !== undefined && last.length - this.#used >= length) {
      const place = last.subarray(this.#used, this.#used + length)
      this.#used += length
      return place
    }
    // The first packet of a quiet connection has a chunk of its size, which is read at once.
    const chunk = new Uint8Array(last === undefined ? length : Math.max(length, SHARED_CHUNK_SIZE))
    this.#trimLast()
    this.#chunks.push(chunk)
    this.#used = length
    return chunk.length === length ? chunk : chunk.subarray(0, length)
  }

  /** What was appended since the last end is a message. */
  endMessage(): void {
    this.#messages.push(this.#partial)
    this.#partial = 0
  }

  /** The number of messages that are whole. */
  get messages(): number {
    return this.#messages.length - this.#firstMessage
  }

  /** The size of all chunks, in bytes. */
  get memory(): number {
    return this.#chunks.reduce((sum, chunk) => sum + chunk.buffer.byteLength, 0)
  }

  /** Takes bytes of a stream: a chunk of them. `undefined` when there are none. */
  take(): Uint8Array | undefined {
    const first = this.#chunks[0]
    if (first === undefined) return undefined
    this.#partial = 0
    const bytes = first.subarray(this.#skip, this.#chunks.length === 1 ? this.#used : first.length)
    this.#chunks.shift()
    this.#skip = 0
    this.length -= bytes.length
    if (this.#chunks.length === 0) this.#used = 0
    return bytes
  }

  /** Takes the oldest message. `undefined` when none is whole. */
  takeMessage(): Uint8Array | undefined {
    const length = this.#messages[this.#firstMessage]
    if (length === undefined) return undefined
    this.#firstMessage++
    if (this.#firstMessage * 2 > this.#messages.length) {
      this.#messages = this.#messages.slice(this.#firstMessage)
      this.#firstMessage = 0
    }
    this.length -= length
    const message = new Uint8Array(length)
    for (let done = 0; done < length;) {
      const chunk = this.#chunks[0]
      if (chunk === undefined) break
      const end = this.#chunks.length === 1 ? this.#used : chunk.length
      const part = chunk.subarray(this.#skip, Math.min(end, this.#skip + length - done))
      message.set(part, done)
      done += part.length
      this.#skip += part.length
      if (this.#skip < end) continue
      this.#chunks.shift()
      this.#skip = 0
      if (this.#chunks.length === 0) this.#used = 0
    }
    return message
  }

  /** Forgets everything. */
  clear(): void {
    this.#chunks = []
    this.#used = 0
    this.#skip = 0
    this.#messages = []
    this.#firstMessage = 0
    this.#partial = 0
    this.length = 0
  }

  /** The last chunk gets a successor: what of it is not filled will not be. */
  #trimLast(): void {
    const last = this.#chunks.at(-1)
    if (last !== undefined && this.#used < last.length) {
      this.#chunks[this.#chunks.length - 1] = last.subarray(0, this.#used)
    }
  }
}
