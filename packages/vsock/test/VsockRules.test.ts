/** What virtio 1.3, section 5.10, demands of the socket device, packet by packet. */
import { assert, describe, it } from "@effect/vitest"
import { GuestCid } from "@troupe/vsock"
import * as fc from "fast-check"
import { BUFFER_SIZE } from "../src/VsockConnection.ts"
import { vsockDevice } from "../src/VsockDevice.ts"
import { Op } from "../src/VsockPacket.ts"
import { VsockPorts } from "../src/VsockPorts.ts"
import { GUEST_CID, SessionGuest } from "./SessionGuest.ts"

describe("The rules of the socket device", () => {
  it("a packet of an unknown type is answered by RST, whatever it asks, unless it is one", () => {
    for (const type of [0, 3, 0xffff]) {
      for (const op of [Op.REQUEST, Op.RW, Op.CREDIT_REQUEST, 0, 9]) {
        const guest = new SessionGuest()
        guest.send({ op, type })
        const answers = guest.receive()
        assert.deepStrictEqual(answers.map(({ op }) => op), [Op.RST])
        assert.deepInclude(answers[0], { srcCid: 2, srcPort: 1, dstCid: GUEST_CID, dstPort: 1000, type })
        assert.deepStrictEqual(guest.arrived, [])
      }
      const guest = new SessionGuest()
      guest.send({ op: Op.RST, type })
      assert.deepStrictEqual(guest.receive(), [])
    }
  })

  it("without any feature there are streams, and nothing else", () => {
    const guest = new SessionGuest({ hasSeqpacket: false })
    guest.send({ op: Op.REQUEST, type: 2 })
    assert.deepStrictEqual(guest.receive().map(({ op }) => op), [Op.RST])
    const connection = guest.open()
    guest.send({ op: Op.RW, data: Uint8Array.of(1, 2, 3) })
    assert.deepStrictEqual(connection.take(), Uint8Array.of(1, 2, 3))
    assert.strictEqual(guest.session.connect("seqpacket", 2, undefined, 80), "CONNECTION_REFUSED")
  })

  it("every packet of a flow says what room there is and what was read, and data goes only where there is room", () => {
    const step = fc.oneof(
      fc.record({ kind: fc.constant("send" as const), bytes: fc.integer({ min: 1, max: 3000 }) }),
      fc.record({ kind: fc.constant("read" as const) }),
      fc.record({ kind: fc.constant("write" as const), bytes: fc.integer({ min: 1, max: 3000 }) }),
      fc.record({ kind: fc.constant("room" as const), bytes: fc.nat({ max: 3000 }) }),
      fc.record({ kind: fc.constant("ask" as const) })
    )
    fc.assert(fc.property(fc.array(step, { maxLength: 60, size: "max" }), (steps) => {
      const guest = new SessionGuest()
      let room = 1000
      const connection = guest.open({ bufAlloc: room })
      let sent = 0
      let read = 0
      let received = 0
      for (const step of steps) {
        const credit = { bufAlloc: room, fwdCnt: received }
        if (step.kind === "send" && sent - read + step.bytes <= BUFFER_SIZE) {
          guest.send({ op: Op.RW, data: new Uint8Array(step.bytes), ...credit })
          sent += step.bytes
        } else if (step.kind === "read") read += connection.take()?.length ?? 0
        else if (step.kind === "write") connection.write(new Uint8Array(step.bytes), () => {})
        else if (step.kind === "room") {
          room = Math.max(room, step.bytes)
          guest.send({ op: Op.CREDIT_UPDATE, bufAlloc: room, fwdCnt: received })
        } else if (step.kind === "ask") guest.send({ op: Op.CREDIT_REQUEST, ...credit })
        const packets = guest.receive()
        // The guest reads at once what comes, but says so only with its next packet.
        assert.isAtMost(packets.reduce((sum, { len }) => sum + len, 0), room)
        for (const packet of packets) {
          received += packet.len
          assert.isAtLeast(packet.bufAlloc, BUFFER_SIZE)
          assert.strictEqual(packet.fwdCnt, read)
        }
        if (step.kind === "ask") assert.isTrue(packets.some(({ op }) => op === Op.CREDIT_UPDATE))
      }
      assert.strictEqual(connection.end, "open")
    }))
  })

  it("the configuration has the guest's context ID, and zeros above it", () => {
    for (const cid of [3, 0x1234_5678, 0xffff_fffe]) {
      const device = vsockDevice({
        guestCid: GuestCid.make(cid),
        hostPorts: new VsockPorts(),
        listens: () => false,
        arrived: () => {},
        onShutdown: () => {},
        attach: () => {},
        onTransportReset: () => {}
      })
      const view = new DataView(device.config.slice().buffer)
      assert.strictEqual(view.getBigUint64(0, true), BigInt(cid))
    }
  })
})
