/**
 * Messages about the ports of a console, to and from its driver (virtio 1.3, section 5.3.6.2).
 *
 * What is to be said of a port is a set of bits, not a queue of messages: however often the driver asks or the host changes
 * its mind, it costs nothing, and the driver learns how things are when it has a buffer for it.
 */
import { ConsoleEvent, Control, CONTROL_SIZE } from "./ConsoleLayout.ts"
import type { ConsoleLine } from "./ConsoleLine.ts"

/** The most bytes of a name. */
export const PORT_NAME_BYTES_MAX = 248
/** The most bytes of a message to the driver. */
export const MESSAGE_BYTES_MAX = CONTROL_SIZE + PORT_NAME_BYTES_MAX

// What is to be said of a port, in the order in which it is said.
const REMOVE = 1
const ADD = 2
const CONSOLE_PORT = 4
const NAME = 8
const RESIZE = 16
const OPEN = 32

/** What a driver has been told of a port, and has answered. */
const UNKNOWN = 0
const ADDED = 1
const READY = 2

/** The text as UTF-8, without an encoder, which is not part of the language. */
export const encodeUtf8 = (text: string): Uint8Array<ArrayBuffer> => {
  const bytes: Array<number> = []
  for (const character of text) {
    const code = character.codePointAt(0) ?? 0
    if (code < 0x80) bytes.push(code)
    else if (code < 0x800) bytes.push(0xc0 | (code >> 6), 0x80 | (code & 0x3f))
    else if (code < 0x1_0000) bytes.push(0xe0 | (code >> 12), 0x80 | ((code >> 6) & 0x3f), 0x80 | (code & 0x3f))
    else {
      bytes.push(
        0xf0 | (code >> 18),
        0x80 | ((code >> 12) & 0x3f),
        0x80 | ((code >> 6) & 0x3f),
        0x80 | (code & 0x3f)
      )
    }
  }
  return Uint8Array.from(bytes)
}

/** What a driver is to be told about the ports, and what it has said. */
export class ConsoleControl {
  readonly #lines: ReadonlyArray<ConsoleLine | undefined>
  readonly #size: () => { readonly cols: number; readonly rows: number }
  readonly #states: Uint8Array
  readonly #toSay: Uint8Array
  #driverReady = false

  /** `lines` are the ports that there are now, by number; it changes with them. */
  constructor(
    lines: ReadonlyArray<ConsoleLine | undefined>,
    size: () => { readonly cols: number; readonly rows: number }
  ) {
    this.#lines = lines
    this.#size = size
    this.#states = new Uint8Array(lines.length)
    this.#toSay = new Uint8Array(lines.length)
  }

  /** The driver is gone; the next one knows nothing. */
  reset(): void {
    this.#driverReady = false
    this.#states.fill(UNKNOWN)
    this.#toSay.fill(0)
  }

  /** Whether the driver has made the port ready, and knows it by this name. */
  isReady(port: number): boolean {
    return this.#states[port] === READY
  }

  /** Whether the driver still has a port of this number that is gone. */
  isLeaving(port: number): boolean {
    return ((this.#toSay[port] ?? 0) & REMOVE) !== 0
  }

  /** There is a new port. */
  added(port: number): void {
    if (this.#driverReady) this.#say(port, ADD)
  }

  /** A port is gone. */
  removed(port: number): void {
    const known = this.#states[port] !== UNKNOWN
    this.#states[port] = UNKNOWN
    this.#toSay[port] = known ? REMOVE : (this.#toSay[port] ?? 0) & REMOVE
  }

  /** The host's end of a port was opened or closed. */
  hostOpenChanged(port: number): void {
    if (this.isReady(port)) this.#say(port, OPEN)
  }

  /** The host's terminal has another size. */
  resized(): void {
    if (this.isReady(0)) this.#say(0, RESIZE)
  }

  /** Takes a message of the driver. What makes no sense changes nothing. */
  receive(message: DataView): void {
    const port = message.getUint32(Control.id, true)
    const event = message.getUint16(Control.event, true)
    const value = message.getUint16(Control.value, true)
    if (event === ConsoleEvent.DEVICE_READY) {
      this.#driverReady = value === 1
      if (this.#driverReady) {
        this.#lines.forEach((line, id) => {
          if (line !== undefined && this.#states[id] === UNKNOWN) this.#say(id, ADD)
        })
      }
      return
    }
    const line = this.#lines[port]
    if (line === undefined || this.#states[port] === UNKNOWN) return
    if (event === ConsoleEvent.PORT_READY) {
      this.#states[port] = value === 1 ? READY : ADDED
      this.#toSay[port] = (this.#toSay[port] ?? 0) & (REMOVE | ADD)
      if (value === 1) this.#say(port, port === 0 ? CONSOLE_PORT | RESIZE | OPEN : NAME | OPEN)
      else line.guestOpen = false
    } else if (event === ConsoleEvent.PORT_OPEN) {
      line.guestOpen = value === 1 && this.isReady(port)
    }
  }

  /** Writes the next message to the driver, and returns its length; 0 when there is nothing to say. */
  next(message: DataView): number {
    for (let port = 0; port < this.#toSay.length; port++) {
      const toSay = this.#toSay[port] ?? 0
      if (toSay === 0) continue
      const bit = toSay & -toSay
      this.#toSay[port] = toSay & ~bit
      message.setUint32(Control.id, port, true)
      return this.#message(bit, port, message)
    }
    return 0
  }

  /** Whether there is something to say. */
  get waiting(): boolean {
    for (let port = 0; port < this.#toSay.length; port++) if (this.#toSay[port] !== 0) return true
    return false
  }

  #say(port: number, bits: number): void {
    this.#toSay[port] = (this.#toSay[port] ?? 0) | bits
  }

  #message(bit: number, port: number, message: DataView): number {
    const line = this.#lines[port]
    const header = (event: number, value: number): number => {
      message.setUint16(Control.event, event, true)
      message.setUint16(Control.value, value, true)
      return CONTROL_SIZE
    }
    switch (bit) {
      case REMOVE:
        return header(ConsoleEvent.DEVICE_REMOVE, 0)
      case ADD:
        this.#states[port] = ADDED
        return header(ConsoleEvent.DEVICE_ADD, 0)
      case CONSOLE_PORT:
        return header(ConsoleEvent.CONSOLE_PORT, 1)
      case NAME: {
        const name = encodeUtf8(line?.name ?? "")
        for (let i = 0; i < name.length; i++) message.setUint8(CONTROL_SIZE + i, name[i] ?? 0)
        return header(ConsoleEvent.PORT_NAME, 1) + name.length
      }
      case RESIZE: {
        const { cols, rows } = this.#size()
        message.setUint16(CONTROL_SIZE, cols, true)
        message.setUint16(CONTROL_SIZE + 2, rows, true)
        return header(ConsoleEvent.RESIZE, 0) + 4
      }
      default:
        return header(ConsoleEvent.PORT_OPEN, line?.hostOpen === true ? 1 : 0)
    }
  }
}
