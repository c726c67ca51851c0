/**
 * A host whose guest has every kind of device that QEMU's microvm can have as well, for measurements of a boot:
 * `boot-devices.ts KERNEL INITRD MEMORY_MIB CMDLINE DISK`. What the guest prints on its serial port goes to standard output.
 */
import { GuestLifecycle } from "@troupe/core"
import { BlockFile, fromPath, KvmGuestLifecycle } from "@troupe/node"
import * as UserNetwork from "@troupe/node/net/UserNetwork"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"

const [kernel = "", initrd = "", memory = "", cmdline = "", disk = ""] = process.argv.slice(2)

const main = Effect.gen(function*() {
  const lifecycle = yield* GuestLifecycle
  yield* lifecycle.create({
    kernelType: "LINUX",
    kernel: fromPath(kernel),
    ramdisk: fromPath(initrd),
    cmdline,
    cpus: 1,
    guestMemory: `${memory}M`,
    bootProtocol: "pvh",
    virtioRng: true,
    virtioBalloon: true,
    virtioConsole: true,
    blockDevices: [{ id: "disk", mode: "READ_WRITE", format: "FILE", client: BlockFile.fromPath(disk) }],
    netDevices: [{ macAddress: "02:00:00:00:00:01", enableBridge: false }]
  })
  const serial = yield* (yield* lifecycle.bind).getSerial
  const shown = Stream.runForEach(serial.output, (bytes) => Effect.sync(() => process.stdout.write(bytes)))
  return yield* Effect.andThen(lifecycle.run, Effect.void).pipe(Effect.raceFirst(Effect.andThen(shown, Effect.never)))
})

await Effect.runPromise(
  Effect.scoped(main).pipe(Effect.provide(KvmGuestLifecycle.layer.pipe(Layer.provide(UserNetwork.layer()))))
)
