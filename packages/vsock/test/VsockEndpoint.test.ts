/** The endpoint of a machine as its host uses it: listeners, connections, ends, and guests that talk to each other. */
import { assert, describe, it } from "@effect/vitest"
import type { HostVsockEndpoint, VsockSocket } from "@troupe/core/HostVsockEndpoint"
import { VSOCK_PORT_ANY, VsockRefused } from "@troupe/core/HostVsockEndpoint"
import { type VsockDriver, VsockStream } from "@troupe/core/testing/drivers/VsockDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Ref from "effect/Ref"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { TestClock } from "effect/testing"
import { VsockManager } from "../src/VsockManager.ts"
import { create, guestOf, layerMachine } from "./Machines.ts"

const encode = (text: string) => new TextEncoder().encode(text)
const decode = (bytes: Uint8Array | undefined) => new TextDecoder().decode(bytes)

/** One machine whose guests reach nobody but the host. */
const alone = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
  Effect.flatMap(VsockManager, (manager) => Effect.provide(Effect.scoped(Effect.asVoid(effect)), layerMachine(manager)))
    .pipe(
      Effect.provide(VsockManager.layer)
    )

const idle = guestOf(function*() {})

describe("Listening", () => {
  it.effect("is for one at a time on each port, and ends with its scope", () =>
    alone(Effect.gen(function*() {
      const { endpoint } = yield* create(idle)
      const accept = () => Effect.succeed(() => Effect.void)
      yield* Effect.scoped(Effect.gen(function*() {
        yield* endpoint.listen(5, accept)
        const error = yield* Effect.flip(endpoint.listen(5, accept))
        assert.deepInclude(error, { status: "ALREADY_BOUND", hostPort: 5 })
        assert.include(error.message, "host port 5")
      }))
      yield* endpoint.listen(5, accept)
      assert.deepInclude(yield* Effect.flip(endpoint.listen(-1, accept)), { status: "INVALID_ARGS", hostPort: -1 })
    })))

  it.effect("takes a port over that the configuration has, and the connections that wait there", () =>
    alone(Effect.gen(function*() {
      let answer = ""
      const program = guestOf(function*(cpu, vsock) {
        const stream = yield* VsockStream.connect(cpu, vsock, 1000, 5)
        answer = decode(yield* stream?.read(cpu) ?? [])
      })
      const { endpoint, lifecycle } = yield* create(program, [{ port: 5 }])
      const run = yield* Effect.forkChild(lifecycle.run)
      // The guest comes to its connection, and waits.
      for (let turn = 0; turn < 100; turn++) yield* Effect.yieldNow
      assert.strictEqual(answer, "")
      yield* endpoint.listen(5, () => Effect.succeed((socket) => socket.write(encode("late"))))
      yield* Fiber.join(run)
      assert.strictEqual(answer, "late")
    })))

  it.effect("gives a port of the configuration back to it, where connections wait again", () =>
    alone(Effect.gen(function*() {
      const answers: Array<string> = []
      const firstHeard = yield* Deferred.make<void>()
      const program = guestOf(function*(cpu, vsock) {
        for (const port of [1000, 1001]) {
          const stream = yield* VsockStream.connect(cpu, vsock, port, 5)
          if (stream === undefined) throw new Error("refused")
          answers.push(decode(yield* stream.read(cpu)))
          while ((yield* stream.read(cpu)) !== undefined);
          Deferred.doneUnsafe(firstHeard, Effect.void)
        }
      })
      const { endpoint, lifecycle } = yield* create(program, [{ port: 5 }])
      const answer = (text: string) => endpoint.listen(5, () => Effect.succeed((socket) => socket.write(encode(text))))
      const run = yield* Effect.scoped(Effect.gen(function*() {
        yield* answer("first")
        const run = yield* Effect.forkDetach(lifecycle.run)
        yield* Deferred.await(firstHeard)
        return run
      }))
      for (let turn = 0; turn < 100; turn++) yield* Effect.yieldNow
      yield* answer("second")
      yield* Fiber.join(run)
      assert.deepStrictEqual(answers, ["first", "second"])
    })))

  it.effect("on thousands of ports is free again on each of them when it ends", () =>
    alone(Effect.gen(function*() {
      const { endpoint } = yield* create(idle)
      const accept = () => Effect.succeed(() => Effect.void)
      const ports = Array.from({ length: 5000 }, (_, index) => index * 7)
      for (let round = 0; round < 2; round++) {
        yield* Effect.scoped(Effect.forEach(ports, (port) => endpoint.listen(port, accept), { concurrency: 100 }))
      }
    })))

  it.effect("on every port serves those that nobody else listens on", () =>
    alone(Effect.gen(function*() {
      const answers: Array<string> = []
      const program = guestOf(function*(cpu, vsock) {
        for (const port of [5, 6, 0xffff_fffe]) {
          const stream = yield* VsockStream.connect(cpu, vsock, 1000 + answers.length, port)
          if (stream === undefined) throw new Error("refused")
          answers.push(decode(yield* stream.read(cpu)))
          while ((yield* stream.read(cpu)) !== undefined);
        }
      })
      const { endpoint, lifecycle } = yield* create(program)
      const answer = (text: string) => () => Effect.succeed((socket: VsockSocket) => socket.write(encode(text)))
      yield* endpoint.listen(VSOCK_PORT_ANY, ({ port }) => answer(`any ${port}`)())
      yield* endpoint.listen(6, answer("six"))
      yield* lifecycle.run
      assert.deepStrictEqual(answers, ["any 5", "six", "any 4294967294"])
    })))

  it.effect("refuses by an acceptor that does not want a connection", () =>
    alone(Effect.gen(function*() {
      let isRefused = false
      const program = guestOf(function*(cpu, vsock) {
        isRefused = (yield* VsockStream.connect(cpu, vsock, 1000, 5)) === undefined
      })
      const { endpoint, lifecycle } = yield* create(program)
      yield* endpoint.listen(5, ({ srcPort }) => Effect.fail(new VsockRefused({ reason: `not ${srcPort}` })))
      yield* lifecycle.run
      assert.isTrue(isRefused)
    })))

  it.effect("gives a stream of connections, each open until it is closed", () =>
    alone(Effect.gen(function*() {
      const program = guestOf(function*(cpu, vsock) {
        for (const port of [1000, 1001]) {
          const stream = yield* VsockStream.connect(cpu, vsock, port, 5)
          if (stream === undefined) throw new Error("refused")
          yield* stream.write(cpu, encode(`from ${port}`))
          while ((yield* stream.read(cpu)) !== undefined);
        }
      })
      const { endpoint, lifecycle } = yield* create(program, [{ port: 5 }])
      const host = yield* Effect.forkChild(
        endpoint.connections(5).pipe(
          Stream.mapEffect((socket: VsockSocket) => Effect.tap(socket.read, () => socket.close)),
          Stream.map(decode),
          Stream.take(2),
          Stream.runCollect
        )
      )
      yield* lifecycle.run
      assert.deepStrictEqual([...(yield* Fiber.join(host))], ["from 1000", "from 1001"])
    })))
})

describe("A handler", () => {
  it.effect("that fails resets its own connection, and no other", () =>
    alone(Effect.gen(function*() {
      const ends: Array<string> = []
      const program = guestOf(function*(cpu, vsock) {
        for (const port of [5, 6]) {
          const stream = yield* VsockStream.connect(cpu, vsock, 1000 + port, port)
          ends.push(decode(yield* stream?.read(cpu) ?? []))
        }
      })
      const { endpoint, lifecycle } = yield* create(program)
      yield* endpoint.listen(5, () => Effect.succeed(() => Effect.die(new Error("injected"))))
      yield* endpoint.listen(6, () => Effect.succeed((socket) => socket.write(encode("fine"))))
      yield* lifecycle.run
      assert.deepStrictEqual(ends, ["", "fine"])
    })))

  it.effect("that fails has its connection reset, and one that returns has it ended in good order", () =>
    alone(Effect.gen(function*() {
      const ops: Array<number> = []
      const program = guestOf(function*(cpu, vsock) {
        for (const port of [5, 6]) {
          yield* vsock.send(cpu, { op: 1, srcPort: 1000 + port, dstPort: port, bufAlloc: 100 })
          ops.push((yield* vsock.receive(cpu)).op)
          ops.push((yield* vsock.receive(cpu)).op)
        }
      })
      const { endpoint, lifecycle } = yield* create(program)
      yield* endpoint.listen(5, () => Effect.succeed(() => Effect.fail("injected")))
      yield* endpoint.listen(6, () => Effect.succeed(() => Effect.void))
      yield* lifecycle.run
      assert.deepStrictEqual(ops, [2, 3, 2, 4])
    })))

  it.effect("is not asked for any more by a guest that has given up", () =>
    alone(Effect.gen(function*() {
      const interrupted = yield* Deferred.make<void>()
      const asked = yield* Deferred.make<void>()
      const program = guestOf(function*(cpu, vsock) {
        yield* vsock.send(cpu, { op: 1, srcPort: 1000, dstPort: 5 })
        while (!Deferred.isDoneUnsafe(asked)) yield* cpu.yield()
        yield* vsock.send(cpu, { op: 3, srcPort: 1000, dstPort: 5 })
        while (!Deferred.isDoneUnsafe(interrupted)) yield* cpu.yield()
      })
      const { endpoint, lifecycle } = yield* create(program)
      yield* endpoint.listen(5, () =>
        Effect.andThen(
          Deferred.succeed(asked, undefined),
          Effect.onInterrupt(Effect.never, () => Deferred.succeed(interrupted, undefined))
        ))
      yield* lifecycle.run
    })))

  it.effect("has a scope of its own, which closes with it", () =>
    alone(Effect.gen(function*() {
      const closed = yield* Ref.make(0)
      const program = guestOf(function*(cpu, vsock) {
        const stream = yield* VsockStream.connect(cpu, vsock, 1000, 5)
        while ((yield* stream?.read(cpu) ?? []) !== undefined);
      })
      const { endpoint, lifecycle } = yield* create(program)
      yield* endpoint.listen(5, () =>
        Effect.succeed(() => Effect.addFinalizer(() => Ref.update(closed, (count) => count + 1))))
      yield* lifecycle.run
      assert.strictEqual(yield* Ref.get(closed), 1)
    })))

  it.effect("is interrupted when its machine is gone", () =>
    Effect.gen(function*() {
      const interrupted = yield* Deferred.make<void>()
      yield* alone(Effect.gen(function*() {
        const program = guestOf(function*(cpu, vsock) {
          yield* VsockStream.connect(cpu, vsock, 1000, 5)
        })
        const { endpoint, lifecycle } = yield* create(program)
        yield* endpoint.listen(5, () =>
          Effect.succeed(() => Effect.onInterrupt(Effect.never, () => Deferred.succeed(interrupted, undefined))))
        yield* lifecycle.run
      }))
      yield* Deferred.await(interrupted)
    }))
})

describe("Connecting", () => {
  it.effect("can be given up, and the guest hears of it", () =>
    alone(Effect.gen(function*() {
      const packets: Array<number> = []
      const asked = yield* Deferred.make<void>()
      const program = guestOf(function*(cpu, vsock) {
        packets.push((yield* vsock.receive(cpu)).op)
        Deferred.doneUnsafe(asked, Effect.void)
        packets.push((yield* vsock.receive(cpu)).op)
      })
      const { endpoint, lifecycle } = yield* create(program)
      const run = yield* Effect.forkChild(lifecycle.run)
      const connecting = yield* Effect.forkChild(Effect.scoped(endpoint.connect2(80)))
      yield* Deferred.await(asked)
      yield* Fiber.interrupt(connecting)
      yield* Fiber.join(run)
      assert.deepStrictEqual(packets, [1, 3])
    })))

  it.effect("has no time-out but that of the caller", () =>
    alone(Effect.gen(function*() {
      const { endpoint, lifecycle } = yield* create(guestOf(function*(cpu, vsock) {
        yield* vsock.receive(cpu)
        yield* vsock.receive(cpu)
      }))
      const run = yield* Effect.forkChild(lifecycle.run)
      const connecting = yield* Effect.forkChild(
        Effect.scoped(endpoint.connect2(80)).pipe(Effect.timeoutOption("1 minute"))
      )
      yield* TestClock.adjust("59 seconds")
      assert.isUndefined(connecting.pollUnsafe())
      yield* TestClock.adjust("1 second")
      assert.strictEqual((yield* Fiber.join(connecting))._tag, "None")
      yield* Fiber.join(run)
    })))

  it.effect("ends in good order with its scope, within five seconds of a guest that does not answer", () =>
    alone(Effect.gen(function*() {
      const packets: Array<number> = []
      const { endpoint, lifecycle } = yield* create(guestOf(function*(cpu, vsock) {
        const request = yield* vsock.receive(cpu)
        yield* vsock.send(cpu, { op: 2, srcPort: request.dstPort, dstPort: request.srcPort, bufAlloc: 100 })
        packets.push((yield* vsock.receive(cpu)).op)
        packets.push((yield* vsock.receive(cpu)).op)
      }))
      const run = yield* Effect.forkChild(lifecycle.run)
      const scope = yield* Scope.make()
      yield* Scope.provide(endpoint.connect2(80), scope)
      yield* Scope.close(scope, yield* Effect.exit(Effect.void))
      yield* TestClock.adjust("5 seconds")
      yield* Fiber.join(run)
      assert.deepStrictEqual(packets, [4, 3])
    })))
})

describe("A reader", () => {
  it.effect("hears of a reset after all that came before it", () =>
    alone(Effect.gen(function*() {
      const heard = yield* Deferred.make<string>()
      const program = guestOf(function*(cpu, vsock) {
        const stream = yield* VsockStream.connect(cpu, vsock, 1000, 5)
        yield* stream?.write(cpu, encode("before")) ?? []
        yield* vsock.send(cpu, { op: 3, srcPort: 1000, dstPort: 5 })
      })
      const { endpoint, lifecycle } = yield* create(program)
      yield* endpoint.listen(5, () =>
        Effect.succeed((socket) =>
          Effect.gen(function*() {
            const bytes = decode(yield* socket.read)
            const error = yield* Effect.flip(socket.read)
            yield* Deferred.succeed(heard, `${bytes}, ${error.status}`)
          })
        ))
      yield* lifecycle.run
      assert.strictEqual(yield* Deferred.await(heard), "before, PEER_CLOSED")
    })))
})

describe("A manager", () => {
  it.effect("tells of connections that have ended", () =>
    Effect.gen(function*() {
      const manager = yield* VsockManager
      const program = guestOf(function*(cpu, vsock) {
        const stream = yield* VsockStream.connect(cpu, vsock, 1000, 5)
        yield* stream?.close(cpu) ?? []
      })
      const seen = yield* Effect.forkChild(Stream.runHead(manager.shutdowns), { startImmediately: true })
      yield* Effect.scoped(Effect.gen(function*() {
        const { endpoint, lifecycle } = yield* create(program)
        yield* endpoint.listen(5, () => Effect.succeed((socket) => Effect.asVoid(socket.read)))
        yield* lifecycle.run
      })).pipe(Effect.provide(layerMachine(manager)))
      assert.deepStrictEqual(Option.getOrUndefined(yield* Fiber.join(seen)), {
        srcCid: 2,
        srcPort: 5,
        dstCid: 3,
        dstPort: 1000
      })
    }).pipe(Effect.provide(VsockManager.layer)))
})

describe("A machine that is gone", () => {
  it.effect("refuses those who wait for its driver, and those who come later", () =>
    Effect.gen(function*() {
      let kept: HostVsockEndpoint["Service"] | undefined
      let waiting: Fiber.Fiber<unknown, unknown> | undefined
      yield* alone(Effect.gen(function*() {
        const { endpoint } = yield* create(idle)
        kept = endpoint
        waiting = yield* Effect.forkDetach(Effect.scoped(Effect.flip(endpoint.connect2(80))))
        yield* Effect.yieldNow
      }))
      assert.deepInclude(yield* Fiber.join(waiting ?? (yield* Effect.die("nobody waits"))), {
        status: "CONNECTION_REFUSED"
      })
      if (kept !== undefined) {
        assert.deepInclude(yield* Effect.scoped(Effect.flip(kept.connect2(80))), { status: "CONNECTION_REFUSED" })
      }
    }))
})

describe("Guests of one manager", () => {
  const server = guestOf(function*(cpu, vsock) {
    const stream = yield* VsockStream.accept(cpu, vsock, 80)
    const question = yield* stream.read(cpu)
    if (question !== undefined) yield* stream.write(cpu, encode(`${decode(question)} from ${vsock.cid}`))
    while ((yield* stream.read(cpu)) !== undefined);
  })

  const two = (policy: boolean) =>
    Effect.gen(function*() {
      const manager = yield* VsockManager
      let answer = "none"
      const client = guestOf(function*(cpu, vsock) {
        const stream = yield* VsockStream.connect(cpu, vsock, 1000, 80, 3)
        if (stream === undefined) {
          answer = "refused"
          return
        }
        yield* stream.write(cpu, encode("question"))
        answer = decode(yield* stream.read(cpu))
        yield* stream.close(cpu)
      })
      yield* Effect.scoped(Effect.gen(function*() {
        const first = yield* Layer.build(layerMachine(manager))
        const second = yield* Layer.build(layerMachine(manager))
        const a = yield* Effect.provide(create(server), first)
        const b = yield* Effect.provide(create(client), second)
        assert.deepStrictEqual<ReadonlyArray<number>>(yield* manager.guests, [3, 4])
        assert.deepStrictEqual([a.endpoint.guestCid, b.endpoint.guestCid], [3, 4])
        const serving = yield* Effect.forkChild(a.lifecycle.run)
        yield* b.lifecycle.run
        if (policy) yield* Fiber.join(serving)
        else yield* Fiber.interrupt(serving)
      }))
      assert.deepStrictEqual(yield* manager.guests, [])
      return answer
    }).pipe(Effect.provide(VsockManager.layerWith({ policy: () => Effect.succeed(policy) })))

  it.effect("have context IDs from 3 on, and talk to each other when the policy lets them", () =>
    Effect.gen(function*() {
      assert.strictEqual(yield* two(true), "question from 3")
    }))

  it.effect("are refused when it does not", () =>
    Effect.gen(function*() {
      assert.strictEqual(yield* two(false), "refused")
    }))

  /** What the server hears of a client that does this after they have spoken. */
  const heard = (end: (cpu: GuestCpu, stream: VsockStream, vsock: VsockDriver) => GuestRoutine) =>
    Effect.gen(function*() {
      const manager = yield* VsockManager
      const ops: Array<string> = []
      const listener = guestOf(function*(cpu, vsock) {
        const request = yield* vsock.receive(cpu)
        const answer = (op: number) =>
          vsock.send(cpu, {
            op,
            srcPort: request.dstPort,
            dstPort: request.srcPort,
            dstCid: request.srcCid,
            bufAlloc: 1000
          })
        yield* answer(2)
        for (;;) {
          const { data, flags, op } = yield* vsock.receive(cpu)
          if (op === 6 || op === 7) continue
          ops.push(op === 5 ? decode(data) : op === 4 ? `shutdown ${flags}` : `op ${op}`)
          if (op === 4 && flags === 3) yield* answer(3)
          if (op === 3 || (op === 4 && flags === 3)) return
        }
      })
      const client = guestOf(function*(cpu, vsock) {
        const stream = yield* VsockStream.connect(cpu, vsock, 1000, 80, 3)
        if (stream === undefined) throw new Error("refused")
        yield* stream.write(cpu, encode("all of it"))
        yield* end(cpu, stream, vsock)
      })
      yield* Effect.scoped(Effect.gen(function*() {
        const first = yield* Layer.build(layerMachine(manager))
        const second = yield* Layer.build(layerMachine(manager))
        const a = yield* Effect.provide(create(listener), first)
        const b = yield* Effect.provide(create(client), second)
        const serving = yield* Effect.forkChild(a.lifecycle.run)
        yield* b.lifecycle.run
        yield* Fiber.join(serving)
      }))
      return ops
    }).pipe(Effect.provide(VsockManager.layerWith({ policy: () => Effect.succeed(true) })))

  it.effect("get each other's bytes in order, whatever pieces they come in", () =>
    Effect.gen(function*() {
      const sizes = [1, 2000, 3, 1500, 2048, 700, 1, 1, 2047]
      const sent = Uint8Array.from({ length: 30 * sizes.reduce((a, b) => a + b) }, (_, place) =>
        (place * 7 + (place >> 8)) & 0xff)
      const got: Array<number> = []
      const manager = yield* VsockManager
      const receiver = guestOf(function*(cpu, vsock) {
        const stream = yield* VsockStream.accept(cpu, vsock, 80)
        for (let bytes = yield* stream.read(cpu); bytes !== undefined; bytes = yield* stream.read(cpu)) {
          got.push(...bytes)
        }
      })
      const sender = guestOf(function*(cpu, vsock) {
        const stream = yield* VsockStream.connect(cpu, vsock, 1000, 80, 3)
        let at = 0
        for (let piece = 0; at < sent.length; piece++) {
          const part = sent.subarray(at, at + (sizes[piece % sizes.length] ?? 1))
          yield* stream?.write(cpu, part) ?? []
          at += part.length
        }
        yield* stream?.close(cpu) ?? []
      })
      yield* Effect.scoped(Effect.gen(function*() {
        const a = yield* Effect.provide(create(receiver), yield* Layer.build(layerMachine(manager)))
        const b = yield* Effect.provide(create(sender), yield* Layer.build(layerMachine(manager)))
        const receiving = yield* Effect.forkChild(a.lifecycle.run)
        const sending = yield* Effect.forkChild(b.lifecycle.run)
        yield* Fiber.join(receiving)
        yield* Fiber.join(sending)
      }))
      assert.deepStrictEqual(Uint8Array.from(got), sent)
    }).pipe(Effect.provide(VsockManager.layerWith({
      policy: () =>
        Effect.succeed(true)
    }))))

  it.effect("hear of each other's end, after all that was sent", () =>
    Effect.gen(function*() {
      const ops = yield* heard(function*(cpu, stream) {
        yield* stream.close(cpu)
      })
      assert.deepStrictEqual(ops, ["all of it", "shutdown 2", "shutdown 3"])
    }))

  it.effect("hear of each other's reset, and do not take it for an end in good order", () =>
    Effect.gen(function*() {
      const ops = yield* heard(function*(cpu, stream, vsock) {
        yield* vsock.send(cpu, { op: 3, srcPort: stream.port, dstPort: stream.hostPort, dstCid: 3 })
      })
      assert.strictEqual(ops.at(-1), "op 3")
    }))
})
