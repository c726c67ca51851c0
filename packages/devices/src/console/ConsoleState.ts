/** What a console's device and its host share, as long as the machine: the ports and the size of the terminal. */
import {
  type Console,
  ConsoleError,
  type ConsolePort,
  type ConsoleSize,
  type ConsoleStatus
} from "@troupe/core/Console"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Scope from "effect/Scope"
import { encodeUtf8, PORT_NAME_BYTES_MAX } from "./ConsoleControl.ts"
import { ConsoleLine } from "./ConsoleLine.ts"

/** What the running device does for its host, soon and in its own turns. */
export interface ConsoleAttention {
  /** A port has input, or room for output. */
  readonly look: () => void
  readonly added: (line: ConsoleLine) => void
  readonly removed: (line: ConsoleLine) => void
  readonly hostOpenChanged: (line: ConsoleLine) => void
  readonly resized: () => void
  /** Whether the driver still has an old port of this number. */
  readonly isLeaving: (port: number) => boolean
}

const SIZE_MAX = 0xffff

/** The host's side of one console. */
export class ConsoleState {
  /** The ports that there are, by number. */
  readonly lines: Array<ConsoleLine | undefined>
  readonly #scope: Scope.Scope
  #size: ConsoleSize = { cols: 0, rows: 0 }
  #attention: ConsoleAttention | undefined
  #closed = false
  /** The console itself. */
  readonly #console: ConsoleLine

  private constructor(console: ConsoleLine, portsMax: number, scope: Scope.Scope) {
    this.#console = console
    this.#scope = scope
    this.lines = Array.from({ length: portsMax }, (_, id) => id === 0 ? console : undefined)
  }

  /** The console and further ports of these names, `portsMax` ports at most. It is over when the scope closes. */
  static readonly make = Effect.fnUntraced(function*(portsMax: number, names: ReadonlyArray<string>) {
    const scope = yield* Scope.Scope
    const state = new ConsoleState(yield* ConsoleLine.make(0, ""), portsMax, scope)
    yield* Effect.addFinalizer(() =>
      Effect.sync(() => {
        state.#closed = true
      })
    )
    for (const name of names) yield* state.#addPort(name)
    return state
  })

  /** The size of the host's terminal. */
  get size(): ConsoleSize {
    return this.#size
  }

  /** Connects a running device, until {@link detach}. */
  attach(attention: ConsoleAttention): void {
    this.#attention = attention
    for (const line of this.lines) if (line !== undefined) this.#attach(line, attention)
  }

  /** The device does not run any more. */
  detach(): void {
    this.#attention = undefined
    for (const line of this.lines) line?.detach()
  }

  /** The service that this is to clients of the guest. */
  get console(): Console["Service"] {
    return {
      ...this.#console.port,
      size: () => this.#size,
      resize: (size) => Effect.suspend(() => this.#resize(size)),
      ports: () => this.#ports(),
      port: (name) =>
        Effect.suspend(() => {
          const port = this.#ports().find((port) => port.name === name)
          if (port !== undefined) return Effect.succeed(port)
          return this.#fail(
            "port",
            "NOT_FOUND",
            `there is no port ${JSON.stringify(name)}; name it in consolePorts, or add it`
          )
        }),
      addPort: (name) => this.#addPort(name)
    }
  }

  #attach(line: ConsoleLine, attention: ConsoleAttention): void {
    line.attach(attention.look, () => attention.hostOpenChanged(line))
  }

  #ports(): ReadonlyArray<ConsolePort> {
    return this.lines.flatMap((line, id) => line === undefined || id === 0 ? [] : [line.port])
  }

  #fail(operation: string, status: ConsoleStatus, detail: string): Effect.Effect<never, ConsoleError> {
    return Effect.fail(new ConsoleError({ status, operation, detail }))
  }

  #resize(size: ConsoleSize): Effect.Effect<void, ConsoleError> {
    if (this.#closed) return this.#fail("resize", "PEER_CLOSED", "the machine is gone")
    for (const value of [size.cols, size.rows]) {
      if (!Number.isInteger(value) || value < 0 || value > SIZE_MAX) {
        return this.#fail("resize", "OUT_OF_RANGE", `${value} is not a whole number from 0 to ${SIZE_MAX}`)
      }
    }
    this.#size = { cols: size.cols, rows: size.rows }
    this.#attention?.resized()
    return Effect.void
  }

  /** A port in a scope of its own under that of the caller: it goes with either that or the machine's. */
  #addPort(name: string): Effect.Effect<ConsolePort, ConsoleError, Scope.Scope> {
    return Effect.uninterruptible(
      Effect.gen({ self: this }, function*() {
        if (this.#closed) return yield* this.#fail("addPort", "PEER_CLOSED", "the machine is gone")
        const bytes = encodeUtf8(name).length
        if (bytes === 0 || bytes > PORT_NAME_BYTES_MAX) {
          const detail = `a name has 1 to ${PORT_NAME_BYTES_MAX} bytes of UTF-8, and this one has ${bytes}`
          return yield* this.#fail("addPort", "OUT_OF_RANGE", detail)
        }
        if (this.lines.some((line) => line?.name === name)) {
          return yield* this.#fail("addPort", "ALREADY_EXISTS", `there is a port ${JSON.stringify(name)}`)
        }
        const id = this.lines.findIndex((line, id) => line === undefined && this.#attention?.isLeaving(id) !== true)
        if (id < 0) {
          const detail = `the configuration allows ${this.lines.length} ports; raise consolePortsMax`
          return yield* this.#fail("addPort", "NO_RESOURCES", detail)
        }
        const own = yield* Scope.fork(this.#scope)
        yield* Effect.addFinalizer(() => Scope.close(own, Exit.void))
        const line = yield* Scope.provide(ConsoleLine.make(id, name), own)
        this.lines[id] = line
        yield* Scope.addFinalizer(
          own,
          Effect.sync(() => {
            this.lines[id] = undefined
            this.#attention?.removed(line)
          })
        )
        const attention = this.#attention
        if (attention !== undefined) {
          this.#attach(line, attention)
          attention.added(line)
        }
        return line.port
      })
    )
  }
}
