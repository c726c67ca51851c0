/** The codecs of the user-mode network: what is written is read, and no bytes throw or are read past their end. */
import { assert, describe, it } from "@effect/vitest"
import { NetFrame } from "@troupe/core/NetFrame"
import * as fc from "fast-check"
import { foldSum } from "../src/net/InternetChecksum.ts"
import { ARP_LENGTH, decodeArp, encodeArp } from "../src/net/user/Arp.ts"
import { ByteQueue } from "../src/net/user/ByteQueue.ts"
import { addToSum, checksumOf, isWhole } from "../src/net/user/Checksum.ts"
import { decodeDhcpRequest, encodeDhcpReply } from "../src/net/user/Dhcp.ts"
import { DNS_NAMES_MAX, DnsNames, readDnsAddresses } from "../src/net/user/DnsNames.ts"
import { encodeEchoReply, encodeUnreachable, ICMP_ERROR_MAX } from "../src/net/user/Icmp.ts"
import {
  encodeIpv4,
  formatIpv4,
  IPV4_HEADER,
  Ipv4Header,
  isInBlock,
  parseIpv4,
  parseIpv4Block
} from "../src/net/user/Ipv4.ts"
import { Reassembly, REASSEMBLY_PACKETS_MAX } from "../src/net/user/Reassembly.ts"
import { HELD_SEGMENTS_MAX, SegmentHold } from "../src/net/user/SegmentHold.ts"
import { encodeSynOptions, encodeTcp, sequenceAdd, sequenceDistance, TcpHeader } from "../src/net/user/TcpHeader.ts"
import { encodeUdp, UdpHeader } from "../src/net/user/Udp.ts"
import { concat } from "./net/FakeSockets.ts"
import { checksum } from "./net/ReferenceGuest.ts"

const u8 = fc.integer({ min: 0, max: 255 })
const u16 = fc.integer({ min: 0, max: 0xffff })
const u32 = fc.integer({ min: 0, max: 0xffff_ffff })
const bytes = (maxLength: number) => fc.uint8Array({ maxLength, size: "max" })
const mac = fc.uint8Array({ minLength: 6, maxLength: 6 })
/** Rubbish, or something right with a few bytes changed. */
const spoiled = (right: fc.Arbitrary<Uint8Array>) =>
  fc.oneof(
    bytes(400),
    fc.tuple(right, fc.array(fc.tuple(fc.nat(400), u8), { maxLength: 4 }), fc.nat(400)).map(([whole, changes, cut]) => {
      const copy = Uint8Array.from(whole)
      for (const [at, value] of changes) if (at < copy.length) copy[at] = value
      return copy.subarray(0, cut % (copy.length + 1))
    })
  )

describe("codecs of the user-mode network", () => {
  it("sums as RFC 1071 says, piece by piece", () => {
    fc.assert(fc.property(bytes(40_000), fc.array(fc.nat(20_000), { maxLength: 4 }), (data, cuts) => {
      const right = checksum(data)
      assert.strictEqual(checksumOf(addToSum(0, data, 0, data.length)), right)
      const queue = new ByteQueue()
      let at = 0
      for (const cut of [...cuts.map((cut) => cut % (data.length + 1)).toSorted((a, b) => a - b), data.length]) {
        queue.push(data.subarray(at, cut))
        at = cut
      }
      assert.strictEqual(checksumOf(queue.addToSum(0, 0, data.length)), right)
      const whole = concat([data, new Uint8Array(data.length % 2), Uint8Array.of(right >> 8, right & 255)])
      assert.isTrue(isWhole(0, whole, 0, whole.length))
      assert.strictEqual(foldSum(0xffff_ffff), 0xffff)
    }))
  })

  it("reads the ARP that it writes", () => {
    fc.assert(fc.property(u16, mac, u32, mac, u32, (operation, senderMac, senderAddress, targetMac, targetAddress) => {
      const packet = { operation, senderMac, senderAddress, targetMac, targetAddress }
      const buffer = new Uint8Array(ARP_LENGTH + 3)
      encodeArp(buffer, 3, packet)
      assert.deepStrictEqual(decodeArp(buffer, 3), packet)
      assert.isUndefined(decodeArp(buffer.subarray(0, ARP_LENGTH + 2), 3))
    }))
  })

  it("reads the IPv4 header that it writes, and no other", () => {
    fc.assert(fc.property(u32, u32, u8, u16, fc.nat(1480), (source, destination, protocol, identification, length) => {
      const buffer = new Uint8Array(5 + IPV4_HEADER + length)
      encodeIpv4(buffer, 5, { source, destination, protocol, identification, payloadLength: length })
      const header = new Ipv4Header()
      assert.isTrue(header.read(buffer, 5, buffer.length))
      assert.deepInclude(header, { source, destination, protocol, identification, payload: 25, end: buffer.length })
      assert.isFalse(header.isFragment)
      buffer[5 + 8] = (buffer[5 + 8] ?? 0) ^ 1
      assert.isFalse(header.read(buffer, 5, buffer.length), "a wrong checksum")
    }))
    fc.assert(fc.property(bytes(100), (rubbish) => {
      const header = new Ipv4Header()
      if (header.read(rubbish, 0, rubbish.length)) {
        assert.isTrue(header.payload >= IPV4_HEADER && header.end <= rubbish.length && header.payload <= header.end)
      }
    }))
  })

  it("reads the TCP header that it writes, and stays inside of any other", () => {
    const fields = fc.record({ ports: fc.tuple(u16, u16), sequence: u32, acknowledgment: u32, window: u16, mss: u16 })
    fc.assert(fc.property(fields, fc.integer({ min: -1, max: 14 }), (fields, scale) => {
      const { acknowledgment, mss, ports: [from, to], sequence, window } = fields
      const buffer = new Uint8Array(40)
      encodeTcp(buffer, 4, from, to, sequence, acknowledgment, 0x12, window)
      const end = encodeSynOptions(buffer, 4, mss, scale)
      const header = new TcpHeader()
      assert.isTrue(header.read(buffer, 4, end))
      assert.deepInclude(header, {
        sourcePort: from,
        destinationPort: to,
        sequence,
        acknowledgment,
        window,
        mss,
        flags: 0x12,
        windowScale: scale,
        payload: end
      })
    }))
    fc.assert(fc.property(bytes(80), (rubbish) => {
      const header = new TcpHeader()
      if (header.read(rubbish, 0, rubbish.length)) {
        assert.isTrue(header.payload >= 20 && header.payload <= rubbish.length && header.windowScale <= 14)
      }
    }))
  })

  it("reads the UDP header that it writes", () => {
    fc.assert(fc.property(u16, u16, bytes(100), fc.nat(4), (from, to, payload, padding) => {
      const buffer = new Uint8Array(8 + payload.length + padding)
      encodeUdp(buffer, 0, from, to, payload.length)
      const header = new UdpHeader()
      assert.isTrue(header.read(buffer, 0, buffer.length))
      assert.deepInclude(header, { sourcePort: from, destinationPort: to, payload: 8, end: 8 + payload.length })
      assert.isFalse(header.read(buffer, 0, 7 + payload.length))
    }))
  })

  it("writes ICMP with a right checksum, whatever it is about", () => {
    fc.assert(fc.property(bytes(1500), fc.nat(60), u8, (packet, payload, code) => {
      const buffer = new Uint8Array(ICMP_ERROR_MAX + 1500)
      const end = encodeUnreachable(buffer, 0, code, packet, 0, Math.min(payload, packet.length), packet.length)
      assert.isAtMost(end, ICMP_ERROR_MAX)
      assert.strictEqual(checksum(buffer.subarray(0, end)), 0)
      if (packet.length < 8) return
      const reply = encodeEchoReply(buffer, 0, packet, 0, packet.length)
      assert.strictEqual(checksum(buffer.subarray(0, reply)), 0)
    }))
  })

  it("stays inside of any DHCP message, and writes what can be read", () => {
    const message = fc.tuple(
      u8,
      u32,
      mac,
      fc.array(fc.tuple(fc.integer({ min: 1, max: 254 }), bytes(20)), { maxLength: 8 })
    )
      .map(([messageType, transaction, hardwareAddress, options]) => {
        const reply = encodeDhcpReply({
          messageType,
          transaction,
          clientAddress: 1,
          yourAddress: 2,
          serverAddress: 3,
          hardwareAddress,
          options
        })
        reply[0] = 1
        return reply
      })
    fc.assert(fc.property(message, (message) => {
      const request = decodeDhcpRequest(message, 0, message.length)
      if (message[242] === 0) assert.isUndefined(request)
      else assert.isNotNull(request)
    }))
    fc.assert(fc.property(spoiled(message), (message) => {
      decodeDhcpRequest(message, 0, message.length)
    }))
  })

  it("knows addresses and blocks", () => {
    fc.assert(fc.property(u32, fc.integer({ min: 0, max: 32 }), (address, prefix) => {
      assert.strictEqual(parseIpv4(formatIpv4(address)), address)
      const mask = prefix === 0 ? 0n : (0xffff_ffffn << BigInt(32 - prefix)) & 0xffff_ffffn
      const base = Number(BigInt(address) & mask)
      const block = parseIpv4Block(`${formatIpv4(base)}/${prefix}`)
      assert.deepStrictEqual(block, { base, prefix })
      assert.isTrue(isInBlock(address, block!))
      if (prefix > 0) assert.isFalse(isInBlock((address ^ (1 << (32 - prefix))) >>> 0, block!))
    }))
    for (
      const wrong of ["", "1.2.3", "1.2.3.4.5", "256.1.1.1", "01.2.3.4", "1.2.3.4 ", "a.b.c.d", "1.2.3.-4", "0x1.1.1.1"]
    ) {
      assert.isUndefined(parseIpv4(wrong), wrong)
    }
    for (const wrong of ["10.0.2.1/24", "10.0.2.0", "10.0.2.0/33", "10.0.2.0/-1", "x/8"]) {
      assert.isUndefined(parseIpv4Block(wrong), wrong)
    }
  })

  it("counts sequence numbers around the end", () => {
    fc.assert(fc.property(u32, fc.integer({ min: -0x7fff_ffff, max: 0x7fff_ffff }), (from, by) => {
      assert.strictEqual(sequenceDistance(sequenceAdd(from, by), from), by)
    }))
  })

  it("keeps bytes in order, however they are put in and dropped", () => {
    const step = fc.oneof(
      bytes(300).map((push) => ({ push, drop: 0 })),
      fc.nat(400).map((drop) => ({ push: undefined, drop }))
    )
    fc.assert(fc.property(fc.array(step, { maxLength: 200, size: "max" }), (steps) => {
      const queue = new ByteQueue()
      let model = new Uint8Array(0)
      for (const { drop, push } of steps) {
        if (push === undefined) {
          queue.drop(drop)
          model = model.slice(Math.min(drop, model.length))
        } else {
          queue.push(push)
          model = Uint8Array.from([...model, ...push])
        }
        assert.strictEqual(queue.length, model.length)
      }
      const from = Math.floor(model.length / 3)
      const frame = new NetFrame()
      const target = new Uint8Array(model.length + 7)
      frame.add(target, 0, 5)
      frame.add(target, 5, target.length - 5)
      assert.strictEqual(queue.copyTo(frame, 7, from, model.length - from), model.length - from)
      assert.deepStrictEqual(target.slice(7, 7 + model.length - from), model.slice(from))
    }))
  })

  it("puts segments in order again, and keeps few", () => {
    const pieces = fc.array(fc.tuple(fc.nat(500), fc.integer({ min: 1, max: 100 })), { maxLength: 60, size: "max" })
    fc.assert(fc.property(u32, pieces, (start, pieces) => {
      const stream = Uint8Array.from({ length: 700 }, (_, i) => i)
      const hold = new SegmentHold()
      let next = 0
      const taken: Array<Uint8Array> = []
      for (const [from, length] of [...pieces, [0, 600] as const]) {
        const to = from + length
        if (from > next) {
          hold.keep(sequenceAdd(start, from), stream.subarray(from, to), false, sequenceAdd(start, next), 2000)
        } else if (to > next) {
          taken.push(stream.subarray(next, to))
          next = to
          while (hold.take(sequenceAdd(start, next))) {
            taken.push(hold.bytes)
            next += hold.bytes.length
          }
        }
        assert.isAtMost(hold.length, 2000)
      }
      assert.isAtMost(hold.length, HELD_SEGMENTS_MAX * 100)
      assert.deepStrictEqual(concat(taken), stream.slice(0, next))
    }))
  })

  it("puts IPv4 packets together out of pieces in any order, and keeps few", () => {
    const cuts = fc.uniqueArray(fc.integer({ min: 1, max: 100 }), { maxLength: 10 })
    fc.assert(fc.property(bytes(900), cuts, fc.infiniteStream(fc.nat(1000)), (payload, cuts, order) => {
      fc.pre(payload.length > 0)
      const places = [0, ...cuts.map((cut) => cut * 8).filter((cut) => cut < payload.length), payload.length]
        .toSorted((a, b) => a - b)
      const pieces = places.slice(0, -1).map((from, index) => {
        const to = places[index + 1]!
        const frame = new Uint8Array(IPV4_HEADER + to - from)
        const more = to < payload.length ? 0x2000 : 0
        encodeIpv4(frame, 0, {
          source: 1,
          destination: 2,
          protocol: 17,
          identification: 3,
          payloadLength: to - from,
          fragment: more | (from / 8)
        })
        frame.set(payload.subarray(from, to), IPV4_HEADER)
        return { frame, order: order.next().value }
      }).toSorted((a, b) => a.order - b.order)
      const reassembly = new Reassembly()
      const header = new Ipv4Header()
      let whole: Uint8Array | undefined
      for (const { frame } of pieces) {
        assert.isUndefined(whole)
        assert.isTrue(header.read(frame, 0, frame.length))
        whole = reassembly.add(header, frame, 0)
      }
      assert.deepStrictEqual(whole, payload)
      assert.strictEqual(reassembly.count, 0)
    }))
    fc.assert(fc.property(fc.array(fc.tuple(u16, u16, fc.nat(100)), { maxLength: 300, size: "max" }), (pieces) => {
      const reassembly = new Reassembly()
      const header = new Ipv4Header()
      for (const [identification, fragment, length] of pieces) {
        const frame = new Uint8Array(IPV4_HEADER + length)
        const fields = { source: 1, destination: 2, protocol: 17, identification: identification % 40, fragment }
        encodeIpv4(frame, 0, { ...fields, payloadLength: length })
        if (header.read(frame, 0, frame.length)) reassembly.add(header, frame, 0)
        assert.isAtMost(reassembly.count, REASSEMBLY_PACKETS_MAX)
      }
    }))
  })

  it("reads names out of answers, and stays inside of any", () => {
    const name = [7, ...new TextEncoder().encode("Example"), 3, ...new TextEncoder().encode("org"), 0]
    const answer = Uint8Array.from([
      ...[0, 1, 0x81, 0x80, 0, 1, 0, 2, 0, 0, 0, 0],
      ...[...name, 0, 1, 0, 1],
      ...[0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 2, 0xc0, 20],
      ...[0xc0, 20, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 7]
    ])
    assert.deepStrictEqual(readDnsAddresses(answer), { name: "example.org", addresses: [0xc000_0207] })
    const names = new DnsNames()
    names.learn(answer)
    assert.strictEqual(names.nameOf(0xc000_0207), "example.org")
    for (let i = 0; i < DNS_NAMES_MAX; i++) {
      const other = Uint8Array.from(answer)
      new DataView(other.buffer).setUint32(other.length - 4, i)
      names.learn(other)
    }
    assert.isUndefined(names.nameOf(0xc000_0207), "the oldest is forgotten")
    fc.assert(fc.property(spoiled(fc.constant(answer)), (message) => {
      const found = readDnsAddresses(message)
      if (found !== undefined) assert.match(found.name, /^[\w.-]+$/)
    }))
    // A name that refers to itself ends.
    assert.isUndefined(
      readDnsAddresses(Uint8Array.from([0, 1, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1]))
    )
  })
})
