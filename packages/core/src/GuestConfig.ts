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
import { BlockClient } from "./BlockClient.ts"
import { PLUGGABLE_BLOCKS_MAX } from "./BlockMap.ts"
import { BadConfig, type ConfigIssue } from "./GuestError.ts"
import { GuestFile } from "./GuestFile.ts"
import { PAGE_SIZE } from "./GuestMemory.ts"
import type { HostVsockAcceptor } from "./HostVsockEndpoint.ts"
import { formatMacAddress, isStationAddress, MAC_ADDRESS_PATTERN, macAddressBytes } from "./MacAddress.ts"
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
/** The most images below a disk's own, each the backing of the one above. */
export const BLOCK_BACKING_MAX = 8
/** The most network devices of one machine. */
export const MAX_NET_DEVICES = 32

/** The most ports of a console. */
export const CONSOLE_PORTS_MAX = 31
/** The most characters of the name of a console's port. */
export const CONSOLE_PORT_NAME_MAX = 64

const BLOCK_DEVICE_ID = new RegExp(`^[ -~]{1,${MAX_BLOCK_DEVICE_ID}}$`)

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

/** How the bytes of a disk are laid out: as they are (in a file, or in a block device), or in a qcow2 image. */
export const BlockFormat = Schema.Literals(["FILE", "QCOW", "BLOCK"])
/** How the bytes of a disk are laid out. */
export type BlockFormat = typeof BlockFormat.Type

/** What a qcow2 image is the difference to. It may itself be such an image. */
export interface BlockBacking {
  readonly client: BlockClient
  readonly format: BlockFormat
  readonly backing?: BlockBacking
}
/** What a qcow2 image is the difference to. */
export const BlockBacking = Schema.Struct({
  client: BlockClient,
  format: BlockFormat,
  backing: Schema.optionalKey(Schema.suspend((): Schema.Codec<BlockBacking> => BlockBacking))
})

/** A disk of the guest. */
export const BlockSpec = Schema.Struct({
  /** What the guest's driver is told (virtio-blk's GET_ID): 1 to {@link MAX_BLOCK_DEVICE_ID} printable ASCII characters. */
  id: Schema.String.check(Schema.isPattern(BLOCK_DEVICE_ID, {
    expected: `1 to ${MAX_BLOCK_DEVICE_ID} printable ASCII characters`
  })),
  /**
   * - `READ_WRITE`: what the guest writes is there afterwards
   * - `READ_ONLY`: the guest sees a disk that it cannot write
   * - `VOLATILE_WRITE`: what the guest writes is kept in memory and is gone when the machine ends
   */
  mode: Schema.Literals(["READ_WRITE", "READ_ONLY", "VOLATILE_WRITE"]),
  format: BlockFormat,
  /** What serves the disk. */
  client: BlockClient,
  /**
   * What a qcow2 image is the difference to. An image that has a backing file is refused without it: the name in the image is
   * never opened, because whoever wrote the image, perhaps a guest, chose it.
   */
  backing: Schema.optionalKey(BlockBacking),
  /** The most bytes of memory that a disk with the mode `VOLATILE_WRITE` takes for what was written. Default: 256 MiB. */
  volatileLimit: Schema.optionalKey(byteCount),
  /** The most that the guest may read and write. Default: no limit. */
  rateLimit: Schema.optionalKey(RateLimit)
})
/** A disk of the guest. */
export type BlockSpec = typeof BlockSpec.Type
/** A network interface of the guest. */
export const NetSpec = Schema.Struct({
  /** The address of the interface, such as `02:00:00:00:00:01`: of one station, no group, and of no other interface. */
  macAddress: Schema.String.check(Schema.isPattern(MAC_ADDRESS_PATTERN, {
    expected: "six pairs of hexadecimal digits with colons"
  })),
  /** Whether the guest is to be a station of the host's own network, where the back end can do that. */
  enableBridge: Schema.Boolean,
  /** The most that the guest may receive. Default: no limit. */
  rxRateLimit: Schema.optionalKey(RateLimit),
  /** The most that the guest may send. Default: no limit. */
  txRateLimit: Schema.optionalKey(RateLimit)
})
/** A network interface of the guest. */
export type NetSpec = typeof NetSpec.Type
/** A host port that accepts connections of the guest from its first instruction on. */
export const VsockListener = Schema.Struct({
  port: VsockPort,
  /** Who decides about the connections. Without one they wait until somebody listens on the port. */
  acceptor: Schema.optionalKey(
    Schema.declare<HostVsockAcceptor>((u): u is HostVsockAcceptor => typeof u === "function", {
      expected: "a function from a connection request to an effect"
    })
  )
})

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
  /** One more network interface with the settings of {@link DEFAULT_NET}. Default: off. */
  defaultNet: off,
  /** The memory balloon. Default: off. */
  virtioBalloon: off,
  /** The console. Default: off. */
  virtioConsole: off,
  /** Names of further ports of the console (on Linux `/dev/virtio-ports/NAME`). Only with `virtioConsole`. Default: none. */
  consolePorts: Schema.Array(Schema.NonEmptyString.check(Schema.isMaxLength(CONSOLE_PORT_NAME_MAX)))
    .pipe(Schema.withDecodingDefaultKey(Effect.succeed([]))),
  /**
   * The most ports that the console can ever have, with itself: more can be added while the guest runs. Default: itself and
   * `consolePorts`.
   */
  consolePortsMax: Schema.optionalKey(
    Schema.Int.check(Schema.isBetween({ minimum: 1, maximum: CONSOLE_PORTS_MAX }))
  ),
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
  /** The alignment of the pluggable region in bytes, a power of two; at least the block size is used. Default: 128 MiB. */
  virtioMemRegionAlignment: Schema.optionalKey(Bytes),
  /** How the guest finds and drives its virtio devices. Default: `mmio`. */
  virtioTransport: VirtioTransport.pipe(Schema.withDecodingDefaultKey(Effect.succeed("mmio"))),
  /** Offer packed virtqueues (VIRTIO_F_RING_PACKED) as well; a driver that knows them takes them. Default: off. */
  virtioPackedRing: off,
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

/** The interface that `defaultNet` asks for. It is not bridged, so that every back end can connect it. */
export const DEFAULT_NET: NetSpec = { macAddress: "02:1a:11:00:01:00", enableBridge: false }

/** The network interfaces of a configuration: `netDevices`, and behind them {@link DEFAULT_NET} with `defaultNet`. */
export const netSpecs = (config: Pick<GuestConfig, "defaultNet" | "netDevices">): ReadonlyArray<NetSpec> =>
  config.defaultNet ? [...config.netDevices, DEFAULT_NET] : config.netDevices

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

const checkDisks = (disks: ReadonlyArray<BlockSpec>): Array<ConfigIssue> => {
  const issues: Array<ConfigIssue> = []
  const ids = new Map<string, number>()
  disks.forEach((disk, index) => {
    const field = `blockDevices[${index}]`
    const first = ids.get(disk.id)
    if (first === undefined) ids.set(disk.id, index)
    else issues.push(rule(`${field}.id`, `must differ from blockDevices[${first}].id`, disk.id))
    if (disk.volatileLimit !== undefined && disk.mode !== "VOLATILE_WRITE") {
      issues.push(
        rule(`${field}.volatileLimit`, "must be absent unless the mode is VOLATILE_WRITE", disk.volatileLimit)
      )
    }
    let below: BlockBacking | BlockSpec | undefined = disk
    let path = field
    for (let depth = 0; below !== undefined; depth++) {
      if (below.backing !== undefined && below.format !== "QCOW") {
        issues.push(rule(`${path}.backing`, "must be absent unless the format is QCOW", below.backing.client.name))
      }
      if (depth > BLOCK_BACKING_MAX) {
        issues.push(rule(`${field}.backing`, `must be at most ${BLOCK_BACKING_MAX} images deep`, depth))
        break
      }
      below = below.backing
      path = `${path}.backing`
    }
  })
  return issues
}

const checkInterfaces = (config: Pick<GuestConfig, "defaultNet" | "netDevices">): Array<ConfigIssue> => {
  const issues: Array<ConfigIssue> = []
  const addresses = new Map<string, string>()
  netSpecs(config).forEach(({ macAddress }, index) => {
    const field = index < config.netDevices.length ? `netDevices[${index}].macAddress` : "defaultNet"
    const bytes = macAddressBytes(macAddress)
    if (!isStationAddress(bytes)) {
      issues.push(rule(field, "must be the address of one station: the first byte even, and not all zeros", macAddress))
    }
    const first = addresses.get(formatMacAddress(bytes))
    if (first === undefined) addresses.set(formatMacAddress(bytes), field)
    else issues.push(rule(field, `must differ from ${first}`, macAddress))
  })
  if (config.defaultNet && config.netDevices.length === MAX_NET_DEVICES) {
    issues.push(rule("defaultNet", `must be off with ${MAX_NET_DEVICES} network devices`, true))
  }
  return issues
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
  if (config.vsockListeners.length > 0 && !config.virtioVsock) {
    issues.push(rule("vsockListeners", "must be empty unless virtioVsock is on", config.vsockListeners))
  }
  const ports = new Map<number, number>()
  config.vsockListeners.forEach(({ port }, index) => {
    const first = ports.get(port)
    if (first === undefined) ports.set(port, index)
    else issues.push(rule(`vsockListeners[${index}].port`, `must differ from vsockListeners[${first}].port`, port))
  })
  issues.push(...checkDisks(config.blockDevices))
  issues.push(...checkInterfaces(config))
  config.consolePorts.forEach((name, index) => {
    const first = config.consolePorts.indexOf(name)
    if (first < index) issues.push(rule(`consolePorts[${index}]`, `must differ from consolePorts[${first}]`, name))
  })
  const portsMax = config.consolePortsMax ?? 1 + config.consolePorts.length
  if (portsMax < 1 + config.consolePorts.length || portsMax > CONSOLE_PORTS_MAX) {
    const text = `must be from 1 + the number of consolePorts to ${CONSOLE_PORTS_MAX}`
    issues.push(rule("consolePortsMax", text, portsMax))
  }
  if (config.virtioMem) {
    const { virtioMemBlockSize: block, virtioMemRegionAlignment: alignment, virtioMemRegionSize: region } = config
    if (block === undefined || !isPowerOfTwo(block) || block < PAGE_SIZE) {
      issues.push(rule("virtioMemBlockSize", "must be a power of two of at least one page when virtioMem is on", block))
    } else if (region === undefined || region < block || region % block !== 0) {
      issues.push(rule("virtioMemRegionSize", "must be a multiple of virtioMemBlockSize when virtioMem is on", region))
    } else if (region / block > PLUGGABLE_BLOCKS_MAX) {
      issues.push(
        rule(
          "virtioMemBlockSize",
          `must be at least ${region / PLUGGABLE_BLOCKS_MAX}: a region has at most ${PLUGGABLE_BLOCKS_MAX} blocks`,
          block
        )
      )
    }
    if (alignment !== undefined && !isPowerOfTwo(alignment)) {
      issues.push(rule("virtioMemRegionAlignment", "must be a power of two", alignment))
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
