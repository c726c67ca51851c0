// Run in a new process: how much the loop of a vCPU's thread allocates for each access, and how much the foreign call does that
// enters the guest. The loop runs here, on a stand-in for KVM that makes accesses as fast as it is asked for them.
import { Bus, type BusRange } from "@troupe/core/Bus"
import { Ffi, layerWith } from "@troupe/node/Ffi"
import { buildAccessTable } from "@troupe/node/kvm/thread/AccessTable"
import { PostedRing, RING_HOST_STATE } from "@troupe/node/kvm/thread/PostedRing"
import {
  KVM_EXIT_IO,
  KVM_EXIT_IO_OUT,
  KVM_RUN,
  RUN_EXIT_REASON,
  RUN_IO_COUNT,
  RUN_IO_DATA_OFFSET,
  RUN_IO_DIRECTION,
  RUN_IO_PORT,
  RUN_IO_SIZE
} from "@troupe/node/kvm/thread/RunLayout"
import { CALL_ANSWERED, CALL_MADE, CONTROL_CALL, CONTROL_WORDS, HOST_ASLEEP } from "@troupe/node/kvm/thread/VcpuControl"
import { VcpuLoop } from "@troupe/node/kvm/thread/VcpuLoop"
import * as Effect from "effect/Effect"
import * as ManagedRuntime from "effect/ManagedRuntime"
import { getHeapStatistics } from "node:v8"
import { CALL_PORT, POSTED_PORT, SHADOWED_PORT } from "./BatchGuest.ts"

const BATCH = 200_000
const BATCHES = 12
const LIMIT_BYTES = 1
const KVM_EXIT_SHUTDOWN = 8
const RUN_SIZE = 0x3000
const DATA = 0x1000

const port = (base: number, read: BusRange["read"], write: BusRange["write"]): BusRange => ({
  space: "pio",
  base,
  size: 1,
  read,
  write,
  doorbells: [],
  device: "bench"
})

const bus = Bus.make([
  port(POSTED_PORT, "call", "posted"),
  port(SHADOWED_PORT, "shadowed", "call"),
  port(CALL_PORT, "call", "call")
])
if (!(bus instanceof Bus)) throw new Error(bus.message)

const real = ManagedRuntime.make(layerWith({ quiet: true })).runSync(Effect.map(Ffi, (ffi) => ffi.functions))

const allocated = (): number => getHeapStatistics().total_allocated_bytes

/** The least number of bytes for each access of all batches. */
const measure = (access: "posted" | "shadowed" | "call"): number => {
  const table = buildAccessTable(bus)
  new Int16Array(table.shadow).fill(0x60)
  const ring = PostedRing.allocate(2048)
  const host = new PostedRing(ring)
  const control = new Int32Array(new SharedArrayBuffer(CONTROL_WORDS * 4))
  const run = new DataView(new ArrayBuffer(RUN_SIZE))
  run.setUint32(RUN_IO_COUNT, 1, true)
  run.setUint32(RUN_IO_DATA_OFFSET, DATA, true)
  run.setUint8(RUN_IO_SIZE, 1)
  run.setUint8(RUN_IO_DIRECTION, access === "posted" ? KVM_EXIT_IO_OUT : 0)
  run.setUint16(RUN_IO_PORT, { posted: POSTED_PORT, shadowed: SHADOWED_PORT, call: CALL_PORT }[access], true)
  let count = 0
  let batches = 0
  let before = allocated()
  let least = Number.POSITIVE_INFINITY
  const functions = {
    ...real,
    ioctlNumber: (): number => {
      run.setUint32(RUN_EXIT_REASON, KVM_EXIT_IO, true)
      while (host.peek()) host.advance()
      if (++count === BATCH) {
        count = 0
        least = Math.min(least, allocated() - before)
        before = allocated()
        if (++batches === BATCHES) run.setUint32(RUN_EXIT_REASON, KVM_EXIT_SHUTDOWN, true)
      }
      return 0
    },
    eventfdWrite: (): number => {
      Atomics.compareExchange(control, CONTROL_CALL, CALL_MADE, CALL_ANSWERED)
      Atomics.store(host.words, RING_HOST_STATE, HOST_ASLEEP)
      return 0
    }
  }
  const job = {
    vcpu: -1,
    run: { address: 0n, length: RUN_SIZE },
    control: control.buffer,
    ring,
    wake: -1,
    table,
    rows: bus.ranges.length
  }
  Atomics.store(host.words, RING_HOST_STATE, HOST_ASLEEP)
  new VcpuLoop(functions, job, run.buffer).enter()
  return least / BATCH
}

/** The foreign call itself, on a descriptor that is none. */
const measureForeignCall = (): number => {
  let least = Number.POSITIVE_INFINITY
  for (let batch = 0; batch < BATCHES; batch++) {
    const before = allocated()
    for (let i = 0; i < BATCH; i++) real.ioctlNumber(-1, KVM_RUN, 0n)
    least = Math.min(least, allocated() - before)
  }
  return least / BATCH
}

let failed = false
const report = (what: string, bytes: number): void => {
  const ok = bytes < LIMIT_BYTES
  failed ||= !ok
  process.stdout.write(`vCPU thread, ${what}: ${bytes.toFixed(3)} bytes for each: ${ok ? "ok" : "allocates"}\n`)
}
for (const access of ["posted", "shadowed", "call"] as const) report(access, measure(access))
report("the call into the guest", measureForeignCall())
process.exitCode = failed ? 1 : 0
