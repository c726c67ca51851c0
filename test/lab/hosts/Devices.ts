/** A host that tries every device with the drivers of an unmodified Linux: the transport is the command line's. */
import { BALLOON_PAGE_SIZE, MemStatTag, NetBackend } from "@troupe/core"
import { redirect, reset } from "@troupe/devices/net/user/NetPolicy"
import { layerUserNet } from "@troupe/devices/net/user/UserNetBackend"
import { BlockFile, KvmGuestLifecycle } from "@troupe/node"
import * as NodeSockets from "@troupe/node/net/NodeSockets"
import * as Tap from "@troupe/node/net/Tap"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as assert from "node:assert"
import { execFileSync } from "node:child_process"
import { createHash, randomBytes } from "node:crypto"
import { once } from "node:events"
import { mkdtempSync, readFileSync, statSync, truncateSync, writeFileSync } from "node:fs"
import { createServer } from "node:http"
import { join } from "node:path"
import { type LinuxGuest, runHost, startLinux, until } from "./LinuxHost.ts"

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
  const grown = yield* meminfo(linux, "MemTotal")
  assert.ok(grown - before > 120 * MEBIBYTE, `${before} grew to ${grown}`)
  // More than the guest had at first, and it does not run out.
  const size = Math.floor(before / MEBIBYTE)
  yield* linux.run(`dd if=/dev/zero of=/tmp/big bs=1M count=${size}; rm /tmp/big`)
  yield* linux.step("memory: shrink", plugged(0))
  const shrunk = yield* meminfo(linux, "MemTotal")
  assert.ok(Math.abs(shrunk - before) < 8 * MEBIBYTE, `${before} became ${shrunk} again`)
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
  const { ageMillis, stats } = yield* controller.getMemStats
  assert.ok(ageMillis < 2000, `the statistics are ${ageMillis} ms old`)
  const said = stats.find(({ tag }) => tag === MemStatTag.MEMFREE)?.val ?? 0
  assert.ok(Math.abs(said - left) < 16 * MEBIBYTE, `${said} free bytes by statistics, ${left} by /proc`)
  yield* linux.step("balloon: deflate", inflated(0))
  const again = yield* meminfo(linux, "MemFree")
  assert.ok(again - left > SIZE * 0.8, `of ${left} free bytes there were ${again} again`)
})

const DISK = 32 * MEBIBYTE

/** The disks of the host, each with its number in its first byte. */
const makeDisks = Effect.sync(() => {
  const folder = mkdtempSync("/tmp/disks-")
  const path = (name: string) => join(folder, name)
  for (const [index, name] of ["rw", "ro", "volatile"].entries()) {
    writeFileSync(path(name), new Uint8Array([index + 1]))
    truncateSync(path(name), DISK)
  }
  return { folder, path }
})

const block = Effect.fnUntraced(function*(linux: LinuxGuest, path: (name: string) => string) {
  assert.strictEqual(
    yield* linux.run("for disk in a b c; do echo $(cat /sys/block/vd$disk/serial); done"),
    "rw\nro\nvolatile"
  )
  assert.strictEqual(yield* linux.run("cat /sys/block/vd?/size"), Array(3).fill(DISK / 512).join("\n"))
  assert.strictEqual(
    yield* linux.run("for disk in a b c; do head -c 1 /dev/vd$disk | od -An -tu1; done | tr -d ' '"),
    "1\n2\n3"
  )
  assert.strictEqual(yield* linux.run("cat /sys/block/vd?/ro"), "0\n1\n0")
  assert.notStrictEqual((yield* linux.attempt("dd if=/dev/zero of=/dev/vdb bs=4096 count=1")).code, 0)
  // What is written, and flushed, is in the file; the volatile disk has it for the guest alone.
  yield* linux.run("dd if=/dev/urandom of=/tmp/data bs=1M count=16")
  const sum = yield* linux.run("sha256sum < /tmp/data | cut -d' ' -f1")
  for (const [disk, kept] of [["vda", true], ["vdc", false]] as const) {
    yield* linux.run(`dd if=/tmp/data of=/dev/${disk} bs=1M seek=8 conv=fsync`)
    yield* linux.run(`echo 1 > /proc/sys/vm/drop_caches`)
    assert.strictEqual(
      yield* linux.run(`dd if=/dev/${disk} bs=1M skip=8 count=16 2>/dev/null | sha256sum | cut -d' ' -f1`),
      sum
    )
    const bytes = readFileSync(path(kept ? "rw" : "volatile")).subarray(8 * MEBIBYTE, 24 * MEBIBYTE)
    assert.strictEqual(createHash("sha256").update(bytes).digest("hex") === sum, kept)
  }
  // Thrown away, it takes no room on the host and reads as zero.
  const taken = statSync(path("rw")).blocks * 512
  yield* linux.run(`blkdiscard -o ${8 * MEBIBYTE} -l ${16 * MEBIBYTE} /dev/vda`)
  assert.ok(taken - statSync(path("rw")).blocks * 512 >= 15 * MEBIBYTE, `${taken} bytes before`)
  assert.strictEqual(yield* linux.run("dd if=/dev/vda bs=1M skip=8 count=16 2>/dev/null | tr -d '\\0' | wc -c"), "0")
  // A file system on it, whose free blocks go back to the host.
  yield* linux.run("mke2fs -b 4096 /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")
  yield* linux.run(
    "cp /tmp/data /mnt/data && sync && sha256sum < /mnt/data | grep -q $(sha256sum < /tmp/data | cut -d' ' -f1)"
  )
  const full = statSync(path("rw")).blocks * 512
  yield* linux.run("rm /mnt/data && sync && fstrim /mnt && umount /mnt && rm /tmp/data")
  assert.ok(full - statSync(path("rw")).blocks * 512 >= 15 * MEBIBYTE, `${full} bytes before`)
  const disks = yield* linux.guest.getBlockDevices
  assert.deepStrictEqual(disks.statistics().map(({ disk, failures }) => [disk, failures]), [["rw", 0], ["ro", 0], [
    "volatile",
    0
  ]])
})

/** Where the guest thinks that its server is: nowhere, but the policy knows better. */
const SERVER = "192.0.2.80"
/** An address that the policy knows nothing good about. */
const FORBIDDEN = "192.0.2.81"
const TAP = "troupe-lab"
const TAP_HOST = "198.51.100.1"
const TAP_GUEST = "198.51.100.2"
const DOWNLOAD = randomBytes(8 * MEBIBYTE)

const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex")

/** A web server on all of the host's addresses: gives {@link DOWNLOAD}, and the digest of what it is given. */
const server = createServer((request, response) => {
  if (request.method === "GET") return void response.end(DOWNLOAD)
  const hash = createHash("sha256")
  request.on("data", (chunk: Buffer) => hash.update(chunk))
  request.on("end", () => response.end(hash.digest("hex")))
}).listen(0, "0.0.0.0").unref()
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
      const tap = Context.get(yield* Layer.build(Tap.layer({ name: TAP })), NetBackend)
      return { open: (request) => (request.index === 0 ? userNet : tap).open(request) }
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

const network = Effect.fnUntraced(function*(linux: LinuxGuest) {
  yield* linux.run(
    "dd if=/dev/urandom bs=1M count=3 2>/dev/null | base64 > /tmp/upload"
  )
  yield* linux.run("for link in lo eth0 eth1; do ip link set $link up; done")
  yield* linux.run(`printf '#!/bin/sh\\n%s\\n' '${DHCP_SCRIPT}' > /tmp/dhcp && chmod +x /tmp/dhcp`)
  const lease = yield* linux.run("udhcpc -i eth0 -n -q -f -s /tmp/dhcp")
  assert.match(lease, /dhcp 10\.0\.2\.15 10\.0\.2\.2 10\.0\.2\.3/)
  assert.match(yield* linux.run("ping -c 3 -w 10 10.0.2.2"), /3 packets received/)
  yield* linux.step("network: user mode", transfer(linux, `http://${SERVER}`))
  const refused = yield* linux.attempt(`wget -q -O - http://${FORBIDDEN}/`)
  assert.notStrictEqual(refused.code, 0)
  assert.match(refused.output, /refused/)
  assert.deepStrictEqual(asked, [
    `outgoing tcp ${SERVER}:80`,
    `outgoing tcp ${SERVER}:80`,
    `outgoing tcp ${FORBIDDEN}:80`
  ])

  execFileSync("ip", ["addr", "add", `${TAP_HOST}/24`, "dev", TAP])
  execFileSync("ip", ["link", "set", TAP, "up"])
  yield* linux.run(`ip addr add ${TAP_GUEST}/24 dev eth1`)
  assert.match(yield* linux.run(`ping -c 3 -w 10 ${TAP_HOST}`), /3 packets received/)
  yield* linux.step("network: TAP", transfer(linux, `http://${TAP_HOST}:${port}`))

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

const main = Effect.gen(function*() {
  const disks = yield* makeDisks
  const disk = (id: string, mode: "READ_WRITE" | "READ_ONLY" | "VOLATILE_WRITE") => ({
    id,
    mode,
    format: "FILE" as const,
    client: BlockFile.fromPath(disks.path(id))
  })
  const linux = yield* startLinux({
    guestMemory: "256M",
    blockDevices: [disk("rw", "READ_WRITE"), disk("ro", "READ_ONLY"), disk("volatile", "VOLATILE_WRITE")],
    netDevices: [
      { macAddress: "02:00:00:00:00:01", enableBridge: false },
      { macAddress: "02:00:00:00:00:02", enableBridge: false }
    ],
    virtioBalloon: true,
    virtioRng: true,
    virtioMem: true,
    virtioMemBlockSize: MEM_BLOCK,
    virtioMemRegionSize: MEM_REGION
  })
  yield* linux.step("entropy", entropy(linux))
  yield* linux.step("memory", memory(linux))
  yield* linux.step("balloon", balloon(linux))
  yield* linux.step("block", block(linux, disks.path))
  yield* linux.step("network", network(linux))
  yield* linux.step(
    "poweroff",
    Effect.gen(function*() {
      yield* Effect.forkScoped(Effect.ignore(linux.attempt("poweroff -f")))
      assert.deepStrictEqual(yield* linux.end, { _tag: "PowerOff" })
    })
  )
})

runHost(main, KvmGuestLifecycle.layer.pipe(Layer.provide(layerNetwork())))
