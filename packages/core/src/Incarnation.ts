/**
 * One life of a guest: everything from power-on to its end, in one scope, and the supervision of it.
 *
 * The tree is: incarnation > { vCPU fibers, device fibers }. When the first of them ends the life, the vCPUs leave the guest,
 * the devices do what they were told last, and the scope closes: threads, mappings, descriptors and fibers are gone then.
 */
import * as Cause from "effect/Cause"
import * as Context from "effect/Context"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Result from "effect/Result"
import * as Scope from "effect/Scope"
import { ramRegions } from "./boot/MachineLayout.ts"
import { Bus, type BusHandlers, type BusRange, type RangeBacking } from "./Bus.ts"
import type { Device, DeviceContext } from "./Device.ts"
import { DeviceActor } from "./DeviceActor.ts"
import type { GuestConfig } from "./GuestConfig.ts"
import {
  DeviceInitializationFailure,
  DeviceMemoryOverlap,
  DeviceStartFailure,
  GuestError,
  type GuestErrorReason,
  GuestInitializationFailure,
  InternalError,
  VcpuRuntimeFailure,
  VcpuStartFailure
} from "./GuestError.ts"
import { loadGuest } from "./GuestLoader.ts"
import { GuestMemory } from "./GuestMemory.ts"
import { type GuestStop, Halt } from "./GuestStop.ts"
import {
  Hypervisor,
  type HypervisorError,
  type MessageInterrupt,
  type PluggableMemory,
  type Vcpu,
  type Vm
} from "./Hypervisor.ts"
import { MachinePolicy } from "./MachinePolicy.ts"
import { deviceInitializationFailure, type PlacedDevice, placeDevices } from "./Placement.ts"
import { SerialPort } from "./SerialPort.ts"
import { describeFailure, type GuestFailure, type VcpuExit } from "./VcpuExit.ts"
import type { VcpuState } from "./VcpuState.ts"

/** Rounds of the scheduler in which the doorbells are delivered that a guest has rung before its end. */
const DOORBELL_ROUNDS = 8

/** The reason of a failure, once the last lines of the serial log are known. */
type Failure = (serialLog: ReadonlyArray<string>) => GuestErrorReason

/** How a life of the guest ends: the first to complete it decides. */
type Outcome = Deferred.Deferred<GuestStop, Failure>

/** One life of the guest, ready to start. */
export interface Incarnation {
  readonly scope: Scope.Closeable
  readonly vm: Vm
  /** The state in which the boot processor starts. */
  readonly entry: VcpuState
  readonly actors: ReadonlyArray<DeviceActor>
  readonly outcome: Outcome
}

const fail = (reason: GuestErrorReason): Effect.Effect<never, GuestError> => Effect.fail(new GuestError({ reason }))

/** Builds one life of the guest in a scope of its own below the machine's. */
export const buildIncarnation = (
  config: GuestConfig,
  devices: ReadonlyArray<Device>,
  parent: Scope.Scope
): Effect.Effect<Incarnation, GuestError, Hypervisor> =>
  Effect.uninterruptibleMask(Effect.fnUntraced(function*(restore) {
    const scope = yield* Scope.fork(parent)
    return yield* restore(Scope.provide(assemble(config, devices, scope), scope)).pipe(
      Effect.onExit((exit) => Exit.isFailure(exit) ? Scope.close(scope, exit) : Effect.void)
    )
  }))

const assemble = Effect.fnUntraced(function*(
  config: GuestConfig,
  devices: ReadonlyArray<Device>,
  scope: Scope.Closeable
) {
  const hypervisor = yield* Hypervisor
  const { device: defaultPolicy } = yield* MachinePolicy
  const outcome = Deferred.makeUnsafe<GuestStop, Failure>()
  const initialize = <A, R>(effect: Effect.Effect<A, HypervisorError, R>, detail: string) =>
    Effect.mapError(
      effect,
      (hypervisor) =>
        new GuestError({ reason: new GuestInitializationFailure({ operation: "create", detail, hypervisor }) })
    )

  const vm = yield* initialize(hypervisor.createVm, "the virtual machine could not be made")
  const regions = yield* Effect.forEach(ramRegions(config.guestMemory), (region) =>
    initialize(
      vm.addMemory(region.guestAddress, region.size),
      `${region.size} bytes of guest memory could not be added`
    ))
  const placement = yield* Result.match(
    placeDevices(devices, hypervisor.limits.interruptLines, config.guestMemory),
    {
      onFailure: (failure) => fail(deviceInitializationFailure(failure)),
      onSuccess: Effect.succeed
    }
  )
  const pluggable = new Map<PlacedDevice, PluggableMemory>()
  for (const placed of placement.devices) {
    const { device: { name, pluggableMemory: request }, placement: { pluggableMemory: address } } = placed
    if (request === undefined || address === undefined) continue
    const added = vm.addPluggableMemory(address, request.size, request.blockSize)
    pluggable.set(
      placed,
      yield* initialize(added, `${request.size} bytes of pluggable memory could not be added for ${name}`)
    )
  }
  const memory = new GuestMemory([...regions, ...Array.from(pluggable.values(), ({ region }) => region)])
  const bus = yield* makeBus(placement.ranges, memory)
  const actors: Array<DeviceActor> = []
  const backings = yield* vm.attachBus(bus, deliverTo(actors, placement.devices)).pipe(
    Effect.mapError((hypervisor) =>
      new GuestError({
        reason: new DeviceInitializationFailure({
          operation: "create",
          detail: "the bus could not be put in place",
          hypervisor
        })
      })
    )
  )
  const stop = stopper(outcome)
  for (const placed of placement.devices) {
    const made = <A, R>(interrupt: Effect.Effect<A, HypervisorError, R>, what: string) =>
      Effect.mapError(interrupt, (hypervisor) =>
        new GuestError({
          reason: new DeviceInitializationFailure({
            operation: "create",
            device: placed.device.name,
            detail: `${what} could not be made`,
            hypervisor
          })
        }))
    const interrupts = yield* Effect.forEach(
      placed.placement.gsis,
      (gsi) => made(vm.interruptLine(gsi), `interrupt line ${gsi}`)
    )
    const messages: Array<MessageInterrupt> = []
    while (messages.length < (placed.device.messages ?? 0)) {
      messages.push(yield* made(vm.messageInterrupt, `message-signalled interrupt ${messages.length}`))
    }
    const policy = placed.device.policy ?? defaultPolicy
    const actor = makeActor(placed, policy, memory, pluggable.get(placed), backings, { interrupts, messages }, stop)
    actors.push(actor)
    yield* actor.start.pipe(
      Effect.mapError((failure) =>
        new GuestError({
          reason: new DeviceStartFailure({
            operation: "create",
            device: failure.device,
            detail: failure.detail,
            ...(failure.hint === undefined ? {} : { hint: failure.hint })
          })
        })
      )
    )
  }

  const entry = yield* loadGuest(config, memory, placement.devices)
  return { scope, vm, entry, actors, outcome }
})

const makeBus = Effect.fnUntraced(function*(ranges: ReadonlyArray<BusRange>, memory: GuestMemory) {
  const bus = Bus.make(ranges)
  if (!(bus instanceof Bus)) {
    const device = bus.devices.join(" and ")
    return yield* fail(
      bus.kind === "overlap"
        ? new InternalError({ operation: "create", device, detail: bus.message })
        : new DeviceInitializationFailure({ operation: "create", device, detail: bus.message })
    )
  }
  for (const region of memory.regions) {
    const range = bus.overlapping(region.guestAddress, region.size)
    if (range !== undefined) {
      return yield* fail(
        new DeviceMemoryOverlap({
          operation: "create",
          device: range.device,
          detail: `the device's range at 0x${range.base.toString(16)} overlaps guest memory at 0x${
            region.guestAddress.toString(16)
          }`,
          hint: "Let the machine choose the address: leave `base` out of the range"
        })
      )
    }
  }
  return bus
})

/** Routes the accesses of the whole bus to the devices' mailboxes. The actors are filled in before any vCPU runs. */
const deliverTo = (actors: ReadonlyArray<DeviceActor>, placed: ReadonlyArray<PlacedDevice>): BusHandlers => {
  const owners: Array<number> = []
  const locals: Array<number> = []
  placed.forEach(({ device }, owner) =>
    device.ranges.forEach((_, local) => {
      owners.push(owner)
      locals.push(local)
    })
  )
  const actorOf = (range: number): DeviceActor => {
    const actor = actors[owners[range] ?? -1]
    if (actor === undefined) throw new Error(`an access to range ${range}, which no device has`)
    return actor
  }
  return {
    call: (range, offset, size, isWrite, value, reply) =>
      actorOf(range).call(locals[range] ?? 0, offset, size, isWrite, value, reply),
    posted: (range, offset, size, value) => actorOf(range).posted(locals[range] ?? 0, offset, size, value),
    doorbell: (range, doorbell) => actorOf(range).doorbell(locals[range] ?? 0, doorbell)
  }
}

const makeActor = (
  { device, firstRange, placement }: PlacedDevice,
  policy: NonNullable<Device["policy"]>,
  memory: GuestMemory,
  pluggableMemory: PluggableMemory | undefined,
  backings: ReadonlyArray<RangeBacking>,
  interrupts: Pick<DeviceContext, "interrupts" | "messages">,
  stop: DeviceContext["stop"]
): DeviceActor =>
  new DeviceActor(device, policy, (own) => ({
    ...own,
    name: device.name,
    memory,
    pluggableMemory,
    bases: placement.bases,
    ranges: backings.slice(firstRange, firstRange + device.ranges.length),
    ...interrupts,
    stop
  }))

/** How a device ends the machine: the first to say so decides how. */
const stopper = (outcome: Outcome) => (reason: GuestStop | GuestFailure): void => {
  switch (reason._tag) {
    case "PowerOff":
    case "Reset":
    case "Halt":
      Deferred.doneUnsafe(outcome, Exit.succeed(reason))
      return
    default:
      Deferred.doneUnsafe(
        outcome,
        Exit.fail((serialLog) =>
          new VcpuRuntimeFailure({ operation: "run", detail: describeFailure(reason), failure: reason, serialLog })
        )
      )
  }
}

const serialLog = (services: Context.Context<never>): ReadonlyArray<string> => {
  const serial = Context.getOption(services, SerialPort)
  return serial._tag === "None" ? [] : serial.value.log()
}

/** Runs one life of the guest to its end, and takes it apart. */
export const runIncarnation = (
  incarnation: Incarnation,
  config: GuestConfig,
  services: Context.Context<never>
): Effect.Effect<GuestStop, GuestError> => {
  const { actors, entry, outcome, scope, vm } = incarnation
  const die = (what: string, cause: Cause.Cause<unknown>): Effect.Effect<void> => {
    if (Cause.hasInterruptsOnly(cause)) return Effect.void
    const error = Cause.squash(cause)
    const detail = `${what} died: ${error instanceof Error ? error.message : String(error)}`
    const decides = !Cause.hasInterrupts(cause) &&
      Deferred.doneUnsafe(outcome, Exit.fail(() => new InternalError({ operation: "run", detail })))
    // What dies after the end of this life changes nothing about how it ended.
    return decides ? Effect.void : Effect.logError(`${what} died while its machine was taken apart`, cause)
  }
  const supervise = <E>(what: string, effect: Effect.Effect<void, E>): Effect.Effect<void, never, Scope.Scope> =>
    Effect.forkScoped(
      Effect.onExit(effect, (exit) => Exit.isFailure(exit) ? die(what, exit.cause) : Effect.void)
    )
  const runVcpus = Effect.gen(function*() {
    const vcpus: Array<Vcpu> = []
    for (let id = 0; id < config.cpus; id++) vcpus.push(yield* startFailure(vm.createVcpu(id), id))
    const boot = vcpus[0]
    if (boot !== undefined) yield* startFailure(boot.setState(entry), 0)
    // The boot processor last: the others must be able to take its start-up interrupts.
    for (const vcpu of vcpus.toReversed()) yield* supervise(`vCPU ${vcpu.id}`, runVcpu(vcpu, outcome))
    return yield* Effect.result(Deferred.await(outcome))
  })
  const live = Effect.gen(function*() {
    for (const actor of actors) yield* supervise(actor.device.name, runDevice(actor, outcome))
    const ended = yield* Effect.scoped(runVcpus)
    // No guest code runs any more. The devices still do what it told them last, or its last words would be lost: also what it told
    // them by doorbells, which the event loop delivers.
    for (let round = 0; round < DOORBELL_ROUNDS; round++) yield* Effect.yieldNow
    for (const actor of actors) yield* actor.settled
    return yield* Result.match(ended, {
      onFailure: (reason) => fail(reason(serialLog(services))),
      onSuccess: (stop) => Effect.succeed(stop)
    })
  })
  return Scope.provide(live, scope).pipe(Effect.onExit((exit) => Scope.close(scope, exit)))
}

const startFailure = <A, R>(effect: Effect.Effect<A, HypervisorError, R>, vcpu: number) =>
  Effect.mapError(effect, (hypervisor) =>
    new GuestError({
      reason: new VcpuStartFailure({ operation: "run", vcpu, detail: `vCPU ${vcpu} could not be started`, hypervisor })
    }))

const runDevice = (
  actor: DeviceActor,
  outcome: Outcome
): Effect.Effect<void> =>
  Effect.catch(actor.run, (escalated) =>
    Deferred.fail(
      outcome,
      (serialLog) =>
        new VcpuRuntimeFailure({
          operation: "run",
          device: escalated.device,
          detail: `the device failed and is not started again (started ${escalated.starts} times): ${escalated.detail}`,
          serialLog
        })
    ))

const runVcpu = (
  vcpu: Vcpu,
  outcome: Outcome
): Effect.Effect<void> =>
  Effect.matchEffect(vcpu.run, {
    onFailure: (hypervisor) =>
      Deferred.fail(
        outcome,
        (serialLog) =>
          new VcpuRuntimeFailure({
            operation: "run",
            vcpu: vcpu.id,
            detail: `vCPU ${vcpu.id} could not go on`,
            hypervisor,
            serialLog
          })
      ),
    onSuccess: (exit: VcpuExit) =>
      exit._tag === "Halted"
        ? Deferred.succeed(outcome, Halt.make({}))
        : Deferred.fail(
          outcome,
          (serialLog) =>
            new VcpuRuntimeFailure({
              operation: "run",
              vcpu: vcpu.id,
              detail: describeFailure(exit),
              failure: exit,
              serialLog,
              ...(exit._tag === "HypervisorInternalError" && exit.suberror === 1
                ? { hint: "`troupe doctor` tells which instructions this host's KVM lacks" }
                : {})
            })
        )
  })
