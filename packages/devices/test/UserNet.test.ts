import { assert, describe, it } from "@effect/vitest"
import { Offload } from "@troupe/core/NetBackend"
import { NetFrame } from "@troupe/core/NetFrame"
import { allow, drop, type NetDecision, redirect, reset } from "../src/net/user/NetPolicy.ts"
import { concat, FakeTcp } from "./net/FakeSockets.ts"
import { GATEWAY, GUEST, GUEST_MAC, NAMESERVER, NetworkUnderTest } from "./net/NetworkUnderTest.ts"
import {
  ACK,
  dhcp,
  ethernet,
  FIN,
  GATEWAY_MAC,
  icmp,
  ipv4,
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
import { ReferenceTcp } from "./net/ReferenceTcp.ts"

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

/** Offers a buffer that is too small. */
const refused = (test: NetworkUnderTest): void => {
  const frame = new NetFrame()
  frame.add(new Uint8Array(10), 0, 10)
  assert.isBelow(test.net.receive(frame), 0)
}

describe("UserNet", () => {
  it("goes on with the next device after one that failed in the middle of a frame", () => {
    const test = new NetworkUnderTest()
    test.decide = () => {
      throw new Error("the test says so")
    }
    assert.throws(() => test.send(udp(1000, 2000, text("lost"), { destination: REMOTE })))
    test.told = 0
    // A datagram of the host comes on its own.
    const forwarded = { send: () => {}, close: () => {} }
    test.decide = (_, answer) => {
      answer(allow)
      return () => {}
    }
    test.net.acceptUdp(text("hello"), { address: "127.0.0.1", port: 9 }, 53, new Map(), forwarded)
    assert.strictEqual(test.told, 1)
    assert.isDefined(test.receive())
  })

  it("asks the guest again for a connection whose SYN was lost while its link was down", () => {
    const test = new NetworkUnderTest()
    const socket = new FakeTcp({ address: "127.0.0.1", port: 9 }, undefined)
    socket.events = test.net.acceptTcp(socket, { address: "127.0.0.1", port: 9 }, 22)
    const nothing = new NetFrame()
    assert.isBelow(test.net.receive(nothing), 0)
    test.net.discard()
    assert.strictEqual(test.net.receive(nothing), 0)
    test.pass(5000)
    assert.strictEqual(parseTcp(test.receive()!.bytes).flags, SYN)
  })

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

  it("repeats its acknowledgment for each segment that comes before its turn, so that the guest finds what was lost", () => {
    const test = new NetworkUnderTest({}, Offload.CHECKSUM | Offload.TSO4)
    const base = { sourcePort: 40_000, destinationPort: 80, destination: REMOTE }
    test.send(tcp({ ...base, sequence: 100, flags: SYN, options: synOptions(1460, 7) }))
    const socket = test.sockets.tcp[0]!
    socket.connect()
    const acknowledgment = parseTcp(test.receive()!.bytes, true).sequence + 1
    const segment = (sequence: number, length: number) =>
      test.send(tcp({ ...base, sequence, acknowledgment, flags: ACK, payload: new Uint8Array(length) }))
    const answers = () =>
      test.receiveAll().map(({ bytes }) => parseTcp(bytes, true)).map((it) => [it.acknowledgment, it.payload.length])
    test.send(tcp({ ...base, sequence: 101, acknowledgment, flags: ACK }))
    segment(101, 1000)
    const [first] = test.receiveAll().map(({ bytes }) => parseTcp(bytes, true))
    assert.strictEqual(first!.acknowledgment, 1101)
    // Room becomes free in between: that is no reason to say something else.
    socket.take()
    segment(2101, 1000)
    segment(3101, 1000)
    const repeated = test.receiveAll().map(({ bytes }) => parseTcp(bytes, true))
    assert.deepStrictEqual(
      repeated.map(({ acknowledgment, payload, window }) => [acknowledgment, payload.length, window]),
      [[1101, 0, first!.window], [1101, 0, first!.window]]
    )
    // As many as the guest needs for one large segment, and no more however many there are.
    for (let i = 0; i < 10; i++) segment(4101 + i * 6000, 6000)
    assert.deepStrictEqual(answers(), [[1101, 0], [1101, 0], [1101, 0]])
    // What was missing makes all of them old.
    segment(70_000, 1000)
    segment(1101, 1000)
    assert.deepStrictEqual(answers(), [[64_101, 0]])
    // They are not for the bytes of the host, which go their own way.
    segment(80_000, 1000)
    socket.say(text("hello"))
    assert.deepStrictEqual(answers(), [[64_101, 0], [64_101, 5]])
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

  it("asks the next name server when one is not there, or silent", () => {
    const test = new NetworkUnderTest()
    test.sockets.nameservers = [{ address: "192.0.2.53", port: 53 }, { address: "192.0.2.54", port: 53 }]
    test.send(udp(6000, 53, text("query"), { destination: NAMESERVER }))
    assert.strictEqual(test.asked[0]!.service, "dns")
    test.sockets.udp[0]!.events.failed("refused")
    assert.isFalse(test.sockets.udp[0]!.open)
    assert.deepStrictEqual(test.sockets.udp[1]!.to.address, "192.0.2.54")
    assert.strictEqual(show(test.sockets.udp[1]!.sent[0]!), "query")
    // The other one is not there either: now the guest is told.
    test.sockets.udp[1]!.events.failed("refused")
    assert.deepStrictEqual([...parseIp(test.receive()!.bytes).payload.slice(0, 2)], [3, 3])
    test.pass(1)
    test.send(udp(6001, 53, text("first"), { destination: NAMESERVER }))
    test.send(udp(6001, 53, text("other"), { destination: NAMESERVER }))
    const first = test.sockets.udp.at(-1)!
    assert.strictEqual(first.sent.length, 2)
    test.pass(2000)
    test.send(udp(6001, 53, text("again"), { destination: NAMESERVER }))
    const second = test.sockets.udp.at(-1)!
    assert.notStrictEqual(second, first)
    assert.notStrictEqual(second.to.address, first.to.address)
    second.say(text("answer"))
    const answer = parseUdp(test.receive()!.bytes)
    assert.deepStrictEqual([answer.source, answer.sourcePort, show(answer.payload)], [NAMESERVER, 53, "answer"])
  })

  it("says that nobody is there when the host has no name server", () => {
    const test = new NetworkUnderTest()
    test.sockets.nameservers = []
    test.send(udp(6000, 53, text("query"), { destination: NAMESERVER }))
    assert.deepStrictEqual([...parseIp(test.receive()!.bytes).payload.slice(0, 2)], [3, 3])
    assert.deepStrictEqual(test.sockets.udp, [])
  })

  it("tells the policy the name that a destination was looked up by", () => {
    const test = new NetworkUnderTest()
    test.send(udp(6000, 53, text("query"), { destination: NAMESERVER }))
    const name = [2, 100, 98, 4, 116, 101, 115, 116, 0]
    test.sockets.udp[0]!.say(Uint8Array.from([
      ...[0, 1, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0, ...name, 0, 1, 0, 1],
      ...[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 1]
    ]))
    test.send(tcp({ sourcePort: 1, destinationPort: 2, destination: REMOTE, sequence: 1, flags: SYN }))
    assert.strictEqual(test.asked[1]!.hostname, "db.test")
    test.send(tcp({ sourcePort: 1, destinationPort: 2, destination: REMOTE + 1, sequence: 1, flags: SYN }))
    assert.isUndefined(test.asked[2]!.hostname)
  })

  it("does what the policy decides", () => {
    const test = new NetworkUnderTest()
    const syn = (sourcePort: number, destination = REMOTE) =>
      test.send(tcp({ sourcePort, destinationPort: 80, destination, sequence: 1, flags: SYN }))
    const decide = (decision: NetDecision) => {
      test.decide = (_, answer) => {
        answer(decision)
        return () => {}
      }
    }
    decide(reset)
    syn(1)
    assert.strictEqual(parseTcp(test.receive()!.bytes).flags, RST | ACK)
    test.send(udp(1, 2, text("x"), { destination: REMOTE }))
    assert.deepStrictEqual([...parseIp(test.receive()!.bytes).payload.slice(0, 2)], [3, 3])
    decide(drop)
    syn(2)
    test.send(udp(3, 2, text("x"), { destination: REMOTE }))
    assert.deepStrictEqual(test.receiveAll(), [])
    assert.strictEqual(test.sockets.tcp.length + test.sockets.udp.length, 0)
    decide(redirect("127.0.0.1", 8080))
    syn(3)
    assert.deepStrictEqual(test.sockets.tcp[0]!.to, { address: "127.0.0.1", port: 8080 })
    // What is not decided yet waits, and is forgotten with its connection.
    let answer: ((decision: NetDecision) => void) | undefined
    let givenUp = 0
    test.decide = (_, later) => {
      answer = later
      return () => givenUp++
    }
    syn(4)
    syn(4)
    assert.strictEqual(test.asked.length, 6, "a repeated question is the same connection")
    test.send(tcp({ sourcePort: 4, destinationPort: 80, destination: REMOTE, sequence: 2, flags: RST }))
    assert.strictEqual(givenUp, 1)
    answer!(allow)
    assert.strictEqual(test.sockets.tcp.length, 1)
    // An address of this network is nobody's, whatever the policy says.
    decide(allow)
    syn(5, GATEWAY)
    assert.strictEqual(parseTcp(test.receive()!.bytes).flags, RST | ACK)
    assert.strictEqual(test.sockets.tcp.length, 1)
  })

  it("keeps few datagrams for a policy that takes its time", () => {
    const test = new NetworkUnderTest()
    let answer: ((decision: NetDecision) => void) | undefined
    test.decide = (_, later) => {
      answer = later
      return () => {}
    }
    for (let i = 0; i < 40; i++) test.send(udp(1, 2, Uint8Array.of(i), { destination: REMOTE }))
    for (let i = 0; i < 40; i++) test.send(udp(3, 4, new Uint8Array(1400).fill(i), { destination: REMOTE }))
    answer!(allow)
    assert.strictEqual(test.sockets.udp[0]!.sent.length, 16)
    for (let i = 0; i < 100; i++) test.send(udp(5, 6, new Uint8Array(0xff00), { destination: REMOTE }))
    answer!(allow)
    assert.strictEqual(test.sockets.udp[1]!.sent.length, 1)
  })

  it("asks the policy about a refused datagram's conversation once in a while", () => {
    const test = new NetworkUnderTest()
    test.decide = (_, answer) => {
      answer(drop)
      return () => {}
    }
    for (let i = 0; i < 10; i++) test.send(udp(1, 2, text("x"), { destination: REMOTE }))
    assert.strictEqual(test.asked.length, 1)
    test.pass(5000)
    test.send(udp(1, 2, text("x"), { destination: REMOTE }))
    assert.strictEqual(test.asked.length, 2)
  })

  it("keeps as many connections and conversations as it may", () => {
    const test = new NetworkUnderTest({ tcpConnections: 3, udpFlows: 3 })
    for (let port = 1; port <= 5; port++) {
      test.send(tcp({ sourcePort: port, destinationPort: 80, destination: REMOTE, sequence: 1, flags: SYN }))
      test.send(udp(port, 2, text("x"), { destination: REMOTE }))
      test.pass(10)
    }
    assert.deepStrictEqual(test.net.usage, { tcp: 3, udp: 3, tcpBytes: 0, lost: 0 })
    assert.strictEqual(test.receiveAll().filter(({ bytes }) => parseTcp(bytes).flags === (RST | ACK)).length, 2)
    assert.deepStrictEqual(test.sockets.udp.map(({ open }) => open), [false, false, true, true, true])
  })

  it("lets datagrams and connections take turns", () => {
    const test = new NetworkUnderTest()
    const base = { sourcePort: 1, destinationPort: 80, destination: REMOTE }
    test.send(tcp({ ...base, sequence: 1, flags: SYN, options: synOptions(1460, 7) }))
    test.sockets.tcp[0]!.connect()
    const { sequence } = parseTcp(test.receive()!.bytes)
    test.send(tcp({ ...base, sequence: 2, acknowledgment: sequence + 1, flags: ACK }))
    test.send(udp(1, 2, text("x"), { destination: REMOTE }))
    for (let i = 0; i < 20; i++) test.sockets.udp[0]!.say(new Uint8Array(1000))
    test.sockets.tcp[0]!.say(new Uint8Array(20_000))
    const protocols: Array<number> = []
    for (let i = 0; i < 20; i++) {
      // One that does not fit stays the next one.
      assert.isUndefined(i === 6 ? refused(test) : undefined)
      protocols.push(parseIp(test.receive()!.bytes).protocol)
    }
    assert.deepStrictEqual(protocols, Array.from({ length: 20 }, (_, i) => i % 2 === 0 ? 17 : 6))
  })

  it("gives each of many connections less room", () => {
    const test = new NetworkUnderTest({ tcpMemory: 3 * 0x8_0000 })
    const windows: Array<number> = []
    for (let sourcePort = 1; sourcePort <= 40; sourcePort++) {
      const base = { sourcePort, destinationPort: 80, destination: REMOTE }
      test.send(tcp({ ...base, sequence: 1, flags: SYN, options: synOptions(1460, 7) }))
      test.sockets.tcp.at(-1)!.connect()
      const { sequence } = parseTcp(test.receive()!.bytes)
      const payload = text("x")
      test.send(tcp({ ...base, sequence: 2, acknowledgment: sequence + 1, flags: ACK, payload }))
      windows.push(parseTcp(test.receive()!.bytes).window * 128)
    }
    assert.isAtLeast(windows[0]!, 0x8_0000 - 128)
    assert.isAtMost(windows[9]!, 0x1_0000)
    assert.isTrue(windows.every((window, index) => index === 0 || window <= windows[index - 1]!))
    assert.strictEqual(windows.at(-1), 0x4000 - 128, "the least")
  })

  it("asks a guest that has been silent for long whether it is there, and gives up", () => {
    const test = new NetworkUnderTest()
    const base = { sourcePort: 1, destinationPort: 80, destination: REMOTE }
    test.send(tcp({ ...base, sequence: 1, flags: SYN }))
    test.sockets.tcp[0]!.connect()
    const { sequence } = parseTcp(test.receive()!.bytes)
    test.send(tcp({ ...base, sequence: 2, acknowledgment: sequence + 1, flags: ACK }))
    test.pass(120_000)
    const probe = parseTcp(test.receive()!.bytes)
    assert.strictEqual(probe.sequence, sequence, "old by one")
    test.send(tcp({ ...base, sequence: 2, acknowledgment: sequence + 1, flags: ACK }))
    let probes = 0
    for (let seconds = 0; test.net.usage.tcp > 0 && seconds < 1000; seconds++) {
      test.pass(1000)
      probes += test.receiveAll().length
    }
    assert.isAtLeast(probes, 10)
    assert.isTrue(test.sockets.tcp[0]!.wasReset)
    assert.strictEqual(test.sockets.open, 0)
  })

  it("keeps the connections of a guest that takes nothing for long", () => {
    const test = new NetworkUnderTest()
    const base = { sourcePort: 1, destinationPort: 80, destination: REMOTE }
    test.send(tcp({ ...base, sequence: 1, flags: SYN }))
    test.sockets.tcp[0]!.connect()
    const { sequence } = parseTcp(test.receive()!.bytes)
    test.send(tcp({ ...base, sequence: 2, acknowledgment: sequence + 1, flags: ACK }))
    test.sockets.tcp[0]!.say(text("hello"))
    for (let hours = 0; hours < 24 * 60; hours++) test.pass(60_000)
    assert.strictEqual(show(parseTcp(test.receive()!.bytes).payload), "hello")
  })

  it("connects a forwarded port to the guest", () => {
    const test = new NetworkUnderTest()
    const socket = new FakeTcp({ address: "", port: 0 }, undefined)
    socket.pause()
    socket.events = test.net.acceptTcp(socket, { address: "127.0.0.1", port: 9 }, 22)
    const guest = new ReferenceTcp({
      port: 22,
      remote: GATEWAY,
      remotePort: 0,
      initial: 77,
      mss: 1460,
      scale: 3,
      room: 10_000,
      segment: 1460,
      data: text("SSH-2.0"),
      passive: true
    })
    let remotePort = 0
    for (let i = 0; i < 20; i++) {
      for (const { bytes } of test.receiveAll()) {
        const segment = parseTcp(bytes)
        remotePort = segment.sourcePort
        assert.strictEqual(segment.source, GATEWAY)
        guest.receive(segment, test.now)
      }
      if (i === 3) socket.say(text("hello"))
      if (i === 5) socket.finish()
      socket.take()
      guest.read(1000)
      for (const segment of guest.poll(test.now)) test.send(tcp({ ...segment, destinationPort: remotePort }))
      test.pass(10)
    }
    assert.isFalse(socket.paused)
    assert.strictEqual(show(socket.bytes), "SSH-2.0")
    assert.strictEqual(show(Uint8Array.from(guest.received)), "hello")
    assert.isTrue(guest.done && guest.ended && !socket.open)
    assert.deepStrictEqual(test.asked, [{
      protocol: "tcp",
      direction: "incoming",
      source: { address: "127.0.0.1", port: 9 },
      destination: { address: "10.0.2.15", port: 22 }
    }])
  })

  it("puts large datagrams together, and cuts them", () => {
    const test = new NetworkUnderTest()
    const payload = Uint8Array.from({ length: 4000 }, (_, i) => i)
    const whole = udp(5, 6, payload, { destination: REMOTE }).subarray(34)
    for (const [from, to] of [[2960, 4008], [0, 1480], [1480, 2960]] as const) {
      test.send(ipv4(17, whole.slice(from, to), {
        destination: REMOTE,
        fragment: (from / 8) | (to < 4008 ? 0x2000 : 0),
        id: 9
      }))
    }
    assert.deepStrictEqual(test.sockets.udp[0]!.sent, [payload])
    test.sockets.udp[0]!.say(payload)
    const pieces = test.receiveAll().map(({ bytes }) => parseIp(bytes))
    assert.deepStrictEqual(pieces.map(({ fragment }) => fragment), [0x2000, 0x2000 | 185, 370])
    assert.deepStrictEqual(concat(pieces.map(({ payload }) => payload)).slice(8), payload)
  })

  it("sends large segments where the guest takes them, and small ones where it has no room", () => {
    for (const room of [65_553, 2048]) {
      const test = new NetworkUnderTest({}, Offload.CHECKSUM | Offload.TSO4)
      const base = { sourcePort: 1, destinationPort: 80, destination: REMOTE }
      test.send(tcp({ ...base, sequence: 1, flags: SYN, options: synOptions(1448, 7) }))
      test.sockets.tcp[0]!.connect()
      const { sequence } = parseTcp(test.receive()!.bytes, true)
      test.send(tcp({ ...base, sequence: 2, acknowledgment: sequence + 1, flags: ACK, window: 0xffff }))
      test.sockets.tcp[0]!.say(new Uint8Array(200_000))
      const first = test.receive(room)
      if (room > 2048) {
        assert.strictEqual(first!.gsoSize, 1448)
        assert.strictEqual((first!.bytes.length - 54) % 1448, 0)
        assert.isAbove(first!.bytes.length, 60_000)
      } else {
        // It does not fit, is lost, and comes again in the size that there is room for.
        assert.isUndefined(first)
        assert.isAtMost(test.receive(room)!.bytes.length, room)
      }
    }
  })
})
