/**
 * Guest programs: the guest's side of the boundary, written in TypeScript.
 *
 * A program is a generator function. What only memory answers is plain code; what crosses the boundary is an operation that
 * the program delegates to with `yield*`:
 *
 * ```ts
 * import { GuestProgram } from "@troupe/core/testing"
 *
 * export const hello = GuestProgram.make(function*(cpu) {
 *   for (const byte of new TextEncoder().encode("hello\n")) {
 *     while (((yield* cpu.in8(0x3fd)) & 0x20) === 0) yield* cpu.yield()
 *     yield* cpu.out8(0x3f8, byte)
 *   }
 *   yield* cpu.halt()
 * })
 * ```
 *
 * A program becomes a kernel image by {@link kernel}, so that the same configuration, loaders and boot protocols run on the
 * fake.
 * An image is a small ELF file whose code is `ud2`, a signature and the program's number: the fake, when its boot vCPU starts
 * there, looks the program up. Any other hypervisor runs into the `ud2` and reports a triple fault.
 *
 * The image bytes keep their program alive. The registry itself holds it weakly, but for the {@link RECENT_PROGRAMS} that
 * were made last: a machine may drop the image once it is in guest memory, and must still find the program when it
 * starts.
 */
import type { GuestMemory } from "../GuestMemory.ts"
import type { GuestProgram } from "./GuestCpu.ts"
import { makeElfKernel } from "./KernelImages.ts"

export type {
  AccessSize,
  GuestCpu,
  GuestInterrupts,
  GuestOperation,
  GuestProgram,
  GuestReply,
  GuestRequest,
  GuestRoutine,
  InterruptHandler
} from "./GuestCpu.ts"

/** A program, with the type of `cpu` known in place. */
export const make = (program: GuestProgram): GuestProgram => program

/** How a kernel image says where it starts: a PVH note (32-bit entry), or the ELF entry of a 64-bit Linux kernel. */
export type KernelFormat = "pvh" | "elf64"

/** What a kernel image may choose. */
export interface KernelOptions {
  /** Default: `pvh`. */
  readonly format?: KernelFormat
  /** Physical address of the code; a multiple of 4 KiB, at least 1 MiB. Default: 1 MiB. */
  readonly address?: number
}

/** Number of programs that stay alive without their image. */
export const RECENT_PROGRAMS = 4096

const DEFAULT_ADDRESS = 0x10_0000
/** `ud2` and "TROUPE". */
const SIGNATURE = Uint8Array.of(0x0f, 0x0b, 0x54, 0x52, 0x4f, 0x55, 0x50, 0x45)
const CODE_SIZE = SIGNATURE.length + 4

const programs = new Map<number, WeakRef<GuestProgram>>()
const forgotten = new FinalizationRegistry<number>((id) => programs.delete(id))
const recent: Array<GuestProgram> = []
const owners = new WeakMap<Uint8Array, GuestProgram>()
const images = new WeakMap<GuestProgram, Map<string, WeakRef<Uint8Array>>>()
const ids = new WeakMap<GuestProgram, number>()
let nextId = 1

const register = (program: GuestProgram): number => {
  recent[nextRecent()] = program
  const known = ids.get(program)
  if (known !== undefined) return known
  const id = nextId++
  ids.set(program, id)
  programs.set(id, new WeakRef(program))
  forgotten.register(program, id)
  return id
}

let recentCursor = 0
const nextRecent = (): number => {
  recentCursor = (recentCursor + 1) % RECENT_PROGRAMS
  return recentCursor
}

/** The kernel image of a program. The same program and options give the same bytes object as long as somebody holds it. */
export const kernel = (program: GuestProgram, options: KernelOptions = {}): Uint8Array => {
  const format = options.format ?? "pvh"
  const address = options.address ?? DEFAULT_ADDRESS
  const key = `${format}@${address}`
  const known = images.get(program) ?? new Map<string, WeakRef<Uint8Array>>()
  images.set(program, known)
  const id = register(program)
  const made = known.get(key)?.deref()
  if (made !== undefined) return made
  const image = elfImage(codeOf(id), format, address)
  owners.set(image, program)
  known.set(key, new WeakRef(image))
  return image
}

/**
 * The code of a program, for a test that puts it into memory itself: 12 bytes for the address where the boot vCPU starts.
 * They do not keep the program alive.
 */
export const code = (program: GuestProgram): Uint8Array => codeOf(register(program))

const codeOf = (id: number): Uint8Array => {
  const bytes = new Uint8Array(CODE_SIZE)
  bytes.set(SIGNATURE)
  new DataView(bytes.buffer).setUint32(SIGNATURE.length, id, true)
  return bytes
}

const elfImage = (bytes: Uint8Array, format: KernelFormat, address: number): Uint8Array =>
  makeElfKernel({
    segments: [{ guestAddress: address, bytes }],
    entry: address,
    ...(format === "pvh" ? { pvhEntry: address } : {})
  })

/** The program whose code lies at a guest physical address, or `undefined`. */
export const programAt = (memory: GuestMemory, address: number): GuestProgram | undefined => {
  const code = memory.slice(address, CODE_SIZE)
  if (code === undefined || SIGNATURE.some((byte, index) => code[index] !== byte)) return undefined
  const id = new DataView(code.buffer, code.byteOffset).getUint32(SIGNATURE.length, true)
  return programs.get(id)?.deref()
}
