/**
 * The TCP and UDP of this host's kernel as the guest of a user-mode network, over a TAP interface. Runs in a network namespace of
 * its own, in which it is root; prints a line for each check that held.
 */
import { NetBackend, type NetPort } from "@troupe/core/NetBackend"
import { FRAME_DATA_VALID, NetFrame } from "@troupe/core/NetFrame"
import { EntropySource } from "@troupe/devices/EntropySource"
import type { HostEndpoint } from "@troupe/devices/net/user/HostSockets"
import { allow, type NetPolicy, redirect } from "@troupe/devices/net/user/NetPolicy"
import { layerUserNet } from "@troupe/devices/net/user/UserNetBackend"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import assert from "node:assert/strict"
import { execFile, execFileSync, spawnSync } from "node:child_process"
import { createHash, randomBytes, randomFillSync } from "node:crypto"
import { createSocket } from "node:dgram"
import { once } from "node:events"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { connect, createServer, type Server, type Socket } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { layerWith } from "../../src/net/NodeSockets.ts"
import * as Tap from "../../src/net/Tap.ts"

const ip = (...args: ReadonlyArray<string>) => execFileSync("ip", args, { encoding: "utf8" })
const REMOTE = "192.0.2.1"
const GUEST = "10.0.2.15"
const MIB = 2 ** 20
/** Mebibytes of a large stream. */
const LARGE = Number(process.argv[2] ?? 8)

/** Carries frames between two ports, and loses some. */
const connectPorts = (left: NetPort, right: NetPort, lose: () => boolean) => {
  const buffer = new Uint8Array(70_000)
  const frame = new NetFrame()
  const move = (from: NetPort, to: NetPort): number => {
    let moved = 0
    for (; moved < 256; moved++) {
      frame.clear()
      frame.add(buffer, 0, buffer.length)
      const length = from.receive(frame)
      if (length <= 0) break
      const { checksumOffset, checksumStart, flags, gsoSize, gsoType, headerLength } = frame
      frame.clear()
      frame.add(buffer, 0, length)
      const offloads = {
        checksumOffset,
        checksumStart,
        flags: flags & ~FRAME_DATA_VALID,
        gsoSize,
        gsoType,
        headerLength
      }
      Object.assign(frame, offloads)
      if (!lose()) to.send(frame)
    }
    if (moved > 0) to.flush?.()
    return moved
  }
  let scheduled = false
  const schedule = () => {
    if (scheduled) return
    scheduled = true
    setImmediate(() => {
      scheduled = false
      if (move(left, right) + move(right, left) > 0) schedule()
    })
  }
  const listener = { readable: schedule, writable: schedule, linkChanged: () => {} }
  left.listen(listener)
  right.listen(listener)
  schedule()
}

/** Distance of two frames that are lost, at least and on average. */
const LOSS_DISTANCE_MIN = 25
const LOSS_DISTANCE = 50
/**
 * Frames that are still to be lost, and how many pass before the next one. A few, and some way apart: the kernel waits twice as
 * long after each repetition that is lost as well, so there is no bound on the time that losses without end can take.
 */
const loss = { left: 0, passing: 0 }
const isLost = (): boolean => {
  if (loss.left === 0 || loss.passing-- > 0) return false
  loss.left--
  loss.passing = LOSS_DISTANCE_MIN + Math.floor(2 * (LOSS_DISTANCE - LOSS_DISTANCE_MIN) * Math.random())
  return true
}
/** Where connections go, by the port that they ask for. */
const routes = new Map<number, number>()
const policy: NetPolicy = ({ destination, direction }) => {
  const port = routes.get(destination.port)
  return Effect.succeed(direction === "incoming" || port === undefined ? allow : redirect("127.0.0.1", port))
}
const forwards: Array<HostEndpoint> = []

const listen = async (handle: (socket: Socket) => void): Promise<Server> => {
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    socket.on("error", () => {})
    handle(socket)
  })
  server.listen(0, "127.0.0.1")
  await once(server, "listening")
  const address = server.address()
  if (typeof address === "object" && address !== null) routes.set(80, address.port)
  return server
}

const hashOf = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex")

/** Reads to the end. */
const read = async (socket: Socket): Promise<Buffer> => {
  const pieces: Array<Buffer> = []
  socket.on("data", (piece: Buffer) => pieces.push(piece))
  await once(socket, "end")
  return Buffer.concat(pieces)
}

/** Sends bytes to a server that answers with others, both at once. */
const exchange = async (size: number): Promise<number> => {
  const up = randomBytes(size)
  const down = randomBytes(size)
  const heard = Promise.withResolvers<Buffer>()
  const server = await listen((socket) => {
    void read(socket).then(heard.resolve, heard.reject)
    socket.end(down)
  })
  const began = performance.now()
  const socket = connect({ port: 80, host: REMOTE, allowHalfOpen: true })
  const answer = read(socket)
  socket.end(up)
  assert.equal(hashOf(await answer), hashOf(down))
  assert.equal(hashOf(await heard.promise), hashOf(up))
  server.close()
  return performance.now() - began
}

/** Runs a program while frames go back and forth. */
const run = (program: string, args: ReadonlyArray<string>) =>
  new Promise<string>((resolve, reject) =>
    execFile(program, args, { timeout: 30_000 }, (error, stdout, stderr) => {
      if (error === null) resolve(stdout)
      else reject(new Error(`${error.message}\n${stdout}\n${stderr}`))
    })
  )

/** Prints what a DHCP client has been told. */
const DHCP_SCRIPT = "#!/bin/sh\necho $1 $ip $subnet $router $dns $mtu $hostname $domain $lease\n"
const hasBusybox = spawnSync("busybox", ["udhcpc", "--help"]).status === 0

const checks: Record<string, () => Promise<string | undefined>> = {
  "the DHCP and the ping of busybox": async () => {
    if (!hasBusybox) return "there is no busybox here"
    const folder = mkdtempSync(join(tmpdir(), "udhcpc-"))
    const script = join(folder, "script")
    writeFileSync(script, DHCP_SCRIPT, { mode: 0o755 })
    const said = await run("busybox", ["udhcpc", "-i", "guest0", "-n", "-q", "-f", "-O", "mtu", "-s", script])
    rmSync(folder, { recursive: true })
    assert.match(said, /bound 10\.0\.2\.15 255\.255\.255\.0 10\.0\.2\.2 10\.0\.2\.3 1500 guest example\.org 86400/)
    assert.match(await run("busybox", ["ping", "-c", "3", "10.0.2.2"]), /3 packets received/)
    return undefined
  },
  "the names of busybox": async () => {
    if (!hasBusybox) return "there is no busybox here"
    const said = await run("busybox", ["nslookup", "-type=a", "db.test", "10.0.2.3"])
    assert.match(said, /db\.test\s+Address: 192\.0\.2\.7/)
    return undefined
  },
  "a connection carries both directions at once": async () => {
    const took = await exchange(LARGE * MIB)
    return `${Math.round((2 * LARGE * MIB) / took / 1000)} MB/s`
  },
  "a connection that only sends, and one that only receives": async () => {
    const size = LARGE * MIB
    let received = 0
    const sink = await listen((socket) => {
      socket.on("data", (piece) => (received += piece.length))
      socket.on("end", () => socket.end())
    })
    const up = connect({ port: 80, host: REMOTE })
    const piece = randomFillSync(Buffer.alloc(MIB))
    const began = performance.now()
    for (let i = 0; i < size / MIB; i++) if (!up.write(piece)) await once(up, "drain")
    up.end()
    up.resume()
    await once(up, "close")
    const upTook = performance.now() - began
    assert.equal(received, size)
    sink.close()
    const source = await listen((socket) => {
      let left = size / MIB
      const more = () => {
        while (left > 0) {
          left--
          if (!socket.write(piece)) {
            socket.once("drain", more)
            return
          }
        }
        socket.end()
      }
      more()
    })
    received = 0
    const down = connect({ port: 80, host: REMOTE })
    const downBegan = performance.now()
    down.on("data", (piece) => (received += piece.length))
    await once(down, "close")
    const downTook = performance.now() - downBegan
    assert.equal(received, size)
    source.close()
    return `${Math.round(size / upTook / 1000)} and ${Math.round(size / downTook / 1000)} MB/s`
  },
  "round trips": async () => {
    const server = await listen((socket) => socket.pipe(socket))
    const socket = connect({ port: 80, host: REMOTE, noDelay: true })
    await once(socket, "connect")
    const began = performance.now()
    const rounds = 2000
    for (let i = 0; i < rounds; i++) {
      socket.write("x")
      await once(socket, "data")
    }
    const took = performance.now() - began
    socket.destroy()
    server.close()
    return `${Math.round((took * 1000) / rounds)} us each`
  },
  "many connections at once": async () => {
    const server = await listen((socket) => socket.pipe(socket))
    await Promise.all(Array.from({ length: 200 }, async (_, i) => {
      const bytes = randomBytes(1 + ((i * 7919) % 50_000))
      const socket = connect({ port: 80, host: REMOTE })
      const answer = read(socket)
      socket.end(bytes)
      assert.equal(hashOf(await answer), hashOf(bytes))
    }))
    server.close()
  },
  "a wire that loses frames": async () => {
    // After the handshake: when that was repeated, the kernel waits three seconds before it repeats anything else.
    Object.assign(loss, { left: 8, passing: 4 + Math.floor(16 * Math.random()) })
    await exchange(MIB)
    assert.ok(loss.left < 8)
    loss.left = 0
  },
  "a slow reader, and a slow writer": async () => {
    const size = 4 * MIB
    const server = await listen((socket) => {
      socket.pause()
      setTimeout(() => socket.resume(), 300)
      let received = 0
      socket.on("data", (piece) => (received += piece.length))
      socket.on("end", () => socket.end(`${received}`))
    })
    const socket = connect({ port: 80, host: REMOTE })
    const answer = read(socket)
    socket.end(Buffer.alloc(size))
    assert.equal((await answer).toString(), `${size}`)
    server.close()
  },
  "a connection that is refused, and one that is reset": async () => {
    const server = await listen((socket) => socket.once("data", () => socket.resetAndDestroy()))
    const socket = connect({ port: 80, host: REMOTE })
    socket.write("x")
    const [error] = await once(socket, "error")
    assert.equal(error.code, "ECONNRESET")
    server.close()
    await once(server, "close")
    const refused = connect({ port: 80, host: REMOTE })
    const [why] = await once(refused, "error")
    assert.equal(why.code, "ECONNREFUSED")
  },
  "datagrams, larger than the MTU as well": async () => {
    const server = createSocket("udp4")
    server.on("message", (bytes, from) => server.send(bytes, from.port, from.address))
    server.bind(0, "127.0.0.1")
    await once(server, "listening")
    routes.set(7, server.address().port)
    const client = createSocket("udp4")
    for (const size of [0, 1, 1472, 1473, 9000, 40_000]) {
      const question = randomBytes(size)
      client.send(question, 7, REMOTE)
      const [answer] = await once(client, "message")
      assert.ok(question.equals(answer), `${size} bytes`)
    }
    client.close()
    server.close()
  },
  "a datagram that nobody takes": async () => {
    routes.set(7, 1)
    const client = createSocket("udp4")
    client.connect(7, REMOTE)
    await once(client, "connect")
    client.send("x")
    const [error] = await once(client, "error")
    assert.equal(error.code, "ECONNREFUSED")
    client.close()
  },
  "forwarded ports": async () => {
    const server = createServer((socket) => socket.pipe(socket))
    server.listen(22, GUEST)
    await once(server, "listening")
    const bytes = randomBytes(MIB)
    const socket = connect(forwards[0]?.port ?? 0, "127.0.0.1")
    const answer = read(socket)
    socket.end(bytes)
    assert.equal(hashOf(await answer), hashOf(bytes))
    server.close()
    const echo = createSocket("udp4")
    echo.on("message", (bytes, from) => echo.send(bytes, from.port, from.address))
    echo.bind(53, GUEST)
    await once(echo, "listening")
    const client = createSocket("udp4")
    client.send("hello", forwards[1]?.port ?? 0, "127.0.0.1")
    assert.equal(`${(await once(client, "message"))[0]}`, "hello")
    client.close()
    echo.close()
  }
}

/** A name server that knows one address. */
const nameserver = async (): Promise<HostEndpoint> => {
  const socket = createSocket("udp4")
  socket.on("message", (query, from) => {
    const answer = Buffer.concat([query, Buffer.from([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 7])])
    answer.writeUInt16BE(0x8180, 2)
    answer.writeUInt16BE(1, 6)
    socket.send(answer, from.port, from.address)
  })
  socket.bind(0, "127.0.0.1")
  await once(socket, "listening")
  socket.unref()
  return { address: "127.0.0.1", port: socket.address().port }
}

const program = Effect.gen(function*() {
  ip("link", "set", "lo", "up")
  const dns = yield* Effect.promise(nameserver)
  const host = { address: "127.0.0.1", port: 0 }
  const entropy = Layer.succeed(EntropySource, { fill: (bytes) => void randomFillSync(bytes) })
  const user = layerUserNet({
    policy,
    hostname: "guest",
    domain: "example.org",
    forwards: [{ protocol: "tcp", host, guestPort: 22 }, { protocol: "udp", host, guestPort: 53 }],
    onForward: (_, at) => forwards.push(at)
  }).pipe(Layer.provide([layerWith({ nameservers: [dns] }), entropy]))
  const tap = yield* Context.get(yield* Layer.build(Tap.layer({ name: "guest0" })), NetBackend).open({
    index: 0,
    name: "net0",
    macAddress: "02:00:00:00:00:02",
    enableBridge: false
  })
  ip("addr", "add", `${GUEST}/24`, "dev", "guest0")
  ip("route", "add", "default", "via", "10.0.2.2")
  const macAddress = /link\/ether ([0-9a-f:]+)/.exec(ip("link", "show", "guest0"))?.[1] ?? ""
  const net = yield* Context.get(yield* Layer.build(user), NetBackend).open({
    index: 0,
    name: "net0",
    macAddress,
    enableBridge: false
  })
  tap.allowOffloads(tap.delivers & net.accepts)
  net.allowOffloads(net.delivers & tap.accepts)
  connectPorts(tap, net, isLost)
  for (const [name, check] of Object.entries(checks)) {
    const said = yield* Effect.promise(check)
    console.log(`held: ${name}${said === undefined ? "" : ` (${said})`}`)
  }
})

await Effect.runPromise(Effect.scoped(program))
console.log("done")
