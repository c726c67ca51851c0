/** The serial line over the life of a machine: it ends with its machine, not with the lifecycle that made it. */
import { assert, it } from "@effect/vitest"
import { DeviceCatalog, GuestLifecycle } from "@troupe/core"
import { FakeHypervisor, GuestProgram } from "@troupe/core/testing"
import { layerPower } from "@troupe/devices/Power"
import { layerSerial } from "@troupe/devices/Serial"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"

const sayAndPowerOff = GuestProgram.make(function*(cpu) {
  for (const byte of new TextEncoder().encode("hello\n")) yield* cpu.out8(0x3f8, byte)
  yield* cpu.out8(0x600, (5 << 2) | 0x20)
})

const devices = layerSerial.pipe(Layer.provide(layerPower), Layer.provide(DeviceCatalog.layerEmpty))
const layer = GuestLifecycle.layer.pipe(Layer.provide(devices), Layer.provide(FakeHypervisor.layer()))

it.effect("a reader of the output ends when the guest has ended", () =>
  Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({
      kernelType: "LINUX",
      kernel: GuestProgram.kernel(sayAndPowerOff),
      cpus: 1,
      guestMemory: "2M"
    })
    const serial = yield* Effect.flatMap(lifecycle.bind, (guest) => guest.getSerial)
    const output = yield* Effect.forkChild(Stream.mkString(Stream.decodeText(serial.output)), {
      startImmediately: true
    })
    yield* lifecycle.run
    for (let turn = 0; turn < 10; turn++) yield* Effect.yieldNow
    assert.isDefined(output.pollUnsafe(), "the reader still waits for output")
    const exit = output.pollUnsafe()
    assert.strictEqual(exit?._tag === "Success" ? exit.value : undefined, "hello\n")
  }).pipe(Effect.provide(layer)))
