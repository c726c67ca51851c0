/**
 * The processor that a guest sees: KVM's supported CPUID leaves, less what the host hides, with the identity of each vCPU.
 *
 * Topology: one package, one thread a core, APIC IDs equal to vCPU numbers. Leaves as in Intel SDM volume 2, `CPUID`, and AMD
 * APM volume 3, appendix E.
 */
import * as Context from "effect/Context"
import { KvmValue } from "./KvmIoctl.ts"
import { KvmCpuid2, KvmCpuidEntry2 } from "./KvmStructs.ts"
import type { StructView } from "./Struct.ts"

/** One CPUID leaf. Registers are unsigned. */
export interface CpuidLeaf {
  readonly function: number
  readonly index: number
  /** `KVM_CPUID_FLAG_*`. */
  readonly flags: number
  readonly eax: number
  readonly ebx: number
  readonly ecx: number
  readonly edx: number
}

/** Bits that a guest must not see: those set here are cleared in every subleaf of the function. */
export interface CpuidMask {
  readonly function: number
  readonly eax?: number
  readonly ebx?: number
  readonly ecx?: number
  readonly edx?: number
}

/** Features by the names that `/proc/cpuinfo` gives them, for masks. */
export const cpuidFeature = {
  cx16: { function: 1, ecx: 1 << 13 },
  x2apic: { function: 1, ecx: 1 << 21 },
  movbe: { function: 1, ecx: 1 << 22 },
  popcnt: { function: 1, ecx: 1 << 23 },
  tsc_deadline_timer: { function: 1, ecx: 1 << 24 },
  xsave: { function: 1, ecx: 1 << 26 },
  smep: { function: 7, ebx: 1 << 7 },
  smap: { function: 7, ebx: 1 << 20 }
} as const satisfies { readonly [name: string]: CpuidMask }

/** What the guests of a hypervisor must not see. Default: nothing is hidden. Read when the hypervisor's layer is built. */
export const HiddenCpuid = Context.Reference<ReadonlyArray<CpuidMask>>("@troupe/node/HiddenCpuid", {
  defaultValue: () => []
})

/** Leaf 1, ECX: the local APIC timer's TSC deadline mode. KVM emulates it but does not list it as supported. */
const TSC_DEADLINE_TIMER = 1 << 24
/** Leaf 1, ECX: this is a virtual machine. Without it Linux does not look for KVM's leaves, and has no clock that it can use. */
const HYPERVISOR = 1 << 31
/** Leaf 1, EDX: the package has more than one logical processor. */
const HTT = 1 << 28
/** Leaves 0xB and 0x1F, ECX bits 8 to 15: type of the level. */
const LEVEL_SMT = 1
const LEVEL_CORE = 2
/** Leaves 4 and 0x8000_001D, EAX bits 5 to 7: a cache of this level or above is shared by all cores. */
const SHARED_CACHE_LEVEL = 3

const unsigned = (value: number): number => value >>> 0

/** Bits `low` to `low + width - 1` of `value` replaced. */
const withBits = (value: number, low: number, width: number, bits: number): number => {
  const mask = width === 32 ? 0xffff_ffff : ((1 << width) - 1) << low
  return unsigned((value & ~mask) | ((bits << low) & mask))
}

/** Number of bits that hold the APIC IDs of `count` processors. */
const apicIdBits = (count: number): number => (count <= 1 ? 0 : 32 - Math.clz32(count - 1))

const hide = (leaf: CpuidLeaf, masks: ReadonlyArray<CpuidMask>): CpuidLeaf => {
  let { eax, ebx, ecx, edx } = leaf
  for (const mask of masks) {
    if (mask.function !== leaf.function) continue
    eax &= ~(mask.eax ?? 0)
    ebx &= ~(mask.ebx ?? 0)
    ecx &= ~(mask.ecx ?? 0)
    edx &= ~(mask.edx ?? 0)
  }
  return { ...leaf, eax: unsigned(eax), ebx: unsigned(ebx), ecx: unsigned(ecx), edx: unsigned(edx) }
}

const extendedTopology = (leaf: CpuidLeaf, id: number, count: number): CpuidLeaf => {
  const core = leaf.index === 1
  const known = leaf.index <= 1
  return {
    ...leaf,
    flags: leaf.flags | KvmValue.KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    eax: core ? apicIdBits(count) : 0,
    ebx: known ? (core ? count : 1) : 0,
    ecx: unsigned(leaf.index | (known ? (core ? LEVEL_CORE : LEVEL_SMT) << 8 : 0)),
    edx: id
  }
}

const cacheSharing = (leaf: CpuidLeaf, count: number): CpuidLeaf => {
  const level = (leaf.eax >>> 5) & 7
  return { ...leaf, eax: withBits(leaf.eax, 14, 12, level >= SHARED_CACHE_LEVEL ? count - 1 : 0) }
}

const identify = (leaf: CpuidLeaf, id: number, count: number): CpuidLeaf => {
  switch (leaf.function) {
    case 0x1:
      return {
        ...leaf,
        ebx: withBits(withBits(leaf.ebx, 24, 8, id), 16, 8, count),
        edx: unsigned(count > 1 ? leaf.edx | HTT : leaf.edx & ~HTT)
      }
    case 0x4: {
      const shared = cacheSharing(leaf, count)
      return (leaf.eax & 0x1f) === 0 ? leaf : { ...shared, eax: withBits(shared.eax, 26, 6, count - 1) }
    }
    case 0xb:
    case 0x1f:
      return extendedTopology(leaf, id, count)
    case 0x8000_0008:
      return { ...leaf, ecx: withBits(withBits(leaf.ecx, 0, 8, count - 1), 12, 4, apicIdBits(count)) }
    case 0x8000_001d:
      return cacheSharing(leaf, count)
    case 0x8000_001e:
      return { ...leaf, eax: id, ebx: withBits(leaf.ebx, 0, 16, id & 0xff), ecx: withBits(leaf.ecx, 0, 11, 0) }
    default:
      return leaf
  }
}

/** The leaves of vCPU `id` of a machine with `count` vCPUs. */
export const cpuidFor = (
  supported: ReadonlyArray<CpuidLeaf>,
  options: {
    readonly id: number
    readonly count: number
    readonly hidden: ReadonlyArray<CpuidMask>
    /** Whether KVM has `KVM_CAP_TSC_DEADLINE_TIMER`. */
    readonly tscDeadline: boolean
  }
): ReadonlyArray<CpuidLeaf> => {
  const { count, hidden, id, tscDeadline } = options
  const leaves: Array<CpuidLeaf> = []
  for (const leaf of supported) {
    const complete = leaf.function === 1
      ? { ...leaf, ecx: unsigned(leaf.ecx | HYPERVISOR | (tscDeadline ? TSC_DEADLINE_TIMER : 0)) }
      : leaf
    leaves.push(hide(identify(complete, id, count), hidden))
  }
  // A host without threads may list one level only; software looks for both.
  for (const topology of [0xb, 0x1f]) {
    const levels = leaves.filter((leaf) => leaf.function === topology)
    if (levels.length === 1) {
      const empty = { function: topology, index: 1, flags: 0, eax: 0, ebx: 0, ecx: 0, edx: 0 }
      leaves.push(extendedTopology(empty, id, count))
    }
  }
  return leaves
}

/** Reads `struct kvm_cpuid2`. */
export const decodeCpuid = (view: StructView): ReadonlyArray<CpuidLeaf> => {
  const { entries, nent } = KvmCpuid2.fields
  const entry = KvmCpuidEntry2.fields
  return Array.from({ length: nent.get(view) }, (_, i): CpuidLeaf => {
    const base = entries.at(i)
    return {
      function: entry.function.get(view, base),
      index: entry.index.get(view, base),
      flags: entry.flags.get(view, base),
      eax: entry.eax.get(view, base),
      ebx: entry.ebx.get(view, base),
      ecx: entry.ecx.get(view, base),
      edx: entry.edx.get(view, base)
    }
  })
}

/** Makes `struct kvm_cpuid2`. */
export const encodeCpuid = (leaves: ReadonlyArray<CpuidLeaf>): StructView => {
  const view = KvmCpuid2.make(leaves.length)
  const { entries, nent } = KvmCpuid2.fields
  const entry = KvmCpuidEntry2.fields
  nent.set(view, leaves.length)
  leaves.forEach((leaf, i) => {
    const base = entries.at(i)
    entry.function.set(view, leaf.function, base)
    entry.index.set(view, leaf.index, base)
    entry.flags.set(view, leaf.flags, base)
    entry.eax.set(view, leaf.eax, base)
    entry.ebx.set(view, leaf.ebx, base)
    entry.ecx.set(view, leaf.ecx, base)
    entry.edx.set(view, leaf.edx, base)
  })
  return view
}
