/**
 * A guest on the wire of a user-mode network, for tests with real sockets: a second network with the addresses the other way round,
 * whose forwarded connections are those that the guest makes.
 */
import type { NetPort } from "@troupe/core/NetBackend"
import { NetFrame } from "@troupe/core/NetFrame"
import type { HostTcp, HostTcpEvents, HostUdp } from "@troupe/devices/net/user/HostSockets"
import { parseIpv4 } from "@troupe/devices/net/user/Ipv4"
import { allow } from "@troupe/devices/net/user/NetPolicy"
import { UserNet } from "@troupe/devices/net/user/UserNet"
import type { UdpClients } from "@troupe/devices/net/user/UserUdp"

const address = (text: string): number => parseIpv4(text) ?? 0

/** What one end of a connection of the guest has seen. */
export class GuestStream implements HostTcp {
  readonly received: Array<Uint8Array> = []
  bytes = 0
  ended = false
  wasReset = false
  /** How many bytes it reads at once before it has to be told to go on; unlimited at first. */
  events: HostTcpEvents | undefined
  paused = false
  held = 0
  /** Whether what comes is taken at once. */
  takes = true

  write(bytes: Uint8Array): void {
    this.received.push(bytes)
    this.bytes += bytes.length
    this.held += bytes.length
    if (this.takes) this.take()
  }
  /** Takes what has come. */
  take(): void {
    const { held } = this
    this.held = 0
    // Sockets do not call back at once.
    if (held > 0) queueMicrotask(() => this.events?.written(held))
  }
  end(): void {
    this.ended = true
  }
  reset(): void {
    this.wasReset = true
  }
  pause(): void {
    this.paused = true
  }
  resume(): void {
    this.paused = false
  }
}

/** A guest at a port. */
export class GuestEnd {
  readonly net: UserNet
  readonly datagrams: Array<Uint8Array> = []
  readonly #port: NetPort
  readonly #frame = new NetFrame()
  readonly #buffer = new Uint8Array(65_553)
  #scheduled = false
  #random = 99

  constructor(port: NetPort, remote = "192.0.2.1") {
    this.#port = port
    this.net = new UserNet(
      {
        subnet: { base: 0, prefix: 0 },
        gateway: address("10.0.2.15"),
        nameserver: address("10.0.2.99"),
        guest: address(remote),
        broadcast: 0xffff_ffff,
        mtu: 1500,
        hostname: "",
        domain: "",
        tcpConnections: 100,
        udpFlows: 100,
        tcpBuffer: 0x8_0000,
        tcpMemory: 0x400_0000
      },
      Uint8Array.of(0x52, 0x55, 10, 0, 2, 2),
      {
        now: () => performance.now(),
        random32: () => (this.#random = (Math.imul(this.#random, 1_664_525) + 1_013_904_223) >>> 0),
        sockets: {
          connectTcp: () => new GuestStream(),
          connectUdp: () => ({ send: () => {}, close: () => {} }),
          listenTcp: () => {
            throw new Error("not here")
          },
          bindUdp: () => {
            throw new Error("not here")
          },
          nameservers: () => []
        },
        decide: (_, answer) => {
          answer(allow)
          return () => {}
        },
        wakeAt: () => {}
      }
    )
    const offloads = port.delivers & port.accepts
    port.allowOffloads(offloads)
    this.net.allowOffloads(offloads)
    const listener = { readable: () => this.#schedule(), writable: () => {}, linkChanged: () => {} }
    port.listen(listener)
    this.net.listen(listener)
  }

  /** Connects to a port of the remote. */
  connect(port: number): GuestStream {
    const stream = new GuestStream()
    stream.events = this.net.acceptTcp(stream, { address: "127.0.0.1", port: 1 }, port)
    this.#schedule()
    return stream
  }

  /** Sends a datagram to a port of the remote. What comes back is in {@link datagrams}. */
  datagram(bytes: Uint8Array, port: number, clients: UdpClients = new Map()): UdpClients {
    const reply: HostUdp = { send: (answer) => void this.datagrams.push(answer), close: () => {} }
    this.net.acceptUdp(bytes, { address: "127.0.0.1", port: 1 }, port, clients, reply)
    this.#schedule()
    return clients
  }

  /** Ends the guest. */
  close(): void {
    this.#port.listen(undefined)
    this.net.close()
  }

  #schedule(): void {
    if (this.#scheduled) return
    this.#scheduled = true
    setImmediate(() => {
      this.#scheduled = false
      this.#exchange()
    })
  }

  #exchange(): void {
    for (let turn = 0; turn < 64; turn++) {
      const sent = this.#move(this.net, this.#port) + this.#move(this.#port, this.net)
      if (sent === 0) return
    }
    this.#schedule()
  }

  #move(from: NetPort, to: NetPort): number {
    let moved = 0
    for (; moved < 64; moved++) {
      this.#frame.clear()
      this.#frame.add(this.#buffer, 0, this.#buffer.length)
      const length = from.receive(this.#frame)
      if (length <= 0) break
      const { checksumOffset, checksumStart, flags, gsoSize, gsoType, headerLength } = this.#frame
      this.#frame.clear()
      this.#frame.add(this.#buffer, 0, length)
      Object.assign(this.#frame, { checksumOffset, checksumStart, flags, gsoSize, gsoType, headerLength })
      to.send(this.#frame)
    }
    if (moved > 0) to.flush?.()
    return moved
  }
}
