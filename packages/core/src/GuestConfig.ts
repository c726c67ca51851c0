/**
 * What a guest is made of: the table `GuestConfig` of the virtualization protocols as a Schema.
 *
 * Field names are those of the protocol in camel case, an absent device flag means that the device is off. Everything that
 * can be known to be wrong before a machine is built is a `BAD_CONFIG` with the field, the rule and the value.
 */
import * as Effect from "effect/Effect"
import * as Result from "effect/Result"
import * as Schema from "effect/Schema"
import * as SchemaIssue from "effect/SchemaIssue"
import { BadConfig, type ConfigIssue } from "./GuestError.ts"
import { GuestFile } from "./GuestFile.ts"
import { PAGE_SIZE } from "./GuestMemory.ts"
import { RateLimit } from "./RateLimit.ts"

/** The largest `cpus` that the protocol can carry (it is a byte). A hypervisor may allow fewer. */
export const CPUS_MAX = 255
/** The least memory in which a kernel and the boot tables have room: 2 MiB. */
export const GUEST_MEMORY_MIN = 2 * 2 ** 20
/** The most memory of one machine: 512 GiB. */
export const GUEST_MEMORY_MAX = 512 * 2 ** 30
/** The most characters of a block device's `id` (virtio-blk's GET_ID). */
export const MAX_BLOCK_DEVICE_ID = 20
/** The most block devices of one machine. */
export const MAX_BLOCK_DEVICES = 32
/** The most network devices of one machine. */
export const MAX_NET_DEVICES = 32

const SUFFIXES: { readonly [suffix: string]: number } = { b: 1, k: 2 ** 10, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30 }

/** Text such as `512M`: decimal digits and one of `b`, `k`, `K`, `M`, `G`, or none for bytes. `undefined` when it is not. */
export const parseBytes = (text: string): number | undefined => {
  const match = /^(\d{1,15})([bkKMG]?)$/.exec(text)
  if (match === null) return undefined
  const bytes = Number(match[1]) * (SUFFIXES[match[2] ?? ""] ?? 1)
  return Number.isSafeInteger(bytes) ? bytes : undefined
}

const byteCount = Schema.Int.check(Schema.isBetween({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER }))

/** A number of bytes. */
export const Bytes = byteCount.pipe(Schema.brand("Bytes"))
/** A number of bytes. */
export type Bytes = typeof Bytes.Type

/** A vsock port: any 32-bit number. */
export const VsockPort = Schema.Int.check(Schema.isBetween({ minimum: 0, maximum: 0xffff_ffff }))
  .pipe(Schema.brand("VsockPort"))
/** A vsock port. */
export type VsockPort = typeof VsockPort.Type

/** A number of virtual processors, 1 to {@link CPUS_MAX}. */
export const CpuCount = Schema.Int.check(Schema.isBetween({ minimum: 1, maximum: CPUS_MAX })).pipe(
  Schema.brand("CpuCount")
)
/** A number of virtual processors. */
export type CpuCount = typeof CpuCount.Type

/** A disk of the guest. */
export const BlockSpec = Schema.Struct({
  id: Schema.NonEmptyString.check(Schema.isMaxLength(MAX_BLOCK_DEVICE_ID)),
  mode: Schema.Literals(["READ_WRITE", "READ_ONLY", "VOLATILE_WRITE"]),
  format: Schema.Literals(["FILE", "QCOW", "BLOCK"]),
  /** The most that the guest may read and write. Default: no limit. */
  rateLimit: Schema.optionalKey(RateLimit)
})
/** A network interface of the guest. */
export const NetSpec = Schema.Struct({
  macAddress: Schema.String.check(Schema.isPattern(/^[0-9a-f]{2}(:[0-9a-f]{2}){5}$/i)),
  enableBridge: Schema.Boolean,
  /** The most that the guest may receive. Default: no limit. */
  rxRateLimit: Schema.optionalKey(RateLimit),
  /** The most that the guest may send. Default: no limit. */
  txRateLimit: Schema.optionalKey(RateLimit)
})
/** A host port that accepts connections of the guest from its first instruction on. */
export const VsockListener = Schema.Struct({ port: VsockPort })

/** How a guest finds and drives its virtio devices: registers in memory named by ACPI, or functions on a PCI bus. */
export const VirtioTransport = Schema.Literals(["mmio", "pci"])
/** How a guest finds and drives its virtio devices. */
export type VirtioTransport = typeof VirtioTransport.Type

const off = Schema.Boolean.pipe(Schema.withDecodingDefaultKey(Effect.succeed(false)))
const fileOrBytes = Schema.Union([GuestFile, Schema.Uint8Array])

/** The configuration of a guest. Defaults stand at each field; a field without one is required. */
export const GuestConfig = Schema.Struct({
  /** The loader to use. `ZIRCON` decodes and is refused: there is no ZBI loader yet. */
  kernelType: Schema.Literals(["ZIRCON", "LINUX"]),
  /** The kernel: a bzImage, or an ELF file with a PVH note or a 64-bit Linux entry. */
  kernel: fileOrBytes,
  /** The initial RAM disk. Default: none. */
  ramdisk: Schema.optionalKey(fileOrBytes),
  /** A device-tree overlay. Decodes and is refused: no supported architecture takes one yet. */
  dtbOverlay: Schema.optionalKey(fileOrBytes),
  /** The kernel's command line. Default: empty. */
  cmdline: Schema.String.pipe(Schema.withDecodingDefaultKey(Effect.succeed(""))),
  /** Pieces added to the command line, joined by single spaces. Default: none. */
  cmdlineAdd: Schema.Array(Schema.String).pipe(Schema.withDecodingDefaultKey(Effect.succeed([]))),
  /** The number of virtual processors. */
  cpus: CpuCount,
  /** The guest's RAM in bytes, or as text such as `512M`. Rounded up to whole pages. */
  guestMemory: Schema.Union([byteCount, Schema.String]),
  /** Disks. Default: none. */
  blockDevices: Schema.Array(BlockSpec).check(Schema.isMaxLength(MAX_BLOCK_DEVICES))
    .pipe(Schema.withDecodingDefaultKey(Effect.succeed([]))),
  /** Network interfaces. Default: none. */
  netDevices: Schema.Array(NetSpec).check(Schema.isMaxLength(MAX_NET_DEVICES))
    .pipe(Schema.withDecodingDefaultKey(Effect.succeed([]))),
  /** One network interface with default settings. Default: off. */
  defaultNet: off,
  /** The memory balloon. Default: off. */
  virtioBalloon: off,
  /** The console. Default: off. */
  virtioConsole: off,
  /** The display, with keyboard and pointer. Default: off. */
  virtioGpu: off,
  /** The entropy device. Default: off. */
  virtioRng: off,
  /** The most entropy that the guest may draw. Only with `virtioRng`. Default: no limit. */
  entropyRateLimit: Schema.optionalKey(RateLimit),
  /** The socket device. Default: off. */
  virtioVsock: off,
  /** Sound output. Default: off. */
  virtioSound: off,
  /** Sound input as well. Only with `virtioSound`. Default: off. */
  virtioSoundInput: off,
  /** Host ports that listen before the guest starts. Only with `virtioVsock`. Default: none. */
  vsockListeners: Schema.Array(VsockListener).pipe(Schema.withDecodingDefaultKey(Effect.succeed([]))),
  /** Hot-pluggable memory. Default: off. */
  virtioMem: off,
  /** The granularity of hot-plug in bytes. Required with `virtioMem`. */
  virtioMemBlockSize: Schema.optionalKey(Bytes),
  /** The size of the pluggable region in bytes. Required with `virtioMem`. */
  virtioMemRegionSize: Schema.optionalKey(Bytes),
  /** The alignment of the pluggable region in bytes; at least the block size is used. Default: the block size. */
  virtioMemRegionAlignment: Schema.optionalKey(Bytes),
  /** How the guest finds and drives its virtio devices. Default: `mmio`. */
  virtioTransport: VirtioTransport.pipe(Schema.withDecodingDefaultKey(Effect.succeed("mmio"))),
  /** Which entry of a kernel that has several is used. Default: `auto` (PVH for an ELF file that has it). */
  bootProtocol: Schema.Literals(["auto", "linux64", "pvh"]).pipe(Schema.withDecodingDefaultKey(Effect.succeed("auto")))
})
/** What a host writes. */
export type GuestConfigInput = typeof GuestConfig.Encoded
/** The configuration of a guest, decoded and checked: `guestMemory` is whole pages. */
export type GuestConfig = Omit<typeof GuestConfig.Type, "guestMemory"> & { readonly guestMemory: Bytes }

/** The flags that turn a virtio device on. */
export type DeviceFlag =
  | "virtioBalloon"
  | "virtioConsole"
  | "virtioGpu"
  | "virtioRng"
  | "virtioVsock"
  | "virtioSound"
  | "virtioMem"

const DEVICE_FLAGS: ReadonlyArray<DeviceFlag> = [
  "virtioBalloon",
  "virtioConsole",
  "virtioGpu",
  "virtioRng",
  "virtioVsock",
  "virtioSound",
  "virtioMem"
]

/** The virtio devices that exist. The others decode and are refused. */
export const EXISTING_DEVICES: ReadonlySet<DeviceFlag> = new Set<DeviceFlag>([
  "virtioBalloon",
  "virtioConsole",
  "virtioMem",
  "virtioRng",
  "virtioVsock"
])

/** A field that asks for devices: a flag, or a list of them (`defaultNet` is an entry of `netDevices`). */
export type DeviceField = DeviceFlag | "blockDevices" | "netDevices"

/** The fields by which a configuration asks for devices. */
export const deviceFields = (config: GuestConfig): ReadonlyArray<DeviceField> => [
  ...DEVICE_FLAGS.filter((flag) => config[flag]),
  ...(config.blockDevices.length > 0 ? ["blockDevices" as const] : []),
  ...(config.netDevices.length > 0 || config.defaultNet ? ["netDevices" as const] : [])
]

const show = (value: unknown): string => {
  if (value === undefined) return "nothing"
  if (value instanceof Uint8Array) return `${value.length} bytes`
  if (typeof value === "string") return JSON.stringify(value)
  if (typeof value === "object" && value !== null) return Array.isArray(value) ? `${value.length} entries` : "an object"
  if (typeof value === "number" || typeof value === "boolean" || typeof value === "bigint") return `${value}`
  return `a ${typeof value}`
}

const fieldPath = (path: ReadonlyArray<PropertyKey>): string =>
  path.reduce<string>(
    (text, key) => typeof key === "number" ? `${text}[${key}]` : text === "" ? String(key) : `${text}.${String(key)}`,
    ""
  )

const valueAt = (input: unknown, path: ReadonlyArray<PropertyKey>): unknown =>
  path.reduce<unknown>(
    (value, key) => typeof value === "object" && value !== null ? Reflect.get(value, key) : undefined,
    input
  )

const formatIssues = SchemaIssue.makeFormatterStandardSchemaV1()
const decode = Schema.decodeUnknownResult(GuestConfig, { errors: "all", onExcessProperty: "error" })

const rule = (field: string, text: string, value: unknown): ConfigIssue => ({ field, rule: text, value: show(value) })

const isPowerOfTwo = (value: number): boolean => value > 0 && Number.isInteger(Math.log2(value))

const memoryBytes = (value: number | string): number | undefined =>
  typeof value === "string" ? parseBytes(value) : value

const checkMemory = (value: number | string): ReadonlyArray<ConfigIssue> => {
  const bytes = memoryBytes(value)
  if (bytes === undefined) {
    return [rule("guestMemory", "must be a number of bytes, or digits with one of b, k, M, G", value)]
  }
  return bytes < GUEST_MEMORY_MIN || bytes > GUEST_MEMORY_MAX
    ? [rule("guestMemory", "must be from 2 MiB to 512 GiB", value)]
    : []
}

/** What the Schema cannot say: rules between fields, and devices that do not exist yet. */
const checkRules = (config: typeof GuestConfig.Type): Array<ConfigIssue> => {
  const issues: Array<ConfigIssue> = [...checkMemory(config.guestMemory)]
  if (config.kernelType === "ZIRCON") {
    issues.push(rule("kernelType", "must be LINUX: the Zircon loader does not exist yet", "ZIRCON"))
  }
  if (config.dtbOverlay !== undefined) {
    issues.push(rule("dtbOverlay", "must be absent: device-tree overlays do not exist yet", config.dtbOverlay))
  }
  for (const flag of DEVICE_FLAGS) {
    if (config[flag] && !EXISTING_DEVICES.has(flag)) {
      issues.push(rule(flag, "must be off: this device does not exist yet", true))
    }
  }
  if (config.virtioSoundInput) {
    issues.push(rule("virtioSoundInput", "must be off: this device does not exist yet", true))
  }
  const ports = new Map<number, number>()
  config.vsockListeners.forEach(({ port }, index) => {
    const first = ports.get(port)
    if (first === undefined) ports.set(port, index)
    else issues.push(rule(`vsockListeners[${index}].port`, `must differ from vsockListeners[${first}].port`, port))
  })
  if (config.virtioMem) {
    for (const field of ["virtioMemBlockSize", "virtioMemRegionSize"] as const) {
      const value = config[field]
      if (value === undefined || !isPowerOfTwo(value) || value < PAGE_SIZE) {
        issues.push(rule(field, "must be a power of two of at least one page when virtioMem is on", value))
      }
    }
  }
  return issues
}

/** Decodes and checks what a host wrote; all that is wrong is reported at once. */
export const decodeGuestConfig = (input: unknown): Result.Result<GuestConfig, BadConfig> => {
  const decoded = decode(input)
  if (Result.isFailure(decoded)) {
    const issues = formatIssues(decoded.failure.issue).issues.map((issue) => {
      const path = (issue.path ?? []).map((segment) => typeof segment === "object" ? segment.key : segment)
      return rule(path.length === 0 ? "the configuration" : fieldPath(path), issue.message, valueAt(input, path))
    })
    const memory = valueAt(input, ["guestMemory"])
    if (typeof memory === "string") issues.push(...checkMemory(memory))
    return Result.fail(badConfig(issues))
  }
  const config = decoded.success
  const issues = checkRules(config)
  const bytes = memoryBytes(config.guestMemory)
  if (issues.length > 0 || bytes === undefined) return Result.fail(badConfig(issues))
  return Result.succeed({ ...config, guestMemory: Bytes.make(Math.ceil(bytes / PAGE_SIZE) * PAGE_SIZE) })
}

const badConfig = (issues: ReadonlyArray<ConfigIssue>): BadConfig =>
  new BadConfig({
    operation: "create",
    detail: issues.length === 1 ? "one field is wrong" : `${issues.length} fields are wrong`,
    issues
  })
