/**
 * What goes wrong under an unmodified Linux: devices that break in the middle of a request, by the drivers that can begin anew and by one that
 * cannot, a guest that runs out of memory while its balloon has most of it, and a device whose failure is the machine's end.
 */
import { BALLOON_PAGE_SIZE, blockClientFromBytes, type Device, GuestLifecycle } from "@troupe/core"
import { DeviceDefects } from "@troupe/core/testing"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import { BlockFile, KvmGuestLifecycle } from "@troupe/node"
import { layerVsock, VsockManager } from "@troupe/vsock"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"
import * as assert from "node:assert"
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { isWanted, type LinuxGuest, runHost, startLinux, until } from "./LinuxHost.ts"

const MEBIBYTE = 2 ** 20
const SECTOR = 512
const DEVICE_NEEDS_RESET = 0x40
/** ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK. */
const WORKING = 0xf
const HOST = 2
const ECHO = 3
const PORT = "org.example.port"
const VSOCK_PROGRAM = fileURLToPath(new URL("../../guest/linux/vsock", import.meta.url))

/** The devices that break the next time their driver has something for them. Each does once, is started again, and works. */
const broken = new Set<string>()

const fragile = (device: Device): Device => ({
  ...DeviceDefects.breaking(
    device,
    new DeviceDefects.DeviceDefects((_, place) => place === "doorbell" && broken.delete(device.name))
  ),
  ...(device.name === "rng0" ? { policy: { _tag: "escalate" } } : {})
})

/** The file of a device of the guest in sysfs that says what the driver and the device think of each other. */
const statusOf = (linux: LinuxGuest, device: string) =>
  Effect.map(linux.run(`cat /sys/bus/virtio/devices/${device}/status`), Number)

const needsReset = (linux: LinuxGuest, device: string) =>
  until(statusOf(linux, device), (status) => (status & DEVICE_NEEDS_RESET) !== 0)

/** The driver's only device, or what a file of sysfs links to. */
const deviceOf = (linux: LinuxGuest, driver: string) =>
  linux.run(`basename $(ls -d /sys/bus/virtio/drivers/${driver}/virtio* | head -n 1)`)

/** Has the driver let go of its device and take it again, which begins with a reset. */
const rebind = (linux: LinuxGuest, driver: string, device: string) =>
  Effect.gen(function*() {
    yield* linux.run(`cd /sys/bus/virtio/drivers/${driver} && echo ${device} > unbind && echo ${device} > bind; cd /`)
    assert.strictEqual(yield* statusOf(linux, device), WORKING)
  })

/** Starts something that comes upon a broken device, and waits until it has. Its process is in `/tmp/waiting`. */
const breakBy = (linux: LinuxGuest, device: string, command: string) =>
  Effect.gen(function*() {
    broken.add(device)
    yield* linux.run(`(${command}) >/dev/null 2>&1 & echo $! > /tmp/waiting`)
    yield* until(Effect.sync(() => broken.has(device)), (still) => !still)
  })

/**
 * Through a port without a terminal, and with it open already: for a terminal's output, and for the message that a port is opened, the driver
 * waits with its processor held until the device has taken them, so a guest with one processor would stand still.
 */
const consoleFails = Effect.fnUntraced(function*(linux: LinuxGuest) {
  const port = yield* (yield* linux.guest.getConsole).port(PORT)
  let heard = ""
  yield* Effect.forkScoped(Stream.runForEach(port.output, (bytes) =>
    Effect.sync(() => {
      heard += Buffer.from(bytes).toString()
    })))
  const open = Effect.gen(function*() {
    const node = yield* linux.run(
      `for port in /sys/class/virtio-ports/*; do grep -qs '^${PORT}$' $port/name && echo /dev/\${port##*/}; done`
    )
    yield* linux.run(`exec 5>${node}`)
  })
  const say = (word: string) =>
    Effect.gen(function*() {
      yield* linux.run(`echo ${word} >&5`)
      yield* until(Effect.sync(() => heard), (text) => text.includes(word))
    })
  yield* open
  yield* say("before")
  const device = yield* deviceOf(linux, "virtio_console")
  yield* breakBy(linux, "console0", "echo lost >&5")
  yield* needsReset(linux, device)
  yield* rebind(linux, "virtio_console", device)
  yield* linux.run("exec 5>&-")
  // The port comes with a message from the device, after the driver has the device.
  yield* until(linux.run("ls /sys/class/virtio-ports"), (names) => names !== "")
  yield* open
  yield* say("after")
})

const socketsFail = Effect.fnUntraced(function*(linux: LinuxGuest) {
  const connections = (count: number) => linux.run(`/tmp/vsock short ${HOST} ${ECHO} ${count}`)
  yield* linux.run("dd if=/dev/vda of=/tmp/vsock bs=4096 2>/dev/null && chmod +x /tmp/vsock")
  assert.strictEqual(yield* connections(3), "made 3")
  const device = yield* deviceOf(linux, "vmw_vsock_virtio_transport")
  yield* breakBy(linux, "vsock0", `/tmp/vsock short ${HOST} ${ECHO} 1`)
  yield* needsReset(linux, device)
  yield* rebind(linux, "vmw_vsock_virtio_transport", device)
  assert.strictEqual(yield* connections(3), "made 3")
})

const outOfMemory = Effect.fnUntraced(function*(linux: LinuxGuest) {
  const LEFT = 40 * MEBIBYTE
  const WANTED = 96
  const balloon = yield* linux.guest.getBalloonController
  const free = yield* linux.run("echo 3 > /proc/sys/vm/drop_caches; grep ^MemFree: /proc/meminfo")
  const pages = Math.floor((Number(/(\d+) kB/.exec(free)?.[1]) * 1024 - LEFT) / BALLOON_PAGE_SIZE)
  yield* balloon.requestNumPages(pages)
  yield* until(balloon.getBalloonSize, (size) => size.currentNumPages === pages)
  // A process that takes more than there is: the driver gives it back out of the balloon, and nobody is killed.
  yield* linux.run(`dd if=/dev/zero of=/dev/null bs=${WANTED}M count=1`)
  assert.strictEqual((yield* linux.attempt("dmesg | grep 'Killed process'")).output, "")
  const given = pages - (yield* balloon.getBalloonSize).currentNumPages
  assert.ok(given * BALLOON_PAGE_SIZE > (WANTED * MEBIBYTE - LEFT) / 2, `the balloon gave back ${given} pages`)
  yield* balloon.requestNumPages(0)
  yield* until(balloon.getBalloonSize, (size) => size.currentNumPages === 0)
})

/** Linux's driver for disks does not look at DEVICE_NEEDS_RESET: what it waits for it waits for. All else goes on. */
const diskFails = Effect.fnUntraced(function*(linux: LinuxGuest) {
  const device = yield* linux.run("basename $(readlink /sys/block/vdb/device)")
  yield* breakBy(linux, "block1", "exec dd if=/dev/vdb of=/dev/null bs=4096 skip=100 count=1")
  yield* needsReset(linux, device)
  yield* linux.run("dd if=/dev/vdc of=/dev/null bs=4096 skip=100 count=1")
  yield* linux.run("dd if=/dev/zero of=/dev/vdc bs=4096 count=1 conv=fsync")
  assert.strictEqual(yield* linux.run("/tmp/vsock short 2 3 1"), "made 1")
  // Uninterruptible, in the request that was in flight.
  assert.match(yield* linux.run("grep ^State: /proc/$(cat /tmp/waiting)/status"), /State:\tD/)
})

const escalates = Effect.fnUntraced(function*(linux: LinuxGuest) {
  broken.add("rng0")
  yield* Effect.forkScoped(Effect.ignore(linux.attempt("dd if=/dev/hwrng of=/dev/null bs=512 count=1")))
  const error = yield* Effect.flip(linux.end).pipe(Effect.mapError(({ _tag }) => new Error(`it ended with ${_tag}`)))
  assert.match(String(error), /VCPU_RUNTIME_FAILURE during run[^]*device: rng0/)
})

const main = Effect.gen(function*() {
  const path = join(mkdtempSync("/tmp/failure-"), "program")
  const program = readFileSync(VSOCK_PROGRAM)
  writeFileSync(path, Buffer.concat([program, Buffer.alloc(-program.length & (SECTOR - 1))]))
  const disk = (id: string) => blockClientFromBytes(id, new Uint8Array(MEBIBYTE))
  const linux = yield* startLinux({
    guestMemory: "256M",
    virtioRng: true,
    virtioBalloon: true,
    virtioConsole: true,
    consolePorts: [PORT],
    virtioVsock: true,
    vsockListeners: [{
      port: ECHO,
      acceptor: () => Effect.succeed((socket) => Stream.runForEach(socket.input, (bytes) => socket.write(bytes)))
    }],
    blockDevices: [
      { id: "program", mode: "READ_ONLY", format: "FILE", client: BlockFile.fromPath(path) },
      { id: "fails", mode: "READ_WRITE", format: "FILE", client: disk("fails") },
      { id: "sibling", mode: "READ_WRITE", format: "FILE", client: disk("sibling") }
    ]
  })
  const steps = {
    console: consoleFails,
    sockets: socketsFail,
    "out of memory": outOfMemory,
    disk: diskFails,
    escalates
  }
  for (const [name, step] of Object.entries(steps)) if (isWanted(name)) yield* linux.step(name, step(linux))
})

const devices = layerVsock.pipe(
  Layer.provide(layerDevices),
  Layer.provide(EntropySource.layerRandom),
  Layer.provide(VsockManager.layer)
)

runHost(
  main,
  GuestLifecycle.layer.pipe(
    Layer.provide(DeviceDefects.layer(fragile).pipe(Layer.provide(devices))),
    Layer.provide(KvmGuestLifecycle.layerHypervisor())
  )
)
