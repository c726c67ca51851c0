/** A host that tries every device with the drivers of an unmodified Linux: the transport is the command line's. */
import { BALLOON_PAGE_SIZE, GuestLifecycle, MemStatTag, NetBackend, type NetPort } from "@troupe/core"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import { redirect, reset } from "@troupe/devices/net/user/NetPolicy"
import { layerUserNet } from "@troupe/devices/net/user/UserNetBackend"
import { BlockFile, KvmGuestLifecycle } from "@troupe/node"
import * as NodeSockets from "@troupe/node/net/NodeSockets"
import * as Tap from "@troupe/node/net/Tap"
import { layerVsock, VsockManager } from "@troupe/vsock"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"
import * as assert from "node:assert"
import { execFileSync } from "node:child_process"
import { createHash, randomBytes, randomFillSync } from "node:crypto"
import { once } from "node:events"
import { mkdtempSync, readFileSync, statSync, truncateSync, writeFileSync } from "node:fs"
import { createServer } from "node:http"
import { join } from "node:path"
// The tests' own maker and checker of images: no part of any package.
// oxlint-disable-next-line eslint/no-restricted-imports
import { checkImage, makeImage } from "../../../packages/devices/test/Qcow2Images.ts"
import { isWanted, type LinuxGuest, mayTap, runHost, startLinux, until } from "./LinuxHost.ts"

const MEBIBYTE = 2 ** 20
const MEM_BLOCK = 8 * MEBIBYTE
const MEM_REGION = 512 * MEBIBYTE

/** A number of `/proc/meminfo`, in bytes. */
const meminfo = (linux: LinuxGuest, field: string) =>
  Effect.map(linux.run(`grep ^${field}: /proc/meminfo`), (line) => Number(/(\d+) kB/.exec(line)?.[1]) * 1024)

const entropy = Effect.fnUntraced(function*(linux: LinuxGuest) {
  assert.match(yield* linux.run("cat /sys/class/misc/hw_random/rng_current"), /^virtio_rng\.0$/)
  const bytes = yield* linux.run("dd if=/dev/hwrng bs=4096 count=1 2>/dev/null | sha256sum")
  assert.match(bytes, /^[0-9a-f]{64} /)
})

const memory = Effect.fnUntraced(function*(linux: LinuxGuest) {
  const controller = yield* linux.guest.getMemController
  const before = yield* meminfo(linux, "MemTotal")
  const plugged = (bytes: number) =>
    Effect.gen(function*() {
      yield* controller.requestSize(bytes)
      yield* until(controller.getMemSize, (size) => size.pluggedSize === bytes)
    })
  yield* linux.step("memory: grow", plugged(128 * MEBIBYTE))
  // The driver has the block before the kernel has its pages.
  yield* until(meminfo(linux, "MemTotal"), (grown) => grown - before > 120 * MEBIBYTE)
  // More than the guest had at first, and it does not run out.
  const size = Math.floor(before / MEBIBYTE)
  yield* linux.run(`dd if=/dev/zero of=/tmp/big bs=1M count=${size}; rm /tmp/big`)
  yield* linux.step("memory: shrink", plugged(0))
  yield* until(meminfo(linux, "MemTotal"), (shrunk) => Math.abs(shrunk - before) < 8 * MEBIBYTE)
})

/** Memory of this process, the guest's in it, that is really there, in bytes. */
const residentBytes = Effect.sync(() =>
  1024 * Number(/^RssAnon:\s+(\d+) kB$/m.exec(readFileSync("/proc/self/status", "utf8"))?.[1])
)

const balloon = Effect.fnUntraced(function*(linux: LinuxGuest) {
  const controller = yield* linux.guest.getBalloonController
  const SIZE = 96 * MEBIBYTE
  yield* linux.run(`dd if=/dev/zero of=/tmp/big bs=1M count=${SIZE / MEBIBYTE}`)
  const used = yield* residentBytes
  yield* linux.run("rm /tmp/big")
  yield* linux.step("balloon: free pages", until(residentBytes, (bytes) => used - bytes > SIZE / 2))
  assert.ok(controller.counters().reportedPages * BALLOON_PAGE_SIZE > SIZE / 2)

  const free = yield* meminfo(linux, "MemFree")
  const inflated = (bytes: number) =>
    Effect.gen(function*() {
      yield* controller.requestNumPages(bytes / BALLOON_PAGE_SIZE)
      yield* until(
        controller.getBalloonSize,
        (size) => size.currentNumPages === size.requestedNumPages
      )
    })
  yield* linux.step("balloon: inflate", inflated(SIZE))
  const left = yield* meminfo(linux, "MemFree")
  assert.ok(free - left > SIZE * 0.8, `of ${free} free bytes ${left} were left`)
  // Asked for now, however long the guest takes: they are younger than the question.
  const asked = performance.now()
  const { ageMillis, stats } = yield* controller.getMemStatsWithin("1 minute")
  const patience = performance.now() - asked
  assert.ok(ageMillis <= patience, `the statistics are ${ageMillis} ms old and were asked for ${patience} ms ago`)
  const said = stats.find(({ tag }) => tag === MemStatTag.MEMFREE)?.val ?? 0
  assert.ok(Math.abs(said - left) < 16 * MEBIBYTE, `${said} free bytes by statistics, ${left} by /proc`)
  yield* linux.step("balloon: deflate", inflated(0))
  const again = yield* meminfo(linux, "MemFree")
  assert.ok(again - left > SIZE * 0.8, `of ${left} free bytes there were ${again} again`)
})

const DISK = 32 * MEBIBYTE

/** The disks of the host: raw ones with their number in the first byte, and an empty qcow2 image. Returns their paths. */
const makeDisks = Effect.sync(() => {
  const folder = mkdtempSync("/tmp/disks-")
  const path = (name: string) => join(folder, name)
  for (const [index, name] of ["rw", "ro", "volatile"].entries()) {
    writeFileSync(path(name), new Uint8Array([index + 1]))
    truncateSync(path(name), DISK)
  }
  writeFileSync(path("qcow"), makeImage({ size: DISK, clusterBits: 16, version: 3, refcountOrder: 4 }))
  return path
})

const block = (path: (name: string) => string) =>
  Effect.fnUntraced(function*(linux: LinuxGuest) {
    assert.strictEqual(
      yield* linux.run("for disk in a b c d; do echo $(cat /sys/block/vd$disk/serial); done"),
      "rw\nro\nvolatile\nqcow"
    )
    assert.strictEqual(yield* linux.run("cat /sys/block/vd?/size"), Array(4).fill(DISK / 512).join("\n"))
    assert.strictEqual(
      yield* linux.run("for disk in a b c d; do head -c 1 /dev/vd$disk | od -An -tu1; done | tr -d ' '"),
      "1\n2\n3\n0"
    )
    assert.strictEqual(yield* linux.run("cat /sys/block/vd?/ro"), "0\n1\n0\n0")
    assert.notStrictEqual((yield* linux.attempt("dd if=/dev/zero of=/dev/vdb bs=4096 count=1")).code, 0)
    // What is written, and flushed, is in the file; the volatile disk has it for the guest alone.
    yield* linux.run("dd if=/dev/urandom of=/tmp/data bs=1M count=8")
    const sum = yield* linux.run("sha256sum < /tmp/data | cut -d' ' -f1")
    for (const [disk, kept] of [["vda", true], ["vdc", false], ["vdd", undefined]] as const) {
      yield* linux.run(`dd if=/tmp/data of=/dev/${disk} bs=1M seek=8 conv=fsync`)
      yield* linux.run(`echo 1 > /proc/sys/vm/drop_caches`)
      assert.strictEqual(
        yield* linux.run(`dd if=/dev/${disk} bs=1M skip=8 count=8 2>/dev/null | sha256sum | cut -d' ' -f1`),
        sum
      )
      if (kept === undefined) continue
      const bytes = readFileSync(path(kept ? "rw" : "volatile")).subarray(8 * MEBIBYTE, 16 * MEBIBYTE)
      assert.strictEqual(createHash("sha256").update(bytes).digest("hex") === sum, kept)
    }
    // Thrown away, it takes no room on the host and reads as zero.
    const taken = statSync(path("rw")).blocks * 512
    yield* linux.run(`blkdiscard -o ${8 * MEBIBYTE} -l ${8 * MEBIBYTE} /dev/vda`)
    assert.ok(taken - statSync(path("rw")).blocks * 512 >= 7 * MEBIBYTE, `${taken} bytes before`)
    assert.strictEqual(yield* linux.run("dd if=/dev/vda bs=1M skip=8 count=8 2>/dev/null | tr -d '\\0' | wc -c"), "0")
    // The image has grown by what was written, and what was thrown away is free in it again.
    const grown = statSync(path("qcow")).size
    assert.ok(grown > 8 * MEBIBYTE && grown < 10 * MEBIBYTE, `the image has ${grown} bytes`)
    yield* linux.run(`blkdiscard -o ${8 * MEBIBYTE} -l ${8 * MEBIBYTE} /dev/vdd`)
    // Not before it is flushed: until then an image that is torn from its power still has what was there.
    yield* linux.run(
      "dd if=/tmp/data of=/dev/vdd bs=4096 count=1 conv=fsync && dd if=/tmp/data of=/dev/vdd bs=1M conv=fsync"
    )
    assert.ok(statSync(path("qcow")).size < grown + 2 * MEBIBYTE, `the image of ${grown} bytes has grown`)
    // A file system on it, whose free blocks go back to the host.
    yield* linux.run("mke2fs -b 4096 /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")
    yield* linux.run(
      "cp /tmp/data /mnt/data && sync && sha256sum < /mnt/data | grep -q $(sha256sum < /tmp/data | cut -d' ' -f1)"
    )
    const full = statSync(path("rw")).blocks * 512
    yield* linux.run("rm /mnt/data && sync && fstrim /mnt && umount /mnt && rm /tmp/data")
    assert.ok(full - statSync(path("rw")).blocks * 512 >= 7 * MEBIBYTE, `${full} bytes before`)
    const disks = yield* linux.guest.getBlockDevices
    assert.deepStrictEqual(disks.statistics().map(({ failures }) => failures), [0, 0, 0, 0])
  })

/** Where the guest thinks that its server is: nowhere, but the policy knows better. */
const SERVER = "192.0.2.80"
/** An address that the policy knows nothing good about. */
const FORBIDDEN = "192.0.2.81"
const TAP = "troupe-lab"
const TAP_HOST = "198.51.100.1"
const TAP_GUEST = "198.51.100.2"
const DOWNLOAD = randomBytes(4 * MEBIBYTE)

const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex")

/** A web server: gives {@link DOWNLOAD}, and the digest of what it is given. */
const server = createServer((request, response) => {
  if (request.method === "GET") return void response.end(DOWNLOAD)
  const hash = createHash("sha256")
  request.on("data", (chunk: Buffer) => hash.update(chunk))
  request.on("end", () => response.end(hash.digest("hex")))
}).listen(0, mayTap ? "0.0.0.0" : "127.0.0.1").unref()
await once(server, "listening")
const address = server.address()
const port = typeof address === "object" && address !== null ? address.port : 0

/** What the policy was asked about. */
const asked: Array<string> = []

/** The first interface is in a user-mode network whose policy knows one server, the second one on a TAP interface of the host. */
const layerNetwork = () => {
  const user = layerUserNet({
    policy: ({ destination, direction, protocol }) =>
      Effect.sync(() => {
        asked.push(`${direction} ${protocol} ${destination.address}:${destination.port}`)
        return destination.address === SERVER ? redirect("127.0.0.1", port) : reset
      })
  }).pipe(Layer.provide(NodeSockets.layer), Layer.provide(KvmGuestLifecycle.layerEntropySource))
  return Layer.effect(
    NetBackend,
    Effect.gen(function*() {
      const userNet = yield* NetBackend
      const tap = mayTap ? Context.get(yield* Layer.build(Tap.layer({ name: TAP })), NetBackend) : userNet
      return {
        open: (request) => request.index === 0 ? Effect.map(userNet.open(request), breaking) : tap.open(request)
      }
    })
  ).pipe(Layer.provide(user))
}

const DHCP_SCRIPT =
  `[ "$1" = bound ] && ip addr add $ip/$mask dev $interface && ip route add default via $router && echo dhcp $ip $router $dns`

const transfer = Effect.fnUntraced(function*(linux: LinuxGuest, url: string) {
  const download = yield* linux.run(`wget -q -O - ${url}/file | sha256sum | cut -d' ' -f1`)
  assert.strictEqual(download, sha256(DOWNLOAD))
  const digest = yield* linux.run(`wget -q -O - --post-file=/tmp/upload ${url}/`)
  assert.strictEqual(digest, yield* linux.run("sha256sum < /tmp/upload | cut -d' ' -f1"))
})

/** Asks for an address by DHCP, takes it, and returns what the server said. */
const connect = Effect.fnUntraced(function*(linux: LinuxGuest) {
  yield* linux.run("for link in lo eth0 eth1; do ip link set $link up; done")
  yield* linux.run(`printf '#!/bin/sh\\n%s\\n' '${DHCP_SCRIPT}' > /tmp/dhcp && chmod +x /tmp/dhcp`)
  return yield* linux.run("udhcpc -i eth0 -n -q -f -t 20 -s /tmp/dhcp")
})

const network = Effect.fnUntraced(function*(linux: LinuxGuest) {
  yield* linux.run(
    "dd if=/dev/urandom bs=1M count=2 2>/dev/null | base64 > /tmp/upload"
  )
  const lease = yield* connect(linux)
  assert.match(lease, /dhcp 10\.0\.2\.15 10\.0\.2\.2 10\.0\.2\.3/)
  assert.match(yield* linux.run("ping -c 3 -w 60 10.0.2.2"), /3 packets received/)
  yield* linux.step("network: user mode", transfer(linux, `http://${SERVER}`))
  const refused = yield* linux.attempt(`wget -q -O - http://${FORBIDDEN}/`)
  assert.notStrictEqual(refused.code, 0)
  assert.match(refused.output, /refused/)
  assert.deepStrictEqual(asked, [
    `outgoing tcp ${SERVER}:80`,
    `outgoing tcp ${SERVER}:80`,
    `outgoing tcp ${FORBIDDEN}:80`
  ])

  if (mayTap) {
    execFileSync("ip", ["addr", "add", `${TAP_HOST}/24`, "dev", TAP])
    execFileSync("ip", ["link", "set", TAP, "up"])
    yield* linux.run(`ip addr add ${TAP_GUEST}/24 dev eth1`)
    assert.match(yield* linux.run(`ping -c 3 -w 60 ${TAP_HOST}`), /3 packets received/)
    yield* linux.step("network: TAP", transfer(linux, `http://${TAP_HOST}:${port}`))
  }
  const { interfaces } = yield* linux.guest.getNetInterfaces
  const first = interfaces[0]
  assert.ok(first !== undefined && first.counters().receivedBytes > DOWNLOAD.length)
  const carrier = linux.run("cat /sys/class/net/eth0/carrier")
  assert.strictEqual(yield* carrier, "1")
  yield* first.setLink(false)
  yield* until(carrier, (it) => it === "0")
  yield* first.setLink(true)
  yield* until(carrier, (it) => it === "1")
  yield* linux.run("rm /tmp/upload")
})

const PORT = "org.example.port"

/** What a stream gives, as text, from now on. */
const listen = (output: Stream.Stream<Uint8Array>) =>
  Effect.gen(function*() {
    const heard = { text: "" }
    const decoder = new TextDecoder()
    yield* Effect.forkScoped(Stream.runForEach(output, (bytes) =>
      Effect.sync(() => {
        heard.text += decoder.decode(bytes, { stream: true })
      })))
    return heard
  })

const console = Effect.fnUntraced(function*(linux: LinuxGuest) {
  const terminal = yield* linux.guest.getConsole
  yield* terminal.resize({ cols: 132, rows: 43 })
  yield* until(linux.run("stty -F /dev/hvc0 size"), (size) => size === "43 132")
  const heard = yield* listen(terminal.output)
  // The terminal forgets its settings when nobody has it open.
  yield* linux.run("exec 5<>/dev/hvc0; stty -F /dev/hvc0 -echo -onlcr; echo hello from the guest >&5")
  yield* until(Effect.sync(() => heard.text), (text) => text === "hello from the guest\n")
  yield* terminal.write(new TextEncoder().encode("typed by the host\n"))
  assert.strictEqual(yield* linux.run("head -n 1 <&5"), "typed by the host")

  // A port without a terminal: a megabyte each way.
  const port = yield* terminal.port(PORT)
  const node = yield* linux.run(
    `for port in /sys/class/virtio-ports/*; do grep -qs '^${PORT}$' $port/name && echo /dev/\${port##*/}; done`
  )
  const data = randomBytes(MEBIBYTE)
  yield* Effect.forkScoped(port.write(data))
  assert.strictEqual(yield* linux.run(`head -c ${MEBIBYTE} ${node} | sha256sum | cut -d' ' -f1`), sha256(data))
  const hash = createHash("sha256")
  let received = 0
  yield* Effect.forkScoped(Stream.runForEach(port.output, (bytes) =>
    Effect.sync(() => {
      received += bytes.length
      hash.update(bytes)
    })))
  const sum = yield* linux.run(
    `dd if=/dev/urandom of=/tmp/data bs=1M count=1 2>/dev/null; cat /tmp/data > ${node}; sha256sum < /tmp/data | cut -d' ' -f1`
  )
  yield* until(Effect.sync(() => received), (it) => it >= MEBIBYTE)
  assert.strictEqual(hash.digest("hex"), sum)
})

/** What is broken now: the source of the entropy device, or the port of the first network device. */
const broken = new Set<"entropy" | "network">()

const breaks = (what: "entropy" | "network"): void => {
  // Once: the device is started again, and works.
  if (broken.delete(what)) throw new Error(`the ${what} device breaks, as it was told`)
}

const DEVICE_NEEDS_RESET = 0x40

/** Each device fails in the middle of a request and is started again. Linux's drivers do not reset it by themselves: the shell does. */
const failure = Effect.fnUntraced(function*(linux: LinuxGuest) {
  const rebind = (driver: string, device: string) =>
    Effect.gen(function*() {
      const status = linux.run(`cat /sys/bus/virtio/devices/${device}/status`)
      yield* until(status, (text) => (Number(text) & DEVICE_NEEDS_RESET) !== 0)
      yield* linux.run(`cd /sys/bus/virtio/drivers/${driver} && echo ${device} > unbind && echo ${device} > bind; cd /`)
      assert.strictEqual(Number(yield* status), 0xf)
    })
  const deviceOf = (driver: string) =>
    linux.run(`cd /sys/bus/virtio/drivers/${driver} && ls -d virtio* | head -n 1; cd /`)

  // What waits for the device is killed when the device has broken, not after a time.
  const breakingIn = (what: "entropy" | "network", command: string) =>
    Effect.gen(function*() {
      broken.add(what)
      yield* linux.run(`(exec ${command}) >/dev/null 2>&1 & echo $! > /tmp/waiting`)
      yield* until(Effect.sync(() => broken.has(what)), (still) => !still)
      yield* linux.run("kill -KILL $(cat /tmp/waiting)")
    })

  yield* breakingIn("entropy", "dd if=/dev/hwrng of=/dev/null bs=65536 count=1")
  yield* linux.step("failure: entropy", rebind("virtio_rng", yield* deviceOf("virtio_rng")))
  yield* entropy(linux)

  yield* connect(linux)
  yield* breakingIn("network", "ping 10.0.2.2")
  yield* linux.step(
    "failure: network",
    rebind("virtio_net", yield* linux.run("basename $(readlink /sys/class/net/eth0/device)"))
  )
  yield* connect(linux)
  yield* linux.run("ping -c 1 -w 60 10.0.2.2")
})

/** Random bytes of the operating system, until they break. */
const layerEntropy = Layer.succeed(EntropySource, {
  fill: (bytes) => {
    breaks("entropy")
    randomFillSync(bytes)
  }
})

/** The port, until it breaks. */
const breaking = (port: NetPort): NetPort =>
  new Proxy(port, {
    get: (target, key) => {
      const value: unknown = Reflect.get(target, key, target)
      if (typeof value !== "function") return value
      return (...args: ReadonlyArray<unknown>): unknown => {
        if (key === "send") breaks("network")
        return Reflect.apply(value, target, args)
      }
    }
  })

const layer = GuestLifecycle.layer.pipe(
  Layer.provide(
    layerVsock.pipe(
      Layer.provide(layerDevices),
      Layer.provide(layerEntropy),
      Layer.provide(VsockManager.layer),
      Layer.provide(layerNetwork())
    )
  ),
  Layer.provide(KvmGuestLifecycle.layerHypervisor())
)

const main = Effect.gen(function*() {
  const path = yield* makeDisks
  const disk = (id: string, mode: "READ_WRITE" | "READ_ONLY" | "VOLATILE_WRITE", format: "FILE" | "QCOW" = "FILE") => ({
    id,
    mode,
    format,
    client: BlockFile.fromPath(path(id))
  })
  const linux = yield* startLinux({
    guestMemory: "256M",
    blockDevices: [
      disk("rw", "READ_WRITE"),
      disk("ro", "READ_ONLY"),
      disk("volatile", "VOLATILE_WRITE"),
      disk("qcow", "READ_WRITE", "QCOW")
    ],
    netDevices: [
      { macAddress: "02:00:00:00:00:01", enableBridge: false },
      { macAddress: "02:00:00:00:00:02", enableBridge: false }
    ],
    virtioBalloon: true,
    virtioConsole: true,
    consolePorts: [PORT],
    virtioRng: true,
    virtioMem: true,
    virtioMemBlockSize: MEM_BLOCK,
    virtioMemRegionSize: MEM_REGION
  })
  const steps = { entropy, memory, balloon, block: block(path), network, console, failure }
  for (const [name, step] of Object.entries(steps)) if (isWanted(name)) yield* linux.step(name, step(linux))
  yield* linux.step(
    "poweroff",
    Effect.gen(function*() {
      yield* Effect.forkScoped(Effect.ignore(linux.attempt("poweroff -f")))
      assert.deepStrictEqual(yield* linux.end, { _tag: "PowerOff" })
      assert.deepStrictEqual(checkImage(new Uint8Array(readFileSync(path("qcow")))), { errors: [], leaks: 0 })
    })
  )
})

runHost(main, layer)
