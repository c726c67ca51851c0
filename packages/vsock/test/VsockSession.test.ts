/** Packets of a guest, and what each leads to. */
import { assert, describe, it } from "@effect/vitest"
import * as Exit from "effect/Exit"
import * as fc from "fast-check"
import { BUFFER_SIZE, BUFFER_SIZE_MAX, EMPTY_MESSAGES_MAX } from "../src/VsockConnection.ts"
import {
  HEADER_SIZE,
  Op,
  SHUTDOWN_BOTH,
  VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
  VIRTIO_VSOCK_SHUTDOWN_F_SEND
} from "../src/VsockPacket.ts"
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

describe("A host that shuts down both directions", () => {
  it("has closed the connection: the guest's RST is its end, in good order", () => {
    const guest = new SessionGuest()
    const connection = guest.open()
    connection.shutdown("send")
    connection.shutdown("receive")
    assert.deepInclude(guest.receive().at(-1), { op: Op.SHUTDOWN, flags: SHUTDOWN_BOTH })
    guest.send({ op: Op.RST })
    assert.isTrue(connection.isOver)
    assert.strictEqual(connection.end, "ended")
    guest.open()
  })

  it("waits for a silent guest no longer than one that closes", () => {
    const guest = new SessionGuest()
    const connection = guest.open()
    connection.shutdown("receive")
    connection.write(text("last"), () => {})
    connection.shutdown("send")
    assert.deepStrictEqual(ops(guest.receive()), [Op.SHUTDOWN, Op.RW, Op.SHUTDOWN])
    guest.time += CLOSE_TIMEOUT_MILLIS
    guest.session.turn(() => guest.session.expire())
    assert.isTrue(connection.isOver)
    assert.deepStrictEqual(ops(guest.receive()), [Op.RST])
  })

  it("says so although the guest does not take what was still to be sent", () => {
    const guest = new SessionGuest()
    const connection = guest.open({ bufAlloc: 0 })
    connection.write(text("never sent"), () => {})
    connection.shutdown("send")
    guest.receive()
    guest.send({ op: Op.SHUTDOWN, flags: VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE, bufAlloc: 0 })
    assert.deepInclude(guest.receive()[0], { op: Op.SHUTDOWN, flags: VIRTIO_VSOCK_SHUTDOWN_F_SEND })
  })
})

describe("What is over", () => {
  it("is not kept for the time that a guest may take to answer", () => {
    const guest = new SessionGuest()
    const waiting = guest.open({ srcPort: 999 })
    waiting.close()
    guest.receive()
    for (let i = 0; i < 1000; i++) {
      const connection = guest.open()
      connection.close()
      guest.receive()
      guest.send({ op: Op.RST })
      guest.arrived.length = 0
    }
    assert.isAtMost(guest.session.closing, 100)
    assert.strictEqual(guest.session.size, 1)
  })

  it("keeps no ports back for the next driver, who sends no packets of old connections", () => {
    const guest = new SessionGuest()
    guest.open().reset()
    guest.session.end()
    assert.strictEqual(guest.hostPorts.quarantined, 0)
    assert.isTrue(guest.hostPorts.addConnection(1, 1000, guest.time))
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

describe("A guest that has no room", () => {
  it("is asked for credit once, however often it says that it has none", () => {
    const guest = new SessionGuest()
    const connection = guest.open({ bufAlloc: 10 })
    connection.write(new Uint8Array(25), () => {})
    assert.deepStrictEqual(ops(guest.receive()), [Op.RW, Op.CREDIT_REQUEST])
    for (let answers = 0; answers < 3; answers++) {
      guest.send({ op: Op.CREDIT_UPDATE, bufAlloc: 10, fwdCnt: 0 })
      assert.deepStrictEqual(guest.receive(), [])
    }
    guest.send({ op: Op.CREDIT_UPDATE, bufAlloc: 10, fwdCnt: 10 })
    assert.deepStrictEqual(ops(guest.receive()), [Op.RW, Op.CREDIT_REQUEST])
    guest.send({ op: Op.CREDIT_UPDATE, bufAlloc: 10, fwdCnt: 15 })
    assert.deepStrictEqual(ops(guest.receive()), [Op.RW])
  })
})

describe("A guest that sends without end", () => {
  it("is given credit as its host reads, more of it as both keep up, and never more than the most", () => {
    fc.assert(
      fc.property(fc.array(fc.nat({ max: 3 }), { minLength: 1, maxLength: 8 }), (readsAfter) => {
        const guest = new SessionGuest()
        const connection = guest.open()
        let sent = 0
        let credit = { bufAlloc: BUFFER_SIZE, fwdCnt: 0 }
        for (let round = 0; sent < 24 * 2 ** 20; round++) {
          if (round > 10_000) assert.fail("the guest has no credit any more")
          for (let packets = 1 + (readsAfter[round % readsAfter.length] ?? 0); packets > 0; packets--) {
            const room = Math.min(credit.bufAlloc - (sent - credit.fwdCnt), 0x1_0000)
            if (room <= 0) break
            guest.send({ op: Op.RW, data: new Uint8Array(room) })
            sent += room
          }
          while (connection.take() !== undefined);
          for (const { bufAlloc, fwdCnt } of guest.receive()) credit = { bufAlloc, fwdCnt }
        }
        assert.strictEqual(connection.end, "open")
        assert.strictEqual(credit.bufAlloc, BUFFER_SIZE_MAX)
      }),
      { numRuns: 20 }
    )
  })

  it("has no more credit than it had first while nobody reads", () => {
    const guest = new SessionGuest()
    const connection = guest.open()
    for (let sent = 0; sent < BUFFER_SIZE; sent += 1000) {
      guest.send({ op: Op.RW, data: new Uint8Array(Math.min(1000, BUFFER_SIZE - sent)) })
    }
    assert.deepStrictEqual(guest.receive(), [])
    assert.strictEqual(connection.unread, BUFFER_SIZE)
    assert.strictEqual(connection.bufAlloc, BUFFER_SIZE)
  })
})

describe("Counters of credit", () => {
  it("wrap at 2^32 in both directions", () => {
    const guest = new SessionGuest()
    const first = 0xffff_ff00
    const connection = guest.open({ bufAlloc: 0x400, fwdCnt: first })
    let done = false
    connection.write(new Uint8Array(0x800), () => {
      done = true
    })
    assert.strictEqual(guest.receive().reduce((sum, { len }) => sum + len, 0), 0x400)
    guest.send({ op: Op.CREDIT_UPDATE, bufAlloc: 0x400, fwdCnt: (first + 0x400) >>> 0 })
    assert.strictEqual(guest.receive().reduce((sum, { len }) => sum + len, 0), 0x400)
    assert.isTrue(done)
  })
})

describe("Messages", () => {
  it("keep their boundaries whatever packets they come in", () => {
    fc.assert(fc.property(
      fc.array(fc.array(fc.uint8Array({ maxLength: 5000 }), { minLength: 1, maxLength: 3 }), { maxLength: 10 }),
      (messages) => {
        const guest = new SessionGuest()
        const connection = guest.open({ type: 2 })
        const wanted: Array<Uint8Array> = []
        for (const parts of messages) {
          for (const [index, data] of parts.entries()) {
            guest.send({ op: Op.RW, type: 2, data, flags: index === parts.length - 1 ? 1 : 0 })
          }
          wanted.push(Uint8Array.from(parts.flatMap((part) => Array.from(part))))
        }
        const got: Array<Uint8Array> = []
        for (let message = connection.take(); message !== undefined; message = connection.take()) got.push(message)
        assert.deepStrictEqual(got, wanted)
        assert.strictEqual(connection.unread, 0)
      }
    ))
  })

  it("of no bytes cost no credit, so there is a bound on how many may wait", () => {
    const guest = new SessionGuest()
    const connection = guest.open({ type: 2 })
    guest.send({ op: Op.RW, type: 2, flags: 1, data: text("a") })
    for (let i = 0; i < EMPTY_MESSAGES_MAX; i++) guest.send({ op: Op.RW, type: 2, flags: 1 })
    assert.strictEqual(connection.end, "open")
    guest.send({ op: Op.RW, type: 2, flags: 1 })
    assert.strictEqual(connection.end, "reset")
  })

  it("of the host end where its writes do", () => {
    const guest = new SessionGuest()
    const connection = guest.open({ type: 2 })
    guest.bufferSize = 44 + 100
    for (const length of [250, 0, 100]) connection.write(new Uint8Array(length), () => {})
    const packets = guest.receive().map(({ flags, len }) => [len, flags])
    assert.deepStrictEqual(packets, [[100, 0], [100, 0], [50, 1], [0, 1], [100, 1]])
  })
})

describe("A buffer of the guest", () => {
  it("that has no room for data comes back empty, and the data goes into the next one", () => {
    const guest = new SessionGuest()
    const connection = guest.open()
    connection.write(text("data"), () => {})
    const empty = { readableBytes: 0, writableBytes: HEADER_SIZE, write: () => assert.fail("nothing fits") }
    guest.session.turn(() => assert.strictEqual(guest.session.send(empty), 0))
    assert.deepInclude(guest.receive()[0], { op: Op.RW, data: text("data") })
  })
})

describe("Fairness", () => {
  it("gives each connection one packet in turn", () => {
    const guest = new SessionGuest()
    const greedy = guest.open({ srcPort: 1000 })
    const modest = guest.open({ srcPort: 1001 })
    greedy.write(new Uint8Array(100_000), () => {})
    modest.write(new Uint8Array(10), () => {})
    assert.include(guest.receive(2).map(({ dstPort }) => dstPort), 1001)
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
