/** Packets of a guest, and what each leads to. */
import { assert, describe, it } from "@effect/vitest"
import * as Exit from "effect/Exit"
import * as fc from "fast-check"
import { BUFFER_SIZE } from "../src/VsockConnection.ts"
import { HEADER_SIZE, Op, SHUTDOWN_BOTH, VIRTIO_VSOCK_SHUTDOWN_F_SEND } from "../src/VsockPacket.ts"
import { EPHEMERAL_PORT_FIRST, QUARANTINE_MILLIS } from "../src/VsockPorts.ts"
import { CLOSE_TIMEOUT_MILLIS } from "../src/VsockSession.ts"
import { SessionGuest } from "./SessionGuest.ts"

const ops = (packets: ReadonlyArray<{ readonly op: number }>) => packets.map(({ op }) => op)
const text = (value: string) => new TextEncoder().encode(value)

describe("A connection that the guest asks for", () => {
  it("is answered with the host's credit, and carries bytes both ways", () => {
    const guest = new SessionGuest()
    guest.send({ op: Op.REQUEST })
    assert.isTrue(guest.arrived[0]?.accept())
    const [response] = guest.receive()
    assert.deepInclude(response, {
      op: Op.RESPONSE,
      srcPort: 1,
      dstPort: 1000,
      srcCid: 2,
      dstCid: 3,
      bufAlloc: BUFFER_SIZE
    })
    const connection = guest.arrived[0]
    guest.send({ op: Op.RW, data: text("hello") })
    assert.deepStrictEqual(connection?.take(), text("hello"))
    let done = false
    connection?.write(text("world"), (exit) => {
      done = Exit.isSuccess(exit)
    })
    assert.isFalse(done)
    assert.deepInclude(guest.receive()[0], { op: Op.RW, data: text("world"), fwdCnt: 5 })
    assert.isTrue(done)
  })

  it("is reset when nobody listens, when it is refused, and when it is asked for twice", () => {
    const guest = new SessionGuest()
    guest.send({ op: Op.REQUEST, dstPort: 2 })
    assert.deepInclude(guest.receive()[0], { op: Op.RST, srcPort: 2, dstPort: 1000 })
    guest.send({ op: Op.REQUEST })
    guest.arrived[0]?.close()
    assert.deepStrictEqual(ops(guest.receive()), [Op.RST])
    // The pair is kept back.
    guest.send({ op: Op.REQUEST })
    assert.deepStrictEqual(ops(guest.receive()), [Op.RST])
    guest.time += QUARANTINE_MILLIS + 1
    const connection = guest.open()
    guest.send({ op: Op.REQUEST })
    assert.deepStrictEqual(ops(guest.receive()), [Op.RST])
    assert.strictEqual(connection.end, "reset")
    assert.strictEqual(guest.session.size, 0)
  })
})

describe("The end of a connection", () => {
  it("by the guest is answered at once, and what came before can be read", () => {
    const guest = new SessionGuest()
    const connection = guest.open()
    guest.send({ op: Op.RW, data: text("last words") })
    guest.send({ op: Op.SHUTDOWN, flags: SHUTDOWN_BOTH })
    assert.deepStrictEqual(ops(guest.receive()), [Op.RST])
    assert.deepStrictEqual(connection.take(), text("last words"))
    assert.strictEqual(connection.end, "ended")
    assert.strictEqual(guest.session.size, 0)
    guest.open()
  })

  it("by the host waits for the guest, and not for ever", () => {
    const guest = new SessionGuest()
    const polite = guest.open()
    polite.close()
    assert.deepInclude(guest.receive()[0], { op: Op.SHUTDOWN, flags: SHUTDOWN_BOTH })
    guest.send({ op: Op.RST })
    assert.isTrue(polite.isOver)
    const silent = guest.open()
    silent.close()
    assert.deepStrictEqual(ops(guest.receive()), [Op.SHUTDOWN])
    guest.time += CLOSE_TIMEOUT_MILLIS
    guest.session.turn(() => guest.session.expire())
    assert.isTrue(silent.isOver)
    assert.deepStrictEqual(ops(guest.receive()), [Op.RST])
  })

  it("of one direction leaves the other", () => {
    const guest = new SessionGuest()
    const connection = guest.open()
    guest.send({ op: Op.SHUTDOWN, flags: VIRTIO_VSOCK_SHUTDOWN_F_SEND })
    assert.strictEqual(connection.end, "ended")
    connection.write(text("still"), () => {})
    connection.shutdown("send")
    assert.deepStrictEqual(ops(guest.receive()), [Op.RW, Op.SHUTDOWN])
    assert.isFalse(connection.isOver)
    // The guest has said that it sends no more.
    guest.send({ op: Op.RW, data: text("more") })
    assert.strictEqual(connection.end, "reset")
  })
})

describe("A connection that the host asks for", () => {
  it("has a port of its own, and is open when the guest answers", () => {
    const guest = new SessionGuest()
    const connection = guest.session.connect("stream", 2, undefined, 80)
    if (typeof connection === "string") throw new Error(connection)
    let decided: boolean | undefined
    connection.ask((exit) => {
      decided = Exit.isSuccess(exit)
    })
    assert.deepInclude(guest.receive()[0], { op: Op.REQUEST, srcPort: EPHEMERAL_PORT_FIRST, dstPort: 80 })
    assert.isUndefined(decided)
    guest.send({ op: Op.RESPONSE, srcPort: 80, dstPort: EPHEMERAL_PORT_FIRST })
    assert.isTrue(decided)
  })
})

describe("Credit", () => {
  it("bounds what the guest sends, to the byte", () => {
    const guest = new SessionGuest()
    const connection = guest.open()
    for (let sent = 0; sent < BUFFER_SIZE; sent += 0x1_0000) guest.send({ op: Op.RW, data: new Uint8Array(0x1_0000) })
    assert.strictEqual(connection.end, "open")
    guest.send({ op: Op.RW, data: new Uint8Array(1) })
    assert.strictEqual(connection.end, "reset")
  })

  it("bounds what the host sends, and resumes it", () => {
    const guest = new SessionGuest()
    const connection = guest.open({ bufAlloc: 10 })
    let done = false
    connection.write(new Uint8Array(25), () => {
      done = true
    })
    const first = guest.receive()
    assert.deepStrictEqual(first.map(({ len, op }) => [op, len]), [[Op.RW, 10], [Op.CREDIT_REQUEST, 0]])
    guest.send({ op: Op.CREDIT_UPDATE, bufAlloc: 10, fwdCnt: 10 })
    assert.deepStrictEqual(guest.receive().map(({ len }) => len), [10, 0])
    assert.isFalse(done)
    guest.send({ op: Op.CREDIT_UPDATE, bufAlloc: 10, fwdCnt: 20 })
    guest.receive()
    assert.isTrue(done)
    // It says that it has read more than was sent.
    guest.send({ op: Op.CREDIT_UPDATE, bufAlloc: 10, fwdCnt: 26 })
    assert.strictEqual(connection.end, "reset")
  })
})

describe("Any packets", () => {
  it("never throw, and leave nothing behind when the driver goes", () => {
    const packet = fc.record({
      op: fc.nat({ max: 9 }),
      srcPort: fc.constantFrom(1000, 1001),
      dstPort: fc.constantFrom(1, 2, EPHEMERAL_PORT_FIRST),
      srcCid: fc.constantFrom(3, 3, 3, 2, 4),
      dstCid: fc.constantFrom(2, 2, 2, 3, 0xffff_ffff),
      type: fc.constantFrom(1, 1, 1, 2, 0),
      flags: fc.constantFrom(0, 0, 1, 2, 3, 4),
      bufAlloc: fc.constantFrom(0, 100, 0xffff_ffff),
      fwdCnt: fc.constantFrom(0, 0, 5, 0xffff_ffff),
      data: fc.uint8Array({ maxLength: 20 })
    })
    const step = fc.oneof(
      packet.map((packet) => (guest: SessionGuest) => guest.send(packet)),
      packet.map((packet) => (guest: SessionGuest) => guest.send({ ...packet, len: packet.data.length + 1 })),
      fc.uint8Array({ maxLength: HEADER_SIZE + 4 }).map((bytes) => (guest: SessionGuest) => guest.sendBytes(bytes)),
      fc.nat({ max: 6000 }).map((millis) => (guest: SessionGuest) => {
        guest.time += millis
        guest.session.turn(() => guest.session.expire())
      }),
      fc.constant((guest: SessionGuest) => void guest.receive(3)),
      fc.constant((guest: SessionGuest) => void guest.arrived.at(-1)?.accept()),
      fc.constant((guest: SessionGuest) => guest.arrived.at(-1)?.close()),
      fc.constant((guest: SessionGuest) => void guest.arrived.at(-1)?.take()),
      fc.constant((guest: SessionGuest) => void guest.arrived.at(-1)?.write(new Uint8Array(30), () => {}))
    )
    fc.assert(fc.property(fc.array(step, { size: "max", maxLength: 60 }), (steps) => {
      const guest = new SessionGuest()
      for (const step of steps) step(guest)
      guest.session.end()
      assert.strictEqual(guest.session.size, 0)
      for (const connection of guest.arrived) assert.isTrue(connection.isOver)
    }))
  })
})
