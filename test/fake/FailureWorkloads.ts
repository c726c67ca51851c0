/**
 * What a guest has each kind of virtio device do while the device fails: requests whose effect can be told afterwards, so that one
 * that was lost, done twice, or done after the reset that failed it is seen.
 */
import { assert } from "@effect/vitest"
import { type BlockBytes, makeBlockBackend, SECTOR_SIZE } from "@troupe/core/BlockBackend"
import { makeBlockClient } from "@troupe/core/BlockClient"
import type { Guest } from "@troupe/core/Guest"
import type { GuestConfigInput } from "@troupe/core/GuestConfig"
import type { GuestError } from "@troupe/core/GuestError"
import type { NetBackend } from "@troupe/core/NetBackend"
import * as NetStreams from "@troupe/core/NetStreams"
import type { DeviceDefects } from "@troupe/core/testing"
import type { DriverBuffer } from "@troupe/core/testing/drivers/QueueDriver"
import type { VirtioDriver } from "@troupe/core/testing/drivers/VirtioDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"
import * as Random from "effect/Random"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"

/** Bytes of memory of a slot, which is one request of those in flight. Page by page, for the balloon. */
export const SLOT_SIZE = 0x2000

/** A request. Its memory is that of its slot, for nobody else while it is in flight. */
export interface Request {
  readonly chain: ReadonlyArray<DriverBuffer>
  /** It was completed. Looks at what it brought; throws if that is wrong. */
  readonly completed: (written: number) => void
  /** A reset came first. */
  readonly failed: () => void
}

/** What one kind of device is given to do. */
export interface Workload {
  readonly deviceId: number
  readonly config: Partial<GuestConfigInput>
  /** The queue of the requests. All queues up to `queues` are set up. */
  readonly queue: number
  readonly queues: number
  /** Features of the device type to accept, low half. */
  readonly features: number
  /** What the driver does each time when it has started. */
  readonly prepare?: (cpu: GuestCpu, driver: VirtioDriver) => GuestRoutine
  /** The next request, in memory that begins there. */
  readonly next: (cpu: GuestCpu, slot: number, address: number) => Request
  /** The host's part: done before the guest runs, its fibers interrupted when it has ended. */
  readonly host?: (guest: Guest) => Effect.Effect<unknown, GuestError, Scope.Scope>
  readonly network?: Layer.Layer<NetBackend>
  /** Looks at what the host has got in the end. Throws if that is wrong. */
  readonly ended?: () => void
}

/** Makes a workload afresh for a run. What the host provides to the device may be made to break as well. */
export type MakeWorkload = (defects: DeviceDefects.DeviceDefects) => Workload

/** Guest memory. */
export const bytesAt = (cpu: GuestCpu, address: number, length: number): Uint8Array => {
  const bytes = cpu.memory.slice(address, length)
  if (bytes === undefined) throw new Error("not in guest memory")
  return bytes
}

const viewAt = (cpu: GuestCpu, address: number, length: number): DataView => {
  const bytes = bytesAt(cpu, address, length)
  return new DataView(bytes.buffer, bytes.byteOffset, length)
}

const POISON = 0xa5
const nothing = (): void => undefined

/** What the source of randomness gives: a byte that was not written is known. */
export const RANDOM_BYTE = 0x11

const entropy: MakeWorkload = () => ({
  deviceId: 4,
  config: { virtioRng: true },
  queue: 0,
  queues: 1,
  features: 0,
  next: (cpu, slot, address) => {
    const bytes = bytesAt(cpu, address, 64).fill(POISON)
    return {
      chain: [{ address, length: 16 + slot, writable: true }],
      completed: (written) => {
        assert.isAbove(written, 0)
        assert.isTrue(bytes.every((byte, index) => byte === (index < written ? RANDOM_BYTE : POISON)))
      },
      failed: nothing
    }
  }
})

const nap = Effect.flatMap(Random.nextIntBetween(0, 30), (millis) => millis < 10 ? Effect.void : Effect.sleep(millis))

/** A disk whose operations take a while, each another one, and whose back end breaks as planned, which none should. */
const slowDisk = (bytes: Uint8Array<ArrayBuffer>, defects: DeviceDefects.DeviceDefects) =>
  makeBlockClient("slow", () =>
    Effect.map(
      makeBlockBackend({
        name: "slow",
        capacity: bytes.length,
        read: (offset, target: BlockBytes) =>
          Effect.map(nap, () => target.set(bytes.subarray(offset, offset + target.length))),
        write: (offset, source) => Effect.map(nap, () => bytes.set(source, offset))
      }),
      (backend) => ({
        ...backend,
        read: (...request) => {
          defects.reach("host")
          backend.read(...request)
        },
        write: (...request) => {
          defects.reach("host")
          backend.write(...request)
        }
      })
    ))

const BLOCK_READ = 0
const BLOCK_WRITE = 1
const BLOCK_HEADER_SIZE = 16

/**
 * Each slot writes to its own sector and reads it again, in turns. What a sector may hold is what the last completed write
 * wrote, or what one wrote that has failed since then. A read settles it: whatever came to the disk later would be seen.
 */
const block: MakeWorkload = (defects) => {
  const possible: Array<Set<number>> = []
  let version = 0
  return {
    deviceId: 2,
    config: {
      blockDevices: [{
        id: "disk",
        mode: "READ_WRITE",
        format: "FILE",
        client: slowDisk(new Uint8Array(64 * SECTOR_SIZE), defects)
      }]
    },
    queue: 0,
    queues: 1,
    features: 0xff_ffff,
    next: (cpu, slot, address) => {
      const versions = possible[slot] ??= new Set([0])
      const type = version++ % 3 === 0 ? BLOCK_READ : BLOCK_WRITE
      const mine = version
      const data = BLOCK_HEADER_SIZE
      const status = data + SECTOR_SIZE
      bytesAt(cpu, address, status + 1).fill(POISON)
      const view = viewAt(cpu, address, status + 1)
      view.setUint32(0, type, true)
      view.setUint32(4, 0, true)
      view.setUint32(8, slot, true)
      view.setUint32(12, 0, true)
      if (type === BLOCK_WRITE) { for (let at = 0; at < SECTOR_SIZE; at += 4) view.setUint32(data + at, mine, true) }
      return {
        chain: [
          { address, length: BLOCK_HEADER_SIZE, writable: false },
          { address: address + data, length: SECTOR_SIZE, writable: type === BLOCK_READ },
          { address: address + status, length: 1, writable: true }
        ],
        completed: (written) => {
          assert.strictEqual(view.getUint8(status), 0)
          assert.strictEqual(written, type === BLOCK_READ ? SECTOR_SIZE + 1 : 1)
          const seen = type === BLOCK_WRITE ? mine : view.getUint32(data, true)
          if (type === BLOCK_READ) {
            assert.isTrue(versions.has(seen), `sector ${slot} holds ${seen}, not one of ${Array.from(versions).join()}`)
            for (let at = 0; at < SECTOR_SIZE; at += 4) assert.strictEqual(view.getUint32(data + at, true), seen)
          }
          versions.clear()
          versions.add(seen)
        },
        failed: () => {
          if (type === BLOCK_WRITE) versions.add(mine)
        }
      }
    }
  }
}

const PLUG = 0
const UNPLUG = 1
const STATE = 3
const ACK = 0
const ERROR = 3
const PLUGGED = 0
const MEM_BLOCK = 2 ** 21
const MEM_REQUEST_SIZE = 24
const MEM_RESPONSE_SIZE = 10
const MEM_CONFIG_ADDR = 16

/** Each slot plugs, unplugs and asks after a block of its own. Whether it is plugged is known, or a request for it has failed. */
const mem: MakeWorkload = () => {
  const possible: Array<Set<boolean>> = []
  let region = 0
  let turn = 0
  return {
    deviceId: 24,
    config: { virtioMem: true, virtioMemBlockSize: MEM_BLOCK, virtioMemRegionSize: 8 * MEM_BLOCK },
    queue: 0,
    queues: 1,
    features: 0xff_ffff,
    host: (guest) => Effect.flatMap(guest.getMemController, (memory) => memory.requestSize(8 * MEM_BLOCK)),
    prepare: function*(cpu, driver) {
      const low = yield* driver.loadConfiguration(cpu, { offset: MEM_CONFIG_ADDR, size: 4 })
      const high = yield* driver.loadConfiguration(cpu, { offset: MEM_CONFIG_ADDR + 4, size: 4 })
      region = high * 2 ** 32 + low
    },
    next: (cpu, slot, address) => {
      const states = possible[slot] ??= new Set([false])
      const type = [PLUG, STATE, UNPLUG, STATE][turn++ % 4] ?? STATE
      const view = viewAt(cpu, address, MEM_REQUEST_SIZE + MEM_RESPONSE_SIZE)
      const place = region + slot * MEM_BLOCK
      view.setUint32(0, type, true)
      view.setUint32(4, 0, true)
      view.setUint32(8, place % 2 ** 32, true)
      view.setUint32(12, Math.floor(place / 2 ** 32), true)
      view.setUint32(16, 1, true)
      view.setUint32(20, 0, true)
      const settle = (state: boolean) => {
        states.clear()
        states.add(state)
      }
      return {
        chain: [
          { address, length: MEM_REQUEST_SIZE, writable: false },
          { address: address + MEM_REQUEST_SIZE, length: MEM_RESPONSE_SIZE, writable: true }
        ],
        completed: (written) => {
          assert.strictEqual(written, MEM_RESPONSE_SIZE)
          const answer = view.getUint16(MEM_REQUEST_SIZE, true)
          if (type === STATE) {
            assert.strictEqual(answer, ACK)
            const plugged = view.getUint16(MEM_REQUEST_SIZE + 8, true) === PLUGGED
            assert.isTrue(states.has(plugged), `block ${slot} is ${plugged ? "" : "not "}plugged`)
            return settle(plugged)
          }
          // What is so already is an error, and only that.
          const wanted = type === PLUG
          assert.strictEqual(answer === ACK || answer === ERROR, true, `answer ${answer}`)
          assert.isTrue(states.has(answer === ACK ? !wanted : wanted))
          settle(wanted)
        },
        failed: () => {
          if (type !== STATE) states.add(type === PLUG)
        }
      }
    }
  }
}

const PAGE = 0x1000

/** Each request inflates one page, which the host takes: it reads as zero then. The guest uses the page again after a reset. */
const balloon: MakeWorkload = () => ({
  deviceId: 5,
  config: { virtioBalloon: true },
  queue: 0,
  queues: 2,
  features: 0,
  next: (cpu, _, address) => {
    const page = address + PAGE
    const bytes = bytesAt(cpu, page, PAGE).fill(POISON)
    viewAt(cpu, address, 4).setUint32(0, page / PAGE, true)
    return {
      chain: [{ address, length: 4, writable: false }],
      completed: () => assert.isTrue(bytes.every((byte) => byte === 0)),
      failed: () => assert.isTrue(bytes.every((byte) => byte === bytes[0]))
    }
  }
})

const NET_HEADER_SIZE = 12
const FRAME_SIZE = 64

/** Each frame has a number. What was sent is on the wire once; what has failed, at most once. */
const net: MakeWorkload = () => {
  const wire: Array<number> = []
  const sent: Array<number> = []
  let number = 0
  return {
    deviceId: 1,
    config: { defaultNet: true },
    queue: 1,
    queues: 2,
    features: 0,
    network: NetStreams.layer(
      ({ fromGuest }) =>
        Stream.runForEach(
          fromGuest,
          (frame) => Effect.sync(() => wire.push(new DataView(frame.buffer, frame.byteOffset).getUint32(14)))
        ),
      { framesWaiting: 2 }
    ),
    next: (cpu, _, address) => {
      const mine = ++number
      bytesAt(cpu, address, NET_HEADER_SIZE + FRAME_SIZE).fill(0)
      viewAt(cpu, address, NET_HEADER_SIZE + FRAME_SIZE).setUint32(NET_HEADER_SIZE + 14, mine)
      return {
        chain: [{ address, length: NET_HEADER_SIZE + FRAME_SIZE, writable: false }],
        completed: () => void sent.push(mine),
        failed: nothing
      }
    },
    ended: () => {
      assert.strictEqual(new Set(wire).size, wire.length, `frames came twice: ${wire.join()}`)
      for (const frame of sent) assert.include(wire, frame)
    }
  }
}

/** Each write is a number in brackets. What was written is read once; what has failed, at most once. */
const console: MakeWorkload = () => {
  const written: Array<number> = []
  let output = ""
  let number = 0
  return {
    deviceId: 3,
    config: { virtioConsole: true },
    queue: 1,
    queues: 2,
    features: 0,
    host: (guest) =>
      Effect.flatMap(guest.getConsole, (port) =>
        Effect.forkScoped(
          Stream.runForEach(port.output, (bytes) =>
            Effect.sync(() => {
              output += String.fromCharCode(...bytes)
            }))
        )),
    next: (cpu, _, address) => {
      const mine = ++number
      const text = `<${mine}>`
      bytesAt(cpu, address, text.length).set(new TextEncoder().encode(text))
      return {
        chain: [{ address, length: text.length, writable: false }],
        completed: () => void written.push(mine),
        failed: nothing
      }
    },
    ended: () => {
      const numbers = Array.from(output.matchAll(/<(\d+)>/g), ([, digits]) => Number(digits))
      assert.strictEqual(new Set(numbers).size, numbers.length, `written twice: ${output}`)
      for (const one of written) assert.include(numbers, one)
    }
  }
}

const VSOCK_HEADER_SIZE = 44
const VSOCK_TYPE_STREAM = 1
const VSOCK_OP_RST = 3
const HOST_CID = 2

/** Each request is a packet that ends a connection that there is not: it is taken, and nothing else happens. */
const vsock: MakeWorkload = () => {
  let cid = 0
  return {
    deviceId: 19,
    config: { virtioVsock: true },
    queue: 1,
    queues: 3,
    features: 0,
    prepare: function*(cpu, driver) {
      cid = yield* driver.loadConfiguration(cpu, { offset: 0, size: 4 })
    },
    next: (cpu, slot, address) => {
      bytesAt(cpu, address, VSOCK_HEADER_SIZE).fill(0)
      const view = viewAt(cpu, address, VSOCK_HEADER_SIZE)
      view.setUint32(0, cid, true)
      view.setUint32(8, HOST_CID, true)
      view.setUint32(16, 1024 + slot, true)
      view.setUint32(20, 80, true)
      view.setUint16(28, VSOCK_TYPE_STREAM, true)
      view.setUint16(30, VSOCK_OP_RST, true)
      return {
        chain: [{ address, length: VSOCK_HEADER_SIZE, writable: false }],
        completed: (written) => assert.strictEqual(written, 0),
        failed: nothing
      }
    }
  }
}

/** A workload for each kind of device. */
export const workloads: Readonly<Record<string, MakeWorkload>> = { entropy, block, mem, balloon, net, console, vsock }
