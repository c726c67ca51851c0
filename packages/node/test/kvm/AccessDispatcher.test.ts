/** The host side of accesses, without KVM: order, refusal, wake-ups and bounds. */
import { assert, describe, it } from "@effect/vitest"
import type { CallReply } from "@troupe/core/Bus"
import { AccessDispatcher } from "@troupe/node/kvm/AccessDispatcher"
import { PostedRing, RING_HOST_STATE } from "@troupe/node/kvm/thread/PostedRing"
import * as Control from "@troupe/node/kvm/thread/VcpuControl"
import * as fc from "fast-check"
import { setTimeout } from "node:timers/promises"

const makeControl = () => new Int32Array(new SharedArrayBuffer(Control.CONTROL_WORDS * 4))

/** What a vCPU thread does to make a call. */
const makeCall = (control: Int32Array<SharedArrayBuffer>, ring: PostedRing, offset: number) => {
  control[Control.CONTROL_CALL_OFFSET] = offset
  control[Control.CONTROL_CALL_SIZE] = 4
  control[Control.CONTROL_CALL_TAIL] = ring.tail
  Atomics.store(control, Control.CONTROL_CALL, Control.CALL_MADE)
}

const make = (options: { readonly vcpus: number; readonly accept: () => boolean; readonly capacity?: number }) => {
  const ring = new PostedRing(PostedRing.allocate(options.capacity ?? 256))
  const log: Array<string> = []
  const defects: Array<unknown> = []
  const dispatcher = new AccessDispatcher(ring, {
    posted: (_range, offset) => {
      if (!options.accept()) return false
      log.push(`p${offset}`)
      return true
    },
    call: (_range, offset, _size, _isWrite, _value, reply) => {
      log.push(`c${offset}`)
      reply.complete(offset + 1)
    },
    doorbell: (_range, doorbell) => log.push(`d${doorbell}`)
  }, (defect) => defects.push(defect))
  const controls = Array.from({ length: options.vcpus }, makeControl)
  for (const control of controls) dispatcher.add(control)
  return { ring, log, defects, dispatcher, controls }
}

describe("AccessDispatcher", () => {
  it("delivers everything in an order that keeps every vCPU's own, however the device refuses", async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.record({ vcpu: fc.nat({ max: 2 }), kind: fc.constantFrom("post", "call") }), { maxLength: 60 }),
        fc.infiniteStream(fc.integer({ min: 0, max: 3 })),
        async (accesses, choices) => {
          const next = () => choices.next().value !== 0
          const { controls, defects, dispatcher, log, ring } = make({ vcpus: 3, accept: next })
          const blocked = (vcpu: number) => {
            const control = controls[vcpu]
            if (control === undefined) return false
            const state = Atomics.load(control, Control.CONTROL_CALL)
            if (state === Control.CALL_ANSWERED) Atomics.store(control, Control.CONTROL_CALL, Control.CALL_NONE)
            return state === Control.CALL_MADE || state === Control.CALL_TAKEN
          }
          for (const [i, { kind, vcpu }] of accesses.entries()) {
            while (blocked(vcpu)) {
              dispatcher.turn()
              await setTimeout(0)
            }
            const control = controls[vcpu]
            if (control === undefined) continue
            if (kind === "post") ring.post(0, 4, i, 0)
            else makeCall(control, ring, i)
            if (next()) dispatcher.turn()
          }
          while (ring.used > 0 || [0, 1, 2].some(blocked)) {
            dispatcher.turn()
            await setTimeout(0)
          }
          dispatcher.close()
          assert.deepStrictEqual(defects, [])
          assert.strictEqual(log.length, accesses.length)
          const position = new Map(log.map((event, at) => [Number(event.slice(1)), at]))
          accesses.forEach((access, i) => {
            accesses.forEach((later, j) => {
              // One vCPU's accesses keep their order, and so do posted writes; a call follows all that was posted before it.
              if (j <= i || (access.vcpu !== later.vcpu && access.kind !== "post")) return
              assert.isBelow(position.get(i) ?? Infinity, position.get(j) ?? -1, `${i} before ${j} in ${log.join(" ")}`)
            })
          })
        }
      ),
      { numRuns: 50 }
    )
  })

  it("costs a burst of posted writes one wake-up, and is armed again when it is over", async () => {
    const { dispatcher, log, ring } = make({ vcpus: 1, accept: () => true })
    assert.strictEqual(Atomics.load(ring.words, RING_HOST_STATE), Control.HOST_ASLEEP)
    ring.post(0, 1, 0, 0)
    dispatcher.turn()
    assert.deepStrictEqual(log, ["p0"])
    assert.strictEqual(Atomics.load(ring.words, RING_HOST_STATE), Control.HOST_LAZY)
    // Nobody wakes the host for this one.
    ring.post(0, 1, 1, 0)
    while (Atomics.load(ring.words, RING_HOST_STATE) !== Control.HOST_ASLEEP) await setTimeout(1)
    assert.deepStrictEqual(log, ["p0", "p1"])
    dispatcher.close()
  })

  it("delivers what was posted before a doorbell first", () => {
    for (const count of [1, 1024]) {
      const { dispatcher, log, ring } = make({ vcpus: 1, accept: () => true, capacity: 1024 })
      for (let i = 0; i < count; i++) assert.isTrue(ring.post(0, 1, i, 0))
      dispatcher.doorbell(0, 3)
      assert.deepStrictEqual(log, [...Array.from({ length: count }, (_, i) => `p${i}`), "d3"])
      dispatcher.close()
    }
  })

  it("ignores an answer that nobody waits for", () => {
    const replies: Array<CallReply> = []
    const ring = new PostedRing(PostedRing.allocate(8))
    const dispatcher = new AccessDispatcher(ring, {
      posted: () => true,
      call: (_range, _offset, _size, _isWrite, _value, reply) => replies.push(reply),
      doorbell: () => {}
    }, () => assert.fail("no handler throws"))
    const control = makeControl()
    dispatcher.add(control)
    makeCall(control, ring, 0)
    dispatcher.turn()
    replies[0]?.complete(0xffff_ffff)
    replies[0]?.complete(1)
    assert.strictEqual(Atomics.load(control, Control.CONTROL_CALL), Control.CALL_ANSWERED)
    assert.strictEqual((control[Control.CONTROL_CALL_VALUE] ?? 0) >>> 0, 0xffff_ffff)
    dispatcher.close()
  })

  it("hands a handler's exception to its owner and delivers nothing after it", () => {
    const ring = new PostedRing(PostedRing.allocate(8))
    const defects: Array<unknown> = []
    let delivered = 0
    const dispatcher = new AccessDispatcher(ring, {
      posted: () => {
        delivered++
        throw new Error("defect")
      },
      call: () => {},
      doorbell: () => {}
    }, (defect) => defects.push(defect))
    ring.post(0, 1, 0, 0)
    ring.post(0, 1, 0, 0)
    let isDelivered = false
    dispatcher.whenDelivered(() => {
      isDelivered = true
    })
    dispatcher.turn()
    assert.strictEqual(delivered, 1)
    assert.strictEqual(defects.length, 1)
    assert.isTrue(isDelivered, "nobody waits for what is never delivered")
  })
})
