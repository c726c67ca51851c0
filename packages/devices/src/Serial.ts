/**
 * The serial port of a PC: a 16550A at 0x3f8 with interrupt 4, and the service `SerialPort` for the host.
 *
 * Writes of data are posted and the status registers are read from shadows, so that output costs the guest no wait. What
 * the guest reads is still never older than what it wrote: registers whose writes could change a shadow (FIFO, line and
 * modem control) are calls, before whose answer the posted writes are done, and a status that the data written could
 * change (loopback), or that its read clears (errors), has no shadow.
 */
import { COM1_GSI, COM1_PORT, serialPortDevice } from "@troupe/core/acpi/AcpiDevices"
import { SHADOW_INVALID } from "@troupe/core/Bus"
import type { Device, DeviceBehaviour, RangeRequest } from "@troupe/core/Device"
import { DeviceCatalog } from "@troupe/core/DeviceCatalog"
import { SerialPort } from "@troupe/core/SerialPort"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import { SerialLine } from "./serial/SerialLine.ts"
import { IIR_FCR, LSR, MSR, RBR_THR_DLL, Uart16550 } from "./serial/Uart16550.ts"

/** The signal that the line wants attention: there is input, or somebody waits. */
const SIGNAL_LINE = 0
/** The signal that a burst of bytes has left the transmitter. */
const SIGNAL_TRANSMITTED = 1

/** The range of the status registers. */
const STATUS_RANGE = 2

/** The ranges, and the register that each begins with. */
const ranges: ReadonlyArray<RangeRequest> = [
  { space: "pio", base: COM1_PORT + RBR_THR_DLL, size: 2, read: "call", write: "posted" },
  { space: "pio", base: COM1_PORT + IIR_FCR, size: 3, read: "call", write: "call" },
  { space: "pio", base: COM1_PORT + LSR, size: 3, read: "shadowed", write: "posted" }
]
const firstRegisters = [RBR_THR_DLL, IIR_FCR, LSR] as const

const makeBehaviour = (uart: Uart16550, line: SerialLine, shadow: Int16Array | undefined): DeviceBehaviour => {
  const publish = () => {
    if (shadow === undefined) return
    const lineStatus = uart.stableLineStatus
    const modemStatus = uart.stableModemStatus
    Atomics.store(shadow, 0, lineStatus < 0 ? SHADOW_INVALID : lineStatus)
    Atomics.store(shadow, MSR - LSR, modemStatus < 0 ? SHADOW_INVALID : modemStatus)
  }
  publish()
  return {
    // The registers are bytes: a wider access is one access to each of them, lowest address first.
    read: (range, offset, size) => {
      const register = (firstRegisters[range] ?? 0) + offset
      let value = 0
      for (let i = 0; i < size; i++) value |= uart.read(register + i) << (8 * i)
      publish()
      return value >>> 0
    },
    write: (range, offset, size, value) => {
      const register = (firstRegisters[range] ?? 0) + offset
      for (let i = 0; i < size; i++) uart.write(register + i, (value >>> (8 * i)) & 0xff)
      publish()
    },
    signal: (number) => {
      if (number === SIGNAL_TRANSMITTED) {
        uart.transmitted()
      } else {
        uart.fill()
        line.wake()
      }
      publish()
      return false
    }
  }
}

/** The serial port of a machine. Its output can be read until the scope closes. */
export const makeSerial: Effect.Effect<Device, never, Scope.Scope> = Effect.gen(function*() {
  const line = yield* Effect.acquireRelease(
    Effect.sync(() => new SerialLine()),
    (line) => Effect.sync(() => line.close())
  )
  let uart: Uart16550 | undefined
  return {
    name: "serial0",
    ranges,
    interrupts: [COM1_GSI],
    acpi: () => [serialPortDevice()],
    services: Context.make(SerialPort, line.port),
    start: (context) =>
      Effect.gen(function*() {
        const earlier = context.generation === 0 ? undefined : uart
        const started = new Uart16550({
          transmit: line.transmit,
          receive: line.receive,
          unreceive: line.unreceive,
          interrupt: () => context.interrupts[0]?.trigger(),
          transmitSoon: () => context.signal(SIGNAL_TRANSMITTED)
        }, earlier)
        uart = started
        yield* Effect.acquireRelease(
          Effect.sync(() => line.attach(() => context.signal(SIGNAL_LINE))),
          () => Effect.sync(() => line.detach())
        )
        return makeBehaviour(started, line, context.ranges[STATUS_RANGE]?.shadow)
      })
  }
})

/** Adds the serial port, which every machine has. */
export const layerSerial: Layer.Layer<DeviceCatalog, never, DeviceCatalog> = DeviceCatalog.layerAdd(
  Effect.succeed({ provides: "serial" as const, devices: () => Effect.map(makeSerial, (serial) => [serial]) })
)
