/** A guest's driver of a block device on a device harness: requests in slots of guest memory, sent and answered in any order. */
import type { DriverBuffer } from "@troupe/core/testing/drivers/SplitQueueDriver"
import type { VirtioMmioDriver } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import type { GuestCpu } from "@troupe/core/testing/GuestCpu"
import type { DeviceHarness } from "./DeviceHarness.ts"
import { runGuest } from "./HarnessCpu.ts"

/** Where the slots are, and how much each has. */
const SLOTS_ADDRESS = 0x4_0000
const SLOT_SIZE = 0x1000
const STATUS_AT = 16
const DATA_AT = 64
/** The number of slots. */
export const SLOTS = 180
/** The most bytes of data in a request. */
export const DATA_MAX = SLOT_SIZE - DATA_AT

/** A request as a driver makes it. */
export interface DiskRequest {
  readonly type: number
  readonly sector: number
  /** What the device reads after the header. */
  readonly out?: Uint8Array
  /** How many bytes the device writes before the status. */
  readonly room?: number
  /** The largest buffer. Default: one buffer for all data. */
  readonly piece?: number
  /** Header, data and status in as few buffers as their directions allow. */
  readonly joined?: boolean
}

/** How a request was answered. */
export interface DiskAnswer {
  readonly status: number
  readonly written: number
  readonly data: Uint8Array
}

export class DiskDriver {
  readonly #harness: DeviceHarness
  readonly #cpu: GuestCpu
  readonly #driver: VirtioMmioDriver
  readonly #free = Array.from({ length: SLOTS }, (_, slot) => slot)
  readonly #sent = new Map<number, { readonly slot: number; readonly request: DiskRequest; readonly dataAt: number }>()
  readonly #answers = new Map<DiskRequest, DiskAnswer>()

  constructor(harness: DeviceHarness, cpu: GuestCpu, driver: VirtioMmioDriver) {
    this.#harness = harness
    this.#cpu = cpu
    this.#driver = driver
  }

  /** Requests that were sent and not answered. */
  get waiting(): number {
    return this.#sent.size
  }

  /** Sends requests with one notification, if the device wants any. */
  send(...requests: ReadonlyArray<DiskRequest>): void {
    const queue = this.#driver.queue(0)
    for (const request of requests) {
      const slot = this.#free.pop()
      if (slot === undefined) throw new Error("there is no free slot")
      const at = SLOTS_ADDRESS + slot * SLOT_SIZE
      const { memory } = this.#harness
      const header = new DataView(new ArrayBuffer(16))
      header.setUint32(0, request.type, true)
      header.setUint32(8, request.sector % 2 ** 32, true)
      header.setUint32(12, Math.floor(request.sector / 2 ** 32), true)
      const out = request.out ?? new Uint8Array(0)
      const room = request.room ?? 0
      const joined = request.joined ?? false
      // Joined, the header is followed by its data, and the data by its status.
      const outAt = joined ? at + 16 : at + DATA_AT
      memory.write(at, new Uint8Array(header.buffer))
      memory.write(outAt, out)
      const dataAt = at + DATA_AT
      const statusAt = joined ? dataAt + room : at + STATUS_AT
      if (!joined || out.length === 0) memory.write(dataAt, new Uint8Array(room).fill(0xee))
      memory.write(statusAt, Uint8Array.of(0xee))
      const head = queue.add(
        joined
          ? [{ address: at, length: 16 + out.length, writable: false }, {
            address: dataAt,
            length: room + 1,
            writable: true
          }]
          : [
            { address: at, length: 16, writable: false },
            ...pieces(outAt, out.length, request.piece, false),
            ...pieces(dataAt, room, request.piece, true),
            { address: statusAt, length: 1, writable: true }
          ],
        true
      )
      if (head === undefined) throw new Error("there is no room in the queue")
      this.#sent.set(head, { slot, request, dataAt })
    }
    if (queue.publish()) runGuest(this.#driver.notify(this.#cpu, 0))
  }

  /** Takes what was answered. Returns the number of answers. */
  poll(): number {
    let count = 0
    for (;;) {
      const used = this.#driver.queue(0).poll()
      if (used === undefined) return count
      const sent = this.#sent.get(used.head)
      if (sent === undefined) throw new Error(`chain ${used.head} was answered twice`)
      this.#sent.delete(used.head)
      this.#free.push(sent.slot)
      const { request } = sent
      const room = request.room ?? 0
      const statusAt = request.joined === true ? sent.dataAt + room : sent.dataAt - DATA_AT + STATUS_AT
      this.#answers.set(request, {
        status: this.#bytes(statusAt, 1)[0] ?? -1,
        written: used.written,
        data: this.#bytes(sent.dataAt, room)
      })
      count++
    }
  }

  /** How a request was answered, once. */
  answer(request: DiskRequest): DiskAnswer | undefined {
    const answer = this.#answers.get(request)
    this.#answers.delete(request)
    return answer
  }

  #bytes(address: number, length: number): Uint8Array {
    return this.#harness.memory.slice(address, length)?.slice() ?? new Uint8Array(0)
  }
}

const pieces = (address: number, length: number, piece = length, writable: boolean): Array<DriverBuffer> => {
  const buffers: Array<DriverBuffer> = []
  for (let at = 0; at < length; at += piece) {
    buffers.push({ address: address + at, length: Math.min(piece, length - at), writable })
  }
  return buffers
}
