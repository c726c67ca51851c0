/** What `KvmSystem` says about a KVM that is not as it should be, on a scripted one. */
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer } from "effect"
import * as fc from "fast-check"
import * as Ffi from "../src/Ffi.ts"
import { type ForeignFunctions } from "../src/internal/ForeignFunctions.ts"
import { loadForeignFunctions } from "../src/internal/loadForeignFunctions.ts"
import { KvmCap, type KvmCapName, KvmIoctl } from "../src/kvm/KvmIoctl.ts"
import { KvmCpuid2 } from "../src/kvm/KvmStructs.ts"
import * as KvmSystem from "../src/kvm/KvmSystem.ts"

const FD = 1000
const EINTR = 4
const EMFILE = 24

interface Script {
  readonly open: number
  readonly version: number
  readonly missing: ReadonlySet<string>
  /** What `KVM_CREATE_VM` gives, call by call. */
  readonly createVm: Array<number>
}

/** Foreign functions on which a scripted KVM answers; everything is refused once its descriptor is closed. */
const scripted = (script: Partial<Script>): { readonly functions: ForeignFunctions; readonly open: Set<number> } => {
  const real = loadForeignFunctions("koffi", { quiet: true })
  if (typeof real === "string") throw new Error(real)
  const open = new Set<number>()
  const names = new Map(Object.entries<number>(KvmCap).map(([name, number]) => [number, name]))
  const made = (fd: number): number => {
    if (fd >= 0) open.add(fd)
    return fd
  }
  return {
    open,
    functions: {
      ...real,
      open: () => made(script.open ?? FD),
      close: (fd) => open.delete(fd) ? 0 : -9,
      closeSlowly: (fd, done) => {
        open.delete(fd)
        done()
      },
      ioctlNumber: (_fd, request, argument) => {
        switch (request) {
          case KvmIoctl.KVM_GET_API_VERSION.request:
            return script.version ?? 12
          case KvmIoctl.KVM_CHECK_EXTENSION.request:
            return script.missing?.has(names.get(Number(argument)) ?? "") === true ? 0 : 1
          case KvmIoctl.KVM_GET_VCPU_MMAP_SIZE.request:
            return 12288
          case KvmIoctl.KVM_CREATE_VM.request:
            return made(script.createVm?.shift() ?? FD + 1)
          default:
            return -22
        }
      },
      ioctlBuffer: (_fd, _request, argument) => {
        KvmCpuid2.fields.nent.set(new DataView(argument.buffer), 3)
        return 0
      }
    }
  }
}

/** Uses a scripted KVM; its descriptors are closed afterwards whatever happens. */
const withKvm = <A, E>(script: Partial<Script>, use: Effect.Effect<A, E, KvmSystem.KvmSystem | Ffi.Ffi>) => {
  const { functions, open } = scripted(script)
  return use.pipe(
    Effect.provide(KvmSystem.layer.pipe(Layer.provideMerge(Layer.succeed(Ffi.Ffi, Ffi.make(functions))))),
    Effect.ensuring(Effect.sync(() => assert.strictEqual(open.size, 0)))
  )
}

const required = Object.keys(KvmSystem.requiredCapabilities)

describe("KvmSystem", () => {
  it.effect("reads what it needs to know once", () =>
    withKvm(
      {},
      Effect.gen(function*() {
        const kvm = yield* KvmSystem.KvmSystem
        assert.strictEqual(kvm.vcpuMappingSize, 12288)
        const cpuid = kvm.supportedCpuid()
        assert.strictEqual(cpuid.byteLength, 8 + 3 * 40)
        // A copy each time: a caller that edits it does not change the next one's.
        KvmCpuid2.fields.nent.set(cpuid, 0)
        assert.strictEqual(KvmCpuid2.fields.nent.get(kvm.supportedCpuid()), 3)
      })
    ))

  it.effect("refuses another version of the interface", () =>
    Effect.gen(function*() {
      const error = yield* Effect.flip(withKvm({ version: 11 }, Effect.void))
      assert.strictEqual(error.operation, "KVM_GET_API_VERSION")
      assert.strictEqual(error.detail, "/dev/kvm speaks version 11 of the KVM interface, not 12")
    }))

  it("names every required capability that is missing, and nothing else", () =>
    fc.assert(
      fc.asyncProperty(fc.subarray(Object.keys(KvmCap)), async (missing) => {
        const names = missing.filter((name) => required.includes(name))
        const outcome = await Effect.runPromise(
          Effect.result(withKvm({ missing: new Set(missing) }, KvmSystem.KvmSystem))
        )
        if (names.length === 0) {
          assert.strictEqual(outcome._tag, "Success")
          return
        }
        assert.strictEqual(outcome._tag, "Failure")
        if (outcome._tag === "Failure") {
          assert.strictEqual(outcome.failure.operation, "KVM_CHECK_EXTENSION")
          for (const name of required) {
            assert.strictEqual(outcome.failure.detail.includes(`${name} (`), names.includes(name))
          }
        }
      })
    ))

  it.effect("answers for optional capabilities", () =>
    withKvm(
      { missing: new Set(["KVM_CAP_SPLIT_IRQCHIP"]) },
      Effect.gen(function*() {
        const kvm = yield* KvmSystem.KvmSystem
        assert.strictEqual(kvm.capability("KVM_CAP_SPLIT_IRQCHIP"), 0)
        assert.strictEqual(kvm.capability("KVM_CAP_SIGNAL_MSI"), 1)
      })
    ))

  for (
    const [errno, name, hint] of [
      [2, "ENOENT", /modprobe kvm_intel or kvm_amd/],
      [6, "ENXIO", /modprobe kvm_intel or kvm_amd/],
      [13, "EACCES", /group kvm/],
      [1, "EPERM", /container/],
      [EMFILE, "EMFILE", /ulimit -n/]
    ] as const
  ) {
    it.effect(`says what to do about ${name}`, () =>
      Effect.gen(function*() {
        const error = yield* Effect.flip(withKvm({ open: -errno }, Effect.void))
        assert.strictEqual(error.operation, "open")
        assert.deepStrictEqual(error.errno, { number: errno, name })
        assert.match(error.hint ?? "", hint)
      }))
  }

  it.effect("makes a machine although signals arrive meanwhile, and closes it", () =>
    withKvm(
      { createVm: [-EINTR, -EINTR, FD + 7] },
      Effect.gen(function*() {
        const kvm = yield* KvmSystem.KvmSystem
        assert.strictEqual(yield* Effect.scoped(kvm.createVm), FD + 7)
      })
    ))

  it.effect("reports a machine that cannot be made", () =>
    withKvm(
      { createVm: [-EMFILE] },
      Effect.gen(function*() {
        const kvm = yield* KvmSystem.KvmSystem
        const error = yield* Effect.flip(Effect.scoped(kvm.createVm))
        assert.strictEqual(error.operation, "KVM_CREATE_VM")
        assert.strictEqual(error.errno?.name, "EMFILE")
      })
    ))

  it("knows a purpose for every capability that it lists, and lists none twice", () => {
    const optional: ReadonlyArray<string> = Object.keys(KvmSystem.optionalCapabilities)
    const isKnown = (name: string): name is KvmCapName => name in KvmCap
    for (const name of [...required, ...optional]) assert.isTrue(isKnown(name))
    assert.deepStrictEqual(optional.filter((name) => required.includes(name)), [])
  })
})
