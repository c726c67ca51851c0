/** A vCPU for guest code on a device harness: every operation is done at once, and what waits for the device runs before. */
import { openBusValue } from "@troupe/core/Bus"
import {
  type AccessSize,
  type GuestCpu,
  type GuestOperation,
  type GuestRoutine,
  messageInterrupt
} from "@troupe/core/testing/GuestCpu"
import type { DeviceHarness } from "./DeviceHarness.ts"

/** Where the only memory-mapped range of the device is for the guest. */
export const HARNESS_PLACE = { base: 0xd000_0000, gsi: 0 } as const

const operation = <A>(run: () => A): GuestOperation<A> => ({
  [Symbol.iterator]: () => ({ next: () => ({ done: true, value: run() }) })
})

const unsupported = (): never => {
  throw new Error("the device harness has no such operation")
}

/** A vCPU whose memory and devices are those of the harness. Waiting for an interrupt that does not come throws. */
export const harnessCpu = (harness: DeviceHarness): GuestCpu => {
  const taken = new Map<number, number>()
  /** How often a line was raised, or a message with this vector was sent. */
  const raised = (number: number): number =>
    harness.messages.reduce(
      (sum, message) =>
        sum + (message !== undefined && messageInterrupt(message.data & 0xff) === number ? message.sent : 0),
      harness.interrupts[number] ?? 0
    )
  const acknowledge = (number: number) => {
    const was = raised(number) > (taken.get(number) ?? 0)
    taken.set(number, raised(number))
    return was
  }
  /** The range at an address, and the offset in it. */
  const find = (address: number) =>
    harness.device.ranges.flatMap(({ size }, range) => {
      const offset = address - harness.bases[range]!
      return offset >= 0 && offset < size ? [{ range, offset }] : []
    })[0]
  return {
    id: 0,
    state: undefined,
    memory: harness.memory,
    interrupts: { enabled: false, pending: new Set(), handle: unsupported, route: unsupported, acknowledge },
    in8: (port) => operation(() => harness.in8(port)),
    in16: unsupported,
    in32: unsupported,
    out8: (port, value) => operation(() => harness.out8(port, value)),
    out16: unsupported,
    out32: unsupported,
    load: (address: number, size: AccessSize) =>
      operation(() => {
        const place = find(address)
        return place === undefined ? openBusValue(size) : harness.read(place.range, place.offset, size)
      }),
    store: (address, size, value) =>
      operation(() => {
        const place = find(address)
        if (place !== undefined) harness.write(place.range, place.offset, size, value)
      }),
    enableInterrupts: unsupported,
    disableInterrupts: unsupported,
    waitForInterrupt: (gsi = 0) =>
      operation(() => {
        harness.settle()
        if (!acknowledge(gsi)) throw new Error(`the vCPU would wait for interrupt ${gsi} for ever`)
        return gsi
      }),
    waitForInterruptWithin: unsupported,
    halt: unsupported,
    tripleFault: unsupported,
    internalError: unsupported,
    sleep: unsupported,
    yield: () => operation(() => harness.settle()),
    now: () => 0,
    startVcpu: unsupported
  }
}

/** Runs guest code to its end. */
export const runGuest = <A>(routine: GuestRoutine<A>): A => {
  for (;;) {
    const step = routine.next(undefined)
    if (step.done === true) return step.value
  }
}
