/** Which messages the kernel is told of, and what becomes of those that it does not take. */
import { assert, describe, it } from "@effect/vitest"
import type { MessageInterrupt } from "@troupe/core/Hypervisor"
import { HypervisorError } from "@troupe/core/Hypervisor"
import * as Ffi from "@troupe/node/Ffi"
import { KvmIoctl, KvmValue } from "@troupe/node/kvm/KvmIoctl"
import { KvmIrqRouting, KvmIrqRoutingEntry } from "@troupe/node/kvm/KvmStructs"
import { messageRoutes } from "@troupe/node/kvm/MessageRoutes"
import type { StructView } from "@troupe/node/kvm/Struct"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import type * as Scope from "effect/Scope"
import * as fc from "fast-check"

const EINVAL = 22
const ENOMEM = 12
const VM = -1
/** The kernel takes no message whose data is this or more. */
const REFUSED = 0x100

/** A kernel that has a table of messages, by their data, and refuses some of them. */
class PlayedKernel {
  messages: ReadonlyArray<number> = []
  calls = 0
  broken = false

  readonly ioctlBuffer = (_fd: number, request: number, view: StructView): number => {
    assert.strictEqual(request, KvmIoctl.KVM_SET_GSI_ROUTING.request)
    this.calls++
    if (this.broken) return -ENOMEM
    const { entries, nr } = KvmIrqRouting.fields
    const { type, u } = KvmIrqRoutingEntry.fields
    const messages: Array<number> = []
    for (let i = 0; i < nr.get(view); i++) {
      const base = entries.at(i)
      if (type.get(view, base) === KvmValue.KVM_IRQ_ROUTING_MSI) messages.push(u.msi.data.get(view, base))
    }
    if (messages.some((data) => data >= REFUSED)) return -EINVAL
    this.messages = messages
    return 0
  }
}

interface Played {
  readonly kernel: PlayedKernel
  readonly warnings: Array<string>
  readonly make: Effect.Success<ReturnType<typeof messageRoutes>>["make"]
}

const withRoutes = <A, E>(use: (played: Played) => Effect.Effect<A, E, Scope.Scope>) => {
  const warnings: Array<string> = []
  const logger = Logger.make<unknown, void>(({ message }) => {
    warnings.push(String(message))
  })
  const kernel = new PlayedKernel()
  return Effect.scoped(Effect.gen(function*() {
    const { functions } = yield* Ffi.Ffi
    const ffi = Ffi.make({
      ...functions,
      ioctlBuffer: (fd, request, argument) => {
        assert(argument instanceof DataView && argument.buffer instanceof ArrayBuffer)
        return kernel.ioctlBuffer(fd, request, new DataView(argument.buffer, argument.byteOffset, argument.byteLength))
      }
    })
    const routes = messageRoutes(VM, () => Effect.succeed(0), () => false)
    const { make } = yield* Effect.provideService(routes, Ffi.Ffi, ffi)
    return yield* use({ kernel, warnings, make })
  })).pipe(Effect.provide(Layer.merge(Ffi.layerWith({ quiet: true }), Logger.layer([logger]))))
}

const settle = Effect.repeat(Effect.yieldNow, { times: 20 })

describe("messageRoutes", () => {
  it.effect("tells the kernel of every message that it takes, and says which ones it does not", () =>
    Effect.promise(() =>
      fc.assert(
        fc.asyncProperty(
          fc.array(
            fc.record({ index: fc.nat(3), data: fc.nat(REFUSED + 50), trigger: fc.boolean() }),
            { maxLength: 16, size: "max" }
          ),
          (changes) =>
            Effect.runPromise(withRoutes(({ kernel, make, warnings }) =>
              Effect.gen(function*() {
                const messages: Array<MessageInterrupt> = []
                for (let i = 0; i < 4; i++) messages.push(yield* make)
                const wanted: Array<number | undefined> = [undefined, undefined, undefined, undefined]
                let refused = 0
                const changed = new Set<number>()
                for (const { data, index, trigger } of changes) {
                  messages[index]?.route(0xfee0_0000, 0, data)
                  wanted[index] = data
                  changed.add(index)
                  if (!trigger) continue
                  messages[0]?.trigger()
                  for (const one of changed) if ((wanted[one] ?? 0) >= REFUSED) refused++
                  changed.clear()
                  assert.deepStrictEqual(
                    kernel.messages,
                    wanted.flatMap((data) => data !== undefined && data < REFUSED ? [data] : [])
                  )
                  yield* settle
                }
                assert.lengthOf(warnings, refused)
                for (const warning of warnings) assert.match(warning, /0x1[0-9a-f]{2} to 0xfee00000.*EINVAL/)
              })
            ))
        ),
        { numRuns: 30 }
      )
    ))

  it.effect("logs no more than a few of a guest's refused messages", () =>
    withRoutes(({ make, warnings }) =>
      Effect.gen(function*() {
        const message = yield* make
        for (let i = 0; i < 100; i++) {
          message.route(0, 0, REFUSED)
          message.trigger()
          yield* settle
        }
        assert.lengthOf(warnings, 16)
      })
    ))

  it.effect("breaks where the kernel takes no table at all, and loses none of it", () =>
    withRoutes(({ kernel, make, warnings }) =>
      Effect.gen(function*() {
        const [first, second] = [yield* make, yield* make]
        first.route(0, 0, 1)
        first.trigger()
        kernel.broken = true
        second.route(0, 0, 2)
        for (let i = 0; i < 3; i++) {
          const error = yield* Effect.flip(Effect.try({ try: () => second.trigger(), catch: (thrown) => thrown }))
          assert.instanceOf(error, HypervisorError)
          if (!(error instanceof HypervisorError)) return
          assert.strictEqual(error.operation, "KVM_SET_GSI_ROUTING")
          assert.deepStrictEqual(error.errno, { number: ENOMEM, name: "ENOMEM" })
        }
        assert.deepStrictEqual(kernel.messages, [1])
        kernel.broken = false
        first.trigger()
        assert.deepStrictEqual(kernel.messages, [1, 2])
        const { calls } = kernel
        second.trigger()
        assert.deepStrictEqual([kernel.calls, warnings], [calls, []])
      })
    ))
})
