/** Which transport a virtio device is reached through. */
import type { Device } from "@troupe/core/Device"
import type { VirtioTransport } from "@troupe/core/GuestConfig"
import type { VirtioDevice } from "./VirtioDevice.ts"
import { virtioMmio, type VirtioMmioOptions } from "./VirtioMmio.ts"
import { virtioPci } from "./VirtioPci.ts"

/** What a device may choose besides its own nature, whatever its transport. */
export type VirtioOptions = VirtioMmioOptions

/** A virtio device as a device of the machine, behind the transport that the configuration chooses. */
export const virtioOn = (transport: VirtioTransport, device: VirtioDevice, options: VirtioOptions): Device =>
  transport === "pci" ? virtioPci(device, options) : virtioMmio(device, options)
