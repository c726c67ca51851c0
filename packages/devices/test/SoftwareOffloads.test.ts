/** Checksums and segments made in software, against a reference that is written for clarity. */
import { assert, describe, it } from "@effect/vitest"
import { Offload } from "@troupe/core/NetBackend"
import { NetFrame } from "@troupe/core/NetFrame"
import type { FrameHeader } from "@troupe/core/testing/drivers/NetDriver"
import * as fc from "fast-check"
import { sumBytes } from "../src/net/InternetChecksum.ts"
import { SEGMENTS_MAX, withSoftwareOffloads } from "../src/net/SoftwareOffloads.ts"
import { FakePort } from "./FakePort.ts"

/** RFC 1071, word by word. */
const referenceSum = (bytes: ReadonlyArray<number> | Uint8Array): number => {
  let sum = 0
  for (let i = 0; i < bytes.length; i += 2) {
    sum += (bytes[i] ?? 0) * 256 + (bytes[i + 1] ?? 0)
    if (sum > 0xffff) sum -= 0xffff
  }
  return sum
}

const frameOf = (bytes: Uint8Array<ArrayBuffer>, header: Partial<FrameHeader>, splits: ReadonlyArray<number>) => {
  const frame = new NetFrame()
  let at = 0
  for (const split of [...splits, bytes.length]) {
    const length = Math.min(split, bytes.length - at)
    frame.add(bytes, at, length)
    at += length
  }
  return Object.assign(frame, header)
}

interface Packet {
  readonly version: 4 | 6
  readonly tcp: boolean
  readonly tags: number
  readonly options: number
  readonly flags: number
  readonly sequence: number
  readonly id: number
  readonly payload: number
  readonly segment: number
}

const PROTOCOL = { tcp: 6, udp: 17 }

/** A frame as a guest makes it that leaves checksum and segments to the device. */
const build = (packet: Packet) => {
  const l3 = 14 + 4 * packet.tags
  const l4 = l3 + (packet.version === 4 ? 20 + 4 * (packet.options % 3) : 40)
  const headers = l4 + (packet.tcp ? 20 + 4 * packet.options : 8)
  const bytes = new Uint8Array(headers + packet.payload)
  for (let i = 0; i < bytes.length; i++) bytes[i] = (i * 37 + (i >> 8) * 11 + packet.id) & 0xff
  const view = new DataView(bytes.buffer)
  for (let tag = 0; tag < packet.tags; tag++) view.setUint16(12 + 4 * tag, 0x8100)
  view.setUint16(l3 - 2, packet.version === 4 ? 0x0800 : 0x86dd)
  if (packet.version === 4) {
    view.setUint8(l3, 0x40 | ((l4 - l3) / 4))
    view.setUint16(l3 + 2, bytes.length - l3)
    view.setUint16(l3 + 4, packet.id)
    view.setUint8(l3 + 9, packet.tcp ? PROTOCOL.tcp : PROTOCOL.udp)
  } else {
    view.setUint8(l3, 0x60)
    view.setUint16(l3 + 4, bytes.length - l3 - 40)
    view.setUint8(l3 + 6, packet.tcp ? PROTOCOL.tcp : PROTOCOL.udp)
  }
  if (packet.tcp) {
    view.setUint32(l4 + 4, packet.sequence)
    view.setUint8(l4 + 12, ((headers - l4) / 4) << 4)
    view.setUint8(l4 + 13, packet.flags)
  } else {
    view.setUint16(l4 + 4, bytes.length - l4)
  }
  const header: FrameHeader = {
    flags: 1,
    gsoType: packet.tcp ? (packet.version === 4 ? 1 : 4) : 5,
    headerLength: headers,
    gsoSize: packet.segment,
    checksumStart: l4,
    checksumOffset: packet.tcp ? 16 : 6
  }
  return { bytes, header, l3, l4, headers }
}

const pseudoHeader = (bytes: Uint8Array, l3: number, l4: number, version: 4 | 6, protocol: number) => [
  ...bytes.subarray(l3 + (version === 4 ? 12 : 8), l3 + (version === 4 ? 20 : 40)),
  0,
  protocol,
  (bytes.length - l4) >> 8,
  (bytes.length - l4) & 0xff
]

/** What a receiver checks of each segment, and what of the whole has to be in them. */
const checkSegments = (packet: Packet, sent: ReadonlyArray<Uint8Array>) => {
  const { bytes, headers, l3, l4 } = build(packet)
  const protocol = packet.tcp ? PROTOCOL.tcp : PROTOCOL.udp
  assert.strictEqual(sent.length, Math.max(1, Math.ceil(packet.payload / packet.segment)))
  const payload: Array<number> = []
  for (const [index, segment] of sent.entries()) {
    const view = new DataView(segment.buffer, segment.byteOffset)
    const last = index === sent.length - 1
    assert.isAtMost(segment.length, headers + packet.segment)
    assert.deepStrictEqual(segment.subarray(0, l3), bytes.subarray(0, l3))
    if (packet.version === 4) {
      assert.strictEqual(view.getUint16(l3 + 2), segment.length - l3)
      assert.strictEqual(view.getUint16(l3 + 4), (packet.id + index) & 0xffff)
      assert.strictEqual(referenceSum(segment.subarray(l3, l4)), 0xffff, "the checksum of the IPv4 header")
    } else {
      assert.strictEqual(view.getUint16(l3 + 4), segment.length - l3 - 40)
    }
    const covered = [...pseudoHeader(segment, l3, l4, packet.version, protocol), ...segment.subarray(l4)]
    assert.strictEqual(referenceSum(covered), 0xffff, "the checksum of TCP or UDP")
    if (packet.tcp) {
      assert.strictEqual(view.getUint32(l4 + 4), (packet.sequence + index * packet.segment) >>> 0)
      const flags = packet.flags & ~(last ? 0 : 0x09) & ~(index === 0 ? 0 : 0x80)
      assert.strictEqual(view.getUint8(l4 + 13), flags)
    } else {
      assert.strictEqual(view.getUint16(l4 + 4), segment.length - l4)
      assert.notStrictEqual(view.getUint16(l4 + 6), 0)
    }
    payload.push(...segment.subarray(headers))
  }
  assert.deepStrictEqual(Uint8Array.from(payload), bytes.subarray(headers))
}

const packets: fc.Arbitrary<Packet> = fc.record({
  version: fc.constantFrom(4 as const, 6 as const),
  tcp: fc.boolean(),
  tags: fc.integer({ min: 0, max: 2 }),
  options: fc.integer({ min: 0, max: 10 }),
  flags: fc.integer({ min: 0, max: 255 }),
  sequence: fc.integer({ min: 0, max: 0xffff_ffff }),
  id: fc.integer({ min: 0, max: 0xffff }),
  payload: fc.oneof(fc.integer({ min: 1, max: 5000 }), fc.integer({ min: 1, max: 65_000 })),
  segment: fc.integer({ min: 64, max: 1300 })
})
const splits = fc.array(fc.integer({ min: 1, max: 3000 }), { maxLength: 10 })

describe("SoftwareOffloads", () => {
  it("sums as RFC 1071 says, from even and odd offsets", () => {
    fc.assert(fc.property(fc.uint8Array({ maxLength: 600, size: "max" }), fc.nat(20), (data, from) => {
      const buffer = new ArrayBuffer(1024)
      const bytes = new Uint8Array(buffer)
      bytes.fill(0xa5)
      bytes.set(data, from)
      assert.strictEqual(
        sumBytes(bytes, new Uint16Array(buffer), from, data.length) % 0xffff,
        referenceSum(data) % 0xffff
      )
    }))
    const zeros = new Uint8Array(8)
    assert.strictEqual(sumBytes(zeros, new Uint16Array(zeros.buffer), 0, 8), 0)
    const largest = new Uint8Array(0x1_0000).fill(0xff)
    assert.strictEqual(sumBytes(largest, new Uint16Array(largest.buffer), 0, largest.length), 0xffff)
  })

  it("finishes partial checksums", () => {
    fc.assert(
      fc.property(
        fc.uint8Array({ minLength: 60, maxLength: 1514, size: "max" }),
        fc.nat(1000),
        fc.nat(1000),
        splits,
        (data, a, b, splits) => {
          const bytes = Uint8Array.from(data)
          const checksumStart = 14 + a % (bytes.length - 16)
          const checksumOffset = b % (bytes.length - checksumStart - 1)
          const port = new FakePort()
          const frame = frameOf(bytes, { flags: 1, checksumStart, checksumOffset }, splits)
          assert.isTrue(withSoftwareOffloads(port).send(frame))
          const wanted = bytes.slice()
          const sum = ~referenceSum(bytes.subarray(checksumStart)) & 0xffff
          new DataView(wanted.buffer).setUint16(checksumStart + checksumOffset, sum)
          assert.strictEqual(port.sent[0]?.header.flags, 0)
          const got = port.sent[0]?.bytes ?? new Uint8Array()
          const field = (bytes: Uint8Array) =>
            new DataView(bytes.buffer, bytes.byteOffset).getUint16(checksumStart + checksumOffset) % 0xffff
          // Both zeros of the one's complement are right.
          assert.strictEqual(field(got), field(wanted))
          got.fill(0, checksumStart + checksumOffset, checksumStart + checksumOffset + 2)
          wanted.fill(0, checksumStart + checksumOffset, checksumStart + checksumOffset + 2)
          assert.deepStrictEqual(got, wanted)
        }
      )
    )
  })

  it("cuts frames into segments that a receiver takes, and loses and doubles nothing when the port is full", () => {
    fc.assert(
      fc.property(fc.array(packets, { minLength: 1, maxLength: 4 }), splits, fc.integer({ min: 1, max: 7 }), (
        list,
        splits,
        room
      ) => {
        const port = new FakePort()
        port.room = room
        const outer = withSoftwareOffloads(port)
        const told = { writable: 0 }
        outer.listen({ readable: () => undefined, linkChanged: () => undefined, writable: () => told.writable++ })
        for (const packet of list) {
          const { bytes, header } = build(packet)
          const frame = frameOf(bytes, header, splits)
          while (!outer.send(frame)) {
            const before = told.writable
            // Segments go out first; then the frame that was refused is asked for.
            for (let tries = 0; told.writable === before && tries < 2000; tries++) port.makeRoom(room)
          }
          bytes.fill(0)
        }
        for (let tries = 0; tries < 2000 && port.room === 0; tries++) port.makeRoom(room)
        let at = 0
        for (const packet of list) {
          const count = Math.ceil(packet.payload / packet.segment)
          checkSegments(packet, port.sent.slice(at, at + count).map(({ bytes }) => bytes))
          at += count
        }
        assert.strictEqual(port.sent.length, at)
        assert.isTrue(port.sent.every(({ header }) => header.flags === 0 && header.gsoType === 0))
      }),
      { numRuns: 60 }
    )
  })

  it("leaves to the port what it takes", () => {
    const packet: Packet = {
      version: 4,
      tcp: true,
      tags: 0,
      options: 0,
      flags: 0,
      sequence: 0,
      id: 0,
      payload: 5000,
      segment: 1000
    }
    const { bytes, header } = build(packet)
    const all = new FakePort({ accepts: Offload.CHECKSUM | Offload.TSO4 })
    withSoftwareOffloads(all).send(frameOf(bytes, header, []))
    assert.deepStrictEqual(all.sent, [{ bytes, header }])
    // Segments without checksums are of no use.
    const segments = new FakePort({ accepts: Offload.TSO4 })
    withSoftwareOffloads(segments).send(frameOf(bytes, header, []))
    checkSegments(packet, segments.sent.map(({ bytes }) => bytes))
  })

  it("loses frames whose headers are not what the guest says, and never throws", () => {
    fc.assert(
      fc.property(
        packets,
        fc.array(fc.record({ at: fc.nat(120), value: fc.nat(255) }), { maxLength: 12 }),
        fc.record({
          gsoType: fc.constantFrom(0, 1, 4, 5),
          gsoSize: fc.integer({ min: 1, max: 0xffff }),
          start: fc.nat(300),
          offset: fc.nat(40)
        }),
        fc.nat(200),
        (packet, changes, lies, cut) => {
          const { bytes: whole, header } = build({ ...packet, payload: Math.min(packet.payload, 3000) })
          const bytes = whole.slice(0, Math.max(60, whole.length - cut))
          for (const { at, value } of changes) if (at < bytes.length) bytes[at] = value
          const checksumStart = Math.max(14, Math.min(lies.start, bytes.length - 2))
          const checksumOffset = Math.min(lies.offset, bytes.length - checksumStart - 2)
          const port = new FakePort()
          const gsoSize = Math.max(1, lies.gsoSize % 2000)
          const lie = { ...header, gsoType: lies.gsoType, gsoSize, checksumStart, checksumOffset }
          assert.isTrue(withSoftwareOffloads(port).send(frameOf(bytes, lie, [])))
          assert.isAtMost(port.sent.length, SEGMENTS_MAX)
          assert.isTrue(port.sent.every((frame) => lies.gsoType === 0 || frame.bytes.length <= 1518 + 4))
        }
      ),
      { numRuns: 1000 }
    )
  })
})
