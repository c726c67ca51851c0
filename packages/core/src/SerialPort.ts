/** The serial port as its host sees it: the guest's output as a stream, input as an effect, and the last lines. */
import * as Context from "effect/Context"
import type * as Effect from "effect/Effect"
import type * as Sink from "effect/Sink"
import type * as Stream from "effect/Stream"

/** The guest's serial port (`Guest.GetSerial`). It outlives restarts of the device and resets of the guest. */
export class SerialPort extends Context.Service<SerialPort, {
  /**
   * What the guest writes. Every run of the stream begins with the bounded history and goes on until the machine is gone;
   * a reader that is too slow loses the oldest bytes and never holds the guest up.
   */
  readonly output: Stream.Stream<Uint8Array>
  /** Types `bytes`; returns when the port's receive buffer has taken all of them, or when the machine is gone. */
  readonly write: (bytes: Uint8Array) => Effect.Effect<void>
  /** Types everything that it is fed, like {@link write}. */
  readonly input: Sink.Sink<void, Uint8Array>
  /** The last lines of output, oldest first; the last one may not have ended yet. */
  readonly log: () => ReadonlyArray<string>
  /** How many bytes of output readers have lost by being too slow, all readers together. */
  readonly dropped: () => number
}>()("@troupe/core/SerialPort") {}
