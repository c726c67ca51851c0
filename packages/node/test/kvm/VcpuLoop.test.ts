/** The loop of a vCPU thread and the host side of its accesses, together on one thread: a played KVM makes the exits. */
import { assert, describe, it } from "@effect/vitest"
import { Bus, type BusRange, openBusValue, SHADOW_INVALID } from "@troupe/core/Bus"
import { AccessDispatcher } from "@troupe/node/kvm/AccessDispatcher"
import { readExitCounts } from "@troupe/node/kvm/ExitCounts"
import { KvmExit, KvmRun, KvmRunValue } from "@troupe/node/kvm/KvmRun"
import { AccessTable, buildAccessTable } from "@troupe/node/kvm/thread/AccessTable"
import { PostedRing } from "@troupe/node/kvm/thread/PostedRing"
import * as Control from "@troupe/node/kvm/thread/VcpuControl"
import { VcpuLoop } from "@troupe/node/kvm/thread/VcpuLoop"
import * as fc from "fast-check"
import { loadForeignFunctions } from "../../src/internal/loadForeignFunctions.ts"

const EINTR = 4
const EAGAIN = 11
const EFAULT = 14
/** Where the played KVM puts port data: on the page that the real one uses. */
const DATA_OFFSET = 4096
const RUN_SIZE = 12288

const RANGES: ReadonlyArray<BusRange> = [
  { space: "pio", base: 0x10, size: 8, read: "shadowed", write: "posted", doorbells: [], device: "a" },
  { space: "pio", base: 0x18, size: 4, read: "call", write: "call", doorbells: [], device: "b" },
  { space: "mmio", base: 0x1_0000_0000, size: 16, read: "call", write: "posted", doorbells: [], device: "c" },
  { space: "mmio", base: 0x1_0000_0018, size: 8, read: "shadowed", write: "call", doorbells: [], device: "d" }
]
const MMIO = 0x1_0000_0000

/** One exit: a port access of `count` elements, or a memory access of 1 to 8 bytes. */
type Access =
  | { readonly space: "pio"; readonly address: number; readonly size: 1 | 2 | 4; readonly count: number }
  | { readonly space: "mmio"; readonly address: number; readonly size: number; readonly count: 1 }
interface Step {
  readonly access: Access
  readonly isWrite: boolean
  /** The data that the guest writes; what it reads is compared. */
  readonly data: Uint8Array
  /** `KVM_RUN` returns these first. */
  readonly disturbances: ReadonlyArray<number>
}

const access: fc.Arbitrary<Access> = fc.oneof(
  fc.record({
    space: fc.constant("pio" as const),
    address: fc.integer({ min: 0xc, max: 0x1e }),
    size: fc.constantFrom(1 as const, 2 as const, 4 as const),
    count: fc.oneof(fc.constant(1), fc.integer({ min: 1, max: 6 }))
  }),
  fc.record({
    space: fc.constant("mmio" as const),
    address: fc.integer({ min: MMIO - 2, max: MMIO + 0x22 }),
    size: fc.integer({ min: 1, max: 8 }),
    count: fc.constant(1 as const)
  })
)
const step: fc.Arbitrary<Step> = fc.record({
  access,
  isWrite: fc.boolean(),
  data: fc.uint8Array({ minLength: 24, maxLength: 24 }),
  disturbances: fc.array(fc.constantFrom(-EINTR, -EAGAIN), { maxLength: 2 })
})

/** An event as the bus handlers, or a model, see it. */
type Event = readonly [what: string, range: number, offset: number, size: number, value: number]

/** What a device answers to a call: something of the call itself. */
const answerOf = (range: number, offset: number, size: number): number =>
  (0x0103_0507 * (range + 1) + offset * 0x11 + size) >>> 0

const littleEndian = (bytes: Uint8Array): number => bytes.reduceRight((value, byte) => value * 0x100 + byte, 0)
const truncate = (value: number, size: number): number => size === 4 ? value : value % 2 ** (8 * size)

/** What an access must do, said without the machinery: events for the devices, and the bytes that the guest reads. */
const model = (bus: Bus, shadows: ReadonlyArray<ReadonlyArray<number>>, { access, data, isWrite }: Step) => {
  const events: Array<Event> = []
  const read: Array<number> = []
  const range = bus.find(access.space, access.address, access.size)
  const declared = bus.ranges[range]
  const total = access.size * access.count
  for (let done = 0; done < total;) {
    const rest = access.space === "pio" ? access.size : total - done
    const size = rest >= 4 ? 4 : rest >= 2 ? 2 : 1
    const offset = access.address - (declared?.base ?? 0) + (access.space === "pio" ? 0 : done)
    const value = littleEndian(data.subarray(done, done + size))
    let result = openBusValue(size)
    if (declared !== undefined && isWrite) events.push([declared.write, range, offset, size, value])
    else if (declared !== undefined) {
      const entries = declared.read === "shadowed"
        ? shadows[range]?.slice(offset, offset + size) ?? []
        : [SHADOW_INVALID]
      if (entries.includes(SHADOW_INVALID)) {
        events.push(["read", range, offset, size, 0])
        result = truncate(answerOf(range, offset, size), size)
      } else result = littleEndian(Uint8Array.from(entries))
    }
    for (let i = 0; i < size; i++) read.push(Math.floor(result / 2 ** (8 * i)) % 0x100)
    done += size
  }
  return { events, read }
}

const functions = loadForeignFunctions("node:ffi", { quiet: true })

describe.skipIf(typeof functions === "string")("VcpuLoop", () => {
  it("does for every access what the bus declares, and gives the guest what it reads", () => {
    fc.assert(fc.property(
      fc.array(step, { maxLength: 30 }),
      fc.array(fc.integer({ min: -1, max: 255 }), { minLength: 8, maxLength: 8 }),
      (steps, shadow) => {
        if (typeof functions === "string") return
        const bus = Bus.make(RANGES)
        if (!(bus instanceof Bus)) return assert.fail(bus.message)
        const buffers = buildAccessTable(bus)
        const table = new AccessTable(buffers, RANGES.length)
        const shadows = RANGES.map((range, index) => {
          const entries = range.read === "shadowed" ? shadow : []
          table.shadowOf(index, range.size).set(entries)
          return entries
        })
        // A small ring, so that it is full at times; here it is emptied as soon as the thread asks for room.
        const ring = new PostedRing(PostedRing.allocate(4))
        const control = new Int32Array(new SharedArrayBuffer(Control.CONTROL_WORDS * 4))
        const run = new DataView(new ArrayBuffer(RUN_SIZE))
        const events: Array<Event> = []
        const dispatcher = new AccessDispatcher(ring, {
          posted: (range, offset, size, value) => events.push(["posted", range, offset, size, value]) > 0,
          call: (range, offset, size, isWrite, value, reply) => {
            events.push([isWrite ? "call" : "read", range, offset, size, value])
            reply.complete(isWrite ? 0 : answerOf(range, offset, size))
          },
          doorbell: () => {}
        }, (defect) => {
          throw defect
        })
        dispatcher.add(control)

        const { exit, exit_reason, immediate_exit } = KvmRun.fields
        const pending = steps.map((step) => ({ ...step, disturbances: [...step.disturbances] }))
        let last: Step | undefined
        const expected: Array<Event> = []
        const finishLast = () => {
          if (last === undefined) return
          const { events, read } = model(bus, shadows, last)
          expected.push(...events)
          if (last.isWrite) return
          const at = last.access.space === "pio" ? DATA_OFFSET : exit.mmio.data.offset
          assert.deepStrictEqual(Array.from(new Uint8Array(run.buffer, at, read.length)), read)
        }
        const playedKvm = (): number => {
          finishLast()
          last = undefined
          const next = pending[0]
          if (next === undefined) {
            exit_reason.set(run, KvmExit.KVM_EXIT_SHUTDOWN)
            return 0
          }
          const disturbance = next.disturbances.shift()
          if (disturbance !== undefined) {
            immediate_exit.set(run, 1)
            return disturbance
          }
          pending.shift()
          last = next
          const { access, data, isWrite } = next
          const at = access.space === "pio" ? DATA_OFFSET : exit.mmio.data.offset
          new Uint8Array(run.buffer, at, access.size * access.count).fill(0xee)
          if (isWrite) new Uint8Array(run.buffer, at).set(data.subarray(0, access.size * access.count))
          if (access.space === "pio") {
            exit_reason.set(run, KvmExit.KVM_EXIT_IO)
            exit.io.direction.set(run, isWrite ? KvmRunValue.KVM_EXIT_IO_OUT : KvmRunValue.KVM_EXIT_IO_IN)
            exit.io.size.set(run, access.size)
            exit.io.port.set(run, access.address)
            exit.io.count.set(run, access.count)
            exit.io.data_offset.setNumber(run, DATA_OFFSET)
          } else {
            exit_reason.set(run, KvmExit.KVM_EXIT_MMIO)
            exit.mmio.phys_addr.setNumber(run, access.address)
            exit.mmio.len.set(run, access.size)
            exit.mmio.is_write.set(run, isWrite ? 1 : 0)
          }
          return 0
        }
        const loop = new VcpuLoop(
          {
            ...functions,
            ioctlNumber: playedKvm,
            eventfdWrite: () => {
              dispatcher.turn()
              return 0
            }
          },
          {
            vcpu: -1,
            run: { address: 0n, length: RUN_SIZE },
            control: control.buffer,
            ring: ring.buffer,
            wake: -1,
            table: buffers,
            rows: RANGES.length
          },
          run.buffer
        )
        loop.enter()
        dispatcher.turn()
        dispatcher.close()
        assert.deepStrictEqual(events, expected)
        assert.strictEqual(control[Control.CONTROL_STOP], Control.STOP_EXIT)
        assert.strictEqual(control[Control.CONTROL_STOP_VALUE], KvmExit.KVM_EXIT_SHUTDOWN)
        const counts = readExitCounts(control)
        assert.strictEqual(counts.exits, steps.length + 1)
        assert.strictEqual(counts.posted, expected.filter(([what]) => what === "posted").length)
        assert.strictEqual(counts.calls, expected.filter(([what]) => what !== "posted").length)
      }
    ))
  })

  it("stops when KVM_RUN fails, and when it is asked to", () => {
    if (typeof functions === "string") return
    const start = (ioctlNumber: (control: Int32Array<SharedArrayBuffer>) => number) => {
      const control = new Int32Array(new SharedArrayBuffer(Control.CONTROL_WORDS * 4))
      const bus = Bus.make([])
      if (!(bus instanceof Bus)) return assert.fail(bus.message)
      const job = {
        vcpu: -1,
        run: { address: 0n, length: RUN_SIZE },
        control: control.buffer,
        ring: PostedRing.allocate(2),
        wake: -1,
        table: buildAccessTable(bus),
        rows: 0
      }
      new VcpuLoop({ ...functions, ioctlNumber: () => ioctlNumber(control) }, job, new ArrayBuffer(RUN_SIZE)).enter()
      return [control[Control.CONTROL_STOP], control[Control.CONTROL_STOP_VALUE]]
    }
    assert.deepStrictEqual(start(() => -EFAULT), [Control.STOP_FAILED, EFAULT])
    assert.deepStrictEqual(
      start((control) => {
        Atomics.or(control, Control.CONTROL_REQUEST, Control.REQUEST_STOP)
        return -EINTR
      }),
      [Control.STOP_REQUESTED, 0]
    )
  })
})
