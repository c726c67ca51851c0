/**
 * The guest's console as its host sees it (`Guest.GetConsole`), and the further ports of the console device.
 *
 * A port is a pair of byte streams with backpressure both ways, like a socket: what nobody reads is not lost but holds its sender
 * up, and several readers share the bytes among them.
 */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import type * as Sink from "effect/Sink"
import type * as Stream from "effect/Stream"

/** The size of a terminal, each 0 to 65535; 0 is unknown. */
export interface ConsoleSize {
  readonly cols: number
  readonly rows: number
}

/**
 * Why an operation on a console failed, by the name of its status.
 *
 * - `OUT_OF_RANGE`: not a size of a terminal, or not a name of a port
 * - `NO_RESOURCES`: there are as many ports as the configuration allows
 * - `ALREADY_EXISTS`: there is a port of this name
 * - `NOT_FOUND`: there is no port of this name
 * - `PEER_CLOSED`: the machine is gone
 */
export const ConsoleStatus = Schema.Literals([
  "OUT_OF_RANGE",
  "NO_RESOURCES",
  "ALREADY_EXISTS",
  "NOT_FOUND",
  "PEER_CLOSED"
])
/** Why an operation on a console failed. */
export type ConsoleStatus = typeof ConsoleStatus.Type

/** An operation on a console failed. */
export class ConsoleError extends Schema.TaggedError<ConsoleError>()("ConsoleError", {
  status: ConsoleStatus,
  /** The operation, e.g. `resize`. */
  operation: Schema.String,
  /** What went wrong, and what to do about it. */
  detail: Schema.String
}) {
  override get message(): string {
    return `${this.operation}: ${this.detail} (${this.status})`
  }
}

/** One port of the console device. It outlives restarts of the device and resets of the guest. */
export interface ConsolePort {
  /** Number of the port; the console itself is port 0. */
  readonly id: number
  /** The name by which the guest finds the port (on Linux `/dev/virtio-ports/NAME`); empty for the console itself. */
  readonly name: string
  /**
   * What the guest writes, until the port is gone. Each byte goes to one reader. What nobody reads waits, 64 KiB in the host and
   * the rest in the guest, which cannot write on: a host that has no use for the output drains it.
   */
  readonly output: Stream.Stream<Uint8Array>
  /**
   * Sends `bytes` to the guest. Returns when its driver has all of them, or when the port is gone; until then they must not
   * change. Writes are done one after the other. When it is interrupted, the guest may have got a part.
   */
  readonly write: (bytes: Uint8Array) => Effect.Effect<void>
  /** Sends everything that it is fed, like {@link write}. */
  readonly input: Sink.Sink<void, Uint8Array>
  /** Whether somebody in the guest has the port open now: only then a write goes on. The console of a driver at work is open. */
  readonly guestOpen: () => boolean
  /** {@link guestOpen} now, and then whenever it changes, until the port is gone. A slow reader misses some, never the last. */
  readonly guestOpenChanges: Stream.Stream<boolean>
  /**
   * Opens the host's end, as it is at first, or closes it: then the guest reads the end of the file, and does not write. No bytes
   * are lost. The console itself is always open.
   */
  readonly setOpen: (open: boolean) => Effect.Effect<void>
}

/** The console of a guest. Published by the console device. */
export class Console extends Context.Service<
  Console,
  ConsolePort & {
    /** The size of the host's terminal, as the guest is told. At first 0 by 0. */
    readonly size: () => ConsoleSize
    /** Tells the guest the size of the host's terminal. Fails with `OUT_OF_RANGE`. */
    readonly resize: (size: ConsoleSize) => Effect.Effect<void, ConsoleError>
    /** The further ports that there are now, those of the configuration first. */
    readonly ports: () => ReadonlyArray<ConsolePort>
    /** A further port by its name. Fails with `NOT_FOUND`. */
    readonly port: (name: string) => Effect.Effect<ConsolePort, ConsoleError>
    /**
     * Plugs a further port in until the scope closes. Fails with `NO_RESOURCES` when there are `consolePortsMax` already, with
     * `ALREADY_EXISTS`, and with `OUT_OF_RANGE` for a name that is not one.
     */
    readonly addPort: (name: string) => Effect.Effect<ConsolePort, ConsoleError, Scope.Scope>
  }
>()("@troupe/core/Console") {}
