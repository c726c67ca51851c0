import { assert, describe, it } from "@effect/vitest"
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import { type DriverBuffer, SplitQueueDriver } from "@troupe/core/testing/drivers/SplitQueueDriver"
import * as fc from "fast-check"
import { DescriptorChain } from "../src/virtio/DescriptorChain.ts"
import { availableRingSize, SplitQueue, usedRingSize } from "../src/virtio/SplitQueue.ts"
import type { QueueFaultKind } from "../src/virtio/Virtqueue.ts"

const MEMORY_SIZE = 0x10_0000
const QUEUE_ADDRESS = 0x1000
/** Where the buffers of tests begin. */
const DATA_ADDRESS = 0x8_0000
const HIGH_ADDRESS = 2 ** 32

const makeMemory = () =>
  new GuestMemory([
    new MemoryRegion(0, new ArrayBuffer(MEMORY_SIZE)),
    new MemoryRegion(HIGH_ADDRESS, new ArrayBuffer(0x1_0000))
  ])

interface Options {
  readonly size?: number
  readonly indirect?: boolean
  readonly eventIndex?: boolean
  readonly inOrder?: boolean
}

const pair = ({ eventIndex = false, inOrder = false, indirect = true, size = 8 }: Options = {}) => {
  const memory = makeMemory()
  const driver = new SplitQueueDriver({ memory, address: QUEUE_ADDRESS, size, indirect, eventIndex })
  const queue = SplitQueue.make(memory, {
    size,
    descriptorTable: driver.descriptorTable,
    availableRing: driver.availableRing,
    usedRing: driver.usedRing,
    indirect,
    eventIndex,
    inOrder
  })
  if (queue === undefined) throw new Error("the queue is refused")
  return { memory, driver, queue, chain: new DescriptorChain(2 * size) }
}

const buffer = (address: number, length: number, writable = false): DriverBuffer => ({ address, length, writable })

describe("SplitQueue", () => {
  it("refuses a set-up with a wrong size, alignment or place, and accepts the edges", () => {
    const memory = makeMemory()
    const good = {
      size: 8,
      descriptorTable: 0x1000,
      availableRing: 0x2000,
      usedRing: 0x3000,
      indirect: false,
      eventIndex: false
    }
    const accepts = (change: Partial<typeof good>) => SplitQueue.make(memory, { ...good, ...change }) !== undefined
    assert.isTrue(accepts({}))
    for (const size of [0, 3, 6, -8, 1.5, 65536, 2 ** 32]) assert.isFalse(accepts({ size }), `size ${size}`)
    for (const size of [1, 2, 256]) assert.isTrue(accepts({ size }), `size ${size}`)
    assert.isTrue(accepts({ size: 32768, descriptorTable: 0, availableRing: 0x8_0000, usedRing: 0xa_0000 }))
    assert.isFalse(accepts({ descriptorTable: 0x1008 }))
    assert.isFalse(accepts({ availableRing: 0x2001 }))
    assert.isTrue(accepts({ availableRing: 0x2002 }))
    assert.isFalse(accepts({ usedRing: 0x3002 }))
    assert.isTrue(accepts({ usedRing: 0x3004 }))
    for (const field of ["descriptorTable", "availableRing", "usedRing"]) {
      for (const address of [-1, MEMORY_SIZE, MEMORY_SIZE - 16, 2 ** 52 - 16, 2 ** 53]) {
        assert.isFalse(accepts({ [field]: address }), `${field} at ${address}`)
      }
    }
    assert.isTrue(accepts({ descriptorTable: MEMORY_SIZE - 8 * 16 }))
    assert.isTrue(accepts({ availableRing: MEMORY_SIZE - availableRingSize(8) }))
    assert.isTrue(accepts({ usedRing: HIGH_ADDRESS + 0x1_0000 - usedRingSize(8) - 2 }))
  })

  it("takes chains in order, with their bytes in place, and gives them back in any order", () => {
    const { chain, driver, memory, queue } = pair()
    memory.write(DATA_ADDRESS, Uint8Array.of(1, 2, 3, 4, 5))
    const first = driver.add([buffer(DATA_ADDRESS, 2), buffer(DATA_ADDRESS + 2, 3), buffer(HIGH_ADDRESS + 8, 4, true)])
    const second = driver.add([buffer(DATA_ADDRESS + 100, 10, true)], true)
    assert.isFalse(queue.take(chain))
    driver.publish()
    assert.isTrue(queue.take(chain))
    assert.deepStrictEqual(
      [chain.head, chain.count, chain.readableCount, chain.readableBytes, chain.writableBytes],
      [first, 3, 2, 5, 4]
    )
    const all = new Uint8Array(8)
    assert.strictEqual(chain.read(1, all), 4)
    assert.deepStrictEqual([...all], [2, 3, 4, 5, 0, 0, 0, 0])
    assert.strictEqual(chain.read(3, all), 2)
    assert.deepStrictEqual([...all.subarray(0, 2)], [4, 5])
    assert.strictEqual(chain.read(5, all), 0)
    assert.strictEqual(chain.write(1, Uint8Array.of(7, 8, 9, 10)), 3)
    assert.deepStrictEqual([...memory.slice(HIGH_ADDRESS + 8, 4) ?? []], [0, 7, 8, 9])
    chain.view(0)[0] = 42
    assert.strictEqual(memory.slice(DATA_ADDRESS, 1)?.[0], 42)
    assert.strictEqual(chain.view(2, 3).length, 3)
    assert.throws(() => chain.view(3), RangeError)

    const other = new DescriptorChain(8)
    assert.isTrue(queue.take(other))
    assert.strictEqual(queue.inFlight, 2)
    queue.complete(other, 10)
    assert.isUndefined(driver.poll())
    queue.complete(chain, 4)
    assert.isTrue(queue.publish())
    assert.isFalse(queue.publish())
    assert.deepStrictEqual(driver.poll(), { head: second, written: 10 })
    assert.deepStrictEqual(driver.poll(), { head: first, written: 4 })
    assert.isUndefined(driver.poll())
    assert.throws(() => queue.complete(chain, 0))
  })

  it("gives chains back in order where the driver wants it, in whatever order they are completed", () => {
    fc.assert(
      fc.property(
        fc.array(fc.record({ take: fc.boolean(), pick: fc.nat(100) }), { maxLength: 200, size: "max" }),
        fc.constantFrom(1, 4, 16),
        (steps, size) => {
          const { driver, queue } = pair({ size, inOrder: true })
          const given: Array<number> = []
          const working: Array<DescriptorChain> = []
          let back = 0
          const poll = () => {
            queue.publish()
            for (let used = driver.poll(); used !== undefined; used = driver.poll()) {
              assert.strictEqual(used.head, given[back])
              assert.strictEqual(used.written, back++ % 10)
            }
          }
          const complete = (index: number) => {
            const [chain] = working.splice(index, 1)
            if (chain === undefined) return
            const before = queue.inFlight
            queue.complete(chain, Number(notes.get(chain)) % 10)
            assert.strictEqual(queue.inFlight, before - 1)
          }
          const notes = new Map<DescriptorChain, number>()
          for (const { pick, take } of steps) {
            if (!take) {
              complete(pick % Math.max(1, working.length))
              poll()
              continue
            }
            const head = driver.add([buffer(DATA_ADDRESS, 10, true)])
            if (head === undefined) continue
            driver.publish()
            const chain = new DescriptorChain(size)
            assert.isTrue(queue.take(chain))
            notes.set(chain, given.push(head) - 1)
            working.push(chain)
          }
          while (working.length > 0) complete(working.length - 1)
          poll()
          assert.strictEqual(back, given.length)
          assert.isUndefined(queue.fault)
        }
      )
    )
  })

  it("does not take a chain again that waits for its turn to be given back", () => {
    const { chain, driver, queue } = pair({ inOrder: true })
    for (let i = 0; i < 2; i++) driver.add([buffer(DATA_ADDRESS, 2, true)])
    driver.publish()
    const second = new DescriptorChain(8)
    assert.isTrue(queue.take(chain))
    assert.isTrue(queue.take(second))
    const head = second.head
    queue.complete(second, 1)
    assert.isFalse(queue.publish())
    driver.writeAvailable(2, head)
    driver.writeAvailableIndex(3)
    assert.isFalse(queue.take(second))
    assert.strictEqual(queue.fault?.kind, "head-in-flight")
  })

  it("says that 2^32 bytes were written as well as a used element can", () => {
    const size = 16
    const memory = new GuestMemory([new MemoryRegion(0, new ArrayBuffer(2 ** 28))])
    const driver = new SplitQueueDriver({ memory, address: QUEUE_ADDRESS, size, indirect: false, eventIndex: false })
    const queue = SplitQueue.make(memory, { ...driver, indirect: false, eventIndex: false })
    driver.add(Array.from({ length: size }, () => buffer(0, 2 ** 28, true)))
    driver.publish()
    const chain = new DescriptorChain(size)
    assert.isTrue(queue?.take(chain))
    assert.strictEqual(chain.writableBytes, 2 ** 32)
    queue?.complete(chain, 2 ** 32)
    queue?.publish()
    assert.strictEqual(driver.poll()?.written, 2 ** 32 - 1)
  })

  it("keeps the flags of its used ring 0 where event indices are negotiated", () => {
    const { driver, memory, queue } = pair({ eventIndex: true })
    memory.write(driver.usedRing, Uint8Array.of(1, 0))
    queue.resumeNotifications()
    assert.deepStrictEqual([...memory.slice(driver.usedRing, 2) ?? []], [0, 0])
  })

  it("does nothing at all once it is closed", () => {
    const { chain, driver, memory, queue } = pair()
    for (let i = 0; i < 2; i++) driver.add([buffer(DATA_ADDRESS, 2, true)])
    driver.publish()
    const completed = new DescriptorChain(8)
    assert.isTrue(queue.take(completed))
    queue.complete(completed, 1)
    assert.isTrue(queue.take(chain))
    const before = memory.slice(0, MEMORY_SIZE)?.slice()
    queue.close()
    queue.complete(chain, 2)
    queue.suppressNotifications()
    assert.deepStrictEqual([queue.publish(), queue.resumeNotifications(), queue.take(chain)], [false, false, false])
    assert.deepStrictEqual(memory.slice(0, MEMORY_SIZE), before)
    assert.isUndefined(queue.fault)
  })

  it("goes on when the 16-bit indices wrap", () => {
    for (const eventIndex of [false, true]) {
      const { chain, driver, queue } = pair({ size: 4, eventIndex })
      let interrupts = 0
      for (let i = 0; i < 70_000; i++) {
        driver.add([buffer(DATA_ADDRESS, 1, true)])
        driver.publish()
        driver.enableInterrupts()
        assert.isTrue(queue.take(chain))
        queue.complete(chain, 1)
        if (queue.publish()) interrupts++
        assert.isDefined(driver.poll())
      }
      assert.strictEqual(interrupts, 70_000)
    }
  })

  it("takes all entries of the largest queue at once", () => {
    const size = 32768
    const memory = new GuestMemory([new MemoryRegion(0, new ArrayBuffer(0x20_0000))])
    const region = memory.regions[0]
    const queue = SplitQueue.make(memory, {
      size,
      descriptorTable: 0,
      availableRing: 0x8_0000,
      usedRing: 0xa_0000,
      indirect: false,
      eventIndex: true
    })
    if (region === undefined || queue === undefined) throw new Error("the queue is refused")
    for (let i = 0; i < size; i++) {
      region.view.setUint32(i * 16, 0x10_0000, true)
      region.view.setUint32(i * 16 + 8, 1, true)
      region.view.setUint16(0x8_0004 + 2 * i, i, true)
    }
    region.view.setUint16(0x8_0002, size, true)
    const chain = new DescriptorChain(1)
    for (let i = 0; i < size; i++) assert.isTrue(queue.take(chain))
    assert.isFalse(queue.take(chain))
    assert.isUndefined(queue.fault)
    assert.strictEqual(queue.inFlight, size)
  })
})

describe("A hostile driver", () => {
  const NEXT = 1
  const WRITE = 2
  const INDIRECT = 4
  const SIZE = 8
  const TABLE = 0x9_0000

  interface RawDescriptor {
    readonly address: number
    readonly length: number
    readonly flags: number
    readonly next: number
  }

  const raw = (address: number, length: number, flags = 0, next = 0): RawDescriptor => ({
    address,
    length,
    flags,
    next
  })

  const writeTable = (memory: GuestMemory, address: number, descriptors: ReadonlyArray<RawDescriptor>) => {
    const view = new DataView(new ArrayBuffer(16 * descriptors.length))
    descriptors.forEach((descriptor, i) => {
      view.setBigUint64(16 * i, BigInt(descriptor.address), true)
      view.setUint32(16 * i + 8, descriptor.length, true)
      view.setUint16(16 * i + 12, descriptor.flags, true)
      view.setUint16(16 * i + 14, descriptor.next, true)
    })
    memory.write(address, new Uint8Array(view.buffer))
  }

  const takeOf = (
    descriptors: ReadonlyArray<RawDescriptor>,
    table: ReadonlyArray<RawDescriptor> = [],
    indirect = true
  ) => {
    const made = pair({ size: SIZE, indirect })
    writeTable(made.memory, made.driver.descriptorTable, descriptors)
    writeTable(made.memory, TABLE, table)
    made.driver.writeAvailable(0, 0)
    made.driver.writeAvailableIndex(1)
    return { ...made, taken: made.queue.take(made.chain) }
  }

  const data = (flags = 0, next = 0) => raw(DATA_ADDRESS, 16, flags, next)
  const chainOf = (length: number, lastFlags = 0) =>
    Array.from({ length }, (_, i) => (i === length - 1 ? data(lastFlags) : data(NEXT, i + 1)))

  const cases: ReadonlyArray<
    readonly [string, QueueFaultKind | undefined, ReadonlyArray<RawDescriptor>, ReadonlyArray<RawDescriptor>?, boolean?]
  > = [
    ["a chain of as many descriptors as the queue has", undefined, chainOf(SIZE)],
    ["a loop", "chain-length", [data(NEXT, 1), data(NEXT, 0)]],
    ["a loop of one", "chain-length", [data(NEXT, 0)]],
    ["a next outside the table", "next-index", [data(NEXT, SIZE)]],
    ["a next far outside the table", "next-index", [data(NEXT, 0xffff)]],
    ["a next outside the table that is not used", undefined, [data(0, 0xffff)]],
    ["a readable buffer after a writable one", "direction", [data(NEXT | WRITE, 1), data()]],
    ["a writable buffer after a readable one", undefined, [data(NEXT, 1), data(WRITE)]],
    ["an empty buffer anywhere", undefined, [raw(2 ** 60, 0, NEXT, 1), data(WRITE)]],
    ["a buffer that ends with memory", undefined, [raw(MEMORY_SIZE - 16, 16)]],
    ["a buffer that leaves memory by one byte", "address", [raw(MEMORY_SIZE - 16, 17)]],
    ["a buffer behind memory", "address", [raw(MEMORY_SIZE, 1)]],
    ["a buffer above 52 bits", "address", [raw(2 ** 52, 1)]],
    ["a buffer that wraps at 64 bits", "address", [{ ...data(), address: 2 ** 64 - 2048, length: 4096 }]],
    ["the longest buffer", "address", [raw(0, 0xffff_ffff)]],
    ["a table", undefined, [raw(TABLE, 48, INDIRECT)], chainOf(3)],
    ["a table after buffers", undefined, [data(NEXT, 1), raw(TABLE, 16, INDIRECT)], [data(WRITE)]],
    ["a table that is marked writable", undefined, [raw(TABLE, 16, INDIRECT | WRITE)], [data()]],
    ["a table that was not negotiated", "indirect", [raw(TABLE, 16, INDIRECT)], [data()], false],
    ["a table in a table", "indirect", [raw(TABLE, 16, INDIRECT)], [raw(TABLE, 16, INDIRECT)]],
    ["a table with a next", "indirect", [raw(TABLE, 16, INDIRECT | NEXT, 1), data()], [data()]],
    ["an empty table", "indirect", [raw(TABLE, 0, INDIRECT)]],
    ["half a descriptor in a table", "indirect", [raw(TABLE, 24, INDIRECT)], [data()]],
    ["a table outside memory", "address", [raw(MEMORY_SIZE - 16, 32, INDIRECT)]],
    ["a next outside a table", "next-index", [raw(TABLE, 32, INDIRECT)], [data(NEXT, 2), data()]],
    ["a loop in a table", "chain-length", [raw(TABLE, 32, INDIRECT)], [data(NEXT, 1), data(NEXT, 0)]],
    ["as many buffers in a table as the queue has", undefined, [raw(TABLE, 128, INDIRECT)], chainOf(SIZE)],
    ["more buffers in a table than the queue has", "chain-length", [raw(TABLE, 144, INDIRECT)], chainOf(SIZE + 1)],
    ["more buffers than the queue has entries, empty ones counted", "chain-length", [raw(TABLE, 144, INDIRECT)], [
      raw(0, 0, NEXT, 1),
      ...chainOf(SIZE).map(({ address, flags, length, next }) => raw(address, length, flags, next + 1))
    ]],
    ["a table after as many buffers as the queue has less one", undefined, [
      ...chainOf(SIZE - 1).slice(0, -1),
      data(NEXT, SIZE - 1),
      raw(TABLE, 16, INDIRECT)
    ], [data()]]
  ]

  for (const [name, kind, descriptors, table, indirect] of cases) {
    it(`${kind === undefined ? "may give" : "is found to give"} ${name}`, () => {
      const { chain, queue, taken } = takeOf(descriptors, table, indirect)
      assert.strictEqual(queue.fault?.kind, kind)
      assert.strictEqual(taken, kind === undefined)
      if (!taken) {
        assert.strictEqual(chain.count, 0)
        assert.isFalse(queue.take(chain))
        assert.isFalse(queue.resumeNotifications())
      }
    })
  }

  it("is found to jump with its index, to name no descriptor, and to give a chain twice", () => {
    const jump = pair({ size: SIZE })
    jump.driver.writeAvailableIndex(SIZE + 1)
    assert.isFalse(jump.queue.take(jump.chain))
    assert.strictEqual(jump.queue.fault?.kind, "available-index")

    const back = pair({ size: SIZE })
    back.driver.writeAvailableIndex(0xffff)
    assert.isFalse(back.queue.take(back.chain))
    assert.strictEqual(back.queue.fault?.kind, "available-index")

    // A chain that was not yet shown as used cannot be available again.
    const early = pair({ size: 2 })
    for (let i = 0; i < 2; i++) early.driver.add([buffer(DATA_ADDRESS, 2, true)])
    early.driver.publish()
    while (early.queue.take(early.chain)) early.queue.complete(early.chain, 0)
    early.driver.writeAvailableIndex(3)
    assert.isFalse(early.queue.take(early.chain))
    assert.strictEqual(early.queue.fault?.kind, "available-index")

    const head = pair({ size: SIZE })
    head.driver.writeAvailable(0, SIZE)
    head.driver.writeAvailableIndex(1)
    assert.isFalse(head.queue.take(head.chain))
    assert.strictEqual(head.queue.fault?.kind, "head-index")

    const twice = pair({ size: SIZE })
    twice.driver.writeDescriptor(3, DATA_ADDRESS, 4, 0, 0)
    for (const position of [0, 1]) twice.driver.writeAvailable(position, 3)
    twice.driver.writeAvailableIndex(2)
    assert.isTrue(twice.queue.take(twice.chain))
    const held = twice.chain
    assert.isFalse(twice.queue.take(new DescriptorChain(SIZE)))
    assert.strictEqual(twice.queue.fault?.kind, "head-in-flight")
    // What was taken before can still be given back.
    twice.queue.complete(held, 0)
    assert.isTrue(twice.queue.publish())
  })

  /** The rules of section 2.7 for one chain, written without regard to cost: its buffers, or `undefined`. */
  const oracle = (
    memory: GuestMemory,
    direct: ReadonlyArray<RawDescriptor>,
    table: ReadonlyArray<RawDescriptor>
  ): ReadonlyArray<RawDescriptor> | undefined => {
    const follow = (
      from: ReadonlyArray<RawDescriptor>,
      index: number,
      depth: number
    ): Array<RawDescriptor> | undefined => {
      const first = from[index]
      if (first === undefined || depth > 3 * SIZE) return undefined
      if ((first.flags & INDIRECT) !== 0) {
        if (from === table || (first.flags & NEXT) !== 0 || first.length === 0 || first.length % 16 !== 0) {
          return undefined
        }
        // Behind the table there are zeros in memory.
        const part = Array.from({ length: first.length / 16 }, (_, i) => table[i] ?? raw(0, 0))
        return followTable(part, 0, depth + 1)
      }
      if ((first.flags & NEXT) === 0) return [first]
      const rest = follow(from, first.next, depth + 1)
      return rest === undefined ? undefined : [first, ...rest]
    }
    const followTable = (
      part: ReadonlyArray<RawDescriptor>,
      index: number,
      depth: number
    ): Array<RawDescriptor> | undefined => {
      const first = part[index]
      if (first === undefined || depth > 3 * SIZE || (first.flags & INDIRECT) !== 0) return undefined
      if ((first.flags & NEXT) === 0) return [first]
      const rest = followTable(part, first.next, depth + 1)
      return rest === undefined ? undefined : [first, ...rest]
    }
    const all = follow(direct, 0, 0)
    if (all === undefined || all.length > SIZE) return undefined
    const used = all.filter(({ length }) => length > 0)
    if (used.some(({ address, length }) => memory.slice(address, length) === undefined)) return undefined
    const firstWritable = used.findIndex(({ flags }) => (flags & WRITE) !== 0)
    if (firstWritable >= 0 && used.slice(firstWritable).some(({ flags }) => (flags & WRITE) === 0)) return undefined
    return used
  }

  const descriptor = fc.record({
    address: fc.oneof(
      { weight: 12, arbitrary: fc.constantFrom(DATA_ADDRESS, DATA_ADDRESS + 1, HIGH_ADDRESS) },
      { weight: 1, arbitrary: fc.constantFrom(MEMORY_SIZE - 1, MEMORY_SIZE, 2 ** 52 - 1, 2 ** 52, 2 ** 63) }
    ),
    length: fc.oneof({ weight: 12, arbitrary: fc.nat(64) }, { weight: 1, arbitrary: fc.nat(0xffff_ffff) }),
    flags: fc.constantFrom(0, NEXT, NEXT, NEXT, WRITE, WRITE | NEXT),
    next: fc.oneof({ weight: 12, arbitrary: fc.nat(SIZE - 1) }, { weight: 1, arbitrary: fc.nat(0xffff) })
  })
  const tableReference = fc.record({
    address: fc.constant(TABLE),
    length: fc.oneof(fc.integer({ min: 1, max: 10 }).map((entries) => 16 * entries), fc.nat(200)),
    flags: fc.constantFrom(INDIRECT, INDIRECT, INDIRECT | WRITE, INDIRECT | NEXT),
    next: fc.nat(SIZE)
  })

  it("has its chains taken or refused exactly as a plain reading of the rules says", () => {
    const counts = { taken: 0, refused: 0 }
    fc.assert(
      fc.property(
        fc.array(fc.oneof({ weight: 6, arbitrary: descriptor }, { weight: 1, arbitrary: tableReference }), {
          minLength: SIZE,
          maxLength: SIZE
        }),
        fc.array(fc.oneof({ weight: 20, arbitrary: descriptor }, { weight: 1, arbitrary: tableReference }), {
          minLength: 10,
          maxLength: 10
        }),
        (direct, table) => {
          const { chain, memory, queue, taken } = takeOf(direct, table)
          const wanted = oracle(memory, direct, table)
          assert.strictEqual(taken, wanted !== undefined, queue.fault?.detail ?? "no fault")
          assert.strictEqual(queue.fault === undefined, taken)
          if (wanted === undefined) {
            counts.refused++
            return
          }
          counts.taken++
          assert.strictEqual(chain.count, wanted.length)
          wanted.forEach(({ address, flags, length }, i) => {
            assert.strictEqual(chain.length(i), length)
            assert.strictEqual(i >= chain.readableCount, (flags & WRITE) !== 0)
            const view = chain.view(i)
            const place = memory.slice(address, length)
            assert.deepStrictEqual([view.buffer, view.byteOffset], [place?.buffer, place?.byteOffset])
          })
        }
      ),
      { numRuns: 3000 }
    )
    // Both ways were taken often, so the property says something.
    assert.isAbove(counts.taken, 300)
    assert.isAbove(counts.refused, 300)
  })

  it("cannot make the device throw, work without bound, or write outside what was given", () => {
    const word = fc.record({ at: fc.nat(0x1ff), value: fc.nat(0xffff) })
    fc.assert(
      fc.property(
        fc.array(fc.array(word, { maxLength: 40, size: "max" }), { maxLength: 6 }),
        fc.boolean(),
        (rounds, eventIndex) => {
          const { chain, driver, memory, queue } = pair({ size: SIZE, eventIndex })
          const region = memory.regions[0]
          if (region === undefined) throw new Error("no memory")
          for (const writes of rounds) {
            for (const { at, value } of writes) region.words[QUEUE_ADDRESS / 2 + at] = value
            queue.suppressNotifications()
            let taken = 0
            while (queue.take(chain)) {
              taken++
              assert.isAtMost(chain.count, SIZE)
              queue.complete(chain, Math.min(chain.writableBytes, 3))
            }
            assert.isAtMost(taken, SIZE)
            queue.publish()
            queue.resumeNotifications()
          }
          const end = QUEUE_ADDRESS + 0x400
          const usedEnd = driver.usedRing + usedRingSize(SIZE)
          const outside = region.bytes.subarray(0, 0x1_0000).findIndex((byte, i) =>
            byte !== 0 && (i < QUEUE_ADDRESS || i >= end) && (i < driver.usedRing || i >= usedEnd)
          )
          assert.strictEqual(outside, -1)
        }
      ),
      { numRuns: 1000 }
    )
  })
})
