/** The ring of posted writes: a queue for one consumer, whatever the producers do and wherever its counters stand. */
import { assert, describe, it } from "@effect/vitest"
import { PostedRing } from "@troupe/node/kvm/thread/PostedRing"
import * as fc from "fast-check"
import { once } from "node:events"
import { Worker } from "node:worker_threads"

const entry = fc.record({
  range: fc.nat({ max: 1 << 20 }),
  size: fc.constantFrom(1, 2, 4),
  offset: fc.nat({ max: 0xffff_ffff }),
  value: fc.nat({ max: 0xffff_ffff })
})

describe("PostedRing", () => {
  it("is a bounded first-in-first-out queue, also where its counters wrap", () => {
    fc.assert(
      fc.property(
        fc.constantFrom(1, 2, 8),
        fc.constantFrom(0, 0x7fff_fffc, -3),
        fc.array(fc.oneof(fc.constant("take" as const), entry), { maxLength: 100 }),
        (capacity, start, commands) => {
          const buffer = PostedRing.allocate(capacity, start)
          // Each side has its own face of the memory, as two threads have.
          const producer = new PostedRing(buffer)
          const consumer = new PostedRing(buffer)
          assert.strictEqual(producer.capacity, capacity)
          const model: Array<typeof entry extends fc.Arbitrary<infer A> ? A : never> = []
          for (const command of commands) {
            assert.strictEqual(producer.used, model.length)
            assert.strictEqual(producer.full, model.length === capacity)
            if (command === "take") {
              const expected = model.shift()
              assert.strictEqual(consumer.peek(), expected !== undefined)
              if (expected === undefined) continue
              // Looking does not take: a refused entry is offered again.
              assert.isTrue(consumer.peek())
              const { offset, range, size, value } = consumer
              assert.deepStrictEqual({ range, size, offset, value }, expected)
              const tail = producer.tail
              assert.strictEqual(consumer.reached(tail), false)
              consumer.advance()
              assert.strictEqual(consumer.reached(tail), model.length === 0)
            } else {
              const accepted = producer.post(command.range, command.size, command.offset, command.value)
              assert.strictEqual(accepted, model.length < capacity)
              if (accepted) model.push(command)
            }
          }
        }
      )
    )
  })

  it(
    "loses nothing between threads, keeps each producer's order, and the order of producers that wait for each other",
    async () => {
      const producers = 3
      const count = 2000
      const buffer = PostedRing.allocate(64, 0x7fff_ff00)
      const baton = new SharedArrayBuffer(8)
      const workers = Array.from(
        { length: producers },
        (_, id) =>
          new Worker(new URL("./ringProducer.ts", import.meta.url), {
            workerData: { ring: buffer, baton, id, producers, count }
          })
      )
      const failures = Promise.race(workers.map(async (worker) => {
        const [error]: Array<unknown> = await once(worker, "error")
        throw error
      }))
      const consumer = new PostedRing(buffer)
      const alone = Array.from({ length: producers }, () => 0)
      let turns = 0
      for (let taken = 0; taken < 2 * producers * count;) {
        if (!consumer.peek()) {
          await Promise.race([
            failures,
            new Promise((resolve) => setImmediate(resolve))
          ])
          continue
        }
        const { range, value } = consumer
        consumer.advance()
        taken++
        if (value < count) {
          assert.strictEqual(value, alone[range])
          alone[range] = value + 1
        } else {
          assert.strictEqual(value, count + turns)
          assert.strictEqual(range, turns % producers)
          turns++
        }
      }
      assert.deepStrictEqual(alone, Array.from({ length: producers }, () => count))
      assert.isFalse(consumer.peek())
      await Promise.all(workers.map((worker) => worker.terminate()))
    },
    60_000
  )
})
