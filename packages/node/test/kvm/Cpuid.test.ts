/** The processor that guests see: every vCPU's own identity, nothing that is hidden, nothing that KVM does not support. */
import { assert, describe, it } from "@effect/vitest"
import { cpuidFeature, cpuidFor, type CpuidLeaf, decodeCpuid, encodeCpuid } from "@troupe/node/kvm/Cpuid"
import * as fc from "fast-check"

const register = fc.nat({ max: 0xffff_ffff })
const leaf = fc.record({
  function: fc.constantFrom(0, 1, 4, 7, 0xb, 0x1f, 0x4000_0001, 0x8000_0001, 0x8000_0008, 0x8000_001d, 0x8000_001e),
  index: fc.nat({ max: 3 }),
  flags: fc.nat({ max: 7 }),
  eax: register,
  ebx: register,
  ecx: register,
  edx: register
})
/** Leaves as KVM lists them: each function and index once. */
const supported = fc.uniqueArray(leaf, { selector: (leaf) => `${leaf.function} ${leaf.index}`, maxLength: 30 })
const machine = fc.integer({ min: 1, max: 64 }).chain((count) =>
  fc.record({ count: fc.constant(count), id: fc.nat({ max: count - 1 }), tscDeadline: fc.boolean() })
)

const find = (leaves: ReadonlyArray<CpuidLeaf>, number: number, index: number) =>
  leaves.find((leaf) => leaf.function === number && leaf.index === index)

describe("CPUID", () => {
  it("survives encoding", () => {
    fc.assert(fc.property(supported, (leaves) => {
      assert.deepStrictEqual(decodeCpuid(encodeCpuid(leaves)), leaves)
    }))
  })

  it("names the vCPU and the topology, and leaves other leaves alone", () => {
    fc.assert(fc.property(supported, machine, (leaves, { count, id, tscDeadline }) => {
      const result = cpuidFor(leaves, { id, count, hidden: [], tscDeadline })
      // Every register is an unsigned 32-bit number: what cannot be encoded is not equal afterwards.
      assert.deepStrictEqual(decodeCpuid(encodeCpuid(result)), result)
      for (const before of leaves) {
        const after = find(result, before.function, before.index)
        if (after === undefined) return assert.fail("a supported leaf is gone")
        switch (before.function) {
          case 1:
            assert.strictEqual(after.ebx >>> 24, id)
            assert.strictEqual((after.ebx >>> 16) & 0xff, count)
            assert.strictEqual((after.edx >>> 28) & 1, count > 1 ? 1 : 0)
            assert.strictEqual(after.ecx, (before.ecx | (1 << 31) | (tscDeadline ? 1 << 24 : 0)) >>> 0)
            assert.strictEqual(after.eax, before.eax)
            break
          case 4:
            if ((before.eax & 0x1f) === 0) assert.deepStrictEqual(after, before)
            else assert.strictEqual(after.eax >>> 26, (count - 1) & 0x3f)
            break
          case 0xb:
          case 0x1f:
            assert.strictEqual(after.edx, id)
            break
          case 0x8000_0008:
            assert.strictEqual(after.ecx & 0xff, count - 1)
            break
          case 0x8000_001e:
            assert.strictEqual(after.eax, id)
            break
          case 0x8000_001d:
            break
          default:
            assert.deepStrictEqual(after, before)
        }
      }
    }))
  })

  it("tells one thread a core and all cores one package, with room for every APIC ID", () => {
    fc.assert(fc.property(machine, ({ count, id, tscDeadline }) => {
      const empty = { function: 0xb, index: 0, flags: 1, eax: 0, ebx: 0, ecx: 0, edx: 0 }
      const result = cpuidFor([empty], { id, count, hidden: [], tscDeadline })
      const threads = find(result, 0xb, 0)
      const cores = find(result, 0xb, 1)
      assert.deepInclude(threads, { eax: 0, ebx: 1, ecx: 0x100 })
      assert.deepInclude(cores, { ebx: count, ecx: 0x201, edx: id, flags: 1 })
      assert.isAtLeast(2 ** (cores?.eax ?? 0), count)
      assert.isBelow(2 ** ((cores?.eax ?? 0) - 1), count)
    }))
  })

  it("hides exactly the bits of the masks", () => {
    fc.assert(fc.property(supported, machine, fc.subarray(Object.values(cpuidFeature)), (leaves, options, hidden) => {
      const shown = cpuidFor(leaves, { ...options, hidden: [] })
      const masked = cpuidFor(leaves, { ...options, hidden })
      for (const [i, before] of shown.entries()) {
        const masks = hidden.filter((mask) => mask.function === before.function)
        const ecx = masks.reduce((bits, mask) => bits | ("ecx" in mask ? mask.ecx : 0), 0)
        const ebx = masks.reduce((bits, mask) => bits | ("ebx" in mask ? mask.ebx : 0), 0)
        assert.deepStrictEqual(masked[i], { ...before, ecx: (before.ecx & ~ecx) >>> 0, ebx: (before.ebx & ~ebx) >>> 0 })
      }
    }))
  })
})
