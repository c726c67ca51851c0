/**
 * A device as an actor: one fiber, one bounded mailbox, turns of plain code, restarts by policy.
 *
 * The hypervisor delivers accesses from outside any fiber, so the mailbox is a ring of typed arrays filled without
 * allocation; a delivery wakes the device's fiber, which then works on everything that waits. One access is handled at a
 * time, in the order of delivery. Doorbells and signals carry no data, so those that wait are merged.
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Schema from "effect/Schema"
import * as Scope from "effect/Scope"
import type { CallReply } from "./Bus.ts"
import type { Device, DeviceBehaviour, DeviceContext, DeviceFailure, DevicePolicy } from "./Device.ts"

/** The most accesses that wait for a device. Posted writes leave {@link CALL_RESERVE} places free for calls. */
export const MAILBOX_CAPACITY = 2048
/** Places that only calls take: more than any machine has vCPUs, and each vCPU waits for at most one call. */
export const CALL_RESERVE = 512
/** The most accesses handled in one turn before other fibers run. */
export const TURN_ACCESSES = 512
/** Turns that a device is given at the end of its machine to answer doorbells and signals. */
export const SETTLE_TURNS = 256
/** Signals are numbered below this. */
export const SIGNAL_LIMIT = 32

/** How long the end of a device's generation may take before it is logged. */
const END_PATIENCE = "10 seconds"

/** Places of a new mailbox. Most devices never have more accesses waiting. */
const FIRST_CAPACITY = 16

const KIND_READ = 0
const KIND_WRITE = 1
const KIND_POSTED = 2

// A waiting access is four words: kind and size, range, offset, value.
const RECORD_WORDS = 4
const RECORD_RANGE = 1
const RECORD_OFFSET = 2
const RECORD_VALUE = 3
const KIND_SHIFT = 8
const SIZE_MASK = 0xff

const emptyReplies = (length: number): Array<CallReply | undefined> => Array.from({ length }, () => undefined)

/** A device has failed and will not be started again. */
export class DeviceEscalated extends Schema.TaggedError<DeviceEscalated>()("DeviceEscalated", {
  device: Schema.String,
  /** How often it was started. */
  starts: Schema.Int,
  detail: Schema.String
}) {}

class DeviceCrashed extends Schema.TaggedError<DeviceCrashed>()("DeviceCrashed", { detail: Schema.String }) {}

/** What a device's context has of its actor. */
export type ActorContext = Pick<DeviceContext, "generation" | "signal" | "hold">

/** One write that is held. A vCPU's reply is the same object each time, so it does not tell two of its writes apart. */
interface HeldWrite {
  readonly reply: CallReply
}

const nothing = (): void => undefined

/** The machine's side of a running device. */
export class DeviceActor {
  readonly device: Device
  readonly #makeContext: (own: ActorContext) => DeviceContext
  readonly #policy: DevicePolicy

  /** The ring of waiting accesses, {@link RECORD_WORDS} words each. It grows to its bound, and never back. */
  #records = new Uint32Array(FIRST_CAPACITY * RECORD_WORDS)
  #replies: Array<CallReply | undefined> = emptyReplies(FIRST_CAPACITY)
  #capacity = FIRST_CAPACITY
  #head = 0
  #count = 0
  /** Accesses handled so far. */
  #handled = 0

  /** One entry a doorbell: which range, which doorbell of it, and whether it waits. */
  readonly #doorbellRanges: Uint16Array
  readonly #doorbellIndexes: Uint16Array
  readonly #doorbellWaits: Uint8Array
  /** How many accesses are handled before a doorbell that waits: all that were delivered before it was rung last. */
  readonly #doorbellAfter: Float64Array
  readonly #doorbellBase: Uint16Array
  #doorbellsWaiting = 0
  #signals = 0

  /** Has the parked fiber work at once, in the middle of the delivery. */
  #wake: (() => void) | undefined
  /** Has a task run by the fiber's scheduler. */
  #schedule: ((task: () => void) => void) | undefined
  #wakeScheduled = false
  #generation = 0
  /** Posted writes that were lost since the device failed. */
  #lost = 0
  /** The write that is being handled, if a vCPU waits for it and the device does not hold it. */
  #writing: CallReply | undefined
  /** The writes that the device holds. */
  readonly #held = new Set<HeldWrite>()
  #current: { readonly behaviour: DeviceBehaviour; readonly scope: Scope.Closeable } | undefined

  constructor(
    device: Device,
    policy: DevicePolicy,
    makeContext: (own: ActorContext) => DeviceContext
  ) {
    this.device = device
    this.#policy = policy
    this.#makeContext = makeContext
    const doorbells = device.ranges.flatMap((range, index) =>
      (range.doorbells ?? []).map((_, bell) => ({ index, bell }))
    )
    this.#doorbellRanges = Uint16Array.from(doorbells, (doorbell) => doorbell.index)
    this.#doorbellIndexes = Uint16Array.from(doorbells, (doorbell) => doorbell.bell)
    this.#doorbellWaits = new Uint8Array(doorbells.length)
    this.#doorbellAfter = new Float64Array(doorbells.length)
    this.#doorbellBase = new Uint16Array(device.ranges.length)
    let base = 0
    device.ranges.forEach((range, index) => {
      this.#doorbellBase[index] = base
      base += range.doorbells?.length ?? 0
    })
  }

  /** Delivers an access that a vCPU waits for. */
  readonly call = (
    range: number,
    offset: number,
    size: number,
    isWrite: boolean,
    value: number,
    reply: CallReply
  ): void => {
    if (this.#count === MAILBOX_CAPACITY) {
      throw new Error(`${this.device.name}: more calls wait than there can be vCPUs`)
    }
    this.#push(isWrite ? KIND_WRITE : KIND_READ, range, offset, size, value, reply)
    this.#wake?.()
  }

  /**
   * Delivers a posted write; `false` when there is no room. Nobody waits for it, so the device works on all that have come by
   * the time that its fiber is scheduled: waking a fiber costs many times what a write costs.
   *
   * What a device has no room for holds up the writes to all devices. So one that waits to be started again takes everything,
   * and loses what its mailbox does not hold; how much that was is logged when it works again.
   */
  readonly posted = (range: number, offset: number, size: number, value: number): boolean => {
    if (this.#count >= MAILBOX_CAPACITY - CALL_RESERVE) {
      if (!this.#isDown) return false
      this.#lost++
      return true
    }
    this.#push(KIND_POSTED, range, offset, size, value, undefined)
    if (this.#count >= TURN_ACCESSES) this.#wake?.()
    else this.#wakeSoon()
    return true
  }

  /** Delivers a doorbell. */
  readonly doorbell = (range: number, doorbell: number): void => {
    const index = (this.#doorbellBase[range] ?? 0) + doorbell
    if (this.#doorbellWaits[index] === 0) {
      this.#doorbellWaits[index] = 1
      this.#doorbellsWaiting++
    }
    this.#doorbellAfter[index] = this.#handled + this.#count
    this.#wake?.()
  }

  /** Delivers a signal of the device's own background work. */
  readonly signal = (number: number): void => {
    if (number < 0 || number >= SIGNAL_LIMIT) throw new RangeError(`${this.device.name}: signal ${number}`)
    this.#signals |= 1 << number
    this.#wake?.()
  }

  /** Starts the first generation of the device. Its resources belong to the scope, wherever the device is when it closes. */
  readonly start: Effect.Effect<void, DeviceFailure, Scope.Scope> = Effect.suspend(() =>
    Effect.andThen(Effect.addFinalizer(() => this.#endGeneration(Exit.void)), this.#startGeneration)
  )

  /** Works until interrupted; restarts the device by its policy; fails when the policy gives up. */
  readonly run: Effect.Effect<never, DeviceEscalated> = Effect.suspend(() => {
    const policy = this.#policy
    const life = Effect.suspend(() => this.#life).pipe(
      Effect.catchCause((cause) =>
        Cause.hasInterruptsOnly(cause) ? Effect.interrupt : Effect.fail(new DeviceCrashed({ detail: tellCause(cause) }))
      )
    )
    const told = Effect.tapError(life, (crash) => Effect.logWarning(`${this.device.name} has failed: ${crash.detail}`))
    return (policy._tag === "restart" ? Effect.retry(told, policy.schedule) : life).pipe(
      Effect.catchTag(
        "DeviceCrashed",
        (crash) => new DeviceEscalated({ device: this.device.name, starts: this.#generation, detail: crash.detail })
      )
    )
  })

  /**
   * Returns when the accesses that wait now have been handled and the doorbells and signals answered, as far as
   * {@link SETTLE_TURNS} turns are enough for those; at once when the device does not work now.
   */
  readonly settled: Effect.Effect<void> = Effect.suspend(() => {
    const handled = this.#handled + this.#count
    let turns = 0
    const wait: Effect.Effect<void> = Effect.suspend(() => {
      if (this.#current === undefined) return Effect.void
      const isAtWork = this.#doorbellsWaiting > 0 || this.#signals !== 0
      if (this.#handled >= handled && (!isAtWork || turns++ >= SETTLE_TURNS)) return Effect.void
      return Effect.andThen(Effect.yieldNow, wait)
    })
    return wait
  })

  get #startGeneration(): Effect.Effect<void, DeviceFailure> {
    return Effect.uninterruptibleMask(Effect.fnUntraced({ self: this }, function*(restore) {
      const scope = yield* Scope.make()
      const start = Effect.suspend(() =>
        this.device.start(
          this.#makeContext({ generation: this.#generation++, signal: this.signal, hold: this.#hold })
        )
      )
      const behaviour = yield* restore(Scope.provide(start, scope)).pipe(
        Effect.onExit((exit) => Exit.isFailure(exit) ? Scope.close(scope, exit) : Effect.void)
      )
      this.#current = { behaviour, scope }
      const lost = this.#lost
      this.#lost = 0
      if (lost > 0) {
        yield* Effect.logWarning(`${this.device.name}: ${lost} writes were lost before it was started again`)
      }
    }))
  }

  #endGeneration(exit: Exit.Exit<unknown, unknown>): Effect.Effect<void> {
    return Effect.suspend(() => {
      const current = this.#current
      this.#current = undefined
      if (current === undefined) return Effect.void
      return Effect.ensuring(this.#watched(Scope.close(current.scope, exit)), this.#releaseAll)
    })
  }

  /** The end of a generation waits for what it began. When that takes long, somebody has to be told what everything waits for. */
  #watched(end: Effect.Effect<void>): Effect.Effect<void> {
    const warning = Effect.logWarning(`${this.device.name} does not end: something that it began is still at work`)
    const watch = Effect.interruptible(Effect.andThen(Effect.sleep(END_PATIENCE), warning))
    return Effect.flatMap(Effect.forkChild(watch), (fiber) => Effect.ensuring(end, Fiber.interrupt(fiber)))
  }

  readonly #hold = (): () => void => {
    const reply = this.#writing
    if (reply === undefined) return nothing
    this.#writing = undefined
    const held: HeldWrite = { reply }
    this.#held.add(held)
    return () => this.#release(held)
  }

  #release(held: HeldWrite): void {
    if (this.#held.delete(held)) held.reply.complete(0)
  }

  /** Nobody is left who could answer: the device's work has come to its end, so what was waited for is over. */
  readonly #releaseAll: Effect.Effect<void> = Effect.sync(() => {
    for (const held of this.#held) this.#release(held)
  })

  /** One generation, from its start (unless `start` did that) to its failure. */
  get #life(): Effect.Effect<never, DeviceFailure> {
    const start = this.#current === undefined ? this.#startGeneration : Effect.void
    return start.pipe(
      Effect.andThen(Effect.suspend(() => {
        const behaviour = this.#current?.behaviour
        if (behaviour === undefined) return Effect.die(new Error(`${this.device.name}: no behaviour after its start`))
        const turns = this.#turns(behaviour)
        return behaviour.run === undefined ? turns : Effect.raceFirst(turns, behaviour.run)
      })),
      Effect.onExit((exit) => this.#endGeneration(exit))
    )
  }

  #turns(behaviour: DeviceBehaviour): Effect.Effect<never> {
    const turn = Effect.sync(() => this.#turn(behaviour))
    const step = Effect.flatMap(turn, () => this.#idle ? this.#park : Effect.yieldNow)
    return Effect.forever(step, { disableYield: true })
  }

  /** Whether the device has failed and waits to be started again, or has been given up. */
  get #isDown(): boolean {
    return this.#generation > 0 && this.#current === undefined
  }

  get #idle(): boolean {
    return this.#count === 0 && this.#doorbellsWaiting === 0 && this.#signals === 0
  }

  readonly #park: Effect.Effect<void> = Effect.withFiber((fiber) => {
    const dispatcher = fiber.currentDispatcher
    this.#schedule = (task) => dispatcher.scheduleTask(task, 0)
    return this.#parked
  })

  readonly #parked: Effect.Effect<void> = Effect.callback<void>((resume) => {
    if (!this.#idle) return resume(Effect.void)
    this.#wake = () => {
      this.#wake = undefined
      resume(Effect.void)
    }
    return Effect.sync(() => {
      this.#wake = undefined
    })
  })

  #push(kind: number, range: number, offset: number, size: number, value: number, reply: CallReply | undefined): void {
    if (this.#count === this.#capacity) this.#grow()
    const slot = (this.#head + this.#count) % this.#capacity
    this.#fill(slot, kind << KIND_SHIFT | size, range, offset, value, reply)
    this.#count++
  }

  /** Puts the write that is being handled in front of all others again, with its reply. Its place may be taken by now. */
  #putBack(kindAndSize: number, range: number, offset: number, value: number): void {
    if (this.#count === this.#capacity) this.#grow()
    this.#head = (this.#head + this.#capacity - 1) % this.#capacity
    this.#fill(this.#head, kindAndSize, range, offset, value, this.#writing)
    this.#count++
    this.#handled--
    this.#writing = undefined
  }

  #fill(
    slot: number,
    kindAndSize: number,
    range: number,
    offset: number,
    value: number,
    reply: CallReply | undefined
  ): void {
    const at = slot * RECORD_WORDS
    const records = this.#records
    records[at] = kindAndSize
    records[at + RECORD_RANGE] = range
    records[at + RECORD_OFFSET] = offset
    records[at + RECORD_VALUE] = value
    this.#replies[slot] = reply
  }

  #wakeSoon(): void {
    if (this.#wakeScheduled || this.#wake === undefined) return
    this.#wakeScheduled = true
    this.#schedule?.(this.#scheduledWake)
  }

  readonly #scheduledWake = (): void => {
    this.#wakeScheduled = false
    this.#wake?.()
  }

  /** Doubles a full mailbox; its oldest access comes to the front. The callers keep it within {@link MAILBOX_CAPACITY}. */
  #grow(): void {
    const split = this.#head * RECORD_WORDS
    const records = new Uint32Array(this.#records.length * 2)
    records.set(this.#records.subarray(split))
    records.set(this.#records.subarray(0, split), this.#records.length - split)
    this.#replies = [
      ...this.#replies.slice(this.#head),
      ...this.#replies.slice(0, this.#head),
      ...emptyReplies(this.#capacity)
    ]
    this.#records = records
    this.#capacity *= 2
    this.#head = 0
  }

  /** Handles what waits, up to the turn's bound. A call whose handler throws is answered before the defect goes on. */
  #turn(behaviour: DeviceBehaviour): void {
    for (let handled = 0; handled < TURN_ACCESSES && this.#count > 0; handled++) {
      const slot = this.#head
      const reply = this.#replies[slot]
      this.#replies[slot] = undefined
      const at = slot * RECORD_WORDS
      const kindAndSize = this.#records[at] ?? 0
      const range = this.#records[at + RECORD_RANGE] ?? 0
      const offset = this.#records[at + RECORD_OFFSET] ?? 0
      const value = this.#records[at + RECORD_VALUE] ?? 0
      const size = kindAndSize & SIZE_MASK
      this.#head = (slot + 1) % this.#capacity
      this.#count--
      this.#handled++
      if (kindAndSize >> KIND_SHIFT === KIND_READ) {
        let answer = 0
        try {
          answer = behaviour.read(range, offset, size)
        } finally {
          reply?.complete(answer)
        }
      } else {
        this.#writing = reply
        try {
          behaviour.write(range, offset, size, value)
        } catch (defect) {
          if (this.device.ranges[range]?.repeats?.(offset) === true) this.#putBack(kindAndSize, range, offset, value)
          throw defect
        } finally {
          // Nothing, if the device holds it.
          const answered = this.#writing
          this.#writing = undefined
          answered?.complete(0)
        }
      }
    }
    if (this.#doorbellsWaiting > 0) this.#ringDoorbells(behaviour)
    if (this.#signals !== 0) this.#deliverSignals(behaviour)
  }

  #ringDoorbells(behaviour: DeviceBehaviour): void {
    for (let index = 0; index < this.#doorbellWaits.length; index++) {
      if (this.#doorbellWaits[index] === 0 || (this.#doorbellAfter[index] ?? 0) > this.#handled) continue
      this.#doorbellWaits[index] = 0
      this.#doorbellsWaiting--
      const more = behaviour.doorbell?.(this.#doorbellRanges[index] ?? 0, this.#doorbellIndexes[index] ?? 0) ?? false
      if (more && this.#doorbellWaits[index] === 0) {
        this.#doorbellWaits[index] = 1
        this.#doorbellsWaiting++
      }
    }
  }

  #deliverSignals(behaviour: DeviceBehaviour): void {
    const signals = this.#signals
    this.#signals = 0
    for (let number = 0; number < SIGNAL_LIMIT; number++) {
      if ((signals & (1 << number)) === 0) continue
      if (behaviour.signal?.(number) ?? false) this.#signals |= 1 << number
    }
  }
}

const tellCause = (cause: Cause.Cause<unknown>): string => {
  const error = Cause.squash(cause)
  return error instanceof Error ? error.message : String(error)
}
