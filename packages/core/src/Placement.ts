/** Gives devices their places: addresses in the device window and interrupt numbers. Pure and deterministic. */
import * as Result from "effect/Result"
import {
  MAXIMUM_MEMORY_SIZE,
  PCI_ECAM_ADDRESS,
  PCI_ECAM_BUS_SIZE,
  PCI_MEMORY_ADDRESS,
  PCI_MEMORY_SIZE,
  pluggableMemoryAddress,
  VIRTIO_MMIO_ADDRESS
} from "./boot/MachineLayout.ts"
import type { BusRange } from "./Bus.ts"
import { type Device, DeviceFailure, type DevicePlacement, type RangeRequest, type RangeWindow } from "./Device.ts"
import { DeviceInitializationFailure } from "./GuestError.ts"
import { PAGE_SIZE } from "./GuestMemory.ts"

/** The first interrupt that is given to a device which asks for any: those below belong to the timer and legacy devices. */
export const FIRST_FREE_GSI = 5

/** The first free configuration page: the function before it is the host bridge's. */
const FIRST_PCI_FUNCTION = PCI_ECAM_ADDRESS + PAGE_SIZE
/**
 * Where memory of PCI functions begins that is not read from register pages. Such pages come before it, one after the other,
 * because a hypervisor can have neighbouring pages at the cost of one.
 */
const PCI_CALLS_ADDRESS = PCI_MEMORY_ADDRESS + PCI_MEMORY_SIZE / 2

const alignUp = (address: number, alignment: number): number => Math.ceil(address / alignment) * alignment

const FULL: { readonly [window in RangeWindow]: string } = {
  "device-window": "the device window is full",
  "pci-function": "no function of the PCI bus is free",
  "pci-memory": "the memory of the PCI functions is full"
}

/** What is taken of the windows in which the machine chooses addresses. */
class DeviceWindows {
  #page = VIRTIO_MMIO_ADDRESS
  #function = FIRST_PCI_FUNCTION
  #pciPage = PCI_MEMORY_ADDRESS
  #pciCall = PCI_CALLS_ADDRESS

  /** The address for a range, or `undefined` when there is no room for it. */
  place({ read, size, window = "device-window" }: RangeRequest): number | undefined {
    switch (window) {
      case "device-window": {
        const base = this.#page
        this.#page = alignUp(base + size, PAGE_SIZE)
        return this.#page > PCI_ECAM_ADDRESS ? undefined : base
      }
      case "pci-function": {
        const base = this.#function
        this.#function += PAGE_SIZE
        return this.#function > PCI_ECAM_ADDRESS + PCI_ECAM_BUS_SIZE ? undefined : base
      }
      case "pci-memory": {
        const isPage = read === "register-page"
        const base = alignUp(isPage ? this.#pciPage : this.#pciCall, size)
        if (isPage) this.#pciPage = base + size
        else this.#pciCall = base + size
        return base + size > (isPage ? PCI_CALLS_ADDRESS : PCI_MEMORY_ADDRESS + PCI_MEMORY_SIZE) ? undefined : base
      }
    }
  }
}

/** A device and where it was placed. */
export interface PlacedDevice {
  readonly device: Device
  readonly placement: DevicePlacement
  /** Index of its first range among the ranges of all devices. */
  readonly firstRange: number
}

/** All devices of a machine in their places. */
export interface MachinePlacement {
  readonly devices: ReadonlyArray<PlacedDevice>
  /** The ranges of all devices, in order. */
  readonly ranges: ReadonlyArray<BusRange>
}

/** Places devices in the order given, in a machine with this much RAM, or names the one for which there is no place. */
export const placeDevices = (
  devices: ReadonlyArray<Device>,
  interruptLines: number,
  memorySize: number
): Result.Result<MachinePlacement, DeviceFailure> => {
  const taken = new Set<number>()
  for (const device of devices) {
    for (const request of device.interrupts) {
      if (request === "any") continue
      if (request < 0 || request >= interruptLines || taken.has(request)) {
        return refuse(
          device,
          `interrupt ${request} is not free`,
          "Two devices cannot share an edge-triggered interrupt"
        )
      }
      taken.add(request)
    }
  }
  const windows = new DeviceWindows()
  let nextGsi = FIRST_FREE_GSI
  let nextPluggable = pluggableMemoryAddress(memorySize)
  const ranges: Array<BusRange> = []
  const placed: Array<PlacedDevice> = []
  for (const device of devices) {
    const firstRange = ranges.length
    const bases: Array<number> = []
    for (const request of device.ranges) {
      let base = request.base
      if (base === undefined) {
        if (request.space === "pio") {
          return refuse(device, "an I/O port range has no base", "Only memory-mapped ranges are placed")
        }
        base = windows.place(request)
        if (base === undefined) {
          return refuse(device, FULL[request.window ?? "device-window"], "Configure fewer devices")
        }
      }
      bases.push(base)
      ranges.push({
        space: request.space,
        base,
        size: request.size,
        read: request.read,
        write: request.write,
        doorbells: request.doorbells ?? [],
        device: device.name
      })
    }
    const gsis: Array<number> = []
    for (const request of device.interrupts) {
      if (request !== "any") {
        gsis.push(request)
        continue
      }
      while (taken.has(nextGsi)) nextGsi++
      if (nextGsi >= interruptLines) {
        return refuse(device, `all ${interruptLines} interrupt lines are taken`, "Configure fewer devices")
      }
      taken.add(nextGsi)
      gsis.push(nextGsi)
    }
    const request = device.pluggableMemory
    if (request === undefined) {
      placed.push({ device, placement: { bases, gsis }, firstRange })
      continue
    }
    const pluggableMemory = Math.ceil(nextPluggable / request.alignment) * request.alignment
    nextPluggable = pluggableMemory + request.size
    if (nextPluggable > MAXIMUM_MEMORY_SIZE) {
      return refuse(
        device,
        `${request.size} bytes of pluggable memory, aligned to ${request.alignment}, do not fit behind the RAM`,
        "Configure a smaller region or a smaller alignment"
      )
    }
    placed.push({ device, placement: { bases, gsis, pluggableMemory }, firstRange })
  }
  return Result.succeed({ devices: placed, ranges })
}

const refuse = (device: Device, detail: string, hint: string): Result.Result<never, DeviceFailure> =>
  Result.fail(new DeviceFailure({ device: device.name, detail, hint }))

/** A device that has no place in its machine, as a guest's reason. */
export const deviceInitializationFailure = (failure: DeviceFailure): DeviceInitializationFailure =>
  new DeviceInitializationFailure({
    operation: "create",
    device: failure.device,
    detail: failure.detail,
    ...(failure.hint === undefined ? {} : { hint: failure.hint })
  })
