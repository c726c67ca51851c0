/**
 * A vCPU's statistics descriptor (`KVM_GET_STATS_FD`): whether it is blocked in the kernel, and how often it has halted,
 * read without stopping it.
 */
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import { readSync } from "node:fs"
import { Ffi } from "../Ffi.ts"
import { KvmIoctl } from "./KvmIoctl.ts"
import { KvmStatsDesc, KvmStatsHeader } from "./KvmStructs.ts"

/** What is read of a vCPU's statistics. */
export interface VcpuStats {
  /** Whether the vCPU sleeps in the kernel: halted, or waiting to be started. */
  readonly isBlocked: () => boolean
  /** How often the vCPU has executed `HLT`, modulo 2^32. */
  readonly halts: () => number
}

const BLOCKING = "blocking"
const HALT_EXITS = "halt_exits"

/** A header names its descriptors; none has been seen with more than 100. */
const DESCRIPTOR_LIMIT = 1024

const read = (fd: number, view: DataView<ArrayBuffer>, position: number): boolean =>
  readSync(fd, view, 0, view.byteLength, position) === view.byteLength

/** Where the named statistics lie in the descriptor's data. */
const offsets = (fd: number, names: ReadonlyArray<string>): ReadonlyArray<number> | undefined => {
  const header = KvmStatsHeader.make()
  if (!read(fd, header, 0)) return undefined
  const fields = KvmStatsHeader.fields
  const nameSize = fields.name_size.get(header)
  const count = Math.min(fields.num_desc.get(header), DESCRIPTOR_LIMIT)
  const stride = KvmStatsDesc.size + nameSize
  const all = new DataView(new ArrayBuffer(count * stride))
  if (!read(fd, all, fields.desc_offset.get(header))) return undefined
  const found = new Map<string, number>()
  for (let i = 0; i < count; i++) {
    const bytes = new Uint8Array(all.buffer, i * stride + KvmStatsDesc.size, nameSize)
    const end = bytes.indexOf(0)
    const name = new TextDecoder().decode(bytes.subarray(0, end < 0 ? nameSize : end))
    found.set(name, fields.data_offset.get(header) + KvmStatsDesc.fields.offset.get(all, i * stride))
  }
  const result = names.map((name) => found.get(name))
  return result.every((offset) => offset !== undefined) ? result : undefined
}

/** The statistics of a vCPU, or `undefined` where this kernel has none. */
export const vcpuStats = Effect.fnUntraced(function*(
  vcpu: number
): Effect.fn.Return<VcpuStats | undefined, never, Ffi | Scope.Scope> {
  const ffi = yield* Ffi
  const opened = yield* Effect.option(ffi.own(ffi.ioctl(vcpu, KvmIoctl.KVM_GET_STATS_FD)))
  if (opened._tag === "None") return undefined
  const fd = opened.value
  const found = yield* Effect.option(
    Effect.try({ try: () => offsets(fd, [BLOCKING, HALT_EXITS]), catch: () => undefined })
  )
  const [blocking, halts] = found._tag === "Some" && found.value !== undefined ? found.value : []
  if (blocking === undefined || halts === undefined) return undefined
  const value = new DataView(new ArrayBuffer(8))
  const at = (position: number): number => (read(fd, value, position) ? value.getUint32(0, true) : 0)
  return { isBlocked: () => at(blocking) !== 0, halts: () => at(halts) }
})
