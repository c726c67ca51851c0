/**
 * One virtual machine on KVM: memory, bus, interrupt inputs and vCPUs, each in the scope of the call that made it.
 */
import { KVM_IDENTITY_MAP_ADDRESS, KVM_TSS_ADDRESS } from "@troupe/core/boot/MachineLayout"
import { MemoryRegion } from "@troupe/core/GuestMemory"
import { HypervisorError, type InterruptLine, type Vm } from "@troupe/core/Hypervisor"
import * as Effect from "effect/Effect"
import { Ffi } from "../Ffi.ts"
import { HiddenCpuid } from "./Cpuid.ts"
import { ExitObserver } from "./ExitCounts.ts"
import { haltWatch } from "./HaltWatch.ts"
import { attachBus } from "./KvmBus.ts"
import { kvmError } from "./KvmError.ts"
import { KvmIoctl, KvmValue } from "./KvmIoctl.ts"
import { KvmPitConfig } from "./KvmStructs.ts"
import { KvmSystem } from "./KvmSystem.ts"
import { type Machine, makeVcpu } from "./KvmVcpu.ts"
import { memorySlots } from "./MemorySlots.ts"
import { encodeIrqfd, messageRoutes } from "./MessageRoutes.ts"
import { giveBackOf, pluggableSlots } from "./PluggableSlots.ts"
import type { AccessTableBuffers } from "./thread/AccessTable.ts"
import { PostedRing } from "./thread/PostedRing.ts"
import { REQUEST_STOP } from "./thread/VcpuControl.ts"
import type { VcpuRunner } from "./VcpuRunner.ts"
import { VcpuThreads } from "./VcpuThreads.ts"
import { makeWakeCounts, WakeObserver } from "./WakeCounts.ts"

/** Entries of a machine's ring of posted writes (16 bytes each): more than a guest can write while the host is lazy. */
const RING_CAPACITY = 2048

const EMPTY_TABLE: AccessTableBuffers = {
  bounds: new SharedArrayBuffer(8),
  rows: new SharedArrayBuffer(4),
  shadow: new SharedArrayBuffer(2),
  pioRows: 0
}

/** Makes an empty machine. */
export const makeVm = Effect.gen(function*() {
  const ffi = yield* Ffi
  const system = yield* KvmSystem
  const threads = yield* VcpuThreads
  const hidden = yield* HiddenCpuid
  const observer = yield* ExitObserver
  const wakes = makeWakeCounts()
  const { ioctl } = system

  const vm = yield* system.createVm
  yield* ioctl(vm, KvmIoctl.KVM_SET_TSS_ADDR, KVM_TSS_ADDRESS)
  const identityMap = new BigUint64Array([BigInt(KVM_IDENTITY_MAP_ADDRESS)])
  yield* ioctl(vm, KvmIoctl.KVM_SET_IDENTITY_MAP_ADDR, identityMap)
  // After the memory: the timer's registers begin a grace period in the kernel, and a memory slot that comes then has to wait for
  // its end, which takes milliseconds.
  let hasControllers = false
  const makeControllers = Effect.uninterruptible(Effect.gen(function*() {
    if (hasControllers) return
    yield* ioctl(vm, KvmIoctl.KVM_CREATE_IRQCHIP)
    const pit = KvmPitConfig.make()
    KvmPitConfig.fields.flags.set(pit, KvmValue.KVM_PIT_SPEAKER_DUMMY)
    yield* ioctl(vm, KvmIoctl.KVM_CREATE_PIT2, pit)
    hasControllers = true
  }))

  const ring = new PostedRing(PostedRing.allocate(RING_CAPACITY))
  const wake = yield* Effect.mapError(ffi.eventFd, kvmError)
  const runners: Array<VcpuRunner> = []
  const hasVcpus = () => runners.length > 0
  let attached: Effect.Success<ReturnType<typeof attachBus>> | undefined
  let defect: { readonly value: unknown } | undefined
  const onMessage = (): void => {
    wakes.messages++
    attached?.dispatcher.turn()
  }
  yield* Effect.mapError(wake.onSignal(onMessage), kvmError)
  const { addSlot, dropStale, reserve } = yield* memorySlots(vm, ioctl, hasVcpus)
  yield* Effect.forkScoped(haltWatch(runners))

  const machine: Machine = {
    vm,
    runners,
    dropStaleMemory: dropStale,
    job: () => ({
      ring: ring.buffer,
      wake: wake.fd,
      table: attached?.table ?? EMPTY_TABLE,
      rows: attached?.rows ?? 0
    }),
    dispatcher: () => attached?.dispatcher,
    defect: () => defect
  }

  const observeWakes = yield* WakeObserver
  observeWakes(wakes)
  const messages = yield* messageRoutes(vm, ioctl, hasVcpus)

  return {
    addMemory: (guestAddress, size) =>
      Effect.map(
        addSlot(guestAddress, size, "guest-writable"),
        (mapping) => new MemoryRegion(guestAddress, mapping.buffer, giveBackOf(ffi.functions, mapping))
      ),
    addPluggableMemory: (guestAddress, size, blockSize) =>
      Effect.provideService(pluggableSlots(reserve)(guestAddress, size, blockSize), Ffi, ffi),
    attachBus: Effect.fnUntraced(function*(bus, handlers) {
      if (attached !== undefined) {
        return yield* new HypervisorError({ operation: "attachBus", detail: "the machine has a bus already" })
      }
      const result = yield* attachBus({
        vm,
        ioctl,
        addSlot,
        hasVcpus,
        ring,
        bus,
        handlers,
        wakes,
        onDefect: (value) => {
          defect ??= { value }
          for (const runner of runners) runner.request(REQUEST_STOP)
        }
      }).pipe(Effect.provideService(Ffi, ffi))
      attached = result
      for (const runner of runners) result.dispatcher.add(runner.control)
      return result.backings
    }),
    interruptLine: Effect.fnUntraced(function*(gsi) {
      yield* makeControllers
      const line = yield* Effect.mapError(ffi.eventFd, kvmError)
      const set = (flags: number) => ioctl(vm, KvmIoctl.KVM_IRQFD, encodeIrqfd(line.fd, gsi, flags))
      // The kernel takes the line away by itself when its eventfd is closed, which is next; that may be later than a vCPU
      // runs on, though.
      yield* Effect.acquireRelease(
        set(0),
        () => hasVcpus() ? Effect.ignore(set(KvmValue.KVM_IRQFD_FLAG_DEASSIGN)) : Effect.void
      )
      return { gsi, trigger: line.trigger } satisfies InterruptLine
    }),
    messageInterrupt: Effect.andThen(makeControllers, messages.make),
    createVcpu: (id) =>
      Effect.andThen(makeControllers, makeVcpu(machine, id)).pipe(
        Effect.provideService(Ffi, ffi),
        Effect.provideService(KvmSystem, system),
        Effect.provideService(VcpuThreads, threads),
        Effect.provideService(HiddenCpuid, hidden),
        Effect.provideService(ExitObserver, observer)
      )
  } satisfies Vm
})
