/** Packets of a guest, and what each leads to. */
import { assert, describe, it } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Exit from "effect/Exit"
import * as fc from "fast-check"
import type { VsockConnection } from "../src/VsockConnection.ts"
import { BUFFER_SIZE, BUFFER_SIZE_MAX, EMPTY_MESSAGES_MAX, SHUTDOWN_LEEWAY_MILLIS } from "../src/VsockConnection.ts"
import {
  HEADER_SIZE,
  Op,
  SHUTDOWN_BOTH,
  VIRTIO_VSOCK_SEQ_EOM,
  VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
  VIRTIO_VSOCK_SHUTDOWN_F_SEND,
  VIRTIO_VSOCK_TYPE_SEQPACKET,
  VIRTIO_VSOCK_TYPE_STREAM,
  VsockHeader
} from "../src/VsockPacket.ts"
import {
  EPHEMERAL_PORT_FIRST,
  EPHEMERAL_PORT_LAST,
  QUARANTINE_MAX,
  QUARANTINE_MILLIS,
  VsockPorts
} from "../src/VsockPorts.ts"
import { CLOSE_TIMEOUT_MILLIS, CONNECTIONS_MAX, GROWTH_MAX, RESETS_WAITING_MAX } from "../src/VsockSession.ts"
import { type Packet, SessionGuest } from "./SessionGuest.ts"

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

describe("A RST of the guest", () => {
  it("ends a connection without an answer, and keeps its ports back", () => {
    const guest = new SessionGuest()
    const connection = guest.open()
    guest.send({ op: Op.RST })
    assert.strictEqual(connection.end, "reset")
    assert.deepStrictEqual(guest.receive(), [])
    assert.strictEqual(guest.hostPorts.quarantined, 1)
  })

  it("of no connection is not answered, as any other packet is", () => {
    for (let op = 1; op <= 7; op++) {
      const guest = new SessionGuest()
      guest.send({ op, dstPort: 2 })
      assert.deepStrictEqual(ops(guest.receive()), op === Op.RST ? [] : [Op.RST])
    }
  })
})

describe("A host that receives no more", () => {
  const shut = () => {
    const guest = new SessionGuest()
    const connection = guest.open()
    connection.shutdown("receive")
    assert.deepStrictEqual(ops(guest.receive()), [Op.SHUTDOWN])
    return { guest, connection }
  }

  it("drops what was on its way, and gives its credit back", () => {
    const { connection, guest } = shut()
    guest.time += SHUTDOWN_LEEWAY_MILLIS
    for (let sent = 0; sent < BUFFER_SIZE; sent += 0x1_0000) guest.send({ op: Op.RW, data: new Uint8Array(0x1_0000) })
    assert.isFalse(connection.isOver)
    assert.strictEqual(connection.unread, 0)
    assert.strictEqual(guest.receive().at(-1)?.fwdCnt, BUFFER_SIZE)
  })

  it("resets a guest that goes on sending", () => {
    const { connection, guest } = shut()
    guest.time += SHUTDOWN_LEEWAY_MILLIS + 1
    guest.send({ op: Op.RW, data: text("more") })
    assert.strictEqual(connection.end, "reset")
  })
})

describe("What the guest does in each state", () => {
  /** A connection in each state of its life, and its ports. */
  const states = {
    GuestInitiated: (guest: SessionGuest) => {
      guest.send({ op: Op.REQUEST })
      return guest.arrived[0]
    },
    ClientInitiated: (guest: SessionGuest) => {
      const connection = guest.session.connect("stream", 2, 1, 1000)
      if (typeof connection === "string") assert.fail(connection)
      connection.ask(() => {})
      return connection
    },
    ReadWrite: (guest: SessionGuest) => guest.open(),
    ClientInitiatedShutdown: (guest: SessionGuest) => {
      const connection = guest.open()
      connection.close()
      return connection
    }
  } as const
  /** What follows, and whether the guest is answered by a RST. What is not here is `ShutdownForced` with a RST. */
  const expected: { readonly [state in keyof typeof states]: { readonly [op: number]: readonly [string, boolean] } } = {
    GuestInitiated: { [Op.SHUTDOWN]: ["ReadWrite or over", false], [Op.RST]: ["ShutdownForced", false] },
    ClientInitiated: {
      [Op.RESPONSE]: ["ReadWrite", false],
      [Op.SHUTDOWN]: ["ShutdownClean", true],
      [Op.RST]: ["ShutdownForced", false]
    },
    ReadWrite: {
      [Op.SHUTDOWN]: ["ShutdownClean", true],
      [Op.RST]: ["ShutdownForced", false],
      [Op.RW]: ["ReadWrite", false],
      [Op.CREDIT_UPDATE]: ["ReadWrite", false],
      [Op.CREDIT_REQUEST]: ["ReadWrite", false]
    },
    ClientInitiatedShutdown: {
      [Op.RST]: ["ShutdownClean", false],
      [Op.RW]: ["ClientInitiatedShutdown", false],
      [Op.CREDIT_UPDATE]: ["ClientInitiatedShutdown", false],
      [Op.CREDIT_REQUEST]: ["ClientInitiatedShutdown", false]
    }
  }
  for (const [state, begin] of Object.entries(states)) {
    for (const [name, op] of Object.entries({ ...Op, INVALID: 0, UNKNOWN: 8 })) {
      it(`${name} in ${state}`, () => {
        const guest = new SessionGuest()
        const connection = begin(guest)
        assert.strictEqual(connection?.state, state)
        guest.receive()
        guest.send({ op, flags: op === Op.SHUTDOWN ? SHUTDOWN_BOTH : 0 })
        const all: Readonly<Record<string, { readonly [op: number]: readonly [string, boolean] }>> = expected
        const [after, isAnswered] = op === Op.SHUTDOWN && state === "GuestInitiated"
          ? ["ShutdownClean", true] as const
          : all[state]?.[op] ?? ["ShutdownForced", true] as const
        assert.strictEqual(connection?.state, after)
        const answers = ops(guest.receive())
        assert.strictEqual(answers.includes(Op.RST), isAnswered)
        assert.strictEqual(answers.includes(Op.CREDIT_UPDATE), op === Op.CREDIT_REQUEST && state === "ReadWrite")
      })
    }
  }

  const ODD: ReadonlyArray<readonly [string, Partial<Packet>]> = [
    ["an unknown flag", { flags: 4 }],
    ["less data than it says", { len: 5 }],
    ["more data than it says", { len: 3, data: text("data") }],
    ["more data than any packet", { len: 0xffff_ffff }],
    ["another type", { type: 2 }],
    ["more read than was sent", { fwdCnt: 1 }],
    ["less read than before", { fwdCnt: 0xffff_ffff }]
  ]
  for (const [what, packet] of ODD) {
    it(`a packet with ${what} resets its connection`, () => {
      const guest = new SessionGuest()
      const connection = guest.open()
      const other = guest.open({ srcPort: 1001 })
      guest.send({ op: Op.RW, data: text("data"), ...packet })
      assert.strictEqual(connection.end, "reset")
      assert.deepStrictEqual(guest.receive().map(({ dstPort, op }) => [op, dstPort]), [[Op.RST, 1000]])
      assert.strictEqual(other.end, "open")
    })
  }

  it("data in any other packet than RW resets its connection", () => {
    for (const op of [Op.CREDIT_UPDATE, Op.CREDIT_REQUEST, Op.SHUTDOWN]) {
      const guest = new SessionGuest()
      const connection = guest.open()
      guest.send({ op, data: text("data") })
      assert.strictEqual(connection.end, "reset")
    }
    const guest = new SessionGuest()
    guest.send({ op: Op.REQUEST, data: text("data") })
    assert.deepStrictEqual(guest.arrived, [])
    assert.deepStrictEqual(ops(guest.receive()), [Op.RST])
  })

  it("packets in the name of another leave the connection alone", () => {
    const guest = new SessionGuest()
    const connection = guest.open()
    for (const cid of [{ srcCid: 4 }, { srcCid: 2 }, { dstCid: 3 }, { dstCid: 0xffff_ffff }, { type: 3 }]) {
      guest.send({ op: Op.RW, data: text("data"), ...cid })
      assert.deepStrictEqual(ops(guest.receive()), [Op.RST])
    }
    assert.strictEqual(connection.end, "open")
    assert.strictEqual(connection.unread, 0)
    // A context ID of more than 32 bits whose low half is the guest's.
    const bytes = new Uint8Array(HEADER_SIZE)
    const header = new VsockHeader()
    header.set(3, 1000, 2, 1, 1, Op.SHUTDOWN, SHUTDOWN_BOTH)
    bytes.set(header.bytes)
    for (const high of [4, 12]) {
      const long = bytes.slice()
      long[high] = 1
      guest.sendBytes(long)
    }
    assert.isFalse(connection.isOver)
  })

  it("no messages without the feature", () => {
    const guest = new SessionGuest({ hasSeqpacket: false })
    guest.send({ op: Op.REQUEST, type: 2 })
    assert.deepStrictEqual(guest.arrived, [])
    assert.strictEqual(guest.session.connect("seqpacket", 2, undefined, 80), "CONNECTION_REFUSED")
  })

  it("an answer before the question", () => {
    const guest = new SessionGuest()
    const connection = guest.session.connect("stream", 2, 1, 1000)
    if (typeof connection === "string") assert.fail(connection)
    let isRefused = false
    connection.ask((exit) => {
      isRefused = Exit.isFailure(exit)
    })
    guest.send({ op: Op.RESPONSE })
    assert.isTrue(isRefused)
    // It has not heard of the connection, so it is told of no end, and the ports are free.
    assert.deepStrictEqual(guest.receive(), [])
    assert.strictEqual(guest.hostPorts.quarantined, 0)
  })
})

describe("Floods", () => {
  const heap = () => process.memoryUsage().arrayBuffers + process.memoryUsage().heapUsed

  it("of packets of one byte take little more memory than their bytes", () => {
    const guest = new SessionGuest()
    const connections = Array.from({ length: 16 }, (_, i) => guest.open({ srcPort: 1000 + i }))
    const data = new Uint8Array(1)
    const before = heap()
    for (let sent = 0; sent < BUFFER_SIZE / 4; sent++) {
      for (let i = 0; i < 16; i++) guest.send({ op: Op.RW, srcPort: 1000 + i, data })
    }
    for (const connection of connections) assert.strictEqual(connection.unread, BUFFER_SIZE / 4)
    // Of what is not collected yet, most is the test's own packets.
    const held = connections.reduce((sum, connection) => sum + connection.memory, 0)
    assert.isAtMost(held, 16 * BUFFER_SIZE / 4 + 16 * 4096)
    assert.isAtMost(heap() - before, 512 * 2 ** 20)
  })

  it("of packets of no bytes leave nothing", () => {
    const guest = new SessionGuest()
    const connection = guest.open()
    for (let sent = 0; sent < 100_000; sent++) guest.send({ op: Op.RW })
    assert.strictEqual(connection.end, "open")
    assert.strictEqual(connection.memory, 0)
    assert.deepStrictEqual(guest.receive(), [])
  })

  it("of requests for ports that nobody has are answered as far as the guest takes answers", () => {
    const guest = new SessionGuest()
    let taken = 0
    while (guest.session.hasRoomForResets && taken < 1_000_000) {
      guest.send({ op: Op.REQUEST, srcPort: taken, dstPort: 2 })
      taken++
    }
    assert.strictEqual(taken, RESETS_WAITING_MAX)
    assert.strictEqual(guest.receive().length, RESETS_WAITING_MAX)
    assert.isTrue(guest.session.hasRoomForResets)
  })

  it("of connections that are opened and reset, with no buffer for an answer, keep nothing", () => {
    const guest = new SessionGuest()
    for (let i = 0; i < 20_000; i++) {
      guest.send({ op: Op.REQUEST })
      guest.arrived.pop()?.accept()
      guest.send({ op: Op.RST })
      guest.time += QUARANTINE_MILLIS + 1
    }
    assert.strictEqual(guest.session.size, 0)
    assert.isAtMost(guest.session.waiting, 200)
    assert.isAtMost(guest.hostPorts.quarantined, 2)
  })

  it("of connections find an end", () => {
    const guest = new SessionGuest()
    for (let port = 0; port <= CONNECTIONS_MAX; port++) guest.send({ op: Op.REQUEST, srcPort: port })
    assert.strictEqual(guest.session.size, CONNECTIONS_MAX)
    assert.deepStrictEqual(guest.receive().map(({ dstPort, op }) => [op, dstPort]), [[Op.RST, CONNECTIONS_MAX]])
    assert.strictEqual(guest.session.connect("stream", 2, undefined, 80), "NO_RESOURCES")
    guest.session.end()
    assert.strictEqual(guest.session.size, 0)
  })

  it("of resets keep no more than so many pairs of ports back", () => {
    const ports = new VsockPorts()
    for (let guestPort = 0; guestPort < QUARANTINE_MAX + 10; guestPort++) {
      assert.isTrue(ports.addConnection(1, guestPort, 0))
      ports.removeConnection(1, guestPort, false, 0)
    }
    assert.strictEqual(ports.quarantined, QUARANTINE_MAX)
    assert.isTrue(ports.addConnection(1, 9, 0))
    assert.isFalse(ports.addConnection(1, 10, 0))
  })
})

describe("The credit of all connections together", () => {
  it("grows to a bound, and what one had is free when it is over", () => {
    const guest = new SessionGuest()
    const connections = Array.from({ length: 40 }, (_, i) => guest.open({ srcPort: 1000 + i }))
    const data = new Uint8Array(0x1_0000)
    const fill = (connection: VsockConnection) => {
      for (let packets = 0; packets < 200; packets++) {
        guest.send({ op: Op.RW, srcPort: connection.peer.port, data })
        connection.take()
        guest.receive()
      }
    }
    for (const connection of connections) fill(connection)
    const grown = connections.reduce((sum, connection) => sum + connection.grown, 0)
    assert.isAtMost(grown, GROWTH_MAX)
    assert.isAbove(grown, GROWTH_MAX - BUFFER_SIZE_MAX)
    const late = guest.open({ srcPort: 2000 })
    fill(late)
    assert.isBelow(late.bufAlloc, BUFFER_SIZE_MAX)
    connections[0]?.reset()
    fill(late)
    assert.strictEqual(late.bufAlloc, BUFFER_SIZE_MAX)
  })
})

describe("Ports of the host", () => {
  it("are chosen in turn, and are all used before there is none", () => {
    const guest = new SessionGuest()
    guest.hostPorts.addListener(EPHEMERAL_PORT_FIRST + 1)
    const count = EPHEMERAL_PORT_LAST - EPHEMERAL_PORT_FIRST
    const ports = Array.from({ length: count }, () => {
      const connection = guest.session.connect("stream", 2, undefined, 80)
      return typeof connection === "string" ? assert.fail(connection) : connection
    })
    assert.strictEqual(new Set(ports.map(({ local }) => local.port)).size, count)
    assert.deepStrictEqual(ports.slice(0, 2).map(({ local }) => local.port), [
      EPHEMERAL_PORT_FIRST,
      EPHEMERAL_PORT_FIRST + 2
    ])
    assert.strictEqual(guest.session.connect("stream", 2, undefined, 81), "NO_RESOURCES")
    ports[5]?.reset()
    assert.strictEqual(guest.session.connect("stream", 2, undefined, 81), "NO_RESOURCES")
    guest.time += QUARANTINE_MILLIS
    assert.strictEqual(guest.session.connect("stream", 2, undefined, 81), "NO_RESOURCES")
    guest.time += 1
    const again = guest.session.connect("stream", 2, undefined, 81)
    assert.deepInclude(again, { local: { cid: 2, port: EPHEMERAL_PORT_FIRST + 6 } })
  })

  it("stay a listener's when its connections end", () => {
    const ports = new VsockPorts()
    ports.addListener(7)
    ports.addConnection(7, 80, 0)
    ports.removeConnection(7, 80, true, 0)
    assert.isTrue(ports.isActive(7))
    assert.isFalse(ports.addListener(7))
    ports.removeListener(7)
    assert.isFalse(ports.isActive(7))
  })

  it("that was just given back is not the next one", () => {
    const ports = new VsockPorts()
    const first = ports.findEphemeral(0) ?? assert.fail("no port")
    ports.addConnection(first, 80, 0)
    ports.removeConnection(first, 80, true, 0)
    assert.strictEqual(ports.findEphemeral(0), first + 1)
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

describe("Who comes too late to be woken", () => {
  it("hears that a connection was refused whose driver went before it was asked for", () => {
    const guest = new SessionGuest()
    const connection = guest.session.connect("stream", 2, undefined, 80)
    if (typeof connection === "string") assert.fail(connection)
    guest.session.end()
    let error: unknown
    connection.ask((exit) => {
      error = Exit.isFailure(exit) ? Cause.squash(exit.cause) : undefined
    })
    assert.deepInclude(error, { status: "CONNECTION_REFUSED", guestPort: 80 })
  })

  it.each(["stream", "seqpacket"] as const)("finds what has come to a %s since it looked", (type) => {
    const guest = new SessionGuest()
    const isMessage = type === "seqpacket"
    const kind = { type: isMessage ? VIRTIO_VSOCK_TYPE_SEQPACKET : VIRTIO_VSOCK_TYPE_STREAM }
    const connection = guest.open(kind)
    let woken = 0
    const wake = () => void woken++
    assert.isUndefined(connection.take())
    guest.send({ ...kind, op: Op.RW, flags: isMessage ? VIRTIO_VSOCK_SEQ_EOM : 0, data: text("late") })
    connection.awaitInput(wake)
    assert.strictEqual(woken, 1)
    assert.deepStrictEqual(connection.take(), text("late"))
    const takeBack = connection.awaitInput(wake)
    assert.strictEqual(woken, 1)
    takeBack()
    guest.send({ ...kind, op: Op.SHUTDOWN, flags: SHUTDOWN_BOTH })
    connection.awaitInput(wake)
    assert.strictEqual(woken, 2)
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

  it("need not use all of its credit: Linux has no more in flight than it could receive itself", () => {
    for (const bufAlloc of [0x1000, 0x1_0000, 0x4_0000]) {
      const guest = new SessionGuest()
      const connection = guest.open({ bufAlloc })
      let sent = 0
      let fwdCnt = 0
      while (sent < 8 * 2 ** 20) {
        const length = Math.min(bufAlloc - (sent - fwdCnt), 0x1_0000)
        if (length <= 0) assert.fail(`the guest has heard of ${fwdCnt} of ${sent} bytes`)
        guest.send({ op: Op.RW, bufAlloc, data: new Uint8Array(length) })
        sent += length
        while (connection.take() !== undefined);
        for (const packet of guest.receive()) fwdCnt = packet.fwdCnt
      }
    }
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
    const greedy = Array.from({ length: 8 }, (_, i) => guest.open({ srcPort: 1000 + i }))
    const modest = guest.open({ srcPort: 1100 })
    for (const connection of greedy) connection.write(new Uint8Array(200_000), () => {})
    guest.receive(100)
    for (let round = 0; round < 5; round++) {
      modest.write(new Uint8Array(10), () => {})
      // The worst wait is one packet of each.
      assert.include(guest.receive(greedy.length + 1).map(({ dstPort }) => dstPort), 1100)
    }
  })

  it("lets control packets pass data", () => {
    const guest = new SessionGuest()
    guest.open({ srcPort: 1000 }).write(new Uint8Array(100_000), () => {})
    const modest = guest.open({ srcPort: 1001 })
    modest.shutdown("send")
    assert.deepInclude(guest.receive(1)[0], { op: Op.SHUTDOWN, dstPort: 1001 })
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
