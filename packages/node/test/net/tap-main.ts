/**
 * What the TAP back end does with the kernel. Runs in a network namespace of its own, in which it is root; prints a line for each
 * check that held.
 */
import { NetBackend, type NetPort, Offload } from "@troupe/core/NetBackend"
import { NetFrame } from "@troupe/core/NetFrame"
import { withSoftwareOffloads } from "@troupe/devices/net/SoftwareOffloads"
import * as Effect from "effect/Effect"
import assert from "node:assert/strict"
import { execFileSync, spawn } from "node:child_process"
import { createHash } from "node:crypto"
import { createSocket } from "node:dgram"
import { once } from "node:events"
import { readFileSync } from "node:fs"
import * as Tap from "../../src/net/Tap.ts"

const ip = (...args: ReadonlyArray<string>) => execFileSync("ip", args, { encoding: "utf8" })
const MAC = "02:00:00:00:00:01"
const request = { index: 0, name: "net0", macAddress: MAC, enableBridge: false }
const open = (options: Tap.TapOptions, more: Partial<typeof request> = {}) =>
  Effect.flatMap(NetBackend, (backend) => backend.open({ ...request, ...more })).pipe(
    Effect.provide(Tap.layer(options), { local: true })
  )
const names = () => readFileSync("/proc/net/dev", "utf8").split("\n").slice(2).map((line) => line.split(":")[0]?.trim())

/** Frames with room for all of them. */
const roomy = () => {
  const frame = new NetFrame()
  frame.add(new Uint8Array(70_000), 0, 70_000)
  return frame
}
const bytesOf = (frame: NetFrame, length: number) => {
  const bytes = new Uint8Array(length)
  frame.read(0, bytes)
  return bytes
}
const nextTurn = () => new Promise((resolve) => setTimeout(resolve, 1))

/** The next frame of a port for which the check holds. */
const frameFor = async (port: NetPort, check: (bytes: Uint8Array, frame: NetFrame) => boolean) => {
  const frame = roomy()
  for (let tries = 0; tries < 3000; tries++) {
    const length = port.receive(frame)
    if (length > 0 && check(bytesOf(frame, length), frame)) return { bytes: bytesOf(frame, length), frame }
    if (length === 0) await nextTurn()
  }
  throw new Error("the frame does not come")
}

const isUdp = (text: string) => (bytes: Uint8Array) => new TextDecoder("latin1").decode(bytes).includes(text)

const checks: Record<string, () => Effect.Effect<void, unknown>> = {
  "an interface is made, is up, has the MTU that was asked for, and goes with its scope": () =>
    Effect.gen(function*() {
      yield* Effect.scoped(Effect.gen(function*() {
        const port = yield* open({ name: "made0", mtu: 9000 })
        assert.equal(port.mtu, 9000)
        assert.ok(port.linkUp)
        assert.equal(port.accepts & 7, Offload.CHECKSUM | Offload.TSO4 | Offload.TSO6)
        assert.match(ip("link", "show", "made0"), /[<,]UP[,>].*mtu 9000/)
      }))
      assert.ok(!names().includes("made0"))
    }),
  "an interface that exists is used and stays": () =>
    Effect.gen(function*() {
      ip("tuntap", "add", "kept0", "mode", "tap", "vnet_hdr")
      yield* Effect.scoped(open({ name: "kept0" }))
      assert.ok(names().includes("kept0"))
    }),
  "several interfaces have names of their own": () =>
    Effect.scoped(Effect.gen(function*() {
      yield* open({})
      yield* open({}, { index: 1 })
      yield* open({ name: ({ index }) => `own${index}` }, { index: 7 })
      for (const name of ["troupe0", "troupe1", "own7"]) assert.ok(names().includes(name), name)
    })),
  "what is wrong is said, with what to do": () =>
    Effect.scoped(Effect.gen(function*() {
      const failure = (options: Tap.TapOptions, more = {}) => Effect.flip(Effect.scoped(open(options, more)))
      yield* open({ name: "busy0" })
      assert.match((yield* failure({ name: "busy0" })).message, /TUNSETIFF busy0: .*EBUSY.*one of its own/)
      assert.match((yield* failure({ name: "lo" })).message, /TUNSETIFF lo: .*EINVAL.*not a TAP interface/)
      assert.match((yield* failure({ name: "a name that is too long" })).message, /is not a name/)
      assert.match((yield* failure({ mtu: 10 })).message, /is not an MTU/)
      assert.match((yield* failure({}, { enableBridge: true })).message, /no bridge/)
      assert.match((yield* failure({ bridge: "none0" }, { enableBridge: true })).message, /SIOCBRADDIF.*ENODEV/)
    })),
  "an interface is added to a bridge when the guest asks for it": () =>
    Effect.scoped(Effect.gen(function*() {
      ip("link", "add", "br0", "type", "bridge")
      yield* open({ name: "in0", bridge: "br0" }, { enableBridge: true })
      yield* open({ name: "out0", bridge: "br0" })
      assert.match(ip("link", "show", "in0"), /master br0/)
      assert.doesNotMatch(ip("link", "show", "out0"), /master/)
    })),
  "frames go both ways intact, whatever their pieces, and the port says when they come": () =>
    Effect.scoped(Effect.gen(function*() {
      const port = yield* open({ name: "udp0" })
      ip("addr", "add", "10.9.0.1/24", "dev", "udp0")
      ip("neigh", "add", "10.9.0.2", "lladdr", MAC, "dev", "udp0")
      yield* Effect.promise(async () => {
        const socket = createSocket("udp4")
        socket.bind(5000, "10.9.0.1")
        await once(socket, "listening")
        const events = { readable: 0 }
        port.listen({ readable: () => events.readable++, writable: () => undefined, linkChanged: () => undefined })
        const empty = roomy()
        while (port.receive(empty) !== 0);
        socket.send("to the guest", 4000, "10.9.0.2")
        for (let tries = 0; events.readable === 0 && tries < 3000; tries++) await nextTurn()
        assert.equal(events.readable, 1)
        // Into pieces of odd lengths, some of them in small arrays.
        const scattered = new NetFrame()
        for (let i = 0; i < 400; i++) scattered.add(new Uint8Array(9), 2, 7)
        let length = 0
        for (let tries = 0; tries < 3000 && length <= 0; tries++) {
          length = port.receive(scattered)
          if (length > 0 && !isUdp("to the guest")(bytesOf(scattered, length))) length = 0
          if (length === 0) await nextTurn()
        }
        const request = bytesOf(scattered, length)
        assert.equal(new TextDecoder().decode(request.subarray(42)), "to the guest")
        // The answer: addresses and ports the other way round.
        const answer = request.slice()
        const swap = (a: number, b: number, size: number) => {
          for (let i = 0; i < size; i++) [answer[a + i], answer[b + i]] = [answer[b + i]!, answer[a + i]!]
        }
        swap(0, 6, 6)
        swap(26, 30, 4)
        swap(34, 36, 2)
        answer.set(new TextEncoder().encode("of the guest"), 42)
        // Its checksum is left to the kernel: the field holds the sum of the pseudo header.
        const view = new DataView(answer.buffer)
        let sum = 17 + answer.length - 34
        for (let at = 26; at < 34; at += 2) sum += view.getUint16(at)
        view.setUint16(40, (sum & 0xffff) + (sum >>> 16))
        const gathered = new NetFrame()
        for (let at = 0; at < answer.length; at += 5) gathered.add(answer, at, Math.min(5, answer.length - at))
        gathered.flags = 1
        gathered.checksumStart = 34
        gathered.checksumOffset = 6
        const message = once(socket, "message")
        assert.ok(port.send(gathered))
        assert.equal(String((await message)[0]), "of the guest")
        socket.close()
      })
    })),
  "a frame that has no room waits, whole": () =>
    Effect.scoped(Effect.gen(function*() {
      const port = yield* open({ name: "big0" })
      ip("addr", "add", "10.8.0.1/24", "dev", "big0")
      ip("neigh", "add", "10.8.0.2", "lladdr", MAC, "dev", "big0")
      yield* Effect.promise(async () => {
        const socket = createSocket("udp4")
        socket.send(Buffer.alloc(1400, "x"), 4000, "10.8.0.2")
        socket.send("and another", 4000, "10.8.0.2")
        const small = new NetFrame()
        small.add(new Uint8Array(100), 0, 100)
        let answer = 0
        for (let tries = 0; tries < 3000 && answer !== -1442; tries++) {
          answer = port.receive(small)
          if (answer !== -1442 && answer < 0) port.discard()
          if (answer === 0) await nextTurn()
        }
        assert.equal(port.receive(small), -1442)
        const frame = roomy()
        assert.equal(port.receive(frame), 1442)
        assert.ok(bytesOf(frame, 1442).subarray(42).every((byte) => byte === 0x78))
        await frameFor(port, isUdp("and another"))
        socket.close()
      })
    })),
  "a port whose interface is deleted has no link": () =>
    Effect.scoped(Effect.gen(function*() {
      const port = yield* open({ name: "gone0" })
      const events = { changes: 0 }
      port.listen({ readable: () => undefined, writable: () => undefined, linkChanged: () => events.changes++ })
      port.receive(roomy())
      ip("link", "del", "gone0")
      yield* Effect.promise(async () => {
        for (let tries = 0; events.changes === 0 && tries < 3000; tries++) await nextTurn()
      })
      assert.equal(events.changes, 1)
      assert.ok(!port.linkUp)
      assert.ok(port.send(roomy()))
      assert.equal(port.receive(roomy()), 0)
    })),
  "two kernels talk through two ports, with every offload": () => wire(false),
  "two kernels talk through two ports, one of which needs the offloads done for it": () => wire(true)
}

/** A port as one that takes and gives nothing but ordinary frames. */
const withoutOffloads = (port: NetPort): NetPort => ({
  mtu: port.mtu,
  accepts: 0,
  delivers: 0,
  linkUp: true,
  listen: port.listen.bind(port),
  allowOffloads: () => undefined,
  send: (frame) => {
    assert.equal(frame.gsoType, 0)
    assert.equal(frame.flags & 1, 0)
    assert.ok(frame.size <= 1514)
    return port.send(frame)
  },
  receive: port.receive.bind(port),
  discard: port.discard.bind(port)
})

/** A stream of TCP from this namespace to another one, over two TAP interfaces whose ports this program connects. */
const wire = (software: boolean) =>
  Effect.scoped(Effect.gen(function*() {
    const a = yield* open({ name: "a0" })
    const far = yield* open({ name: "b0" })
    const b = software ? withSoftwareOffloads(withoutOffloads(far)) : far
    const other = yield* Effect.acquireRelease(
      Effect.promise(async () => {
        const child = spawn("unshare", ["-n", "sh", "-c", "echo ready; exec cat"], {
          stdio: ["pipe", "pipe", "inherit"]
        })
        await once(child.stdout, "data")
        return child
      }),
      (child) => Effect.sync(() => child.kill())
    )
    ip("link", "set", "b0", "netns", String(other.pid))
    const inOther = (...command: ReadonlyArray<string>) =>
      execFileSync("nsenter", ["-t", String(other.pid), "-n", ...command], { encoding: "utf8" })
    ip("addr", "add", "10.7.0.1/24", "dev", "a0")
    ip("addr", "add", "fd00::1/64", "dev", "a0", "nodad")
    inOther("ip", "addr", "add", "10.7.0.2/24", "dev", "b0")
    inOther("ip", "addr", "add", "fd00::2/64", "dev", "b0", "nodad")
    inOther("ip", "link", "set", "b0", "up")
    a.allowOffloads(a.delivers)
    b.allowOffloads(b.delivers)
    const counts = { frames: 0, segmented: 0, partial: 0, lost: 0 }
    /** Moves what comes from one port to the other. */
    const connect = (from: NetPort, to: NetPort) => {
      const frame = new NetFrame()
      const buffer = new Uint8Array(70_000)
      const held = { length: 0 }
      const pump = () => {
        for (;;) {
          if (held.length === 0) {
            frame.clear()
            frame.add(buffer, 0, buffer.length)
            held.length = from.receive(frame)
            if (held.length === 0) return
            const { checksumOffset, checksumStart, flags, gsoSize, gsoType, headerLength } = frame
            frame.clear()
            frame.add(buffer, 0, held.length)
            Object.assign(frame, { checksumOffset, checksumStart, flags, gsoSize, gsoType, headerLength })
            counts.frames++
            if (gsoType !== 0) counts.segmented++
            if ((flags & 1) !== 0) counts.partial++
          }
          if (!to.send(frame)) return
          held.length = 0
        }
      }
      return pump
    }
    const forth = connect(a, b)
    const back = connect(b, a)
    const listen = (port: NetPort, readable: () => void, writable: () => void) =>
      port.listen({ readable, writable, linkChanged: () => undefined })
    listen(a, forth, back)
    listen(b, back, forth)
    forth()
    back()
    const script = `
      const { createServer } = require("node:net"); const { createHash } = require("node:crypto")
      createServer({ allowHalfOpen: true }, (s) => {
        const hash = createHash("sha256"); s.on("data", (d) => hash.update(d)); s.on("end", () => s.end(hash.digest("hex")))
      }).listen(7000, "::", () => console.log("listening"))
    `
    const server = yield* Effect.acquireRelease(
      Effect.promise(async () => {
        const child = spawn("nsenter", ["-t", String(other.pid), "-n", process.execPath, "-e", script], {
          stdio: ["ignore", "pipe", "inherit"]
        })
        await once(child.stdout, "data")
        return child
      }),
      (child) => Effect.sync(() => child.kill())
    )
    assert.ok(server.pid !== undefined)
    for (const host of ["10.7.0.2", "fd00::2"]) {
      const size = 8 << 20
      const data = Buffer.alloc(size)
      for (let i = 0; i < size; i++) data[i] = (i * 7 + (i >> 11)) & 0xff
      const client = `
        const { connect } = require("node:net"); const data = Buffer.alloc(${size})
        for (let i = 0; i < data.length; i++) data[i] = (i * 7 + (i >> 11)) & 0xff
        const s = connect({ host: "${host}", port: 7000 }, () => s.end(data)); s.on("data", (d) => process.stdout.write(d))
      `
      const answer = yield* Effect.promise(async () => {
        const child = spawn(process.execPath, ["-e", client], { stdio: ["ignore", "pipe", "inherit"] })
        let text = ""
        child.stdout.on("data", (chunk) => (text += chunk))
        const timer = setTimeout(() => child.kill(), 40_000)
        await once(child, "close")
        clearTimeout(timer)
        return text
      })
      assert.equal(answer, createHash("sha256").update(data).digest("hex"), `over ${host} ${JSON.stringify(counts)}`)
    }
    assert.ok(counts.segmented > 50, JSON.stringify(counts))
    assert.ok(counts.partial > 50, JSON.stringify(counts))
  }))

const only = process.argv[2]
const program = Effect.gen(function*() {
  ip("link", "set", "lo", "up")
  for (const [name, check] of Object.entries(checks)) {
    if (only !== undefined && !name.includes(only)) continue
    yield* check()
    console.log(`held: ${name}`)
  }
})

await Effect.runPromise(program)
