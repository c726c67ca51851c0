/** A user-mode network with fake sockets, a clock that the test moves, and the frames of its guest. */
import { NetFrame } from "@troupe/core/NetFrame"
import * as Result from "effect/Result"
import { allow, type NetConnection, type NetDecision } from "../../src/net/user/NetPolicy.ts"
import { UserNet } from "../../src/net/user/UserNet.ts"
import { planUserNet, type UserNetOptions } from "../../src/net/user/UserNetPlan.ts"
import { FakeSockets } from "./FakeSockets.ts"

export const GUEST_MAC = Uint8Array.of(2, 0, 0, 0, 0, 1)
export const GATEWAY = 0x0a00_0202
export const NAMESERVER = 0x0a00_0203
export const GUEST = 0x0a00_020f

export interface Received {
  readonly bytes: Uint8Array
  readonly flags: number
  readonly gsoType: number
  readonly gsoSize: number
}

export class NetworkUnderTest {
  now = 1000
  wakeAt = Number.POSITIVE_INFINITY
  readonly sockets = new FakeSockets()
  readonly asked: Array<NetConnection> = []
  decide: (connection: NetConnection, answer: (decision: NetDecision) => void) => () => void = (_, answer) => {
    answer(allow)
    return () => {}
  }
  readonly net: UserNet
  /** Times that the listener was told. */
  told = 0
  #random = 12345

  constructor(options: UserNetOptions = {}, offloads = 0) {
    this.net = new UserNet(Result.getOrThrow(planUserNet(options)), GUEST_MAC, {
      now: () => this.now,
      random32: () => {
        this.#random = (Math.imul(this.#random, 1_664_525) + 1_013_904_223) >>> 0
        return this.#random
      },
      sockets: this.sockets.service,
      decide: (connection, answer) => {
        this.asked.push(connection)
        return this.decide(connection, answer)
      },
      wakeAt: (time) => {
        this.wakeAt = Math.min(this.wakeAt, time)
      }
    })
    this.net.allowOffloads(offloads)
    this.net.listen({
      readable: () => {
        this.told++
      },
      writable: () => {},
      linkChanged: () => {}
    })
  }

  /** The guest sends a frame. */
  send(bytes: Uint8Array, offloads: Partial<Pick<NetFrame, "flags" | "gsoType" | "gsoSize">> = {}): void {
    const frame = new NetFrame()
    frame.add(Uint8Array.from(bytes), 0, bytes.length)
    Object.assign(frame, offloads)
    this.net.send(frame)
    this.net.flush()
  }

  /** The next frame for the guest. One that does not fit is lost. */
  receive(room = 65_553): Received | undefined {
    const buffer = new Uint8Array(room)
    const frame = new NetFrame()
    frame.add(buffer, 0, room)
    const length = this.net.receive(frame)
    if (length < 0) this.net.discard()
    if (length <= 0) return undefined
    return { bytes: buffer.slice(0, length), flags: frame.flags, gsoType: frame.gsoType, gsoSize: frame.gsoSize }
  }

  /** All frames for the guest. */
  receiveAll(room?: number): Array<Received> {
    const frames: Array<Received> = []
    for (let i = 0; i < 10_000; i++) {
      const frame = this.receive(room)
      if (frame === undefined) return frames
      frames.push(frame)
    }
    throw new Error("the network never ends to send")
  }

  /** Moves the clock, and looks after what is due. */
  pass(milliseconds: number): void {
    this.now += milliseconds
    if (this.now < this.wakeAt) return
    this.wakeAt = Number.POSITIVE_INFINITY
    this.wakeAt = Math.min(this.wakeAt, this.net.tick(this.now))
  }
}
