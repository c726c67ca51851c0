import { assert, describe, it } from "@effect/vitest"
import { FaultPlan, Trace } from "@troupe/core/testing"
import * as fc from "fast-check"

const event = fc.record({
  time: fc.nat(),
  kind: fc.constantFrom(...Trace.TRACE_KINDS),
  vm: fc.nat(100),
  vcpu: fc.integer({ min: -1, max: 255 }),
  address: fc.nat({ max: 2 ** 52 - 1 }),
  size: fc.constantFrom(0, 1, 2, 4),
  value: fc.nat(0xffff_ffff)
})

const record = (trace: Trace.Trace, it: Trace.TraceEvent) =>
  trace.record(it.time, it.kind, it.vm, it.vcpu, it.address, it.size, it.value)

describe("Trace", () => {
  it("gives back what was recorded, in order", () => {
    fc.assert(fc.property(fc.array(event, { maxLength: 300 }), (events) => {
      const trace = new Trace.Trace()
      for (const it of events) record(trace, it)
      assert.deepStrictEqual(trace.events, events)
      assert.strictEqual(trace.bytes.length, 32 * events.length)
      assert.strictEqual(trace.text.split("\n").length, Math.max(1, events.length))
    }))
  })

  it("keeps the last events when there are too many", () => {
    const trace = new Trace.Trace()
    const count = Trace.TRACE_LIMIT + 1000
    for (let i = 0; i < count; i++) trace.record(i, "mark", 1, 0, i, 0, 0)
    const { events } = trace
    assert.strictEqual(trace.count, count)
    assert.strictEqual(events.length, Trace.TRACE_LIMIT)
    assert.isTrue(events.every((it, index) => it.address === index + 1000))
  })
})

describe("FaultPlan", () => {
  it("names an operation by its number, or by its kind and use", () => {
    const plan = FaultPlan.firstOf(
      FaultPlan.failAt(3, FaultPlan.ENOMEM),
      FaultPlan.delayAt(3, "1 second"),
      FaultPlan.failFrom("createVcpu", 1, FaultPlan.EMFILE)
    )
    assert.isUndefined(plan(0, "createVm", 0))
    assert.deepStrictEqual(plan(3, "addMemory", 0), { errno: FaultPlan.ENOMEM })
    assert.isUndefined(plan(4, "createVcpu", 0))
    assert.deepStrictEqual(plan(5, "createVcpu", 1), { errno: FaultPlan.EMFILE })
    assert.deepStrictEqual(plan(6, "createVcpu", 2), { errno: FaultPlan.EMFILE })
  })
})
