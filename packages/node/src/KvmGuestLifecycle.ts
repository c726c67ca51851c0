/**
 * Guest lifecycles with everything wired: this host's KVM, all devices, and random bytes of the operating system.
 *
 * ```ts
 * const stop = Effect.gen(function*() {
 *   const lifecycle = yield* GuestLifecycle
 *   yield* lifecycle.create({ kernelType: "LINUX", kernel: fromPath("vmlinuz"), cpus: 1, guestMemory: "256M" })
 *   return yield* lifecycle.run
 * }).pipe(Effect.provide(KvmGuestLifecycle.layer))
 * ```
 */
import type { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { GuestLifecycle } from "@troupe/core/GuestLifecycle"
import type { Hypervisor, HypervisorError } from "@troupe/core/Hypervisor"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import { layerVsock, VsockManager } from "@troupe/vsock"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Schema from "effect/Schema"
import { randomFillSync } from "node:crypto"
import { featuresToHide } from "./doctor/HostProbe.ts"
import { layerWith as layerFfiWith } from "./Ffi.ts"
import type { FfiUnavailable } from "./FfiError.ts"
import { cpuidFeature, type CpuidMask, HiddenCpuid } from "./kvm/Cpuid.ts"
import * as KvmHypervisor from "./kvm/KvmHypervisor.ts"
import * as KvmSystem from "./kvm/KvmSystem.ts"
import * as VcpuThreads from "./kvm/VcpuThreads.ts"

/** The name of a CPU feature is not one that can be hidden. */
export class CpuFeatureUnknown extends Schema.TaggedError<CpuFeatureUnknown>()("CpuFeatureUnknown", {
  feature: Schema.String
}) {
  override get message(): string {
    return `there is no CPU feature ${JSON.stringify(this.feature)} that can be hidden; the names are ${
      Object.keys(cpuidFeature).join(", ")
    }`
  }
}

/** What a host may choose. */
export interface KvmGuestLifecycleOptions {
  /**
   * CPU features that guests are not shown, by the names in `/proc/cpuinfo`. Default: `probe`, which finds out in a few
   * milliseconds which features this host's KVM promises and cannot run in kernel mode.
   */
  readonly hiddenCpuFeatures?: "probe" | ReadonlyArray<string>
}

/** Random bytes of the operating system. */
export const layerEntropySource: Layer.Layer<EntropySource> = Layer.succeed(EntropySource, {
  fill: (bytes) => {
    randomFillSync(bytes)
  }
})

/** All devices, fed by this host; its guests are those of the manager, which may be that of other machines too. */
export const layerCatalogManaged: Layer.Layer<DeviceCatalog, never, VsockManager> = layerVsock.pipe(
  Layer.provide(layerDevices),
  Layer.provide(layerEntropySource)
)

/** All devices, fed by this host; guests reach the host, and not each other. */
export const layerCatalog: Layer.Layer<DeviceCatalog> = layerCatalogManaged.pipe(Layer.provide(VsockManager.layer))

const isHideable = (feature: string): feature is keyof typeof cpuidFeature => feature in cpuidFeature

const masks = (
  features: ReadonlyArray<string>
): Effect.Effect<ReadonlyArray<CpuidMask>, CpuFeatureUnknown> =>
  Effect.forEach(features, (feature) =>
    isHideable(feature)
      ? Effect.succeed(cpuidFeature[feature])
      : Effect.fail(new CpuFeatureUnknown({ feature })))

/** The hypervisor on this host's KVM whose guests do not see the given features. */
export const layerHypervisor = (
  options: KvmGuestLifecycleOptions = {}
): Layer.Layer<Hypervisor, HypervisorError | FfiUnavailable | CpuFeatureUnknown> => {
  const chosen = options.hiddenCpuFeatures ?? "probe"
  const hidden = chosen === "probe"
    ? Effect.flatMap(featuresToHide, masks).pipe(Effect.provide(KvmHypervisor.layer))
    : masks(chosen)
  return Layer.unwrap(
    Effect.map(hidden, (masks) => KvmHypervisor.layer.pipe(Layer.provide(Layer.succeed(HiddenCpuid, masks))))
  ).pipe(
    Layer.provide(KvmSystem.layer),
    Layer.provide(VcpuThreads.layer),
    Layer.provide(layerFfiWith({ quiet: true }))
  )
}

/** A lifecycle on this host's KVM. */
export const layerWith = (
  options: KvmGuestLifecycleOptions
): Layer.Layer<GuestLifecycle, HypervisorError | FfiUnavailable | CpuFeatureUnknown> =>
  GuestLifecycle.layer.pipe(Layer.provide(layerCatalog), Layer.provide(layerHypervisor(options)))

/** A lifecycle on this host's KVM with the default choices. */
export const layer: Layer.Layer<GuestLifecycle, HypervisorError | FfiUnavailable | CpuFeatureUnknown> = layerWith({})
