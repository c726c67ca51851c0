/**
 * A whole machine on the fake, with fibers, timers and devices that break: what `ConnectionModel.ts` says of a session, said of
 * everything around it. A guest that keeps to the protocol plays its part of a script packet by packet through its driver, handlers
 * and connections of the host play theirs in fibers of their own, and a seed decides who goes on when. Time is virtual.
 *
 * It never hangs: where nobody can go on, the simulation says who waits, and the script fails.
 */
import { assert } from "@effect/vitest"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import type { HostVsockAcceptor, VsockSocket } from "@troupe/core/HostVsockEndpoint"
import { type VsockError, VsockRefused } from "@troupe/core/HostVsockEndpoint"
import { restartPolicy } from "@troupe/core/RestartSchedule"
import { DeviceDefects, FakeHypervisor, GuestAcpi, GuestProgram, Simulation } from "@troupe/core/testing"
import { VirtioStatus } from "@troupe/core/testing/drivers/VirtioDriver"
import { VirtioMmioDriver } from "@troupe/core/testing/drivers/VirtioMmioDriver"
import { VsockDriver, type VsockDriverPacket } from "@troupe/core/testing/drivers/VsockDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as Metric from "effect/Metric"
import type * as Scope from "effect/Scope"
import * as fc from "fast-check"
import { layerVsock, VsockManager } from "../src/index.ts"
import {
  Op,
  SHUTDOWN_BOTH,
  VIRTIO_VSOCK_SEQ_EOM,
  VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
  VIRTIO_VSOCK_SHUTDOWN_F_SEND,
  VIRTIO_VSOCK_TYPE_SEQPACKET,
  VIRTIO_VSOCK_TYPE_STREAM
} from "../src/VsockPacket.ts"

// --- Scripts -----------------------------------------------------------------------------------------------------------------

const GUEST_STEPS = ["send", "read", "askCredit", "pause", "shutSend", "shutReceive", "close", "reset"] as const
const HOST_STEPS = [
  "write",
  "read",
  "readAll",
  "readBeside",
  "shutSend",
  "shutReceive",
  "close",
  "pause",
  "giveUpWriting",
  "giveUpReading"
] as const
/** What becomes of a connection that is asked for. */
const ANSWERS = ["accept", "accept", "accept", "accept", "refuse", "ignore", "fail"] as const
/** How a handler ends. */
const ENDS = ["return", "fail", "die"] as const

/** One connection: who begins it, and what each side does with it. */
export interface Plan {
  readonly by: "guest" | "host"
  readonly isSeqpacket: boolean
  readonly answer: typeof ANSWERS[number]
  readonly guest: ReadonlyArray<readonly [typeof GUEST_STEPS[number], number]>
  readonly host: ReadonlyArray<readonly [typeof HOST_STEPS[number], number]>
  readonly end: typeof ENDS[number]
  /** The handler reads all there is beside its steps, and ends when there is no more. */
  readonly isReader: boolean
  /** The guest never confirms the end of the connection. */
  readonly isMute: boolean
}

export interface Script {
  readonly plans: ReadonlyArray<Plan>
  /** Whose turn it is in the guest: numbers of plans. A multiple of three hears the host first. */
  readonly order: ReadonlyArray<number>
  /** After so many turns the driver resets the device and begins anew. */
  readonly restartAt: number
  /** The device breaks at this point of its work, counted from the machine's start or from when the driver is ready first. */
  readonly breaksAt: number
  readonly breaksEarly: boolean
}

/** Most machines have fewer points, so that the device does not break. */
const BREAKS_BEFORE = 400

/** Steps of which most move data: without them ends come before anything has happened. */
const steps = <A>(of: ReadonlyArray<A>, moving: ReadonlyArray<A>) =>
  fc.array(fc.tuple(fc.constantFrom(...of, ...moving, ...moving, ...moving), fc.nat({ max: 400 })), {
    size: "max",
    maxLength: 8
  })

/** Scripts, that shrink to what matters in them. */
export const machineScript: fc.Arbitrary<Script> = fc.record({
  plans: fc.array(
    fc.record({
      by: fc.constantFrom("guest", "host"),
      isSeqpacket: fc.boolean(),
      answer: fc.constantFrom(...ANSWERS),
      guest: steps(GUEST_STEPS, ["send", "read"]),
      host: steps(HOST_STEPS, ["write", "read"]),
      end: fc.constantFrom(...ENDS),
      isReader: fc.boolean(),
      isMute: fc.nat({ max: 7 }).map((number) => number === 7)
    }),
    { size: "max", minLength: 1, maxLength: 4 }
  ),
  order: fc.array(fc.nat({ max: 23 }), { size: "max", maxLength: 20 }),
  restartAt: fc.nat({ max: 60 }),
  breaksAt: fc.integer({ min: 1, max: BREAKS_BEFORE }),
  breaksEarly: fc.nat({ max: 3 }).map((number) => number === 3)
})

/** How often what has happened, over all scripts: a model that nothing happens in proves nothing. */
export type Happened = Map<string, number>

// --- Both sides --------------------------------------------------------------------------------------------------------------

/** What the guest's connections buffer: little, so that credit runs out. */
const GUEST_BUFFER = 300
const BUFFER_SIZE = 512
const DATA_MAX = BUFFER_SIZE - 44
const HOST_PORTS = 10
const GUEST_PORTS = 200
/** The host connects to this port of the guest when it is done. */
const LAST_PORT = 99
const SYNC_PORT = 1
const DRIVER_MEMORY = 0x18_0000
const QUEUES_SIZE = 0x8000

const byteAt = (place: number, seed: number): number => (place * 7 + (place >> 8) + seed * 31) & 0xff
const pattern = (from: number, length: number, seed: number): Uint8Array =>
  Uint8Array.from({ length }, (_, index) => byteAt(from + index, seed))
const checkPattern = (from: number, bytes: Uint8Array, seed: number): void => {
  for (const [index, byte] of bytes.entries()) {
    if (byte !== byteAt(from + index, seed)) assert.fail(`byte ${from + index} of a stream is not what was sent there`)
  }
}
const check = (condition: boolean, detail: string): void => {
  if (!condition) assert.fail(detail)
}

/** The device has failed: everything that the driver had is gone. */
class NeedsReset extends Error {}

/** A driver that looks whether the device has failed whenever it is interrupted. */
class WatchfulDriver extends VirtioMmioDriver {
  override *awaitInterrupt(cpu: GuestCpu): GuestRoutine {
    yield* super.awaitInterrupt(cpu)
    if (((yield* this.status(cpu)) & VirtioStatus.DEVICE_NEEDS_RESET) !== 0) throw new NeedsReset()
  }
}

/** One connection as both sides have it. */
class Connection {
  readonly plan: Plan
  readonly index: number
  /** The guest's side. */
  state: "unborn" | "asking" | "ignored" | "open" | "shut" | "closed" = "unborn"
  guestPort: number
  hostPort: number
  step = 0
  sent = 0
  received = 0
  consumed = 0
  shut = 0
  hostShut = 0
  hostAlloc = 0
  hostFwd = 0
  partReceived = 0
  readonly sentMessages: Array<number> = []
  /** The host's side. */
  written = 0
  delivered = 0
  read = 0
  hasPart = false
  hasShutReceive = false
  isClosed = false
  hasShutSend = false
  /** The handler has failed: the guest must not take what it has for all there is. */
  isCutOff = false
  /** The handler has ended, or its reader has. */
  isReadNoMore = false
  readsBeside = false
  readonly writtenMessages: Array<number> = []

  constructor(plan: Plan, index: number) {
    this.plan = plan
    this.index = index
    this.guestPort = plan.by === "guest" ? 1000 + index : GUEST_PORTS + index
    this.hostPort = plan.by === "guest" ? HOST_PORTS + index : 0
  }

  get guestSeed(): number {
    return this.index + 1
  }

  get hostSeed(): number {
    return this.index + 101
  }
}

/** One run of a script. */
class Run {
  readonly script: Script
  readonly connections: ReadonlyArray<Connection>
  readonly happened: Happened
  readonly program: GuestProgram.GuestProgram
  hostIsDone = false
  /** Whether a driver was ready. */
  isReady = false
  /** Acceptors that decide, and handlers that serve. */
  atWork = 0
  #turns = 0
  #restarts = 0

  constructor(script: Script, happened: Happened) {
    this.script = script
    this.happened = happened
    this.program = GuestProgram.make((cpu) => this.#guest(cpu))
    this.connections = script.plans.map((plan, index) => new Connection(plan, index))
  }

  note(what: string): void {
    this.happened.set(what, (this.happened.get(what) ?? 0) + 1)
  }

  // --- The guest -----------------------------------------------------------------------------------------------------------

  *#guest(cpu: GuestCpu): GuestRoutine {
    const place = GuestAcpi.find(cpu).virtioMmio[0]
    if (place === undefined) throw new Error("the machine has no virtio device")
    for (let life = 0; life < 100; life++) {
      try {
        const device = new WatchfulDriver(place)
        yield* device.start(cpu, {
          memoryAddress: DRIVER_MEMORY,
          queueSizes: [16, 16, 4],
          features: { low: 2, high: 0 },
          eventIndex: this.script.restartAt % 2 === 0
        })
        if (((yield* device.status(cpu)) & VirtioStatus.DRIVER_OK) === 0) throw new NeedsReset()
        const vsock = new VsockDriver(device, 3, DRIVER_MEMORY + QUEUES_SIZE, 8, BUFFER_SIZE)
        yield* vsock.refill(cpu)
        this.isReady = true
        if (yield* this.#life(cpu, vsock)) return yield* GuestAcpi.powerOff(cpu)
        this.note("driver restarts")
      } catch (error) {
        if (error instanceof Error && error.name === "AssertionError") throw error
        this.note(error instanceof NeedsReset ? "driver hears of a failure" : "driver is refused")
        yield* cpu.sleep("1 second")
      }
      for (const connection of this.connections) {
        if (connection.state !== "unborn") connection.state = "closed"
      }
    }
    throw new Error("the device does not start")
  }

  /** Returns whether the guest is done; otherwise the driver begins anew. */
  *#life(cpu: GuestCpu, vsock: VsockDriver): GuestRoutine<boolean> {
    const { order, restartAt } = this.script
    while (this.#turns < order.length) {
      const turn = order[this.#turns++] ?? 0
      if (this.#turns === restartAt && this.#restarts++ === 0) return false
      const connection = this.connections[turn % this.connections.length]
      if (turn % 3 === 0) yield* this.#sync(cpu, vsock)
      if (connection !== undefined) yield* this.#step(cpu, vsock, connection)
    }
    for (;;) {
      for (const connection of this.connections) {
        if (connection.plan.by === "guest" && connection.state === "unborn") yield* this.#step(cpu, vsock, connection)
      }
      for (const connection of this.connections) {
        while (connection.state === "open" && connection.step < connection.plan.guest.length) {
          yield* this.#step(cpu, vsock, connection)
          yield* this.#sync(cpu, vsock)
        }
        if (connection.state === "open") {
          yield* this.#consume(cpu, vsock, connection)
          yield* this.#awaitReader(cpu, connection)
          if (connection.plan.guest.length % 4 === 0) {
            yield* this.#shut(cpu, vsock, connection, SHUTDOWN_BOTH)
          } else {
            yield* this.#shut(cpu, vsock, connection, VIRTIO_VSOCK_SHUTDOWN_F_SEND)
          }
        }
        if (connection.state === "asking" && connection.plan.answer === "ignore") {
          connection.state = "closed"
          yield* this.#send(cpu, vsock, connection, Op.RST)
        }
      }
      const isOver = this.connections.every(({ state }) => state === "closed" || state === "unborn")
      if (isOver && this.hostIsDone) {
        yield* cpu.sleep("1 minute")
        check(this.atWork === 0, "somebody serves a connection that is over")
        return true
      }
      // What has come meanwhile, while others were heard.
      if (this.connections.some((connection) => connection.state === "open" && this.#isBehind(connection))) continue
      yield* this.#arrive(cpu, vsock, yield* vsock.receive(cpu))
    }
  }

  #isBehind({ consumed, received, shut }: Connection): boolean {
    return consumed !== received || (shut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) === 0
  }

  /** A reader of the host that waits has read all that the guest has sent, once everybody has had time. */
  *#awaitReader(cpu: GuestCpu, connection: Connection): GuestRoutine {
    const isRead = () => !connection.readsBeside || connection.isReadNoMore || connection.read === connection.sent
    if (isRead()) return
    this.note("guest waits for a reader")
    yield* cpu.sleep("1 second")
    check(isRead(), "a reader waits although there is something to read")
  }

  /** Hears all that the host has sent before this. */
  *#sync(cpu: GuestCpu, vsock: VsockDriver): GuestRoutine {
    yield* vsock.send(cpu, { op: Op.RW, srcPort: SYNC_PORT, dstPort: SYNC_PORT })
    for (;;) {
      const packet = yield* vsock.receive(cpu)
      if (packet.dstPort === SYNC_PORT) return
      yield* this.#arrive(cpu, vsock, packet)
    }
  }

  *#send(
    cpu: GuestCpu,
    vsock: VsockDriver,
    connection: Connection,
    op: number,
    flags = 0,
    data?: Uint8Array
  ): GuestRoutine {
    yield* vsock.send(cpu, {
      op,
      flags,
      type: connection.plan.isSeqpacket ? VIRTIO_VSOCK_TYPE_SEQPACKET : VIRTIO_VSOCK_TYPE_STREAM,
      srcPort: connection.guestPort,
      dstPort: connection.hostPort,
      bufAlloc: GUEST_BUFFER,
      fwdCnt: connection.consumed,
      ...(data === undefined ? {} : { data })
    })
  }

  *#shut(cpu: GuestCpu, vsock: VsockDriver, connection: Connection, flags: number): GuestRoutine {
    if ((connection.shut | flags) === connection.shut) return
    connection.shut |= flags
    if (connection.shut === SHUTDOWN_BOTH) connection.state = "shut"
    yield* this.#send(cpu, vsock, connection, Op.SHUTDOWN, connection.shut)
  }

  *#consume(cpu: GuestCpu, vsock: VsockDriver, connection: Connection): GuestRoutine {
    if (connection.consumed === connection.received) return
    connection.consumed = connection.received
    yield* this.#send(cpu, vsock, connection, Op.CREDIT_UPDATE)
  }

  *#step(cpu: GuestCpu, vsock: VsockDriver, connection: Connection): GuestRoutine {
    if (connection.state === "unborn") {
      if (connection.plan.by === "host") return
      connection.state = "asking"
      return yield* this.#send(cpu, vsock, connection, Op.REQUEST)
    }
    const next = connection.plan.guest[connection.step]
    if (connection.state !== "open" || next === undefined) return
    connection.step++
    const [step, amount] = next
    this.note(`guest ${step}`)
    switch (step) {
      case "send":
        return yield* this.#sendData(cpu, vsock, connection, amount < 380 ? amount : amount * 20)
      case "read":
        return yield* this.#consume(cpu, vsock, connection)
      case "shutSend":
        return yield* this.#shut(cpu, vsock, connection, VIRTIO_VSOCK_SHUTDOWN_F_SEND)
      case "shutReceive":
        return yield* this.#shut(cpu, vsock, connection, VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE)
      case "close":
        return yield* this.#shut(cpu, vsock, connection, SHUTDOWN_BOTH)
      case "reset":
        connection.state = "closed"
        return yield* this.#send(cpu, vsock, connection, Op.RST)
      case "askCredit":
        return yield* this.#send(cpu, vsock, connection, Op.CREDIT_REQUEST)
      case "pause":
        return yield* cpu.sleep(amount * 20)
    }
  }

  *#sendData(cpu: GuestCpu, vsock: VsockDriver, connection: Connection, length: number): GuestRoutine {
    if ((connection.shut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) !== 0) return
    if ((connection.hostShut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) !== 0) return
    if (length === 0 || length > connection.hostAlloc - (connection.sent - connection.hostFwd)) return
    if (connection.plan.isSeqpacket) connection.sentMessages.push(length)
    for (let left = length; left > 0;) {
      const part = Math.min(left, DATA_MAX)
      left -= part
      const flags = connection.plan.isSeqpacket && left === 0 ? VIRTIO_VSOCK_SEQ_EOM : 0
      const bytes = pattern(connection.sent, part, connection.guestSeed)
      connection.sent += part
      yield* this.#send(cpu, vsock, connection, Op.RW, flags, bytes)
    }
  }

  *#arrive(cpu: GuestCpu, vsock: VsockDriver, packet: VsockDriverPacket): GuestRoutine {
    if (packet.op === Op.REQUEST) return yield* this.#asked(cpu, vsock, packet)
    const connection = this.connections.find(({ guestPort, hostPort }) =>
      guestPort === packet.dstPort && hostPort === packet.srcPort
    )
    if (connection === undefined) {
      // The end of what the guest has refused.
      if (packet.op === Op.RST) return
      assert.fail(`a packet ${packet.op} of no connection`)
    }
    if (packet.op === Op.RST) {
      if (connection.state === "asking") this.note("guest is refused")
      if (connection.plan.isMute && connection.hostShut === SHUTDOWN_BOTH) {
        this.note("host waits no longer for a mute guest")
      }
      connection.state = "closed"
      return
    }
    if (connection.state === "closed") {
      return yield* vsock.send(cpu, { op: Op.RST, srcPort: packet.dstPort, dstPort: packet.srcPort, type: packet.type })
    }
    connection.hostAlloc = packet.bufAlloc
    connection.hostFwd = packet.fwdCnt
    check(packet.fwdCnt <= connection.sent, "the host has read what was not sent")
    switch (packet.op) {
      case Op.RESPONSE:
        check(connection.state === "asking", "an answer that nobody has asked for")
        connection.state = "open"
        return
      case Op.RW:
        check((connection.hostShut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) === 0, "data after the end of data")
        checkPattern(connection.received, packet.data, connection.hostSeed)
        connection.received += packet.data.length
        check(connection.received - connection.consumed <= GUEST_BUFFER, "the host has sent more than it may")
        connection.partReceived += packet.data.length
        if (connection.plan.isSeqpacket && (packet.flags & VIRTIO_VSOCK_SEQ_EOM) !== 0) {
          check(
            connection.writtenMessages.shift() === connection.partReceived,
            "a message has another length than it had"
          )
          connection.partReceived = 0
        }
        return
      case Op.SHUTDOWN:
        if ((packet.flags & ~connection.hostShut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) !== 0) this.#hostEnds(connection)
        connection.hostShut |= packet.flags
        if (connection.hostShut !== SHUTDOWN_BOTH || connection.plan.isMute) return
        connection.state = "closed"
        return yield* this.#send(cpu, vsock, connection, Op.RST)
      case Op.CREDIT_REQUEST:
        return yield* this.#send(cpu, vsock, connection, Op.CREDIT_UPDATE)
    }
  }

  /** The host sends no more: what its writers were told has come. */
  #hostEnds(connection: Connection): void {
    check(!connection.isCutOff, "a handler that has failed has ended its data in good order")
    if ((connection.shut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE) !== 0 || connection.hasPart) return
    this.note("guest hears of the end of data")
    check(connection.received === connection.delivered, "bytes of the host were lost before its orderly end")
  }

  *#asked(cpu: GuestCpu, vsock: VsockDriver, packet: VsockDriverPacket): GuestRoutine {
    const refuse = { op: Op.RST, srcPort: packet.dstPort, dstPort: packet.srcPort, type: packet.type }
    if (packet.dstPort === LAST_PORT) {
      this.hostIsDone = true
      return yield* vsock.send(cpu, refuse)
    }
    const connection = this.connections[packet.dstPort - GUEST_PORTS]
    if (connection === undefined) assert.fail(`the host asks for port ${packet.dstPort}`)
    check(
      (packet.type === VIRTIO_VSOCK_TYPE_SEQPACKET) === connection.plan.isSeqpacket,
      "another type than was asked for"
    )
    connection.hostPort = packet.srcPort
    connection.hostAlloc = packet.bufAlloc
    switch (connection.plan.answer) {
      case "accept":
        connection.state = "open"
        return yield* this.#send(cpu, vsock, connection, Op.RESPONSE)
      case "ignore":
        connection.state = "ignored"
        return
      default:
        connection.state = "closed"
        return yield* vsock.send(cpu, refuse)
    }
  }

  // --- The host ------------------------------------------------------------------------------------------------------------

  /** A connection's handler, whoever has begun it. */
  serve(connection: Connection, socket: VsockSocket): Effect.Effect<void, Error, Scope.Scope> {
    return this.#working(Effect.gen({ self: this }, function*() {
      this.note(`${connection.plan.by} connects`)
      const { host, isReader } = connection.plan
      const reader = isReader ? yield* this.#readBeside(connection, socket) : undefined
      for (const [step, amount] of host) yield* this.#hostStep(connection, socket, step, amount)
      if (reader !== undefined) yield* Fiber.join(reader)
      connection.isReadNoMore = true
      if (connection.plan.end === "return") return
      connection.isCutOff = !connection.isClosed && !connection.hasShutSend
      connection.isClosed = true
      return yield* connection.plan.end === "fail"
        ? Effect.fail(new Error("as told"))
        : Effect.die(new Error("as told"))
    }))
  }

  /** Counts who is at work, however that ends: also when it is interrupted between the counting and the work. */
  #working<A, E, R>(work: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> {
    return Effect.uninterruptibleMask((restore) => {
      this.atWork++
      return Effect.onExit(restore(work), () =>
        Effect.sync(() => {
          this.atWork--
        }))
    })
  }

  #hostStep(
    connection: Connection,
    socket: VsockSocket,
    step: typeof HOST_STEPS[number],
    amount: number
  ): Effect.Effect<void, Error, Scope.Scope> {
    switch (step) {
      case "write":
        return this.#write(connection, socket, amount % 280)
      case "read":
        return connection.readsBeside ? Effect.void : Effect.asVoid(this.#read(connection, socket))
      case "readAll":
        return connection.readsBeside ? Effect.void : this.#readAll(connection, socket)
      case "readBeside":
        return connection.readsBeside ? Effect.void : Effect.asVoid(this.#readBeside(connection, socket))
      case "shutSend":
        connection.hasShutSend = true
        return socket.shutdown("send")
      case "shutReceive":
        connection.hasShutReceive = true
        return socket.shutdown("receive")
      case "close":
        connection.isClosed = true
        return socket.close
      case "pause":
        return Effect.sleep(amount * 20)
      case "giveUpReading":
        if (connection.readsBeside) return Effect.void
        return Effect.asVoid(Effect.timeoutOption(this.#read(connection, socket), amount))
      case "giveUpWriting": {
        // Some of it may be sent: nothing can follow.
        const writing = Effect.timeoutOption(this.#write(connection, socket, 280), amount)
        return Effect.flatMap(writing, (done) => {
          if (done._tag === "Some") return Effect.void
          this.note("host gives a write up")
          connection.hasPart = true
          connection.isReadNoMore = true
          connection.isCutOff = !connection.isClosed && !connection.hasShutSend
          connection.isClosed = true
          return Effect.fail(new Error("it took too long"))
        })
      }
    }
  }

  #write(connection: Connection, socket: VsockSocket, length: number): Effect.Effect<void> {
    return Effect.suspend(() => {
      const bytes = pattern(connection.written, length, connection.hostSeed)
      if (connection.plan.isSeqpacket) connection.writtenMessages.push(length)
      return Effect.map(Effect.exit(socket.write(bytes)), (exit) => {
        this.note(`write: ${outcomeOf(exit)}`)
        if (Exit.isSuccess(exit)) {
          connection.written += length
          connection.delivered += length
        } else if (connection.plan.isSeqpacket) {
          connection.writtenMessages.pop()
        }
      })
    })
  }

  /** Reads once; whether there may be more. */
  #read(connection: Connection, socket: VsockSocket): Effect.Effect<boolean> {
    return Effect.map(Effect.exit(socket.read), (exit) => {
      const bytes = Exit.isSuccess(exit) ? exit.value : undefined
      this.note(Exit.isSuccess(exit) ? `read: ${bytes === undefined ? "ended" : "bytes"}` : `read: ${outcomeOf(exit)}`)
      if (bytes !== undefined) {
        checkPattern(connection.read, bytes, connection.guestSeed)
        connection.read += bytes.length
        if (connection.plan.isSeqpacket) {
          check(connection.sentMessages.shift() === bytes.length, "a message has another length than it had")
        }
        return true
      }
      if (Exit.isSuccess(exit) && !connection.hasShutReceive && !connection.isClosed) {
        check((connection.shut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) !== 0, "an end of data that the guest has not sent")
        check(connection.read === connection.sent, "bytes of the guest were lost before its orderly end")
      }
      return false
    })
  }

  #readBeside(connection: Connection, socket: VsockSocket): Effect.Effect<Fiber.Fiber<void>, never, Scope.Scope> {
    return Effect.suspend(() => {
      connection.readsBeside = true
      const end = Effect.sync(() => {
        connection.isReadNoMore = true
      })
      return Effect.forkScoped(Effect.andThen(this.#readAll(connection, socket), end))
    })
  }

  #readAll(connection: Connection, socket: VsockSocket): Effect.Effect<void> {
    return Effect.flatMap(
      this.#read(connection, socket),
      (more) => more ? this.#readAll(connection, socket) : Effect.void
    )
  }

  acceptor(connection: Connection): HostVsockAcceptor {
    const { answer } = connection.plan
    return ({ type }) =>
      Effect.suspend(() => {
        check((type === "seqpacket") === connection.plan.isSeqpacket, "another type than was asked for")
        switch (answer) {
          case "accept":
            return Effect.succeed((socket) => this.serve(connection, socket))
          case "refuse":
            return Effect.fail(new VsockRefused({ reason: "as told" }))
          case "ignore":
            return this.#working(Effect.never)
          case "fail":
            return Effect.die(new Error("as told"))
        }
      })
  }
}

const outcomeOf = (exit: Exit.Exit<unknown, VsockError>): string => {
  if (Exit.isSuccess(exit)) return "done"
  const reason = exit.cause.reasons[0]
  return reason?._tag === "Fail" ? reason.error.status : reason?._tag ?? "nothing"
}

/** The machine of a script, from its making to its end. */
const machine = (run: Run): Effect.Effect<void, unknown> => {
  const { script } = run
  let early = 0
  let late = 0
  const defects = new DeviceDefects.DeviceDefects(() =>
    (script.breaksEarly ? ++early : run.isReady ? ++late : 0) === script.breaksAt + (script.breaksEarly ? 1 : 0)
  )
  const catalog = layerVsock.pipe(
    Layer.provide(VsockManager.layer),
    Layer.provide(layerDevices),
    Layer.provide(EntropySource.layerRandom)
  )
  const breaking = DeviceDefects.layer((device) =>
    device.name.startsWith("vsock") ? { ...DeviceDefects.breaking(device, defects), policy: restartPolicy() } : device
  )
  const host = GuestLifecycle.layer.pipe(
    Layer.provide(breaking.pipe(Layer.provide(catalog))),
    Layer.provideMerge(FakeHypervisor.layer()),
    Layer.merge(Logger.layer([]))
  )
  return Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({
      kernelType: "LINUX",
      kernel: GuestProgram.kernel(run.program),
      cpus: 1,
      guestMemory: "2M",
      virtioVsock: true,
      vsockListeners: run.connections.filter(({ plan }) => plan.by === "guest").map((connection) => ({
        port: connection.hostPort,
        acceptor: run.acceptor(connection)
      }))
    })
    const endpoint = yield* (yield* lifecycle.bind).getHostVsockEndpoint
    const connects = run.connections.filter(({ plan }) => plan.by === "host").map((connection) =>
      endpoint.connect2(GUEST_PORTS + connection.index, { type: connection.plan.isSeqpacket ? "seqpacket" : "stream" })
        .pipe(
          Effect.timeoutOption("3 seconds"),
          Effect.tapError(({ status }) => Effect.sync(() => run.note(`connect2: ${status}`))),
          Effect.flatMap((socket) => {
            if (socket._tag === "Some") return run.serve(connection, socket.value)
            run.note("connect2: given up")
            return Effect.void
          }),
          Effect.scoped,
          Effect.exit
        )
    )
    const last: Effect.Effect<void> = Effect.suspend(() =>
      run.hostIsDone
        ? Effect.void
        : Effect.andThen(
          Effect.exit(Effect.scoped(endpoint.connect2(LAST_PORT))),
          Effect.andThen(Effect.sleep(100), last)
        )
    )
    const director = yield* Effect.forkChild(
      Effect.andThen(Effect.all(connects, { concurrency: "unbounded" }), last)
    )
    const stop = yield* lifecycle.run
    check(stop._tag === "PowerOff", `the machine ended by ${stop._tag}`)
    // A machine that has ended leaves nobody waiting, without anybody's help.
    yield* Fiber.join(director)
    if (defects.defects > 0) run.note("device breaks")
    const fake = yield* FakeHypervisor.FakeHypervisor
    assert.deepStrictEqual(yield* fake.violations, [])
    assert.deepStrictEqual(yield* fake.openResources, [])
  }).pipe(Effect.provide(host), Effect.scoped)
}

/** Runs a script. Throws a report when something of what is promised does not hold. */
export const runMachine = (script: Script, seed: number, happened: Happened = new Map()): void => {
  let alive = 0
  const counter: Metric.FiberRuntimeMetricsService = {
    recordFiberStart: () => void alive++,
    recordFiberEnd: () => void alive--
  }
  const run = new Run(script, happened)
  let left = 0
  const counted = Effect.gen(function*() {
    const before = alive
    yield* machine(run)
    left = alive - before
  }).pipe(Effect.provideService(Metric.FiberRuntimeMetrics, counter))
  Simulation.check(counted, { seed })
  assert.strictEqual(left, 0, "fibers outlive the machine")
}

/** Plays schedules; the same seed plays the same. The smallest script that fails, in words, or `undefined`. */
export const failingMachine = (seed: number, count: number, beforeEach = () => true): string | undefined => {
  const { counterexample, errorInstance, failed } = fc.check(
    fc.property(machineScript, fc.integer(), (script, seed) => {
      if (beforeEach()) runMachine(script, seed)
    }),
    { seed, numRuns: count }
  )
  if (!failed || counterexample === null) return undefined
  return `A machine does not stand a schedule of the ${count} from seed ${seed}: ${String(errorInstance)}\n  ${
    JSON.stringify(counterexample)
  }`
}
