/** A driver of a 16550A serial port, polled or by interrupts, as a guest's kernel has it. */
import type { GuestCpu, GuestRoutine } from "../GuestCpu.ts"

/** Where a serial port is. */
export interface SerialPlace {
  readonly port: number
  readonly gsi: number
}

/** The first serial port of a PC. */
export const COM1: SerialPlace = { port: 0x3f8, gsi: 4 }

const DATA = 0
const IER = 1
const IIR = 2
const FCR = 2
const LCR = 3
const MCR = 4
const LSR = 5
const IER_RDI = 0x01
const IER_THRI = 0x02
const IIR_NO_INT = 0x01
const LSR_DR = 0x01
const LSR_THRE = 0x20
const FIFO_SIZE = 16
const NEWLINE = 0x0a

/** The bytes of a text in UTF-8. */
export const utf8 = (text: string): Uint8Array => {
  const bytes: Array<number> = []
  for (const character of text) {
    const code = character.codePointAt(0) ?? 0
    if (code < 0x80) bytes.push(code)
    else if (code < 0x800) bytes.push(0xc0 | (code >> 6), 0x80 | (code & 0x3f))
    else if (code < 0x1_0000) bytes.push(0xe0 | (code >> 12), 0x80 | ((code >> 6) & 0x3f), 0x80 | (code & 0x3f))
    else {
      bytes.push(0xf0 | (code >> 18), 0x80 | ((code >> 12) & 0x3f), 0x80 | ((code >> 6) & 0x3f), 0x80 | (code & 0x3f))
    }
  }
  return Uint8Array.from(bytes)
}

/** A serial port that a guest drives. */
export class SerialDriver {
  readonly #base: number
  readonly #gsi: number

  constructor(place: SerialPlace = COM1) {
    this.#base = place.port
    this.#gsi = place.gsi
  }

  /** Sets the port up: 115200 baud, 8 bits, FIFOs on and empty, ready to receive, interrupts connected and off. */
  *setUp(cpu: GuestCpu): GuestRoutine {
    yield* cpu.out8(this.#base + IER, 0)
    yield* cpu.out8(this.#base + LCR, 0x80)
    yield* cpu.out8(this.#base + DATA, 1)
    yield* cpu.out8(this.#base + IER, 0)
    yield* cpu.out8(this.#base + LCR, 0x03)
    yield* cpu.out8(this.#base + FCR, 0x07)
    yield* cpu.out8(this.#base + MCR, 0x0b)
  }

  /** Sends a text or bytes, polled. */
  *print(cpu: GuestCpu, output: string | Uint8Array): GuestRoutine {
    for (const byte of typeof output === "string" ? utf8(output) : output) {
      while (((yield* cpu.in8(this.#base + LSR)) & LSR_THRE) === 0) yield* cpu.yield()
      yield* cpu.out8(this.#base + DATA, byte)
    }
  }

  /** Sends a text or bytes by interrupts, as many bytes as the FIFO holds for each. Returns the number of interrupts. */
  *printByInterrupts(cpu: GuestCpu, output: string | Uint8Array): GuestRoutine<number> {
    const bytes = typeof output === "string" ? utf8(output) : output
    let interrupts = 0
    cpu.interrupts.acknowledge(this.#gsi)
    yield* cpu.out8(this.#base + IER, IER_THRI)
    for (let at = 0; at < bytes.length; at += FIFO_SIZE) {
      yield* cpu.waitForInterrupt(this.#gsi)
      interrupts++
      if (((yield* cpu.in8(this.#base + IIR)) & 0x0f) !== IER_THRI) {
        throw new Error("the transmitter's interrupt is not named")
      }
      for (const byte of bytes.subarray(at, at + FIFO_SIZE)) yield* cpu.out8(this.#base + DATA, byte)
    }
    yield* cpu.out8(this.#base + IER, 0)
    return interrupts
  }

  /** Waits for a byte, by interrupts. */
  *read(cpu: GuestCpu): GuestRoutine<number> {
    for (;;) {
      if (((yield* cpu.in8(this.#base + LSR)) & LSR_DR) !== 0) return yield* cpu.in8(this.#base + DATA)
      yield* cpu.out8(this.#base + IER, IER_RDI)
      if (((yield* cpu.in8(this.#base + IIR)) & IIR_NO_INT) !== 0) yield* cpu.waitForInterrupt(this.#gsi)
      yield* cpu.out8(this.#base + IER, 0)
    }
  }

  /** Waits for a line of ASCII text; returns it without its end. */
  *readLine(cpu: GuestCpu): GuestRoutine<string> {
    let line = ""
    for (;;) {
      const byte = yield* this.read(cpu)
      if (byte === NEWLINE) return line
      line += String.fromCharCode(byte)
    }
  }
}
