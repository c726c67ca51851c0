import { assert, describe, it } from "@effect/vitest"
import { GATEWAY, GUEST, GUEST_MAC, NAMESERVER, NetworkUnderTest } from "./net/NetworkUnderTest.ts"
import {
  ACK,
  dhcp,
  ethernet,
  FIN,
  GATEWAY_MAC,
  icmp,
  parseDhcp,
  parseIp,
  parseTcp,
  parseUdp,
  RST,
  SYN,
  synOptions,
  tcp,
  u16,
  u32,
  udp
} from "./net/ReferenceGuest.ts"

const REMOTE = 0xc000_0201
const text = (value: string): Uint8Array => new TextEncoder().encode(value)
const show = (bytes: Uint8Array): string => new TextDecoder().decode(bytes)

const arpRequest = (target: number): Uint8Array => {
  const bytes = new Uint8Array(28)
  const view = new DataView(bytes.buffer)
  bytes.set([0, 1, 8, 0, 6, 4, 0, 1])
  bytes.set(GUEST_MAC, 8)
  view.setUint32(14, GUEST)
  view.setUint32(24, target)
  return ethernet(0x0806, bytes, [255, 255, 255, 255, 255, 255])
}

describe("UserNet", () => {
  it("answers ARP for the gateway and the name server, and for nobody else", () => {
    const test = new NetworkUnderTest()
    for (const address of [GATEWAY, NAMESERVER]) {
      test.send(arpRequest(address))
      const [reply, ...more] = test.receiveAll()
      assert.strictEqual(more.length, 0)
      assert.deepStrictEqual(reply!.bytes.slice(0, 14), Uint8Array.from([...GUEST_MAC, ...GATEWAY_MAC, 8, 6]))
      assert.deepStrictEqual(reply!.bytes.slice(20, 28), Uint8Array.from([0, 2, ...GATEWAY_MAC]))
      assert.strictEqual(u32(reply!.bytes, 28), address)
    }
    for (const address of [GUEST, GATEWAY + 10, REMOTE]) test.send(arpRequest(address))
    assert.deepStrictEqual(test.receiveAll(), [])
  })

  it("lends the guest its address", () => {
    const test = new NetworkUnderTest({ hostname: "guest", domain: "example.org", mtu: 1400 })
    test.send(dhcp(1))
    const offer = parseDhcp(test.receive()!.bytes)
    assert.strictEqual(offer.type, 2)
    assert.strictEqual(offer.address, GUEST)
    test.send(dhcp(3, { options: [50, 4, 10, 0, 2, 15, 54, 4, 10, 0, 2, 2] }))
    const lease = parseDhcp(test.receive()!.bytes)
    assert.strictEqual(lease.type, 5)
    assert.strictEqual(lease.address, GUEST)
    assert.deepStrictEqual(lease.options.get(1), Uint8Array.of(255, 255, 255, 0))
    assert.deepStrictEqual(lease.options.get(3), Uint8Array.of(10, 0, 2, 2))
    assert.deepStrictEqual(lease.options.get(6), Uint8Array.of(10, 0, 2, 3))
    assert.deepStrictEqual(lease.options.get(26), Uint8Array.of(1400 >> 8, 1400 & 255))
    assert.strictEqual(show(lease.options.get(12)!), "guest")
    assert.strictEqual(show(lease.options.get(15)!), "example.org")
    // Renewing, with an address of its own.
    test.send(dhcp(3, { ciaddr: GUEST, source: GUEST, destination: GATEWAY }))
    const renewed = test.receive()!.bytes
    assert.strictEqual(parseDhcp(renewed).type, 5)
    assert.strictEqual(parseIp(renewed).destination, GUEST)
    // An address of another network is refused, another server's offer is not ours.
    test.send(dhcp(3, { options: [50, 4, 192, 168, 1, 2] }))
    assert.strictEqual(parseDhcp(test.receive()!.bytes).type, 6)
    test.send(dhcp(3, { options: [50, 4, 10, 0, 2, 15, 54, 4, 1, 2, 3, 4] }))
    assert.deepStrictEqual(test.receiveAll(), [])
  })

  it("answers echo at the gateway, and says that the outside is prohibited", () => {
    const test = new NetworkUnderTest()
    const rest = Uint8Array.of(0x12, 0x34, 0, 7, 1, 2, 3, 4, 5)
    test.send(icmp(8, 0, rest))
    const reply = parseIp(test.receive()!.bytes)
    assert.deepStrictEqual([...reply.payload.slice(0, 2), ...reply.payload.slice(4)], [0, 0, ...rest])
    test.send(icmp(8, 0, rest, REMOTE))
    const error = parseIp(test.receive()!.bytes)
    assert.deepStrictEqual([...error.payload.slice(0, 2)], [3, 13])
  })

  it("takes datagrams to the host's sockets and back", () => {
    const test = new NetworkUnderTest()
    test.send(udp(5000, 7, text("ping"), { destination: REMOTE }))
    const [socket] = test.sockets.udp
    assert.deepStrictEqual(socket!.to, { address: "192.0.2.1", port: 7 })
    assert.strictEqual(show(socket!.sent[0]!), "ping")
    socket!.say(text("pong"))
    assert.strictEqual(test.told, 1)
    const answer = parseUdp(test.receive()!.bytes)
    assert.deepStrictEqual(
      { ...answer, payload: show(answer.payload) },
      { source: REMOTE, sourcePort: 7, destinationPort: 5000, payload: "pong" }
    )
    assert.deepStrictEqual(test.asked, [{
      protocol: "udp",
      direction: "outgoing",
      source: { address: "10.0.2.15", port: 5000 },
      destination: { address: "192.0.2.1", port: 7 }
    }])
    test.pass(120_000)
    assert.isFalse(socket!.open)
    assert.strictEqual(test.net.usage.udp, 0)
  })

  it("takes a TCP connection to the host's sockets and back", () => {
    const test = new NetworkUnderTest()
    const base = { sourcePort: 40_000, destinationPort: 80, destination: REMOTE }
    test.send(tcp({ ...base, sequence: 100, flags: SYN, options: synOptions(1460, 7) }))
    const [socket] = test.sockets.tcp
    assert.deepStrictEqual(socket!.to, { address: "192.0.2.1", port: 80 })
    assert.deepStrictEqual(test.receiveAll(), [], "nothing is said before the host has connected")
    socket!.connect()
    const synAck = parseTcp(test.receive()!.bytes)
    assert.strictEqual(synAck.flags, SYN | ACK)
    assert.strictEqual(synAck.acknowledgment, 101)
    assert.strictEqual(synAck.mss, 1460)
    assert.strictEqual(synAck.scale, 7)
    const acknowledgment = synAck.sequence + 1
    test.send(tcp({ ...base, sequence: 101, acknowledgment, flags: ACK }))
    test.send(tcp({ ...base, sequence: 101, acknowledgment, flags: ACK, payload: text("GET /") }))
    assert.strictEqual(show(socket!.bytes), "GET /")
    const first = parseTcp(test.receive()!.bytes)
    assert.strictEqual(first.acknowledgment, 106)
    socket!.say(text("hello"))
    socket!.finish()
    const answer = parseTcp(test.receive()!.bytes)
    assert.strictEqual(show(answer.payload), "hello")
    assert.strictEqual(answer.flags & (FIN | ACK), FIN | ACK)
    const last = acknowledgment + 6
    test.send(tcp({ ...base, sequence: 106, acknowledgment: last, flags: FIN | ACK }))
    assert.isTrue(socket!.ended)
    assert.strictEqual(parseTcp(test.receive()!.bytes).acknowledgment, 107)
    socket!.take()
    assert.isFalse(socket!.open)
    test.pass(11_000)
    assert.deepStrictEqual(test.net.usage, { tcp: 0, udp: 0, tcpBytes: 0, lost: 0 })
  })

  it("refuses what the host refuses", () => {
    const test = new NetworkUnderTest()
    test.send(tcp({ sourcePort: 1, destinationPort: 2, destination: REMOTE, sequence: 100, flags: SYN }))
    test.sockets.tcp[0]!.fail("refused")
    const answer = parseTcp(test.receive()!.bytes)
    assert.strictEqual(answer.flags & RST, RST)
    assert.strictEqual(answer.acknowledgment, 101)
    assert.strictEqual(test.net.usage.tcp, 0)
    test.send(tcp({ sourcePort: 1, destinationPort: 2, destination: REMOTE, sequence: 100, flags: SYN }))
    test.sockets.tcp[1]!.fail("unreachable")
    const error = parseIp(test.receive()!.bytes)
    assert.deepStrictEqual([...error.payload.slice(0, 2)], [3, 1])
    assert.strictEqual(u16(error.payload, 8 + 20), 1)
  })
})
