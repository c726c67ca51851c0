/**
 * The fake is as good as its likeness: the same accesses, made by machine code on KVM and by a guest program on the fake, must
 * give the devices the same events and the guest the same values.
 */
import { assert, describe, it } from "@effect/vitest"
import { type BusRange, openBusValue } from "@troupe/core/Bus"
import type { Hypervisor } from "@troupe/core/Hypervisor"
import { FakeHypervisor, GuestProgram } from "@troupe/core/testing"
import { Effect, Latch, type Scope } from "effect"
import * as fc from "fast-check"
import { kvmObstacle, onKvm } from "./support.ts"
import { asm, CONTROL, dword, END, flatMode, kvmLayer, range, SERIAL, tinyMachine, WINDOW } from "./TinyMachine.ts"

/** Where the guest puts what it has read, 4 bytes each. */
const RESULTS = 0x4_0000
/** The doorbell that is rung last: the others, rung before it, have been delivered when it is. */
const FENCE_PORT = 0x5f0

const PAGE = 0x1000
const RANGES: ReadonlyArray<BusRange> = [
  range({ base: SERIAL, read: "shadowed", write: "posted" }),
  range({ base: CONTROL, doorbells: [{ offset: 4, size: 2 }, { offset: 6, size: 1, value: 5 }] }),
  range({
    base: WINDOW,
    space: "mmio",
    size: PAGE,
    read: "register-page",
    doorbells: [
      { offset: 0x50, size: 4, value: 0 },
      { offset: 0x50, size: 4, value: 1 },
      { offset: 0x64, size: 4, value: 1, wakes: false },
      { offset: 0x80, size: 2 }
    ]
  }),
  range({ base: WINDOW + PAGE, space: "mmio", size: PAGE, read: "register-page", write: "posted" }),
  range({ base: WINDOW + 3 * PAGE, space: "mmio", size: 0x20, doorbells: [{ offset: 0x10, size: 1 }] }),
  range({ base: WINDOW + 3 * PAGE + 0x40, space: "mmio", size: 0x10, read: "shadowed", write: "posted" }),
  range({ base: FENCE_PORT, size: 1, doorbells: [{ offset: 0, size: 1 }] })
]
const FENCE = RANGES.length - 1

interface Access {
  readonly space: BusRange["space"]
  readonly address: number
  readonly size: 1 | 2 | 4
  readonly isWrite: boolean
  readonly value: number
}

/** A write that rings a doorbell, or nearly. */
const ring = fc.constantFrom(
  ...RANGES.slice(0, FENCE).flatMap(({ base, doorbells, space }) =>
    doorbells.map((doorbell) => ({
      space,
      address: base + doorbell.offset,
      size: doorbell.size,
      value: doorbell.value
    }))
  )
).chain(({ address, size, space, value }) =>
  fc.record<Access>({
    space: fc.constant(space),
    address: fc.oneof(fc.constant(address), fc.integer({ min: address - 1, max: address + 1 })),
    size: fc.oneof(fc.constant(size), fc.constantFrom(1, 2, 4)),
    isWrite: fc.constant(true),
    value: fc.oneof(fc.constant(value ?? 0), fc.nat(6))
  })
)

/** An access in, around or across a range. */
const any = fc.constantFrom(...RANGES.slice(0, FENCE)).chain(({ base, size, space }) =>
  fc.record<Access>({
    space: fc.constant(space),
    address: fc.oneof(
      fc.integer({ min: base - 2, max: base + size + 2 }),
      fc.integer({ min: base + size - 4, max: base + size })
    ),
    size: fc.constantFrom(1, 2, 4),
    isWrite: fc.boolean(),
    value: fc.integer({ min: 0, max: 0xffff_ffff })
  })
)

/** What a guest does. A processor itself splits accesses that cross a page, so there are none of those. */
const accesses = fc.array(
  fc.oneof(ring, any).filter(({ address, size, space }) => space === "pio" || (address % PAGE) + size <= PAGE),
  { minLength: 1, maxLength: 40, size: "max" }
)

const OPERAND_16 = 0x66

/** 32-bit code for an access. */
const compile = ({ address, isWrite, size, space, value }: Access, index: number): ReadonlyArray<number> => {
  const prefix = size === 2 ? [OPERAND_16] : []
  const wide = size === 1 ? 0 : 1
  const access = space === "pio"
    ? [0xba, ...dword(address), ...prefix, (isWrite ? 0xee : 0xec) | wide] // mov edx, address; in or out
    : [...prefix, (isWrite ? 0xa2 : 0xa0) | wide, ...dword(address)] // mov [address], a or mov a, [address]
  return [
    ...[0xb8, ...dword(isWrite ? value : 0)], // mov eax, value
    ...access,
    ...(isWrite ? [] : [0xa3, ...dword(RESULTS + index * 4)]) // mov [RESULTS + index * 4], eax
  ]
}

const interpret = (script: ReadonlyArray<Access>) =>
  GuestProgram.make(function*(cpu) {
    for (const [index, { address, isWrite, size, space, value }] of script.entries()) {
      if (isWrite) {
        if (space === "mmio") yield* cpu.store(address, size, value)
        else if (size === 1) yield* cpu.out8(address, value)
        else if (size === 2) yield* cpu.out16(address, value)
        else yield* cpu.out32(address, value)
        continue
      }
      const read = space === "mmio"
        ? yield* cpu.load(address, size)
        : size === 1
        ? yield* cpu.in8(address)
        : size === 2
        ? yield* cpu.in16(address)
        : yield* cpu.in32(address)
      yield* cpu.store(RESULTS + index * 4, 4, read)
    }
    yield* cpu.out8(FENCE_PORT, 0)
    yield* cpu.out8(0xe0, 0)
    yield* cpu.waitForInterrupt()
  })

/** The code of a program's image: the first loaded segment of an ELF file. */
const codeOf = (image: Uint8Array): ReadonlyArray<number> => {
  const segment = new DataView(image.buffer, image.byteOffset + ELF_HEADER_SIZE)
  const offset = segment.getUint32(P_OFFSET, true)
  return Array.from(image.subarray(offset, offset + segment.getUint32(P_FILESZ, true)))
}
const ELF_HEADER_SIZE = 64
const P_OFFSET = 8
const P_FILESZ = 32

const pattern = (seed: number): Uint8Array => Uint8Array.from({ length: PAGE }, (_, i) => (i * 7 + seed) & 0xff)

/** What a guest reads and what its devices see. */
const observe = Effect.fnUntraced(function*(code: ReadonlyArray<number>, script: ReadonlyArray<Access>) {
  const events: Array<string> = []
  const rung = new Set<string>()
  const fence = Latch.makeUnsafe()
  const machine = yield* tinyMachine({
    code,
    state: flatMode,
    ranges: RANGES,
    handlers: {
      posted: (range, offset, size, value) => events.push(`posted ${range}+${offset}/${size} ${value}`) > 0,
      call: (range, offset, size, isWrite, value, reply) => {
        events.push(`${isWrite ? "write" : "read"} ${range}+${offset}/${size} ${value}`)
        reply.complete(isWrite ? 0 : (0x8765_4321 + range * 0x101 + offset) % (openBusValue(size) + 1))
      },
      doorbell: (range, doorbell) => {
        if (range === FENCE) fence.openUnsafe()
        else rung.add(`${range}#${doorbell}`)
      }
    }
  })
  machine.backings.forEach(({ page, shadow }, index) => {
    if (page !== undefined) new Uint8Array(page.buffer, page.byteOffset, page.byteLength).set(pattern(index))
    // Every third register is not shadowed.
    shadow?.forEach((_, i) => i % 3 === 2 || Atomics.store(shadow, i, (i * 5 + index) & 0xff))
  })
  yield* Effect.andThen(machine.runToEnd, fence.await)
  return {
    events,
    rung: Array.from(rung).toSorted(),
    read: script.map(({ isWrite }, index) =>
      isWrite ? undefined : machine.memory.view.getUint32(RESULTS + index * 4, true)
    )
  }
})

describe.skipIf(kvmObstacle !== undefined)(onKvm("The fake and KVM"), () => {
  it.layer(kvmLayer(), { excludeTestServices: true, timeout: 60_000 })((it) => {
    it.effect("show devices and guests the same, whatever a guest accesses", () =>
      Effect.gen(function*() {
        const run = Effect.runPromiseWith(yield* Effect.context<Hypervisor>())
        const scoped = <A>(effect: Effect.Effect<A, unknown, Hypervisor | Scope.Scope>) => Effect.scoped(effect)
        yield* Effect.promise(() =>
          fc.assert(
            fc.asyncProperty(accesses, async (script) => {
              const code = asm(...script.map(compile), [0xba, ...dword(FENCE_PORT), 0xee], END)
              const onKvm = await run(scoped(observe(code, script)))
              const image = GuestProgram.kernel(interpret(script))
              const onFake = await Effect.runPromise(
                scoped(observe(codeOf(image), script)).pipe(Effect.provide(FakeHypervisor.layer()))
              )
              assert.deepStrictEqual(onFake, onKvm)
            }),
            { numRuns: 100 }
          )
        )
      }), 60_000)
  })
})
