/** Turns of the device: what one leaves undone the next one does, whatever buffers a guest gives. */
import { assert, describe, it } from "@effect/vitest"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import { FakeHypervisor, GuestAcpi, GuestProgram } from "@troupe/core/testing"
import { startVsock, type VsockDriver, type VsockDriverOptions } from "@troupe/core/testing/drivers/VsockDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import { virtioOn } from "@troupe/devices/virtio/VirtioTransport"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import { GuestCid } from "../src/index.ts"
import type { VsockConnection } from "../src/VsockConnection.ts"
import {
  BYTES_PER_TURN,
  EVENT_QUEUE,
  TX_QUEUE,
  VIRTIO_VSOCK_EVENT_TRANSPORT_RESET,
  vsockDevice
} from "../src/VsockDevice.ts"
import { Op } from "../src/VsockPacket.ts"
import { VsockPorts } from "../src/VsockPorts.ts"
import { RESETS_WAITING_MAX } from "../src/VsockSession.ts"

const MEMORY = 0x20_0000
/** More than there is in the largest buffers that are used here: 32 of 64 KiB in each direction. */
const GUEST_MEMORY = "16M"

/** Runs a guest whose connections are accepted at once, with what its host has of them. */
const run = (
  work: (cpu: GuestCpu, vsock: VsockDriver, host: Host) => GuestRoutine,
  options: Partial<VsockDriverOptions> = {}
) =>
  Effect.gen(function*() {
    const host: Host = { connections: [], transportReset: () => {} }
    const device = vsockDevice({
      guestCid: GuestCid.make(3),
      hostPorts: new VsockPorts(),
      listens: (_, port) => port === 1,
      arrived: (connection) => {
        connection.accept()
        host.connections.push(connection)
      },
      attach: () => {},
      onShutdown: () => {},
      onTransportReset: (tell) => {
        host.transportReset = tell
      }
    })
    const catalog: Layer.Layer<DeviceCatalog> = DeviceCatalog.layerAdd(Effect.succeed({
      provides: "virtioVsock" as const,
      devices: (config) => Effect.succeed(config.virtioVsock ? [virtioOn(config, device, { name: "vsock0" })] : [])
    })).pipe(Layer.provide(layerDevices), Layer.provide(EntropySource.layerRandom))
    const program = GuestProgram.make(function*(cpu) {
      const place = GuestAcpi.find(cpu).virtioMmio[0]
      if (place === undefined) throw new Error("the machine has no virtio device")
      yield* work(cpu, yield* startVsock(cpu, place, { memoryAddress: MEMORY, ...options }), host)
      yield* GuestAcpi.powerOff(cpu)
    })
    yield* Effect.gen(function*() {
      const lifecycle = yield* GuestLifecycle
      yield* lifecycle.create({
        kernelType: "LINUX",
        kernel: GuestProgram.kernel(program),
        cpus: 1,
        guestMemory: GUEST_MEMORY,
        virtioVsock: true
      })
      yield* lifecycle.run
    }).pipe(Effect.provide(GuestLifecycle.layer.pipe(Layer.provide(Layer.merge(FakeHypervisor.layer(), catalog)))))
  })

interface Host {
  readonly connections: Array<VsockConnection>
  transportReset: () => void
}

const CONNECTIONS = 8
const PACKET = 60_000
/** Packets of each connection: less than its credit, and of all together more than a turn. */
const PACKETS = 4

function* open(cpu: GuestCpu, vsock: VsockDriver): GuestRoutine {
  assert.isAbove(CONNECTIONS * PACKETS * PACKET, BYTES_PER_TURN)
  for (let i = 0; i < CONNECTIONS; i++) {
    yield* vsock.send(cpu, { op: Op.REQUEST, srcPort: 1000 + i, dstPort: 1, bufAlloc: 0x4_0000 })
    assert.strictEqual((yield* vsock.receive(cpu)).op, Op.RESPONSE)
  }
}

describe("A turn of the device", () => {
  it.effect("that has not taken all packets is followed by another", () =>
    run(function*(cpu, vsock, { connections }) {
      yield* open(cpu, vsock)
      const data = new Uint8Array(PACKET)
      for (let i = 0; i < CONNECTIONS * PACKETS; i++) {
        yield* vsock.send(cpu, { op: Op.RW, srcPort: 1000 + i % CONNECTIONS, dstPort: 1, bufAlloc: 0x4_0000, data })
      }
      // The guest says nothing more, and has all its buffers back.
      while (vsock.device.queue(TX_QUEUE).inFlight > 0) yield* vsock.device.receive(cpu, TX_QUEUE)
      for (const { receivedBytes } of connections) assert.strictEqual(receivedBytes, PACKETS * PACKET)
    }, { buffers: CONNECTIONS * PACKETS, bufferSize: 0x1_0000 }))

  for (const [buffers, bufferSize] of [[32, 0x1_0000], [1, 4096]] as const) {
    it.effect(`that has not sent all packets is followed by another, with ${buffers} buffers`, () =>
      run(function*(cpu, vsock, { connections }) {
        yield* open(cpu, vsock)
        for (const connection of connections) connection.write(new Uint8Array(PACKETS * PACKET), () => {})
        let received = 0
        while (received < CONNECTIONS * PACKETS * PACKET) received += (yield* vsock.receive(cpu)).data.length
      }, { buffers, bufferSize }))
  }

  it.effect("takes packets again when the guest has taken the answers that waited", () =>
    run(function*(cpu, vsock) {
      const buffers = 32
      const strays = buffers + RESETS_WAITING_MAX + buffers
      for (let i = 0; i < strays; i++) yield* vsock.send(cpu, { op: Op.RW, srcPort: i, dstPort: 2 })
      for (let i = 0; i < strays; i++) assert.deepInclude(yield* vsock.receive(cpu), { op: Op.RST, dstPort: i })
    }, { buffers: 32, bufferSize: 64 }))
})

describe("A transport reset", () => {
  it.effect("is told when the guest has a buffer for it", () =>
    run(function*(cpu, vsock, host) {
      host.transportReset()
      const address = MEMORY + 0x10_0000
      const event = cpu.memory.slice(address, 4)
      event?.fill(0xff)
      const queue = vsock.device.queue(EVENT_QUEUE)
      queue.add([{ address, length: 4, writable: true }])
      if (queue.publish()) yield* vsock.device.notify(cpu, EVENT_QUEUE)
      assert.strictEqual((yield* vsock.device.receive(cpu, EVENT_QUEUE)).written, 4)
      assert.deepStrictEqual(event?.[0], VIRTIO_VSOCK_EVENT_TRANSPORT_RESET)
    }))
})
