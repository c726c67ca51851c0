/**
 * Turns a kernel file, an initial RAM disk and a command line into a plan: which bytes go where in guest memory, and the state
 * in which the boot processor starts. Pure; nothing is copied but the small tables that the boot protocols ask for.
 */
import * as Result from "effect/Result"
import { formatAddress } from "../GuestAddress.ts"
import { PAGE_SIZE } from "../GuestMemory.ts"
import {
  CR0_ET,
  CR0_PE,
  CR0_PG,
  CR4_PAE,
  EFER_LMA,
  EFER_LME,
  RFLAGS_FIXED,
  type SegmentState,
  type VcpuState
} from "../VcpuState.ts"
import { makeBootParams } from "./BootParams.ts"
import { ENTRY_64_OFFSET, isBzImage, parseBzImage, placeBzImage } from "./BzImage.ts"
import { type E820Entry, makeE820 } from "./E820.ts"
import { checkEntry, isElf, parseElf } from "./Elf.ts"
import { CODE_32, CODE_64, DATA, GDT_REGISTER, makeGdt, NO_IDT, NO_LDT, TSS } from "./Gdt.ts"
import { type GuestBlock, guestBlock } from "./GuestBlock.ts"
import { type KernelImageError, refuse } from "./KernelImageError.ts"
import {
  ACPI_TABLES_ADDRESS,
  type AddressRange,
  BOOT_PARAMS_ADDRESS,
  BOOT_STACK_TOP,
  COMMAND_LINE_ADDRESS,
  COMMAND_LINE_AREA_SIZE,
  DEVICE_WINDOW_ADDRESS,
  FOUR_GIB,
  GDT_ADDRESS,
  HIGH_MEMORY_ADDRESS,
  MAXIMUM_MEMORY_SIZE,
  MINIMUM_MEMORY_SIZE,
  PAGE_TABLES_ADDRESS,
  PVH_START_INFO_ADDRESS,
  ramRegions
} from "./MachineLayout.ts"
import { PAGE_TABLES } from "./PageTables.ts"
import { makeStartInfo } from "./Pvh.ts"

/**
 * How a kernel is entered.
 *
 * - `linux64`: Linux's 64-bit boot protocol, RSI points at `boot_params`
 * - `pvh`: 32-bit protected mode without paging, EBX points at `hvm_start_info`
 */
export type BootProtocol = "linux64" | "pvh"

/** What {@link loadKernel} needs to know. */
export interface KernelInput {
  /** The kernel file, whole: a bzImage or an ELF file. The plan's segments are views of it. */
  readonly image: Uint8Array
  /** The initial RAM disk, whole; Linux takes several archives one after the other. */
  readonly initrd?: Uint8Array | undefined
  /** The kernel's command line: ASCII, no NUL. */
  readonly commandLine: string
  /** The machine's RAM in bytes, a multiple of the page size. It lies where `ramRegions` says. */
  readonly memorySize: number
  /** Address of the ACPI root pointer; the default is where `buildAcpi` puts it. */
  readonly rsdpAddress?: number | undefined
  /** How to enter an ELF kernel. `auto` (default): PVH when the kernel has a PVH note, otherwise `linux64`. */
  readonly bootProtocol?: BootProtocol | "auto" | undefined
}

/** Where the parts of a kernel go, and how it starts. No two ranges overlap, and all of them are RAM. */
export interface KernelPlan {
  readonly format: "bzImage" | "ELF"
  readonly bootProtocol: BootProtocol
  /** The kernel and the initial RAM disk: views of the given files. */
  readonly segments: ReadonlyArray<GuestBlock>
  /** Generated tables, all below 1 MiB. */
  readonly blocks: ReadonlyArray<GuestBlock>
  /** The state in which the boot processor starts. */
  readonly entry: VcpuState
  /** All memory that the kernel takes before it has looked at the memory map. */
  readonly kernel: AddressRange
  /** Where the initial RAM disk is. */
  readonly initrd: AddressRange | undefined
  /** The command line without its terminating zero. */
  readonly commandLine: AddressRange
  /** The memory map that the guest is given. */
  readonly memoryMap: ReadonlyArray<E820Entry>
}

/** Linux's `COMMAND_LINE_SIZE` on x86 is 2048 with the terminating zero. */
const COMMAND_LINE_LIMIT = 2047
/** Kernels in ELF form say nothing about the initial RAM disk; a module's address and size must fit into 32 bits. */
const INITRD_ADDR_MAX = FOUR_GIB - 1
/** What the two formats have in common once they are parsed and placed. */
interface PlacedKernel {
  readonly format: "bzImage" | "ELF"
  readonly bootProtocol: BootProtocol
  readonly segments: ReadonlyArray<GuestBlock>
  readonly range: AddressRange
  readonly entry: number
  readonly setupHeader?: Uint8Array
  readonly commandLineLimit: number
  readonly initrdAddrMax: number
}

/** Makes the plan, or says which field of what is wrong. Never throws, and allocates no more than the fixed tables. */
export const loadKernel = (input: KernelInput): Result.Result<KernelPlan, KernelImageError> =>
  Result.gen(function*() {
    const ram = yield* checkMemory(input.memorySize)
    const lowTop = Math.min(input.memorySize, DEVICE_WINDOW_ADDRESS)
    const kernel = yield* placeKernel(input.image, input.bootProtocol ?? "auto", ram, lowTop)
    const commandLine = yield* encodeCommandLine(input.commandLine, kernel.commandLineLimit)
    const initrd = input.initrd === undefined
      ? undefined
      : yield* placeInitrd(input.initrd, kernel.range, Math.min(lowTop, kernel.initrdAddrMax + 1))
    const memoryMap = makeE820(ram)
    const commandLineRange = { guestAddress: COMMAND_LINE_ADDRESS, size: commandLine.length - 1 }
    const rsdpAddress = input.rsdpAddress ?? ACPI_TABLES_ADDRESS

    const code = kernel.bootProtocol === "linux64" ? CODE_64 : CODE_32
    const blocks = [
      guestBlock("gdt", GDT_ADDRESS, makeGdt(code)),
      guestBlock("command line", COMMAND_LINE_ADDRESS, commandLine)
    ]
    if (kernel.bootProtocol === "linux64") {
      const bootParams = makeBootParams({
        ...(kernel.setupHeader === undefined ? {} : { setupHeader: kernel.setupHeader }),
        ...(initrd === undefined ? {} : { initrd }),
        loadAddress: kernel.range.guestAddress,
        commandLine: commandLineRange,
        e820: memoryMap,
        rsdpAddress
      })
      blocks.push(
        guestBlock("boot_params", BOOT_PARAMS_ADDRESS, bootParams),
        guestBlock("page tables", PAGE_TABLES_ADDRESS, PAGE_TABLES)
      )
    } else {
      const startInfo = makeStartInfo({
        ...(initrd === undefined ? {} : { initrd }),
        commandLineAddress: COMMAND_LINE_ADDRESS,
        memoryMap,
        rsdpAddress
      })
      blocks.push(guestBlock("hvm_start_info", PVH_START_INFO_ADDRESS, startInfo))
    }
    const segments = input.initrd === undefined || initrd === undefined
      ? kernel.segments
      : [...kernel.segments, guestBlock("initrd", initrd.guestAddress, input.initrd)]
    return {
      format: kernel.format,
      bootProtocol: kernel.bootProtocol,
      segments,
      blocks,
      entry: kernel.bootProtocol === "linux64" ? linux64State(kernel.entry, code) : pvhState(kernel.entry, code),
      kernel: kernel.range,
      initrd,
      commandLine: commandLineRange,
      memoryMap
    }
  })

const checkMemory = (size: number): Result.Result<ReadonlyArray<AddressRange>, KernelImageError> =>
  Number.isSafeInteger(size) && size >= MINIMUM_MEMORY_SIZE && size <= MAXIMUM_MEMORY_SIZE && size % PAGE_SIZE === 0
    ? Result.succeed(ramRegions(size))
    : refuse(
      "memory",
      "size",
      `must be a multiple of ${PAGE_SIZE} from ${MINIMUM_MEMORY_SIZE} to ${MAXIMUM_MEMORY_SIZE} bytes`,
      size
    )

const placeKernel = (
  image: Uint8Array,
  protocol: BootProtocol | "auto",
  ram: ReadonlyArray<AddressRange>,
  lowTop: number
): Result.Result<PlacedKernel, KernelImageError> => {
  if (isElf(image)) return placeElf(image, protocol, ram)
  if (isBzImage(image)) return placeBz(image, protocol, lowTop)
  return refuse("kernel", "magic", "must be that of a bzImage (\"HdrS\" at 0x202) or of an ELF file", firstBytes(image))
}

const placeBz = (
  image: Uint8Array,
  protocol: BootProtocol | "auto",
  lowTop: number
): Result.Result<PlacedKernel, KernelImageError> =>
  Result.gen(function*() {
    if (protocol === "pvh") {
      return yield* refuse(
        "bzImage",
        "bootProtocol",
        "must be linux64 or auto: only an ELF kernel can have a PVH entry",
        protocol
      )
    }
    const parsed = yield* parseBzImage(image)
    const range = yield* placeBzImage(parsed, lowTop)
    return {
      format: "bzImage",
      bootProtocol: "linux64",
      segments: [guestBlock("kernel", range.guestAddress, parsed.kernel)],
      range,
      entry: range.guestAddress + ENTRY_64_OFFSET,
      setupHeader: parsed.setupHeader,
      commandLineLimit: parsed.cmdlineSize,
      initrdAddrMax: parsed.initrdAddrMax
    }
  })

const placeElf = (
  image: Uint8Array,
  protocol: BootProtocol | "auto",
  ram: ReadonlyArray<AddressRange>
): Result.Result<PlacedKernel, KernelImageError> =>
  Result.gen(function*() {
    const parsed = yield* parseElf(image, ram)
    const bootProtocol = protocol === "auto" ? (parsed.pvhEntry === undefined ? "linux64" : "pvh") : protocol
    if (bootProtocol === "pvh" && parsed.pvhEntry === undefined) {
      return yield* refuse("ELF", "XEN_ELFNOTE_PHYS32_ENTRY", "must be among the notes for a PVH boot", "no such note")
    }
    const entry = bootProtocol === "pvh" && parsed.pvhEntry !== undefined
      ? yield* checkEntry(parsed, "XEN_ELFNOTE_PHYS32_ENTRY", parsed.pvhEntry)
      : yield* checkEntry(parsed, "e_entry", parsed.entry)
    return {
      format: "ELF",
      bootProtocol,
      segments: parsed.segments.map((segment, index) => ({ name: `kernel segment ${index}`, ...segment })),
      range: lowHull(parsed.segments),
      entry,
      commandLineLimit: COMMAND_LINE_LIMIT,
      initrdAddrMax: INITRD_ADDR_MAX
    }
  })

/** The smallest range that holds all segments below 4 GiB: a kernel may use the gaps between its segments. */
const lowHull = (segments: ReadonlyArray<AddressRange>): AddressRange => {
  let start = FOUR_GIB
  let end = 0
  for (const segment of segments) {
    if (segment.guestAddress >= FOUR_GIB) continue
    start = Math.min(start, segment.guestAddress)
    end = Math.max(end, segment.guestAddress + segment.size)
  }
  return { guestAddress: start, size: end - start }
}

/** The highest whole pages below `limit` that keep clear of the kernel: above it if there is room, otherwise below it. */
const placeInitrd = (
  initrd: Uint8Array,
  kernel: AddressRange,
  limit: number
): Result.Result<AddressRange, KernelImageError> => {
  const size = initrd.length
  if (size === 0) return refuse("initrd", "size", "must not be 0: leave the initial RAM disk out instead", size)
  const above = { start: pageAbove(kernel.guestAddress + kernel.size), end: limit }
  const below = { start: HIGH_MEMORY_ADDRESS, end: Math.min(limit, kernel.guestAddress) }
  for (const { end, start } of [above, below]) {
    if (size <= end - start) return Result.succeed({ guestAddress: pageBelow(end - size), size })
  }
  const room = Math.max(above.end - above.start, below.end - below.start, 0)
  return refuse(
    "initrd",
    "size",
    `must fit beside the kernel: ${room} bytes are free below ${formatAddress(limit)}`,
    size
  )
}

const pageBelow = (address: number): number => Math.floor(address / PAGE_SIZE) * PAGE_SIZE
const pageAbove = (address: number): number => Math.ceil(address / PAGE_SIZE) * PAGE_SIZE

/** The command line as bytes with its terminating zero. */
const encodeCommandLine = (text: string, kernelLimit: number): Result.Result<Uint8Array, KernelImageError> => {
  const limit = Math.min(kernelLimit, COMMAND_LINE_AREA_SIZE - 1)
  if (text.length > limit) {
    return refuse("command line", "length", `must not exceed the ${limit} bytes that the kernel takes`, text.length)
  }
  const bytes = new Uint8Array(text.length + 1)
  for (let index = 0; index < text.length; index++) {
    const code = text.charCodeAt(index)
    if (code === 0) return refuse("command line", `character ${index}`, "must not be NUL", code)
    if (code > 0x7f) return refuse("command line", `character ${index}`, "must be ASCII", code)
    bytes[index] = code
  }
  return Result.succeed(bytes)
}

/** The first bytes of a file as hexadecimal text. */
const firstBytes = (image: Uint8Array): string =>
  image.length === 0
    ? "an empty file"
    : Array.from(image.subarray(0, 4), (byte) => byte.toString(16).padStart(2, "0")).join(" ")

/** Linux's 64-bit entry: long mode, paging on, interrupts off (Linux `boot.rst`, "64-bit Boot Protocol"). */
const linux64State = (entry: number, code: SegmentState): VcpuState => ({
  ...commonState(entry, code),
  mode: "long",
  rbx: 0,
  rsi: BOOT_PARAMS_ADDRESS,
  cr0: CR0_PE + CR0_ET + CR0_PG,
  cr3: PAGE_TABLES_ADDRESS,
  cr4: CR4_PAE,
  efer: EFER_LME | EFER_LMA
})

/** The PVH entry: flat 32-bit protected mode, paging and interrupts off (Xen `docs/misc/pvh.pandoc`). */
const pvhState = (entry: number, code: SegmentState): VcpuState => ({
  ...commonState(entry, code),
  mode: "protected",
  rbx: PVH_START_INFO_ADDRESS,
  rsi: 0,
  cr0: CR0_PE | CR0_ET,
  cr3: 0,
  cr4: 0,
  efer: 0
})

const commonState = (entry: number, code: SegmentState) => ({
  rip: entry,
  rsp: BOOT_STACK_TOP,
  rflags: RFLAGS_FIXED,
  gdt: GDT_REGISTER,
  idt: NO_IDT,
  cs: code,
  ds: DATA,
  es: DATA,
  fs: DATA,
  gs: DATA,
  ss: DATA,
  tr: TSS,
  ldt: NO_LDT
})
