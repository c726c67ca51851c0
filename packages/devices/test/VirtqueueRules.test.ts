// What virtio 1.3 says of devices in sections 2.6 to 2.8, one statement at a time, where no property says more.
import { assert, describe, it } from "@effect/vitest"
import { VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_WRITE } from "../src/virtio/ChainWalk.ts"
import { DescriptorChain } from "../src/virtio/DescriptorChain.ts"
import { buffer, DATA_ADDRESS, FORMATS, pairOf, type PairOptions } from "./QueuePairs.ts"

const SIZE = 8
const OPTIONS: PairOptions = { size: SIZE, indirect: true, eventIndex: false, inOrder: false }
/** Length of a ring of descriptors, and that of the split ring's available ring. */
const DESCRIPTORS = 16 * SIZE
const AVAILABLE_RING = 6 + 2 * SIZE

describe("A split queue", () => {
  const split = (change: Partial<PairOptions> = {}) => {
    const pair = pairOf(false)({ ...OPTIONS, ...change })
    const view = pair.memory.regions[0]?.view
    if (view === undefined) throw new Error("no memory")
    return { ...pair, view, chain: new DescriptorChain(SIZE) }
  }

  it("writes neither to descriptors, nor to the available ring, nor to buffers that it reads", () => {
    const { chain, driver, memory, queue } = split()
    memory.write(DATA_ADDRESS, Uint8Array.of(1, 2, 3))
    driver.add([buffer(DATA_ADDRESS, 3), buffer(DATA_ADDRESS + 16, 3, true)])
    driver.add([buffer(DATA_ADDRESS, 3), buffer(DATA_ADDRESS + 16, 3, true)], true)
    driver.publish()
    const { areas } = driver
    const look = () => [
      memory.slice(areas.descriptor, DESCRIPTORS)?.slice(),
      memory.slice(areas.driver, AVAILABLE_RING)?.slice(),
      memory.slice(DATA_ADDRESS, 3)?.slice()
    ]
    const before = look()
    queue.suppressNotifications()
    while (queue.take(chain)) queue.complete(chain, chain.write(0, Uint8Array.of(7, 7, 7, 7)))
    queue.publish()
    queue.resumeNotifications()
    assert.deepStrictEqual(look(), before)
  })

  it("ignores that a descriptor of a table is marked as one to write", () => {
    const { chain, driver, queue, view } = split()
    const head = driver.add([buffer(DATA_ADDRESS, 3), buffer(DATA_ADDRESS, 3)], true) ?? 0
    view.setUint16(driver.areas.descriptor + 16 * head + 12, VIRTQ_DESC_F_INDIRECT | VIRTQ_DESC_F_WRITE, true)
    driver.publish()
    assert.isTrue(queue.take(chain))
    assert.deepStrictEqual([chain.readableBytes, chain.writableBytes], [6, 0])
  })

  it("takes a table behind ordinary descriptors", () => {
    const { chain, driver, queue, view } = split()
    const head = driver.add([buffer(DATA_ADDRESS, 3), buffer(DATA_ADDRESS + 0x100, 32)]) ?? 0
    // The second one becomes a table of two.
    const second = view.getUint16(driver.areas.descriptor + 16 * head + 14, true)
    view.setUint16(driver.areas.descriptor + 16 * second + 12, VIRTQ_DESC_F_INDIRECT, true)
    for (const [i, flags, next] of [[0, 1, 1], [1, VIRTQ_DESC_F_WRITE, 0]] as const) {
      view.setUint32(DATA_ADDRESS + 0x100 + 16 * i, DATA_ADDRESS, true)
      view.setUint32(DATA_ADDRESS + 0x100 + 16 * i + 8, 5, true)
      view.setUint16(DATA_ADDRESS + 0x100 + 16 * i + 12, flags, true)
      view.setUint16(DATA_ADDRESS + 0x100 + 16 * i + 14, next, true)
    }
    driver.publish()
    assert.isTrue(queue.take(chain), queue.fault?.detail)
    assert.deepStrictEqual([chain.count, chain.readableBytes, chain.writableBytes], [3, 8, 5])
  })

  it("interrupts by the flags and not by used_event without event indices, and the other way round with them", () => {
    for (const eventIndex of [false, true]) {
      for (const flags of [0, 1]) {
        for (const hit of [false, true]) {
          const { chain, driver, queue, view } = split({ eventIndex })
          driver.add([buffer(DATA_ADDRESS, 1, true)])
          driver.publish()
          view.setUint16(driver.areas.driver, flags, true)
          view.setUint16(driver.areas.driver + 4 + 2 * SIZE, hit ? 0 : 5, true)
          assert.isTrue(queue.take(chain))
          queue.complete(chain, 0)
          assert.strictEqual(queue.publish(), eventIndex ? hit : flags === 0, `${eventIndex} ${flags} ${hit}`)
        }
      }
    }
  })

  it("shows a used element, its length in it, only with the index after it", () => {
    const { chain, driver, queue, view } = split()
    driver.add([buffer(DATA_ADDRESS, 4, true)])
    driver.publish()
    assert.isTrue(queue.take(chain))
    queue.complete(chain, 3)
    assert.strictEqual(view.getUint16(driver.areas.device + 2, true), 0)
    queue.publish()
    assert.strictEqual(view.getUint16(driver.areas.device + 2, true), 1)
    assert.strictEqual(view.getUint32(driver.areas.device + 8, true), 3)
  })

  it("asks for notifications by the flags without event indices, and leaves them 0 with them", () => {
    const flagsOf = ({ driver, view }: ReturnType<typeof split>) => view.getUint16(driver.areas.device, true)
    const plain = split()
    plain.queue.suppressNotifications()
    assert.strictEqual(flagsOf(plain), 1)
    plain.queue.resumeNotifications()
    assert.strictEqual(flagsOf(plain), 0)
    const indexed = split({ eventIndex: true })
    indexed.queue.suppressNotifications()
    assert.strictEqual(flagsOf(indexed), 0)
    indexed.queue.resumeNotifications()
    assert.strictEqual(flagsOf(indexed), 0)
  })
})

describe.each(FORMATS)("A queue in the $name format", ({ pair }) => {
  it("is not confused by notifications for nothing", () => {
    const { driver, queue } = pair(OPTIONS)
    const chain = new DescriptorChain(SIZE)
    for (let i = 0; i < 10; i++) {
      queue.suppressNotifications()
      assert.isFalse(queue.take(chain))
      assert.isFalse(queue.resumeNotifications())
    }
    driver.add([buffer(DATA_ADDRESS, 1)])
    assert.isTrue(driver.publish())
    assert.isTrue(queue.take(chain))
    assert.isUndefined(queue.fault)
  })

  it("takes chains in the order of the ring, and gives them back in the order in which they are completed", () => {
    const { driver, queue } = pair(OPTIONS)
    const heads = [1, 2, 3].map((length) => driver.add([buffer(DATA_ADDRESS, length, true)]))
    driver.publish()
    const chains = heads.map(() => new DescriptorChain(SIZE))
    chains.forEach((chain, i) => {
      assert.isTrue(queue.take(chain))
      assert.strictEqual(chain.writableBytes, i + 1)
    })
    for (const chain of chains.toReversed()) queue.complete(chain, 0)
    queue.publish()
    assert.deepStrictEqual(heads.map(() => driver.poll()?.head), heads.toReversed())
  })
})

describe("A packed queue", () => {
  it("does not touch an entry before it was made available, nor after it was used", () => {
    const { driver, memory, queue } = pairOf(true)(OPTIONS)
    const chain = new DescriptorChain(SIZE)
    const ring = () => Array.from(memory.slice(driver.areas.descriptor, DESCRIPTORS) ?? [])
    assert.isFalse(queue.take(chain))
    driver.add([buffer(DATA_ADDRESS, 1, true), buffer(DATA_ADDRESS, 1, true)])
    driver.publish()
    assert.isTrue(queue.take(chain))
    const available = ring()
    queue.complete(chain, 1)
    queue.publish()
    const used = ring()
    // One entry for the whole chain, in the place of its first.
    assert.deepStrictEqual(used.slice(16), available.slice(16))
    assert.notDeepEqual(used.slice(0, 16), available.slice(0, 16))
    queue.suppressNotifications()
    queue.resumeNotifications()
    assert.isFalse(queue.publish())
    assert.deepStrictEqual(ring(), used)
  })

  it("interrupts as the driver's event suppression says, and takes what is reserved for a wish", () => {
    for (const eventIndex of [false, true]) {
      for (
        const [flags, event, wanted] of [[0, 0, true], [1, 0, false], [2, 0x8000, true], [2, 0x8003, !eventIndex], [
          3,
          0,
          true
        ]] as const
      ) {
        const { driver, memory, queue } = pairOf(true)({ ...OPTIONS, eventIndex })
        const chain = new DescriptorChain(SIZE)
        driver.add([buffer(DATA_ADDRESS, 1, true)])
        driver.publish()
        memory.write(driver.areas.driver, Uint8Array.of(event & 0xff, event >> 8, flags, 0))
        assert.isTrue(queue.take(chain))
        queue.complete(chain, 0)
        assert.strictEqual(queue.publish(), wanted, `${eventIndex} ${flags} ${event}`)
      }
    }
  })
})
