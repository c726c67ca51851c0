/** The KVM layer when things go wrong: every foreign call fails once, runs are interrupted anywhere, and nothing is left. */
import { assert, describe, it } from "@effect/vitest"
import type { HypervisorError } from "@troupe/core/Hypervisor"
import * as Ffi from "@troupe/node/Ffi"
import * as KvmHypervisor from "@troupe/node/kvm/KvmHypervisor"
import { KvmIoctl } from "@troupe/node/kvm/KvmIoctl"
import * as KvmSystem from "@troupe/node/kvm/KvmSystem"
import * as VcpuThreads from "@troupe/node/kvm/VcpuThreads"
import { Cause, Effect, Exit, Fiber, Layer, Option } from "effect"
import * as fc from "fast-check"
import { readdirSync, readlinkSync } from "node:fs"
import { kvmObstacle, onKvm } from "./support.ts"
import { CONTROL, END, flatMode, PORTS, range, SERIAL, tinyMachine, WINDOW, word } from "./TinyMachine.ts"

const ENOMEM = 12
const EAGAIN = 11

/** The descriptors of KVM that are open. (Threads that wait in the pool have eventfds of their own.) */
const openDescriptors = (): ReadonlyArray<string> =>
  readdirSync("/proc/self/fd").flatMap((fd) => {
    try {
      return [`${fd} ${readlinkSync(`/proc/self/fd/${fd}`)}`]
    } catch {
      // The descriptor of the listing itself.
      return []
    }
  }).filter((entry) => /kvm/.test(entry))

/** What foreign calls have made and not given back. */
interface Ledger {
  calls: number
  failed: string | undefined
  readonly mappings: Map<bigint, number>
  readonly eventFds: Set<number>
  polls: number
}

const makeLedger = (): Ledger => ({ calls: 0, failed: undefined, mappings: new Map(), eventFds: new Set(), polls: 0 })

const requestNames = new Map(Object.values(KvmIoctl).map(({ name, request }) => [request, name]))

/** The FFI, with a ledger; call number `failAt` fails with ENOMEM. Calls that give things back never do. */
const countingFfi = (ledger: Ledger, failAt: number) =>
  Layer.effect(
    Ffi.Ffi,
    Effect.map(Ffi.Ffi, ({ functions }) => {
      const fails = (name: string): boolean => {
        if (ledger.calls++ !== failAt) return false
        ledger.failed = name
        return true
      }
      const ioctlName = (request: number) => requestNames.get(request) ?? `ioctl 0x${request.toString(16)}`
      return Ffi.make({
        ...functions,
        open: (path, flags) => fails("open") ? -ENOMEM : functions.open(path, flags),
        ioctlNumber: (fd, request, argument) =>
          fails(ioctlName(request)) ? -ENOMEM : functions.ioctlNumber(fd, request, argument),
        ioctlBuffer: (fd, request, argument) =>
          fails(ioctlName(request)) ? -ENOMEM : functions.ioctlBuffer(fd, request, argument),
        eventfd: (initial, flags) => {
          if (fails("eventfd")) return -ENOMEM
          const fd = functions.eventfd(initial, flags)
          ledger.eventFds.add(fd)
          return fd
        },
        close: (fd) => {
          ledger.eventFds.delete(fd)
          return functions.close(fd)
        },
        installKickSignal: () => fails("sigaction") ? -ENOMEM : functions.installKickSignal(),
        mmap: (length, protection, flags, fd, offset) => {
          if (fails("mmap")) return BigInt(-ENOMEM)
          const address = functions.mmap(length, protection, flags, fd, offset)
          if (address >= 0n) ledger.mappings.set(address, length)
          return address
        },
        munmap: (address, length) => {
          assert.strictEqual(ledger.mappings.get(address), length)
          ledger.mappings.delete(address)
          return functions.munmap(address, length)
        },
        poll: (fd, events, callback) => {
          if (fails("uv_poll")) return -ENOMEM
          const handle = functions.poll(fd, events, callback)
          if (typeof handle === "number") return handle
          ledger.polls++
          return {
            ...handle,
            close: () => {
              ledger.polls--
              handle.close()
            }
          }
        }
      })
    })
  ).pipe(Layer.provide(Ffi.layerWith({ quiet: true })))

const hypervisor = (ledger: Ledger, failAt: number) =>
  KvmHypervisor.layer.pipe(
    Layer.provideMerge(VcpuThreads.layerWith({ warm: 0 })),
    Layer.provide(KvmSystem.layer),
    Layer.provide(countingFfi(ledger, failAt))
  )

/** The hypervisor in a process whose user has too many signals waiting: the kernel refuses the first ones that are sent. */
const withoutRoomForSignals = (refuse: () => boolean) =>
  KvmHypervisor.layer.pipe(
    Layer.provide(VcpuThreads.layer),
    Layer.provide(KvmSystem.layer),
    Layer.provide(
      Layer.effect(
        Ffi.Ffi,
        Effect.map(Ffi.Ffi, ({ functions }) =>
          Ffi.make({
            ...functions,
            tgkill: (threadId, signal) => refuse() ? -EAGAIN : functions.tgkill(threadId, signal)
          }))
      )
    ),
    Layer.provide(Ffi.layerWith({ quiet: true }))
  )

/** A machine with one of everything. */
const machineOfEverything = (code: ReadonlyArray<number>) =>
  tinyMachine({
    state: flatMode,
    lines: [5],
    ranges: [
      ...PORTS,
      range({
        space: "mmio",
        base: WINDOW,
        size: 0x1000,
        read: "register-page",
        doorbells: [{ offset: 0x50, size: 4 }, { offset: 0x64, size: 4, value: 3 }]
      })
    ],
    code,
    vcpus: 2
  })

const posts = [0x66, 0xba, ...word(SERIAL), 0xb0, 0x41, 0xee, 0x66, 0xba, ...word(CONTROL), 0xec]

const assertNothingLeft = (
  ledger: Ledger,
  before: ReadonlyArray<string>,
  threads: VcpuThreads.VcpuThreadCounts | undefined
) => {
  assert.deepStrictEqual(openDescriptors(), before)
  assert.strictEqual(ledger.mappings.size, 0, "memory is still mapped")
  assert.strictEqual(ledger.eventFds.size, 0, "an eventfd is still open")
  assert.strictEqual(ledger.polls, 0, "a descriptor is still watched")
  if (threads !== undefined) assert.strictEqual(threads.held, 0, "a thread is still held")
}

/** Where these fail something optional is left out. */
const harmless = new Set(["KVM_GET_STATS_FD", "KVM_GET_REGS", "KVM_GET_SREGS", "KVM_CHECK_EXTENSION"])

describe.skipIf(kvmObstacle !== undefined)(onKvm("KvmHypervisor under faults"), () => {
  it.live(
    "names every foreign call that fails while a machine is made and run, and leaves nothing",
    () =>
      Effect.gen(function*() {
        const scenario = Effect.gen(function*() {
          const machine = yield* machineOfEverything([...posts, ...END])
          yield* machine.runToEnd
        })
        const failures: Array<string> = []
        for (let failAt = 0;; failAt++) {
          const ledger = makeLedger()
          const before = openDescriptors()
          const exit = yield* Effect.exit(
            Effect.provide(Effect.scoped(scenario), hypervisor(ledger, failAt), { local: true })
          )
          assertNothingLeft(ledger, before, undefined)
          if (ledger.failed === undefined) {
            assert.isTrue(Exit.isSuccess(exit))
            break
          }
          failures.push(ledger.failed)
          if (Exit.isSuccess(exit)) {
            assert.isTrue(harmless.has(ledger.failed), `${ledger.failed} has failed and nobody noticed`)
            continue
          }
          const error = Cause.findErrorOption(exit.cause)
          if (Option.isNone(error)) return assert.fail(`${ledger.failed}: ${Cause.pretty(exit.cause)}`)
          const failure: HypervisorError | { readonly _tag: "FfiUnavailable" } = error.value
          if (failure._tag !== "HypervisorError") return assert.fail(failure._tag)
          assert.strictEqual(failure.operation, ledger.failed)
          if (failure.operation !== KvmIoctl.KVM_CHECK_EXTENSION.name) {
            assert.deepStrictEqual(failure.errno, { number: ENOMEM, name: "ENOMEM" })
          }
        }
        for (
          const name of ["open", "KVM_CREATE_VM", "KVM_IOEVENTFD", "KVM_IRQFD", "KVM_CREATE_VCPU", "mmap", "uv_poll"]
        ) {
          assert.include(failures, name)
        }
      }),
    120_000
  )

  it.live("is interrupted anywhere and leaves nothing", () =>
    Effect.gen(function*() {
      const ledger = makeLedger()
      yield* Effect.gen(function*() {
        const threads = yield* VcpuThreads.VcpuThreads
        const before = openDescriptors()
        // Posts and calls without end, or spins: the interruption meets the thread in the guest, on its way, or waiting.
        const again = [...posts, 0xeb, 0x100 - posts.length - 2]
        const delays = fc.sample(fc.tuple(fc.nat({ max: 40 }), fc.constantFrom(again, [0xeb, 0xfe])), { numRuns: 40 })
        for (const [delay, code] of delays) {
          const fiber = yield* Effect.forkChild(Effect.scoped(
            Effect.gen(function*() {
              const machine = yield* machineOfEverything(code)
              yield* Effect.all(machine.vcpus.map((vcpu) => vcpu.run), { concurrency: "unbounded" })
            })
          ))
          yield* Effect.sleep(delay / 2)
          yield* Fiber.interrupt(fiber)
          assertNothingLeft(ledger, before, threads.counts())
        }
        assert.isAtMost(threads.counts().idle, 8)
      }).pipe(Effect.provide(hypervisor(ledger, -1)))
    }), 60_000)

  it.live("takes a vCPU out of its guest also when there is no room for the signal at first", () => {
    let refused = 0
    const refuse = () => refused < 20 && ++refused > 0
    return Effect.gen(function*() {
      const machine = yield* tinyMachine({ state: flatMode, code: [0xeb, 0xfe] })
      const fiber = yield* Effect.forkChild(machine.vcpu.run)
      // The guest spins: long before this its thread has entered it.
      yield* Effect.sleep("500 millis")
      yield* Fiber.interrupt(fiber)
      assert.isAtLeast(refused, 1)
    }).pipe(Effect.scoped, Effect.provide(withoutRoomForSignals(refuse)))
  })
})
