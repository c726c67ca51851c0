// Both formats of virtqueues against one driver's script: the same rules, and the same behaviour that a device sees.
import { assert, describe, it } from "@effect/vitest"
import { INDIRECT_ENTRIES } from "@troupe/core/testing/drivers/SplitQueueDriver"
import * as fc from "fast-check"
import { DescriptorChain } from "../src/virtio/DescriptorChain.ts"
import { buffer, DATA_ADDRESS, FORMATS, type Pair, pairOf } from "./QueuePairs.ts"

describe.each(FORMATS)("A correct driver of a $name ring", ({ pair, sizes }) => {
  const command = fc.oneof(
    {
      weight: 4,
      arbitrary: fc.record({
        kind: fc.constant("add" as const),
        readable: fc.array(fc.integer({ min: 1, max: 300 }), { maxLength: 4 }),
        writable: fc.array(fc.integer({ min: 1, max: 300 }), { maxLength: 4 }),
        indirect: fc.boolean()
      })
    },
    { weight: 2, arbitrary: fc.record({ kind: fc.constant("publish" as const) }) },
    {
      weight: 2,
      arbitrary: fc.record({
        kind: fc.constant("serve" as const),
        budget: fc.integer({ min: 1, max: 6 }),
        race: fc.boolean()
      })
    },
    { weight: 2, arbitrary: fc.record({ kind: fc.constant("finish" as const), order: fc.nat(100) }) },
    { weight: 2, arbitrary: fc.record({ kind: fc.constant("poll" as const) }) }
  )

  /**
   * The device works only when it was notified or had said that there is more, the driver polls only when it was interrupted or
   * found more on asking: what a real pair does. At the end nothing may wait.
   */
  it("has every chain completed exactly once, with no notification and no interrupt lost", () => {
    fc.assert(
      fc.property(
        fc.array(command, { maxLength: 80, size: "max" }),
        fc.boolean(),
        fc.boolean(),
        fc.boolean(),
        fc.constantFrom(...sizes),
        (commands, eventIndex, indirect, inOrder, size) => {
          const { driver, memory, queue } = pair({ eventIndex, indirect, inOrder, size })
          const expected = new Map<number, { readonly contents: Uint8Array; readonly room: number }>()
          const working: Array<DescriptorChain> = []
          const wake = { device: false, driver: false }
          let served = 0
          let finished = 0
          let polled = 0
          let added = 0

          /** With `race`, the driver publishes between the device's last look and its wish to be notified. */
          const serve = (budget: number, race: boolean) => {
            if (!wake.device) return
            queue.suppressNotifications()
            for (let i = 0; i < budget; i++) {
              const chain = new DescriptorChain(size)
              if (!queue.take(chain)) {
                const notified = race && driver.publish()
                wake.device = queue.resumeNotifications() || notified
                return
              }
              served++
              const contents = new Uint8Array(chain.readableBytes)
              chain.read(0, contents)
              assert.deepStrictEqual(contents, expected.get(chain.head)?.contents)
              assert.strictEqual(chain.writableBytes, expected.get(chain.head)?.room)
              working.push(chain)
            }
          }
          const finish = (order: number) => {
            const [chain] = working.splice(order % Math.max(1, working.length), 1)
            if (chain === undefined) return
            finished++
            queue.complete(chain, order % (chain.writableBytes + 1))
            if (queue.publish()) wake.driver = true
          }
          const poll = () => {
            if (!wake.driver) return
            wake.driver = false
            driver.disableInterrupts()
            for (;;) {
              const used = driver.poll()
              if (used !== undefined) {
                polled++
                expected.delete(used.head)
              } else if (!driver.enableInterrupts()) break
            }
          }
          driver.enableInterrupts()
          for (const step of commands) {
            if (step.kind === "add") {
              const lengths = [...step.readable, ...step.writable]
              if (lengths.length === 0 || lengths.length > Math.min(size, INDIRECT_ENTRIES)) continue
              let address = DATA_ADDRESS + (added % 64) * 0x1000
              const contents: Array<number> = []
              const buffers = lengths.map((length, index) => {
                const writable = index >= step.readable.length
                const bytes = Uint8Array.from({ length }, (_, i) => (added + index + i) & 0xff)
                if (!writable) {
                  memory.write(address, bytes)
                  contents.push(...bytes)
                }
                address += length
                return buffer(address - length, length, writable)
              })
              const head = driver.add(buffers, step.indirect)
              if (head === undefined) continue
              added++
              const room = step.writable.reduce((sum, length) => sum + length, 0)
              expected.set(head, { contents: Uint8Array.from(contents), room })
            } else if (step.kind === "publish") {
              if (driver.publish()) wake.device = true
            } else if (step.kind === "serve") serve(step.budget, step.race)
            else if (step.kind === "finish") finish(step.order)
            else poll()
            assert.isUndefined(queue.fault)
          }
          if (driver.publish()) wake.device = true
          for (let turn = 0; turn < 1000 && wake.device; turn++) serve(3, false)
          while (working.length > 0) finish(working.length * 7)
          poll()
          assert.deepStrictEqual([served, finished, polled, expected.size], [added, added, added, 0])
        }
      ),
      { numRuns: 1000 }
    )
  })
})

describe.each(FORMATS)("Any driver of a $name ring", ({ name, pair }) => {
  it("goes on when indices and laps wrap", () => {
    for (const eventIndex of [false, true]) {
      const size = name === "packed" ? 5 : 4
      const { driver, queue } = pair({ size, eventIndex, indirect: false, inOrder: false })
      const chain = new DescriptorChain(size)
      let interrupts = 0
      for (let i = 0; i < 70_000; i++) {
        driver.add([buffer(DATA_ADDRESS, 1, true), buffer(DATA_ADDRESS + 1, 1, true)])
        driver.publish()
        driver.enableInterrupts()
        assert.isTrue(queue.take(chain))
        queue.complete(chain, 1)
        if (queue.publish()) interrupts++
        assert.strictEqual(driver.poll()?.written, 1)
      }
      assert.strictEqual(interrupts, 70_000)
    }
  })

  it("hears of used chains only as often as it has asked to", () => {
    for (const eventIndex of [false, true]) {
      const { driver, queue } = pair({ size: 8, eventIndex, indirect: false, inOrder: false })
      const chain = new DescriptorChain(8)
      driver.enableInterrupts()
      let interrupts = 0
      for (let i = 0; i < 4; i++) {
        driver.add([buffer(DATA_ADDRESS, 1, true)])
        driver.publish()
        assert.isTrue(queue.take(chain))
        queue.complete(chain, 0)
        // One interrupt for the first; the handler then wants none while it has not asked again.
        if (queue.publish()) {
          interrupts++
          driver.disableInterrupts()
        }
      }
      assert.strictEqual(interrupts, 1)
    }
  })

  it("is told to notify only after the device has asked for it", () => {
    for (const eventIndex of [false, true]) {
      const { driver, queue } = pair({ size: 16, eventIndex, indirect: false, inOrder: false })
      const chain = new DescriptorChain(16)
      const send = () => {
        driver.add([buffer(DATA_ADDRESS, 1, true)])
        return driver.publish()
      }
      assert.isTrue(send())
      queue.suppressNotifications()
      assert.isFalse(send())
      for (let i = 0; i < 2; i++) assert.isTrue(queue.take(chain))
      assert.isFalse(queue.resumeNotifications())
      assert.isTrue(send())
      assert.isTrue(queue.resumeNotifications())
      queue.close()
      assert.isFalse(queue.resumeNotifications())
    }
  })
})

describe("The same script of a driver on a split and a packed ring", () => {
  const step = fc.oneof(
    {
      weight: 4,
      arbitrary: fc.record({
        kind: fc.constant("add" as const),
        readable: fc.array(fc.integer({ min: 0, max: 300 }), { maxLength: 4 }),
        writable: fc.array(fc.integer({ min: 0, max: 300 }), { maxLength: 4 }),
        indirect: fc.boolean()
      })
    },
    { weight: 2, arbitrary: fc.record({ kind: fc.constant("publish" as const) }) },
    { weight: 4, arbitrary: fc.record({ kind: fc.constant("take" as const) }) },
    { weight: 3, arbitrary: fc.record({ kind: fc.constant("complete" as const), pick: fc.nat(100) }) },
    { weight: 3, arbitrary: fc.record({ kind: fc.constant("show" as const) }) },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant("enable" as const) }) },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant("disable" as const) }) },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant("suppress" as const) }) },
    { weight: 1, arbitrary: fc.record({ kind: fc.constant("resume" as const) }) }
  )

  type Step = typeof step extends fc.Arbitrary<infer A> ? A : never
  type Script = ReadonlyArray<Step>
  type Seen = ReadonlyArray<ReadonlyArray<unknown>>

  /** What the device and the driver see of a script; chains are named by the order in which they were added. */
  const play = ({ driver, queue }: Pair, size: number, script: Script): Seen => {
    const seen: Array<ReadonlyArray<unknown>> = []
    const names = new Map<number, number>()
    const working: Array<{ readonly chain: DescriptorChain; readonly name: number }> = []
    let added = 0
    for (const action of script) {
      if (action.kind === "add") {
        const lengths = [...action.readable, ...action.writable]
        if (lengths.length === 0) continue
        const buffers = lengths.map((length, i) => buffer(DATA_ADDRESS + 512 * i, length, i >= action.readable.length))
        const head = driver.add(buffers, action.indirect)
        seen.push(["added", head !== undefined])
        if (head !== undefined) names.set(head, added++)
      } else if (action.kind === "publish") seen.push(["notify", driver.publish()])
      else if (action.kind === "take") {
        const chain = new DescriptorChain(size)
        const taken = queue.take(chain)
        const buffers = Array.from({ length: chain.count }, (_, i) => [chain.offset(i), chain.length(i)])
        const name = names.get(chain.head)
        seen.push(["taken", taken, name, chain.readableCount, chain.descriptors, buffers, queue.inFlight, queue.fault])
        if (taken && name !== undefined) working.push({ chain, name })
      } else if (action.kind === "complete") {
        const [work] = working.splice(action.pick % Math.max(1, working.length), 1)
        if (work === undefined) continue
        queue.complete(work.chain, action.pick % (work.chain.writableBytes + 1))
        seen.push(["completed", work.name, queue.inFlight])
      } else if (action.kind === "show") {
        seen.push(["interrupt", queue.publish()])
        for (let used = driver.poll(); used !== undefined; used = driver.poll()) {
          seen.push(["used", names.get(used.head), used.written])
        }
      } else if (action.kind === "enable") seen.push(["enable", driver.enableInterrupts()])
      else if (action.kind === "disable") driver.disableInterrupts()
      else if (action.kind === "suppress") queue.suppressNotifications()
      else seen.push(["resume", queue.resumeNotifications()])
    }
    return seen
  }

  it("makes the device and the driver see the same", () => {
    fc.assert(
      fc.property(
        fc.array(step, { maxLength: 120, size: "max" }),
        fc.boolean(),
        fc.boolean(),
        fc.constantFrom(1, 2, 4, 16),
        (script, indirect, inOrder, size) => {
          const options = { size, indirect, inOrder, eventIndex: false }
          assert.deepStrictEqual(
            play(pairOf(true)(options), size, script),
            play(pairOf(false)(options), size, script)
          )
        }
      ),
      { numRuns: 1000 }
    )
  })

  it("makes them see the same with event indices, and a packed ring tells of no less than a split one", () => {
    fc.assert(
      fc.property(
        // With event indices a split ring has no way to say "no": only a packed one keeps to these.
        fc.array(step.filter(({ kind }) => kind !== "disable" && kind !== "suppress"), { maxLength: 120, size: "max" }),
        fc.boolean(),
        fc.boolean(),
        fc.constantFrom(1, 2, 4, 16),
        (script, indirect, inOrder, size) => {
          const options = { size, indirect, inOrder, eventIndex: true }
          // A packed ring begins with "always" and a split one with "the first": both begin with a wish.
          const whole: Script = [{ kind: "enable" }, { kind: "resume" }, ...script]
          const packed = play(pairOf(true)(options), size, whole)
          const split = play(pairOf(false)(options), size, whole)
          const isHint = ([kind]: ReadonlyArray<unknown>) => kind === "notify" || kind === "interrupt"
          const withoutHints = (seen: Seen) => seen.filter((entry) => !isHint(entry))
          assert.deepStrictEqual(withoutHints(packed), withoutHints(split))
          // An old wish of a packed ring comes up again every second lap, one of a split ring after 65536 chains.
          const hints = (seen: Seen) => seen.filter(isHint)
          hints(split).forEach(([kind, wanted], i) => {
            if (wanted === true) assert.deepStrictEqual(hints(packed)[i], [kind, true])
          })
        }
      ),
      { numRuns: 1000 }
    )
  })
})
