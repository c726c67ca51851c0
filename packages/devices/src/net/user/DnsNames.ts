/**
 * Which names have given which addresses: read out of the answers that the host's name server gives to the guest, for the policy.
 */
import { getU16, getU32 } from "./Octets.ts"

/** The most addresses that are remembered; the oldest are forgotten. */
export const DNS_NAMES_MAX = 1024
/** The most records of one answer that are looked at. */
const RECORDS_MAX = 64
/** The most labels of a name, and thus of jumps inside of a message. */
const LABELS_MAX = 128

const HEADER = 12
const FLAG_RESPONSE = 0x8000
const TYPE_A = 1
const CLASS_IN = 1

/** The name at `at`, lower case without a final dot; `undefined` when it is none, or not of ordinary characters. */
const readName = (bytes: Uint8Array, start: number): string | undefined => {
  const labels: Array<string> = []
  let at = start
  let length = 0
  for (let steps = 0; steps < LABELS_MAX; steps++) {
    const size = bytes[at]
    if (size === undefined) return undefined
    if (size === 0) return labels.join(".").toLowerCase()
    if ((size & 0xc0) === 0xc0) {
      at = getU16(bytes, at) & 0x3fff
      continue
    }
    length += size + 1
    if (size > 63 || length > 255 || at + 1 + size > bytes.length) return undefined
    let label = ""
    for (let i = 0; i < size; i++) label += String.fromCharCode(bytes[at + 1 + i] ?? 0)
    if (!/^[\w-]+$/.test(label)) return undefined
    labels.push(label)
    at += 1 + size
  }
  return undefined
}

/** The end of the name at `at`, or -1. */
const skipName = (bytes: Uint8Array, start: number): number => {
  let at = start
  for (let steps = 0; steps < LABELS_MAX; steps++) {
    const size = bytes[at]
    if (size === undefined) return -1
    if (size === 0) return at + 1
    if ((size & 0xc0) === 0xc0) return at + 2
    if (size > 63) return -1
    at += 1 + size
  }
  return -1
}

/** The IPv4 addresses that an answer gives, under the name that was asked for. */
export const readDnsAddresses = (
  bytes: Uint8Array
): { readonly name: string; readonly addresses: ReadonlyArray<number> } | undefined => {
  if (bytes.length < HEADER || (getU16(bytes, 2) & FLAG_RESPONSE) === 0 || getU16(bytes, 4) !== 1) return undefined
  const name = readName(bytes, HEADER)
  let at = skipName(bytes, HEADER)
  if (name === undefined || name === "" || at < 0) return undefined
  at += 4
  const addresses: Array<number> = []
  const records = Math.min(getU16(bytes, 6), RECORDS_MAX)
  for (let i = 0; i < records; i++) {
    const fixed = skipName(bytes, at)
    if (fixed < 0 || fixed + 10 > bytes.length) break
    const length = getU16(bytes, fixed + 8)
    const data = fixed + 10
    if (data + length > bytes.length) break
    if (getU16(bytes, fixed) === TYPE_A && getU16(bytes, fixed + 2) === CLASS_IN && length === 4) {
      addresses.push(getU32(bytes, data))
    }
    at = data + length
  }
  return { name, addresses }
}

/** The names that a guest has looked up. */
export class DnsNames {
  readonly #names = new Map<number, string>()

  /** Learns from an answer of the name server. */
  learn(answer: Uint8Array): void {
    const found = readDnsAddresses(answer)
    if (found === undefined) return
    for (const address of found.addresses) {
      this.#names.delete(address)
      if (this.#names.size >= DNS_NAMES_MAX) {
        for (const oldest of this.#names.keys()) {
          this.#names.delete(oldest)
          break
        }
      }
      this.#names.set(address, found.name)
    }
  }

  /** The last name that has given an address. */
  nameOf(address: number): string | undefined {
    return this.#names.get(address)
  }
}
