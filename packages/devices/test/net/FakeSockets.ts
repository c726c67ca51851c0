/** Sockets of a host that does not exist: each is an object whose other end the test holds. */
import * as Effect from "effect/Effect"
import type {
  HostEndpoint,
  HostSocketFailure,
  HostSockets,
  HostTcp,
  HostTcpEvents,
  HostUdp,
  HostUdpEvents
} from "../../src/net/user/HostSockets.ts"

/** A TCP socket whose other end the test holds. What the system has to take, it takes when the test says so. */
export class FakeTcp implements HostTcp {
  readonly to: HostEndpoint
  events: HostTcpEvents | undefined
  readonly received: Array<Uint8Array> = []
  /** Bytes that were written and not taken yet. */
  unwritten = 0
  paused = false
  ended = false
  open = true
  wasReset = false
  #toldEnd = false
  #told = false

  constructor(to: HostEndpoint, events: HostTcpEvents | undefined) {
    this.to = to
    this.events = events
  }

  write(bytes: Uint8Array): void {
    if (this.ended) throw new Error("write after end")
    if (!this.open) throw new Error("write after close")
    this.received.push(bytes)
    this.unwritten += bytes.length
  }
  end(): void {
    if (this.ended) throw new Error("end twice")
    this.ended = true
  }
  reset(): void {
    this.open = false
    this.wasReset = true
  }
  pause(): void {
    this.paused = true
  }
  resume(): void {
    this.paused = false
  }

  /** The bytes that the guest has sent. */
  get bytes(): Uint8Array {
    return concat(this.received)
  }
  /** The system takes up to `count` of what was written. */
  take(count = this.unwritten): void {
    const took = Math.min(count, this.unwritten)
    this.unwritten -= took
    if (took > 0 && this.open) this.events?.written(took)
    this.#finish()
  }
  connect(): void {
    if (this.open) this.events?.connected()
  }
  say(bytes: Uint8Array): void {
    if (this.open) this.events?.data(bytes)
  }
  /** The other end sends no more. */
  finish(): void {
    if (!this.open || this.#toldEnd) return
    this.#toldEnd = true
    this.events?.end()
    this.#finish()
  }
  fail(failure: HostSocketFailure): void {
    if (!this.open) return
    this.open = false
    this.events?.failed(failure)
  }
  #finish(): void {
    if (!this.open || this.#told || !this.#toldEnd || !this.ended || this.unwritten > 0) return
    this.#told = true
    this.open = false
    this.events?.closed()
  }
}

/** A UDP socket whose other end the test holds. */
export class FakeUdp implements HostUdp {
  readonly to: HostEndpoint
  readonly events: HostUdpEvents
  readonly sent: Array<Uint8Array> = []
  open = true

  constructor(to: HostEndpoint, events: HostUdpEvents) {
    this.to = to
    this.events = events
  }

  send(bytes: Uint8Array): void {
    if (!this.open) throw new Error("send after close")
    this.sent.push(bytes)
  }
  close(): void {
    this.open = false
  }
  say(bytes: Uint8Array): void {
    if (this.open) this.events.message(bytes)
  }
}

/** The sockets of a network under test. */
export class FakeSockets {
  readonly tcp: Array<FakeTcp> = []
  readonly udp: Array<FakeUdp> = []
  nameservers: ReadonlyArray<HostEndpoint> = [{ address: "192.0.2.53", port: 53 }]

  readonly service: HostSockets["Service"] = {
    connectTcp: (to, events) => {
      const socket = new FakeTcp(to, events)
      this.tcp.push(socket)
      return socket
    },
    connectUdp: (to, events) => {
      const socket = new FakeUdp(to, events)
      this.udp.push(socket)
      return socket
    },
    listenTcp: (at) => Effect.succeed(at),
    bindUdp: (at) => Effect.succeed({ address: at, send: () => {} }),
    nameservers: () => this.nameservers
  }

  /** Sockets that are open. */
  get open(): number {
    return [...this.tcp, ...this.udp].filter((socket) => socket.open).length
  }
}

export const concat = (pieces: ReadonlyArray<Uint8Array>): Uint8Array => {
  const whole = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0))
  let at = 0
  for (const piece of pieces) {
    whole.set(piece, at)
    at += piece.length
  }
  return whole
}
