import { assert, describe, it } from "@effect/vitest"
import { GuestMemory, MemoryRegion } from "@troupe/core/GuestMemory"
import { PackedQueueDriver } from "@troupe/core/testing/drivers/PackedQueueDriver"
import * as fc from "fast-check"
import { DescriptorChain } from "../src/virtio/DescriptorChain.ts"
import { PackedQueue } from "../src/virtio/PackedQueue.ts"
import type { QueueFaultKind } from "../src/virtio/Virtqueue.ts"

const MEMORY_SIZE = 0x10_0000
const QUEUE_ADDRESS = 0x1000
const DATA_ADDRESS = 0x8_0000
const TABLE = 0x9_0000
const SIZE = 5

const NEXT = 1
const WRITE = 2
const INDIRECT = 4
const AVAIL = 0x80
const USED = 0x8000

const pair = (
  options: { readonly indirect?: boolean; readonly eventIndex?: boolean; readonly inOrder?: boolean } = {}
) => {
  const { eventIndex = false, inOrder = false, indirect = true } = options
  const memory = new GuestMemory([new MemoryRegion(0, new ArrayBuffer(MEMORY_SIZE))])
  const driver = new PackedQueueDriver({ memory, address: QUEUE_ADDRESS, size: SIZE, indirect, eventIndex })
  const queue = PackedQueue.make(memory, {
    size: SIZE,
    descriptorRing: driver.descriptorRing,
    driverEvents: driver.driverEvents,
    deviceEvents: driver.deviceEvents,
    indirect,
    eventIndex,
    inOrder
  })
  if (queue === undefined) throw new Error("the queue is refused")
  return { memory, driver, queue, chain: new DescriptorChain(2 * SIZE) }
}

interface Raw {
  readonly address: number
  readonly length: number
  readonly id: number
  readonly flags: number
}

const raw = (flags: number, id = 7, address = DATA_ADDRESS, length = 16): Raw => ({ address, length, id, flags })

describe("PackedQueue", () => {
  it("refuses a set-up with a wrong size, alignment or place, and accepts the edges", () => {
    const memory = new GuestMemory([new MemoryRegion(0, new ArrayBuffer(MEMORY_SIZE))])
    const good = {
      size: 8,
      descriptorRing: 0x1000,
      driverEvents: 0x2000,
      deviceEvents: 0x3000,
      indirect: false,
      eventIndex: false
    }
    const accepts = (change: Partial<typeof good>) => PackedQueue.make(memory, { ...good, ...change }) !== undefined
    for (const size of [0, -1, 1.5, 32769, 65536, 2 ** 32]) assert.isFalse(accepts({ size }), `size ${size}`)
    for (const size of [1, 2, 3, 255, 256, 1000]) assert.isTrue(accepts({ size }), `size ${size}`)
    assert.isTrue(accepts({ size: 32768, descriptorRing: 0, driverEvents: 0x8_0000, deviceEvents: 0x8_0004 }))
    assert.isFalse(accepts({ descriptorRing: 0x1008 }))
    assert.isFalse(accepts({ driverEvents: 0x2002 }))
    assert.isFalse(accepts({ deviceEvents: 0x3002 }))
    for (const field of ["descriptorRing", "driverEvents", "deviceEvents"]) {
      for (const address of [-1, MEMORY_SIZE, MEMORY_SIZE + 16, 2 ** 52 - 16]) {
        assert.isFalse(accepts({ [field]: address }), `${field} at ${address}`)
      }
    }
    assert.isFalse(accepts({ descriptorRing: MEMORY_SIZE - 16 }))
    assert.isTrue(accepts({ driverEvents: MEMORY_SIZE - 4 }))
  })

  it("shows used chains together, with the first entry last", () => {
    const { chain, driver, memory, queue } = pair()
    for (let i = 0; i < 3; i++) driver.add([{ address: DATA_ADDRESS, length: 4, writable: true }])
    driver.publish()
    while (queue.take(chain)) queue.complete(chain, 2)
    const flags = (slot: number) => memory.regions[0]?.view.getUint16(driver.descriptorRing + 16 * slot + 14, true)
    assert.strictEqual(flags(0), AVAIL | WRITE)
    assert.strictEqual(flags(1), AVAIL | USED | WRITE)
    assert.isUndefined(driver.poll())
    assert.isTrue(queue.publish())
    assert.deepStrictEqual([0, 1, 2, 3].map(flags), [
      AVAIL | USED | WRITE,
      AVAIL | USED | WRITE,
      AVAIL | USED | WRITE,
      0
    ])
    for (let i = 0; i < 3; i++) assert.strictEqual(driver.poll()?.written, 2)
  })
})

describe("A hostile driver of a packed ring", () => {
  const write = (memory: GuestMemory, address: number, descriptors: ReadonlyArray<Raw>) => {
    const view = new DataView(new ArrayBuffer(16 * descriptors.length))
    descriptors.forEach((descriptor, i) => {
      view.setBigUint64(16 * i, BigInt(descriptor.address), true)
      view.setUint32(16 * i + 8, descriptor.length, true)
      view.setUint16(16 * i + 12, descriptor.id, true)
      view.setUint16(16 * i + 14, descriptor.flags, true)
    })
    memory.write(address, new Uint8Array(view.buffer))
  }

  const takeOf = (ring: ReadonlyArray<Raw>, table: ReadonlyArray<Raw> = [], indirect = true) => {
    const made = pair({ indirect })
    write(made.memory, made.driver.descriptorRing, ring)
    write(made.memory, TABLE, table)
    return { ...made, taken: made.queue.take(made.chain) }
  }

  const table = (entries: number, flags = 0) => raw(AVAIL | INDIRECT | flags, 7, TABLE, 16 * entries)

  const cases: ReadonlyArray<
    readonly [string, QueueFaultKind | undefined | "nothing", ReadonlyArray<Raw>, ReadonlyArray<Raw>?, boolean?]
  > = [
    ["an entry of the wrong lap", "nothing", [raw(USED)]],
    ["an entry that looks used", "nothing", [raw(AVAIL | USED)]],
    ["a chain around the whole ring", undefined, [1, 1, 1, 1, 0].map((next) => raw(AVAIL | (next * NEXT)))],
    ["a chain longer than the ring", "next-index", Array.from({ length: SIZE }, () => raw(AVAIL | NEXT))],
    ["a chain into what is not available", "next-index", [raw(AVAIL | NEXT), raw(0)]],
    ["a readable buffer after a writable one", "direction", [raw(AVAIL | NEXT | WRITE), raw(AVAIL)]],
    ["an empty buffer anywhere", undefined, [raw(AVAIL, 7, 2 ** 60, 0)]],
    ["an address outside", "address", [raw(AVAIL, 7, MEMORY_SIZE)]],
    ["a range across the end", "address", [raw(AVAIL, 7, MEMORY_SIZE - 8)]],
    ["an address that wraps", "address", [raw(AVAIL, 7, 2 ** 64 - 2048, 4096)]],
    ["a table", undefined, [table(2)], [raw(0), raw(WRITE)]],
    ["a table after another buffer", "indirect", [raw(AVAIL | NEXT), table(1)], [raw(0)]],
    ["a table that was not negotiated", "indirect", [table(1)], [raw(0)], false],
    ["a table that is not the last", "indirect", [table(1, NEXT), raw(AVAIL)], [raw(0)]],
    ["a table of no bytes", "indirect", [table(0)]],
    ["a table of half a descriptor", "indirect", [raw(AVAIL | INDIRECT, 7, TABLE, 8)]],
    ["a table outside", "address", [raw(AVAIL | INDIRECT, 7, MEMORY_SIZE, 16)]],
    ["a table as long as the ring", undefined, [table(SIZE)], Array.from({ length: SIZE }, () => raw(0))],
    ["a table longer than the ring", "chain-length", [table(SIZE + 1)], Array.from({ length: SIZE + 1 }, () => raw(0))],
    ["a table with the wrong order", "direction", [table(2)], [raw(WRITE), raw(0)]]
  ]

  for (const [name, kind, ring, entries, indirect] of cases) {
    it(`${name}: ${kind ?? "taken"}`, () => {
      const { chain, queue, taken } = takeOf(ring, entries, indirect)
      assert.strictEqual(queue.fault?.kind, kind === "nothing" ? undefined : kind)
      assert.strictEqual(taken, kind === undefined)
      if (taken) assert.strictEqual(chain.head, 7)
      else assert.deepStrictEqual([chain.head, chain.count], [-1, 0])
      assert.strictEqual(queue.take(new DescriptorChain(SIZE)), false)
    })
  }

  it("looks at no flag in a table but the direction", () => {
    const { chain, taken } = takeOf([table(2)], [raw(NEXT | INDIRECT | USED), raw(WRITE | AVAIL)])
    assert.isTrue(taken)
    assert.deepStrictEqual([chain.count, chain.readableBytes, chain.writableBytes], [2, 16, 16])
  })

  it("is found to give an id twice, and more entries than the ring has", () => {
    const twice = takeOf([raw(AVAIL), raw(AVAIL)])
    assert.isTrue(twice.taken)
    assert.isFalse(twice.queue.take(new DescriptorChain(SIZE)))
    assert.strictEqual(twice.queue.fault?.kind, "head-in-flight")
    twice.queue.complete(twice.chain, 0)
    assert.isTrue(twice.queue.publish())

    const many = takeOf(Array.from({ length: SIZE }, (_, i) => raw(AVAIL, i)))
    const chains = Array.from({ length: SIZE }, () => new DescriptorChain(SIZE))
    for (const chain of chains.slice(1)) assert.isTrue(many.queue.take(chain))
    write(many.memory, many.driver.descriptorRing, [raw(USED, 100)])
    assert.isTrue(many.queue.resumeNotifications())
    assert.isFalse(many.queue.take(new DescriptorChain(SIZE)))
    assert.strictEqual(many.queue.fault?.kind, "available-index")
  })

  it("cannot make the device throw, work without bound, or write outside what was given", () => {
    const change = fc.oneof(
      fc.record({ at: fc.nat(8 * SIZE + 3), value: fc.nat(0xffff) }),
      fc.record({
        slot: fc.nat(SIZE - 1),
        id: fc.nat(3),
        flags: fc.constantFrom(
          AVAIL,
          AVAIL,
          AVAIL | NEXT,
          AVAIL | WRITE,
          USED,
          USED | NEXT,
          USED | WRITE,
          AVAIL | INDIRECT
        )
      })
    )
    let chains = 0
    fc.assert(
      fc.property(
        fc.array(fc.array(change, { maxLength: 12, size: "max" }), { maxLength: 12, size: "max" }),
        fc.boolean(),
        fc.boolean(),
        (rounds, eventIndex, inOrder) => {
          const { driver, memory, queue } = pair({ eventIndex, inOrder })
          const region = memory.regions[0]
          if (region === undefined) throw new Error("no memory")
          const held: Array<DescriptorChain> = []
          for (const writes of rounds) {
            for (const one of writes) {
              if ("at" in one) region.words[QUEUE_ADDRESS / 2 + one.at] = one.value
              else write(memory, driver.descriptorRing + 16 * one.slot, [raw(one.flags, one.id)])
            }
            queue.suppressNotifications()
            let taken = 0
            for (;;) {
              const chain = new DescriptorChain(SIZE)
              if (!queue.take(chain)) break
              taken++
              chains++
              held.push(chain)
              assert.isAtMost(chain.count, SIZE)
            }
            assert.isAtMost(taken, SIZE)
            while (held.length > 1) {
              const chain = held.pop()
              if (chain !== undefined) queue.complete(chain, Math.min(chain.writableBytes, 3))
            }
            queue.publish()
            queue.resumeNotifications()
          }
          const end = driver.deviceEvents + 4
          const outside = region.bytes.subarray(0, 0x4000).findIndex((byte, i) =>
            byte !== 0 && (i < QUEUE_ADDRESS || i >= end)
          )
          assert.strictEqual(outside, -1)
        }
      ),
      { numRuns: 500 }
    )
    assert.isAbove(chains, 100)
  })
})
