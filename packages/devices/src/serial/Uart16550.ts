/**
 * The registers of a 16550A serial port (PC16550D data sheet): a state machine without a host or a bus.
 *
 * The line to the outside is infinitely fast: what the guest writes is sent at once, so the transmitter is always empty,
 * and what waits on the line comes in as fast as the guest reads. As on a cable with hardware flow control, bytes come in
 * only while the guest asserts RTS; a guest that has never written MCR does not know of RTS and gets them always.
 */

/** Receiver buffer (read), transmitter holding register (write), divisor latch low byte (DLAB = 1). */
export const RBR_THR_DLL = 0
/** Interrupt enable, divisor latch high byte (DLAB = 1). */
export const IER_DLM = 1
/** Interrupt identification (read), FIFO control (write). */
export const IIR_FCR = 2
/** Line control. */
export const LCR = 3
/** Modem control. */
export const MCR = 4
/** Line status. */
export const LSR = 5
/** Modem status. */
export const MSR = 6
/** Scratch. */
export const SCR = 7

/** Interrupt on received data. */
export const IER_RDI = 0x01
/** Interrupt on an empty transmitter holding register. */
export const IER_THRI = 0x02
/** Interrupt on a receiver error. */
export const IER_RLSI = 0x04
/** Interrupt on a change of the modem lines. */
export const IER_MSI = 0x08

/** No interrupt is pending. */
export const IIR_NO_INT = 0x01
/** Modem lines changed. Cleared by reading MSR. */
export const IIR_MSI = 0x00
/** Transmitter holding register empty. Cleared by reading IIR or writing THR. */
export const IIR_THRI = 0x02
/** Received data at the trigger level. */
export const IIR_RDI = 0x04
/** Receiver error. Cleared by reading LSR. */
export const IIR_RLSI = 0x06
/** Received data below the trigger level, and nothing more came (character timeout). */
export const IIR_TIMEOUT = 0x0c
/** The FIFOs are on. */
export const IIR_FIFO_ENABLED = 0xc0

/** FIFOs on. */
export const FCR_ENABLE = 0x01
/** Empties the receiver's FIFO. */
export const FCR_CLEAR_RCVR = 0x02

/** Divisor latch access. */
export const LCR_DLAB = 0x80

/** Data terminal ready. */
export const MCR_DTR = 0x01
/** Request to send: the guest is ready to receive. */
export const MCR_RTS = 0x02
/** The second user output; connects the interrupt on a PC. */
export const MCR_OUT2 = 0x08
/** The transmitter feeds the receiver and the modem outputs feed the modem inputs. */
export const MCR_LOOP = 0x10

/** Data ready. */
export const LSR_DR = 0x01
/** Overrun. Cleared by reading LSR. */
export const LSR_OE = 0x02
/** Transmitter holding register empty. */
export const LSR_THRE = 0x20
/** Transmitter empty. */
export const LSR_TEMT = 0x40

/** The peer is there: clear to send, data set ready, carrier detected. */
export const MSR_PEER_PRESENT = 0xb0

/** Bytes in the receiver's FIFO. */
export const FIFO_SIZE = 16

const TRIGGER_LEVELS = [1, 4, 8, 14] as const
/** Ring indicator, whose delta bit counts only its falling edge. */
const MSR_RI = 0x40

/** What a UART is connected to. */
export interface UartPeer {
  /** Takes a byte that the guest has sent. */
  readonly transmit: (byte: number) => void
  /** The next byte for the guest, or -1 when none waits. */
  readonly receive: () => number
  /** Takes a received byte back, to be the next that {@link receive} gives. */
  readonly unreceive: (byte: number) => void
  /** The interrupt output rose. */
  readonly interrupt: () => void
  /** Asks for one call of {@link Uart16550.transmitted} soon, however often it is asked before. */
  readonly transmitSoon: () => void
}

/** A 16550A. All methods are synchronous and take bounded time; registers and values are bytes. */
export class Uart16550 {
  readonly #peer: UartPeer
  readonly #fifo = new Uint8Array(FIFO_SIZE)
  #first = 0
  #count = 0
  /** A byte of a loopback is, or was, in the FIFO: what it holds did not come from the line. */
  #looped = false
  #overrun = false
  #ier = 0
  #fcr = 0
  #lcr = 0
  #mcr = 0
  #mcrWritten = false
  #msrDelta = 0
  #scr = 0
  #divisor = 1
  /** The transmitter interrupt waits to be identified. */
  #thrEmptyPending = false
  /** Bytes were sent, and their transmitter interrupt has not come yet: one interrupt for a burst of them. */
  #transmitting = false
  #interrupting = false

  /** `earlier` is the port that this one takes the place of: its driver finds the registers as it has set them up. */
  constructor(peer: UartPeer, earlier?: Uart16550) {
    this.#peer = peer
    if (earlier === undefined) return
    this.#ier = earlier.#ier
    this.#fcr = earlier.#fcr
    this.#lcr = earlier.#lcr
    this.#mcr = earlier.#mcr
    this.#mcrWritten = earlier.#mcrWritten
    this.#scr = earlier.#scr
    this.#divisor = earlier.#divisor
    // The driver may wait for an interrupt that the earlier port owes it. One too many does no harm.
    this.#thrEmptyPending = (this.#ier & IER_THRI) !== 0
    this.#updateInterrupt()
  }

  /**
   * The line status as long as a read of it changes nothing and no posted write can change it, else -1: an overrun is
   * cleared by the read, and in loopback a byte that is sent makes data ready.
   */
  get stableLineStatus(): number {
    return this.#overrun || this.#loopback ? -1 : this.#lineStatus
  }

  /** The modem status as long as a read of it changes nothing, else -1. */
  get stableModemStatus(): number {
    return this.#msrDelta !== 0 ? -1 : this.#modemLines
  }

  /** Reads a register. */
  read(register: number): number {
    switch (register) {
      case RBR_THR_DLL:
        return this.#latched ? this.#divisor & 0xff : this.#takeReceived()
      case IER_DLM:
        return this.#latched ? this.#divisor >> 8 : this.#ier
      case IIR_FCR:
        return this.#identify()
      case LCR:
        return this.#lcr
      case MCR:
        return this.#mcr
      case LSR: {
        const status = this.#lineStatus
        this.#overrun = false
        this.#updateInterrupt()
        return status
      }
      case MSR: {
        const status = this.#modemLines | this.#msrDelta
        this.#msrDelta = 0
        this.#updateInterrupt()
        return status
      }
      case SCR:
        return this.#scr
      default:
        return 0xff
    }
  }

  /** Writes a register. */
  write(register: number, value: number): void {
    switch (register) {
      case RBR_THR_DLL:
        if (this.#latched) this.#divisor = (this.#divisor & 0xff00) | value
        else this.#send(value)
        break
      case IER_DLM:
        if (this.#latched) this.#divisor = (this.#divisor & 0xff) | (value << 8)
        else this.#writeInterruptEnable(value)
        break
      case IIR_FCR:
        this.#writeFifoControl(value)
        break
      case LCR:
        this.#lcr = value
        break
      case MCR:
        this.#writeModemControl(value)
        break
      case SCR:
        this.#scr = value
        break
    }
  }

  /** The answer to `transmitSoon`: the bytes written since then have left. */
  transmitted(): void {
    if (!this.#transmitting) return
    this.#transmitting = false
    this.#thrEmptyPending = true
    this.#updateInterrupt()
  }

  /** Takes in what waits on the line, as far as there is room. */
  fill(): void {
    const capacity = this.#capacity
    while (this.#count < capacity && this.#readyToReceive) {
      const byte = this.#peer.receive()
      if (byte < 0) break
      this.#push(byte)
    }
    this.#updateInterrupt()
  }

  get #latched(): boolean {
    return (this.#lcr & LCR_DLAB) !== 0
  }

  get #loopback(): boolean {
    return (this.#mcr & MCR_LOOP) !== 0
  }

  get #fifoEnabled(): boolean {
    return (this.#fcr & FCR_ENABLE) !== 0
  }

  get #capacity(): number {
    return this.#fifoEnabled ? FIFO_SIZE : 1
  }

  /** RTS, as the peer sees it: the pin is inactive in loopback. */
  get #readyToReceive(): boolean {
    return !this.#loopback && (!this.#mcrWritten || (this.#mcr & MCR_RTS) !== 0)
  }

  get #lineStatus(): number {
    return LSR_THRE | LSR_TEMT | (this.#count > 0 ? LSR_DR : 0) | (this.#overrun ? LSR_OE : 0)
  }

  /** The upper half of MSR. In loopback RTS is CTS, DTR is DSR, OUT1 is RI and OUT2 is DCD. */
  get #modemLines(): number {
    if (!this.#loopback) return MSR_PEER_PRESENT
    const mcr = this.#mcr
    return ((mcr & MCR_RTS) << 3) | ((mcr & MCR_DTR) << 5) | ((mcr & 0x04) << 4) | ((mcr & MCR_OUT2) << 4)
  }

  #takeReceived(): number {
    if (this.#count === 0) return 0
    const byte = this.#fifo[this.#first] ?? 0
    this.#first = (this.#first + 1) % FIFO_SIZE
    this.#count--
    this.fill()
    return byte
  }

  #push(byte: number): void {
    this.#fifo[(this.#first + this.#count) % FIFO_SIZE] = byte
    this.#count++
  }

  #send(byte: number): void {
    this.#thrEmptyPending = false
    this.#updateInterrupt()
    if (this.#loopback) this.#receiveLoopback(byte)
    else this.#peer.transmit(byte)
    this.#transmitting = true
    if ((this.#ier & IER_THRI) === 0) this.transmitted()
    else this.#peer.transmitSoon()
  }

  #receiveLoopback(byte: number): void {
    this.#looped = true
    if (this.#count < this.#capacity) {
      this.#push(byte)
    } else {
      this.#overrun = true
      // The FIFO keeps what it has; the single receiver buffer is overwritten.
      if (!this.#fifoEnabled) this.#fifo[this.#first] = byte
    }
    this.#updateInterrupt()
  }

  #writeInterruptEnable(value: number): void {
    const before = this.#ier
    this.#ier = value & 0x0f
    // The transmitter is empty, so enabling its interrupt raises it, again each time. Drivers test for this.
    if ((before & IER_THRI) === 0 && (this.#ier & IER_THRI) !== 0) this.#thrEmptyPending = true
    this.#updateInterrupt()
  }

  #writeFifoControl(value: number): void {
    const toggled = ((value ^ this.#fcr) & FCR_ENABLE) !== 0
    const enabled = (value & FCR_ENABLE) !== 0
    // The other bits are only written together with the enable bit.
    this.#fcr = enabled ? value & 0xc9 : 0
    if (toggled || (enabled && (value & FCR_CLEAR_RCVR) !== 0)) this.#clearReceiver()
    this.fill()
  }

  /** A guest that is not ready to receive throws nothing away: those bytes have not left the line yet. */
  #clearReceiver(): void {
    if (!this.#looped && !(this.#mcrWritten && this.#readyToReceive)) {
      for (let i = this.#count - 1; i >= 0; i--) this.#peer.unreceive(this.#fifo[(this.#first + i) % FIFO_SIZE] ?? 0)
    }
    this.#first = 0
    this.#count = 0
    this.#looped = false
  }

  #writeModemControl(value: number): void {
    const before = this.#modemLines
    this.#mcr = value & 0x1f
    this.#mcrWritten = true
    const lines = this.#modemLines
    const changed = before ^ lines
    this.#msrDelta |= (changed & ~MSR_RI) >> 4
    if ((before & MSR_RI) !== 0 && (lines & MSR_RI) === 0) this.#msrDelta |= MSR_RI >> 4
    this.fill()
  }

  /** The pending interrupt of the highest priority (data sheet, table IV), without the FIFO bits. */
  get #pending(): number {
    const ier = this.#ier
    if ((ier & IER_RLSI) !== 0 && this.#overrun) return IIR_RLSI
    if ((ier & IER_RDI) !== 0 && this.#count > 0) {
      const trigger = this.#fifoEnabled ? TRIGGER_LEVELS[this.#fcr >> 6] ?? 1 : 1
      return this.#count >= trigger ? IIR_RDI : IIR_TIMEOUT
    }
    if ((ier & IER_THRI) !== 0 && this.#thrEmptyPending) return IIR_THRI
    if ((ier & IER_MSI) !== 0 && this.#msrDelta !== 0) return IIR_MSI
    return IIR_NO_INT
  }

  #identify(): number {
    this.transmitted()
    const pending = this.#pending
    if (pending === IIR_THRI) {
      this.#thrEmptyPending = false
      this.#updateInterrupt()
    }
    return pending | (this.#fifoEnabled ? IIR_FIFO_ENABLED : 0)
  }

  /** The interrupt input of a PC sees edges: it is told only when the output rises. */
  #updateInterrupt(): void {
    const interrupting = this.#pending !== IIR_NO_INT
    const rose = interrupting && !this.#interrupting
    this.#interrupting = interrupting
    if (rose) this.#peer.interrupt()
  }
}
