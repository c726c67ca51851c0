/** How the virtio devices of a machine are reached: which transport, and which formats of queues. */
import type { Device } from "@troupe/core/Device"
import type { GuestConfig } from "@troupe/core/GuestConfig"
import { makeFeatures, unionFeatures, VIRTIO_F_RING_PACKED } from "./Features.ts"
import type { VirtioDevice, VirtioOptions } from "./VirtioDevice.ts"
import { virtioMmio } from "./VirtioMmio.ts"
import { virtioPci } from "./VirtioPci.ts"

/** What the configuration of a machine says about all of its virtio devices. */
export type VirtioChoices = Pick<GuestConfig, "virtioTransport" | "virtioPackedRing">

const PACKED = makeFeatures(VIRTIO_F_RING_PACKED)

/** A virtio device as a device of the machine, behind the transport and with the queues that the configuration chooses. */
export const virtioOn = (choices: VirtioChoices, device: VirtioDevice, options: VirtioOptions): Device => {
  const offered = choices.virtioPackedRing
    ? { ...device, features: unionFeatures(device.features, PACKED) }
    : device
  return choices.virtioTransport === "pci" ? virtioPci(offered, options) : virtioMmio(offered, options)
}
