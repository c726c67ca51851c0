/**
 * Which ports of one local context ID are in use: by a listener, by connections, by connections that ended badly a moment ago.
 *
 * Plain data with the time passed in. Many connections may share a local port, and many a guest's port: only the pair must be
 * unique. A pair whose connection ended badly is kept back for a while, so that packets of the old connection that are still
 * on their way are not taken for packets of a new one.
 */

/** The first local port that is chosen for a connection to a guest. */
export const EPHEMERAL_PORT_FIRST = 49152
/** The last local port that is chosen for a connection to a guest. */
export const EPHEMERAL_PORT_LAST = 65535
/** How long a pair of ports is kept back, in milliseconds. */
export const QUARANTINE_MILLIS = 10_000
/** The most pairs that are kept back. When there are more, the oldest are let go. */
export const QUARANTINE_MAX = 65_536

interface PortUse {
  listening: boolean
  readonly guestPorts: Set<number>
}

interface Quarantined {
  readonly port: number
  readonly guestPort: number
  readonly since: number
}

/** The ports of one local context ID, as one guest sees them. */
export class VsockPorts {
  readonly #uses = new Map<number, PortUse>()
  /** Pairs that are kept back, oldest first, from {@link #firstQuarantined} on. */
  #quarantined: Array<Quarantined> = []
  #firstQuarantined = 0
  #nextEphemeral = EPHEMERAL_PORT_FIRST

  /** Whether there is a listener, a connection or a pair kept back on this port. */
  isActive(port: number): boolean {
    return this.#uses.has(port)
  }

  /** The number of pairs that are kept back. */
  get quarantined(): number {
    return this.#quarantined.length - this.#firstQuarantined
  }

  /** Returns `false` when there is a listener already. */
  addListener(port: number): boolean {
    const use = this.#use(port)
    if (use.listening) return false
    use.listening = true
    return true
  }

  removeListener(port: number): void {
    const use = this.#uses.get(port)
    if (use === undefined) return
    use.listening = false
    this.#tidy(port, use)
  }

  /** Returns `false` when the pair is connected or kept back at the time `now`, in milliseconds. */
  addConnection(port: number, guestPort: number, now: number): boolean {
    this.#release(now)
    const use = this.#use(port)
    if (use.guestPorts.has(guestPort)) return false
    use.guestPorts.add(guestPort)
    return true
  }

  /** A connection has ended: `clean` when both sides know, otherwise the pair is kept back from `now` on. */
  removeConnection(port: number, guestPort: number, clean: boolean, now: number): void {
    if (clean) return this.#free(port, guestPort)
    if (this.quarantined === QUARANTINE_MAX) this.#releaseOldest()
    this.#quarantined.push({ port, guestPort, since: now })
  }

  /** A local port on which nothing is, from the ephemeral range, in turn; `undefined` when there is none. */
  findEphemeral(now: number): number | undefined {
    this.#release(now)
    const first = this.#nextEphemeral
    let port = first
    do {
      const next = port === EPHEMERAL_PORT_LAST ? EPHEMERAL_PORT_FIRST : port + 1
      if (!this.#uses.has(port)) {
        this.#nextEphemeral = next
        return port
      }
      port = next
    } while (port !== first)
    return undefined
  }

  /** Lets all pairs go that are kept back. */
  releaseQuarantined(): void {
    while (this.quarantined > 0) this.#releaseOldest()
  }

  #use(port: number): PortUse {
    const known = this.#uses.get(port)
    if (known !== undefined) return known
    const use: PortUse = { listening: false, guestPorts: new Set() }
    this.#uses.set(port, use)
    return use
  }

  #tidy(port: number, use: PortUse): void {
    if (!use.listening && use.guestPorts.size === 0) this.#uses.delete(port)
  }

  #free(port: number, guestPort: number): void {
    const use = this.#uses.get(port)
    if (use === undefined) return
    use.guestPorts.delete(guestPort)
    this.#tidy(port, use)
  }

  #release(now: number): void {
    for (;;) {
      const oldest = this.#quarantined[this.#firstQuarantined]
      if (oldest === undefined || now - oldest.since <= QUARANTINE_MILLIS) return
      this.#releaseOldest()
    }
  }

  #releaseOldest(): void {
    const oldest = this.#quarantined[this.#firstQuarantined]
    if (oldest === undefined) return
    this.#firstQuarantined++
    if (this.#firstQuarantined * 2 > this.#quarantined.length) {
      this.#quarantined = this.#quarantined.slice(this.#firstQuarantined)
      this.#firstQuarantined = 0
    }
    this.#free(oldest.port, oldest.guestPort)
  }
}
