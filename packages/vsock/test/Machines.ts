/** Machines with a socket device on the fake hypervisor, and the guests in them. */
import type { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import type { HostVsockAcceptor } from "@troupe/core/HostVsockEndpoint"
import { FakeHypervisor, GuestAcpi, GuestProgram } from "@troupe/core/testing"
import { startVsock, type VsockDriver } from "@troupe/core/testing/drivers/VsockDriver"
import type { GuestCpu, GuestRoutine } from "@troupe/core/testing/GuestCpu"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import { layerVsock, VsockManager } from "../src/index.ts"

/** A lifecycle whose guests are those of the manager. */
export const layerMachine = (
  manager: VsockManager["Service"]
): Layer.Layer<GuestLifecycle | FakeHypervisor.FakeHypervisor> => {
  const catalog: Layer.Layer<DeviceCatalog> = layerVsock.pipe(
    Layer.provide(Layer.succeed(VsockManager, manager)),
    Layer.provide(layerDevices),
    Layer.provide(EntropySource.layerRandom)
  )
  return Layer.fresh(GuestLifecycle.layer).pipe(
    Layer.provideMerge(Layer.merge(Layer.fresh(FakeHypervisor.layer()), catalog))
  )
}

/** A guest that does this with its socket device, and powers off. */
export const guestOf = (work: (cpu: GuestCpu, vsock: VsockDriver) => GuestRoutine) =>
  GuestProgram.make(function*(cpu) {
    const place = GuestAcpi.find(cpu).virtioMmio[0]
    if (place === undefined) throw new Error("the machine has no virtio device")
    yield* work(cpu, yield* startVsock(cpu, place, { memoryAddress: 0x18_0000 }))
    yield* GuestAcpi.powerOff(cpu)
  })

/** Creates a machine, and returns its lifecycle and its endpoint. */
export const create = Effect.fnUntraced(function*(
  program: GuestProgram.GuestProgram,
  listeners: ReadonlyArray<{ readonly port: number; readonly acceptor?: HostVsockAcceptor }> = []
) {
  const lifecycle = yield* GuestLifecycle
  yield* lifecycle.create({
    kernelType: "LINUX",
    kernel: GuestProgram.kernel(program),
    cpus: 1,
    guestMemory: "2M",
    virtioVsock: true,
    vsockListeners: listeners
  })
  const endpoint = yield* (yield* lifecycle.bind).getHostVsockEndpoint
  return { lifecycle, endpoint }
})
