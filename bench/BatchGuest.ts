// The guest of the exit measurements: at each mark it takes a count from memory, makes that many accesses of one kind, and stores
// the time-stamp counter from before and after. It is the same machine code for our library and for the C loop.
import type { VcpuState } from "@troupe/core/VcpuState"
import { ENTER_USER_MODE, PROBE_MEMORY_SIZE, PROBE_STATE, writeProbeGuest } from "@troupe/node/doctor/ProbeGuest"

/** The kinds of access, by what serves them. */
export type Access = "posted" | "shadowed" | "call" | "page" | "page-as-exit"

/** The port of the marks. */
export const MARK_PORT = 0x80
/** Written by the host before it answers a mark: how many accesses come next. `anchor/exits.c` has these addresses too. */
export const COUNT_ADDRESS = 0xa000
/** The counter before and after the batch. */
export const BEGIN_ADDRESS = 0xa008
export const END_ADDRESS = 0xa010

/** Registers of the measured device. */
export const POSTED_PORT = 0x3f8
export const SHADOWED_PORT = 0x3fd
export const CALL_PORT = 0x5f00
/** The register page, and the page beside it whose reads are exits. */
export const PAGE_ADDRESS = 0xd000_0000
export const EXIT_PAGE_ADDRESS = 0xd000_1000

const PDPT = 0x2000
/** A page of tables that the probe guest leaves free. */
const DEVICE_PD = 0xb000
const LARGE_PAGE_USER_WRITABLE_PRESENT = 0x87
const USER_WRITABLE_PRESENT = 7

const uint32 = (value: number): ReadonlyArray<number> => [
  value & 0xff,
  (value >>> 8) & 0xff,
  (value >>> 16) & 0xff,
  (value >>> 24) & 0xff
]

const MOV_EDX = 0xba
const MOV_EDI = 0xbf
const OUT_DX_AL = [0xee]
const IN_AL_DX = [0xec]
/** mov eax, [rdi] */
const LOAD = [0x8b, 0x07]

interface Kind {
  readonly setup: ReadonlyArray<number>
  readonly access: ReadonlyArray<number>
}

const KINDS: { readonly [access in Access]: Kind } = {
  posted: { setup: [MOV_EDX, ...uint32(POSTED_PORT)], access: OUT_DX_AL },
  shadowed: { setup: [MOV_EDX, ...uint32(SHADOWED_PORT)], access: IN_AL_DX },
  call: { setup: [MOV_EDX, ...uint32(CALL_PORT)], access: IN_AL_DX },
  page: { setup: [MOV_EDI, ...uint32(PAGE_ADDRESS)], access: LOAD },
  "page-as-exit": { setup: [MOV_EDI, ...uint32(EXIT_PAGE_ADDRESS)], access: LOAD }
}

/** rdtsc; mov [address], eax; mov [address + 4], edx */
const stamp = (address: number): ReadonlyArray<number> => [
  ...[0x0f, 0x31],
  ...[0x89, 0x04, 0x25, ...uint32(address)],
  ...[0x89, 0x14, 0x25, ...uint32(address + 4)]
]

const program = (access: Access): ReadonlyArray<number> => {
  const kind = KINDS[access]
  // dec ecx; jnz back to the access
  const loop = [...kind.access, 0xff, 0xc9, 0x75, 0x100 - (kind.access.length + 4)]
  const body = [
    ...[0xb0, 0x01, 0xe6, MARK_PORT], // mov al, 1; out MARK_PORT, al
    ...[0x8b, 0x0c, 0x25, ...uint32(COUNT_ADDRESS)], // mov ecx, [COUNT_ADDRESS]
    ...stamp(BEGIN_ADDRESS),
    ...kind.setup,
    ...loop,
    ...stamp(END_ADDRESS)
  ]
  return [...body, 0xe9, ...uint32(-(body.length + 5))] // jmp to the start
}

/** The guest's memory. Pages are read at privilege level 3, everything else at level 0. */
export const writeBatchGuest = (memory: Uint8Array<ArrayBuffer>, access: Access): void => {
  const user = access === "page" || access === "page-as-exit"
  writeProbeGuest(memory, user ? ENTER_USER_MODE : program(access), user ? program(access) : [])
  const view = new DataView(memory.buffer, memory.byteOffset, memory.byteLength)
  view.setUint32(PDPT + 8 * Math.floor(PAGE_ADDRESS / 2 ** 30), DEVICE_PD | USER_WRITABLE_PRESENT, true)
  view.setUint32(
    DEVICE_PD + 8 * (Math.floor(PAGE_ADDRESS / 2 ** 21) % 512),
    PAGE_ADDRESS + LARGE_PAGE_USER_WRITABLE_PRESENT,
    true
  )
}

/** The state in which the guest starts. */
export const BATCH_STATE: VcpuState = PROBE_STATE

/** Bytes of memory of the guest. */
export const BATCH_MEMORY_SIZE = PROBE_MEMORY_SIZE

/** The command line of `anchor/exits.c` after the image. */
export const anchorState = (state: VcpuState): ReadonlyArray<string> =>
  [state.rip, state.rsp, state.cr3, state.cr4, state.gdt.base, state.idt.base, state.tr.base].map((value) =>
    value.toString(16)
  )
