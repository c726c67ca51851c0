/**
 * The loop of a vCPU thread: enters the guest, finishes on this thread what needs no answer from JavaScript on the main thread,
 * and makes calls for the rest. Imports nothing of Effect; the loop allocates nothing.
 *
 * Posted writes go to the machine's ring, shadowed reads come from the table, accesses to no range read as ones or are
 * ignored. A call is published in the control block; the thread spins for a bound, then sleeps until the gate opens.
 */
import type { ForeignFunctions } from "../../internal/ForeignFunctions.ts"
import { AccessTable, type AccessTableBuffers } from "./AccessTable.ts"
import { PostedRing, RING_HOST_STATE, RING_WAITERS } from "./PostedRing.ts"
import {
  EAGAIN,
  EINTR,
  KVM_EXIT_IO,
  KVM_EXIT_IO_OUT,
  KVM_EXIT_MMIO,
  KVM_GET_MP_STATE,
  KVM_GET_REGS,
  KVM_RUN,
  REGS_RFLAGS,
  REGS_SIZE,
  RFLAGS_IF,
  RUN_EXIT_REASON,
  RUN_IMMEDIATE_EXIT,
  RUN_IO_COUNT,
  RUN_IO_DATA_OFFSET,
  RUN_IO_DIRECTION,
  RUN_IO_PORT,
  RUN_IO_SIZE,
  RUN_MMIO_DATA,
  RUN_MMIO_IS_WRITE,
  RUN_MMIO_LEN,
  RUN_MMIO_PHYS_ADDR
} from "./RunLayout.ts"
import {
  CALL_ANSWERED,
  CALL_MADE,
  CALL_NONE,
  CONTROL_CALL,
  CONTROL_CALL_IS_WRITE,
  CONTROL_CALL_OFFSET,
  CONTROL_CALL_RANGE,
  CONTROL_CALL_SIZE,
  CONTROL_CALL_TAIL,
  CONTROL_CALL_VALUE,
  CONTROL_CALLS,
  CONTROL_EXITS,
  CONTROL_GATE,
  CONTROL_INSPECTIONS,
  CONTROL_INTERRUPTS_ENABLED,
  CONTROL_MP_STATE,
  CONTROL_POSTED,
  CONTROL_REQUEST,
  CONTROL_RING_WAITS,
  CONTROL_SHADOWED,
  CONTROL_SLEEPS,
  CONTROL_STOP,
  CONTROL_STOP_VALUE,
  CONTROL_UNCLAIMED,
  HOST_ASLEEP,
  HOST_AWAKE,
  REQUEST_INSPECT,
  REQUEST_STOP,
  STOP_EXIT,
  STOP_FAILED,
  STOP_REQUESTED
} from "./VcpuControl.ts"

/** What a vCPU thread is given to run. */
export interface VcpuJob {
  /** The vCPU's descriptor. */
  readonly vcpu: number
  /** Address and length of the vCPU's mapping. */
  readonly run: { readonly address: bigint; readonly length: number }
  readonly control: SharedArrayBuffer
  readonly ring: SharedArrayBuffer
  /** The eventfd that wakes the machine's host side. */
  readonly wake: number
  readonly table: AccessTableBuffers
  /** Rows of the table. */
  readonly rows: number
}

/**
 * Looks at the answer to a call so often before the thread sleeps: about 50 us. A host that is awake answers a simple call in
 * 10 us, through a fiber in 20; waking this thread costs several times as much. (Measured: 500 looks triple the time of a call
 * through a fiber, 15,000 gain nothing.)
 */
const SPIN_LIMIT = 4000

const NO_ARGUMENT = 0n

/** The part of an access that is delivered next: 4, 2 or 1 bytes. */
const partSize = (rest: number): number => (rest >= 4 ? 4 : rest >= 2 ? 2 : 1)

const allOnes = (size: number): number => (size === 4 ? 0xffff_ffff : size === 2 ? 0xffff : 0xff)

/** One run of one vCPU on this thread. */
export class VcpuLoop {
  readonly #functions: ForeignFunctions
  readonly #vcpu: number
  readonly #wake: number
  readonly #run: DataView<ArrayBuffer>
  readonly #control: Int32Array<SharedArrayBuffer>
  readonly #ring: PostedRing
  readonly #table: AccessTable
  readonly #regs = new DataView(new ArrayBuffer(REGS_SIZE))
  readonly #mpState = new DataView(new ArrayBuffer(4))
  #stopping = false

  /** `run` is this thread's view of the vCPU's mapping. */
  constructor(functions: ForeignFunctions, job: VcpuJob, run: ArrayBuffer) {
    this.#functions = functions
    this.#vcpu = job.vcpu
    this.#wake = job.wake
    this.#run = new DataView(run)
    this.#control = new Int32Array(job.control)
    this.#ring = new PostedRing(job.ring)
    this.#table = new AccessTable(job.table, job.rows)
  }

  /** Runs the vCPU until it stops for good. Why it did is in the control block then. */
  enter(): void {
    const functions = this.#functions
    const run = this.#run
    const vcpu = this.#vcpu
    if (!this.#serve()) return
    while (!this.#stopping) {
      const result = functions.ioctlNumber(vcpu, KVM_RUN, NO_ARGUMENT)
      if (result < 0) {
        if (result !== -EINTR && result !== -EAGAIN) return this.#stop(STOP_FAILED, -result)
        // Whoever makes a request raises the flag after it, so KVM_RUN comes back here and the request need not be looked for at
        // every exit. The flag goes down before the request is read: one that is made after that raises it once more.
        run.setUint8(RUN_IMMEDIATE_EXIT, 0)
        if (!this.#serve()) return
        continue
      }
      this.#count(CONTROL_EXITS)
      const reason = run.getUint32(RUN_EXIT_REASON, true)
      if (reason === KVM_EXIT_IO) this.#portAccess()
      else if (reason === KVM_EXIT_MMIO) this.#memoryAccess()
      else return this.#stop(STOP_EXIT, reason)
    }
    this.#stop(STOP_REQUESTED, 0)
  }

  #stop(reason: number, value: number): void {
    this.#control[CONTROL_STOP_VALUE] = value
    this.#control[CONTROL_STOP] = reason
  }

  #count(word: number): void {
    this.#control[word] = ((this.#control[word] ?? 0) + 1) | 0
  }

  /** Serves the host's requests; `false` when the thread is to leave. */
  #serve(): boolean {
    const control = this.#control
    const request = Atomics.and(control, CONTROL_REQUEST, ~REQUEST_INSPECT)
    if ((request & REQUEST_STOP) !== 0) {
      this.#stop(STOP_REQUESTED, 0)
      return false
    }
    if ((request & REQUEST_INSPECT) !== 0) {
      const state = this.#functions.ioctlBuffer(this.#vcpu, KVM_GET_MP_STATE, this.#mpState)
      const registers = this.#functions.ioctlBuffer(this.#vcpu, KVM_GET_REGS, this.#regs)
      const known = state >= 0 && registers >= 0
      control[CONTROL_MP_STATE] = known ? this.#mpState.getUint32(0, true) : -1
      control[CONTROL_INTERRUPTS_ENABLED] = known && (this.#regs.getUint32(REGS_RFLAGS, true) & RFLAGS_IF) === 0 ? 0 : 1
      Atomics.add(control, CONTROL_INSPECTIONS, 1)
      this.#wakeHost()
    }
    return true
  }

  #wakeHost(): void {
    if (Atomics.exchange(this.#ring.words, RING_HOST_STATE, HOST_AWAKE) !== HOST_AWAKE) {
      this.#functions.eventfdWrite(this.#wake)
    }
  }

  /** `KVM_EXIT_IO`: one access, or the elements of a string instruction. */
  #portAccess(): void {
    const run = this.#run
    const port = run.getUint16(RUN_IO_PORT, true)
    const size = run.getUint8(RUN_IO_SIZE)
    const count = run.getUint32(RUN_IO_COUNT, true)
    const data = run.getUint32(RUN_IO_DATA_OFFSET, true)
    const isWrite = run.getUint8(RUN_IO_DIRECTION) === KVM_EXIT_IO_OUT
    const row = this.#table.findPort(port, size)
    for (let i = 0; i < count && !this.#stopping; i++) {
      this.#access(row, port, size, isWrite, data + i * size)
    }
  }

  /** `KVM_EXIT_MMIO`: 1 to 8 bytes. What is not 1, 2 or 4 bytes wide is delivered in parts, lowest address first. */
  #memoryAccess(): void {
    const run = this.#run
    const address = run.getUint32(RUN_MMIO_PHYS_ADDR, true) +
      run.getUint32(RUN_MMIO_PHYS_ADDR + 4, true) * 0x1_0000_0000
    const length = Math.min(run.getUint32(RUN_MMIO_LEN, true), 8)
    const isWrite = run.getUint8(RUN_MMIO_IS_WRITE) !== 0
    const row = this.#table.findAddress(address, length)
    for (let done = 0; done < length && !this.#stopping;) {
      const size = partSize(length - done)
      this.#access(row, address + done, size, isWrite, RUN_MMIO_DATA + done)
      done += size
    }
  }

  /** One access of 1, 2 or 4 bytes, its data at `data` of the vCPU's mapping. */
  #access(row: number, address: number, size: number, isWrite: boolean, data: number): void {
    if (row < 0) {
      this.#count(CONTROL_UNCLAIMED)
      if (!isWrite) this.#setData(data, size, allOnes(size))
      return
    }
    const table = this.#table
    const offset = address - table.base(row)
    if (isWrite) {
      const value = this.#getData(data, size)
      if (table.isPosted(row)) this.#post(table.range(row), offset, size, value)
      else this.#call(table.range(row), offset, size, 1, value)
      return
    }
    const shadow = table.shadow(row, offset, size)
    if (shadow >= 0) {
      this.#count(CONTROL_SHADOWED)
      this.#setData(data, size, shadow)
    } else {
      this.#setData(data, size, this.#call(table.range(row), offset, size, 0, 0))
    }
  }

  #getData(data: number, size: number): number {
    const run = this.#run
    return size === 1 ? run.getUint8(data) : size === 2 ? run.getUint16(data, true) : run.getUint32(data, true)
  }

  #setData(data: number, size: number, value: number): void {
    const run = this.#run
    if (size === 1) run.setUint8(data, value)
    else if (size === 2) run.setUint16(data, value, true)
    else run.setUint32(data, value, true)
  }

  #post(range: number, offset: number, size: number, value: number): void {
    const ring = this.#ring
    if (!ring.post(range, size, offset, value)) this.#postWhenRoom(range, offset, size, value)
    if (this.#stopping) return
    this.#count(CONTROL_POSTED)
    const state = Atomics.load(ring.words, RING_HOST_STATE)
    if (state === HOST_AWAKE) return
    if (state === HOST_ASLEEP || ring.isFilling) this.#wakeHost()
  }

  #postWhenRoom(range: number, offset: number, size: number, value: number): void {
    const ring = this.#ring
    const control = this.#control
    this.#count(CONTROL_RING_WAITS)
    Atomics.add(ring.words, RING_WAITERS, 1)
    for (;;) {
      const gate = Atomics.load(control, CONTROL_GATE)
      if (ring.post(range, size, offset, value)) break
      if ((Atomics.load(control, CONTROL_REQUEST) & REQUEST_STOP) !== 0) {
        this.#stopping = true
        break
      }
      this.#wakeHost()
      Atomics.wait(control, CONTROL_GATE, gate)
    }
    Atomics.sub(ring.words, RING_WAITERS, 1)
  }

  /** Has the host answer an access, and waits for it; gives the value read. When the thread is to stop it gives 0. */
  #call(range: number, offset: number, size: number, isWrite: 0 | 1, value: number): number {
    const control = this.#control
    this.#count(CONTROL_CALLS)
    control[CONTROL_CALL_RANGE] = range
    control[CONTROL_CALL_OFFSET] = offset
    control[CONTROL_CALL_SIZE] = size
    control[CONTROL_CALL_IS_WRITE] = isWrite
    control[CONTROL_CALL_VALUE] = value
    control[CONTROL_CALL_TAIL] = this.#ring.tail
    Atomics.store(control, CONTROL_CALL, CALL_MADE)
    this.#wakeHost()
    let spins = 0
    while (Atomics.load(control, CONTROL_CALL) !== CALL_ANSWERED) {
      if (spins < SPIN_LIMIT) {
        spins++
        continue
      }
      const gate = Atomics.load(control, CONTROL_GATE)
      if (Atomics.load(control, CONTROL_CALL) === CALL_ANSWERED) break
      if ((Atomics.load(control, CONTROL_REQUEST) & REQUEST_STOP) !== 0) {
        this.#stopping = true
        return 0
      }
      if (spins === SPIN_LIMIT) {
        spins++
        this.#count(CONTROL_SLEEPS)
      }
      Atomics.wait(control, CONTROL_GATE, gate)
    }
    const answer = (control[CONTROL_CALL_VALUE] ?? 0) >>> 0
    Atomics.store(control, CONTROL_CALL, CALL_NONE)
    return answer
  }
}
