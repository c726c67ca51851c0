// A program of somebody who installed the packages: a guest that turns itself off, on the fake hypervisor.
import { GuestLifecycle } from "@troupe/core"
import { FakeHypervisor, GuestAcpi, GuestProgram } from "@troupe/core/testing"
import { layer as layerDevices } from "@troupe/devices"
import { EntropySource } from "@troupe/devices/EntropySource"
import * as KvmGuestLifecycle from "@troupe/node/KvmGuestLifecycle"
import * as Vsock from "@troupe/vsock"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"

declare const process: { readonly stdout: { readonly write: (text: string) => void } }

const kernel = GuestProgram.kernel(GuestProgram.make(function*(cpu) {
  yield* GuestAcpi.powerOff(cpu)
}))

const program = Effect.gen(function*() {
  const lifecycle = yield* GuestLifecycle
  yield* lifecycle.create({ kernelType: "LINUX", kernel, cpus: 1, guestMemory: "4M" })
  const stop = yield* lifecycle.run
  return stop._tag
})

const layer: Layer.Layer<GuestLifecycle> = GuestLifecycle.layer.pipe(
  Layer.provide(layerDevices),
  Layer.provide(EntropySource.layerRandom),
  Layer.provide(FakeHypervisor.layer())
)

/** The other faces are there, with types. */
export const faces: readonly [Layer.Layer<GuestLifecycle, unknown>, object] = [KvmGuestLifecycle.layer, Vsock]

process.stdout.write(`${await Effect.runPromise(Effect.provide(program, layer))}\n`)
