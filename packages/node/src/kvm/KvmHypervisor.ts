/**
 * The `Hypervisor` on Linux KVM.
 */
import { Hypervisor, type HypervisorError } from "@troupe/core/Hypervisor"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import { Ffi, layer as layerFfi } from "../Ffi.ts"
import type { FfiUnavailable } from "../FfiError.ts"
import { HiddenCpuid } from "./Cpuid.ts"
import { ExitObserver } from "./ExitCounts.ts"
import { KvmValue } from "./KvmIoctl.ts"
import { KvmSystem, layer as layerSystem } from "./KvmSystem.ts"
import { makeVm } from "./KvmVm.ts"
import { layer as layerThreads, VcpuThreads } from "./VcpuThreads.ts"
import { WakeObserver } from "./WakeCounts.ts"

/** Local APIC IDs are 8 bits wide without interrupt remapping, and 255 is the broadcast (Intel SDM volume 3, section 11.6.2.1). */
const APIC_ID_LIMIT = 255

/** The hypervisor on an open KVM. Its machines belong to the scopes of `createVm`. */
export const layer: Layer.Layer<Hypervisor, never, Ffi | KvmSystem | VcpuThreads> = Layer.effect(
  Hypervisor,
  Effect.gen(function*() {
    const ffi = yield* Ffi
    const system = yield* KvmSystem
    const threads = yield* VcpuThreads
    const hidden = yield* HiddenCpuid
    const observer = yield* ExitObserver
    const wakeObserver = yield* WakeObserver
    return Hypervisor.of({
      name: "kvm",
      limits: {
        maxVcpus: Math.min(system.maxVcpus, APIC_ID_LIMIT),
        interruptLines: KvmValue.KVM_IOAPIC_NUM_PINS
      },
      createVm: makeVm.pipe(
        Effect.provideService(Ffi, ffi),
        Effect.provideService(KvmSystem, system),
        Effect.provideService(VcpuThreads, threads),
        Effect.provideService(HiddenCpuid, hidden),
        Effect.provideService(ExitObserver, observer),
        Effect.provideService(WakeObserver, wakeObserver)
      )
    })
  })
)

/** The hypervisor on `/dev/kvm`, with everything under it. */
export const layerDefault: Layer.Layer<Hypervisor, HypervisorError | FfiUnavailable> = layer.pipe(
  Layer.provide(layerSystem),
  Layer.provide(layerThreads),
  Layer.provide(layerFfi)
)
