/** 64-bit little-endian fields as two 32-bit halves: no BigInt, and nothing is rounded or wrapped in silence. */
import { addressFromHalves } from "../GuestAddress.ts"

/**
 * The 64-bit field at `offset`, or `INVALID_ADDRESS` (-1) when its value is not below 2^52 and so neither an address of a
 * machine nor a size of anything in it.
 */
export const readUint64 = (view: DataView, offset: number): number =>
  addressFromHalves(view.getUint32(offset, true), view.getUint32(offset + 4, true))

/** The 64-bit field at `offset` as hexadecimal text, for reports about values that are out of range. */
export const hexUint64 = (view: DataView, offset: number): string => {
  const high = view.getUint32(offset + 4, true).toString(16)
  return `0x${high === "0" ? "" : high}${view.getUint32(offset, true).toString(16).padStart(high === "0" ? 1 : 8, "0")}`
}

/** Writes a non-negative safe integer as a 64-bit field. */
export const writeUint64 = (view: DataView, offset: number, value: number): void => {
  view.setUint32(offset, value % 2 ** 32, true)
  view.setUint32(offset + 4, Math.floor(value / 2 ** 32), true)
}

/** A view of exactly these bytes. */
export const viewOf = (bytes: Uint8Array): DataView => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
