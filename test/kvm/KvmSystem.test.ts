/** The FFI module and the KVM structures on a real /dev/kvm: a 16-bit guest that prints one byte and halts. */
import { assert, describe, it } from "@effect/vitest"
import * as Ffi from "@troupe/node/Ffi"
import { KvmRegs, KvmSregs } from "@troupe/node/kvm/KvmCpuState"
import { KvmIoctl } from "@troupe/node/kvm/KvmIoctl"
import { KvmExit, KvmRun, KvmRunValue } from "@troupe/node/kvm/KvmRun"
import { KvmCpuid2, KvmUserspaceMemoryRegion } from "@troupe/node/kvm/KvmStructs"
import * as KvmSystem from "@troupe/node/kvm/KvmSystem"
import { Effect, Layer } from "effect"
import { readdirSync, readlinkSync } from "node:fs"
import { kvmObstacle, onKvm } from "./support.ts"

const MEMORY_SIZE = 0x1_0000
const ENTRY = 0x1000
const PORT = 0x3f8

/** A machine with one vCPU in real mode at `ENTRY`, where `code` lies. */
const makeGuest = Effect.fnUntraced(function*(code: ReadonlyArray<number>) {
  const ffi = yield* Ffi.Ffi
  const kvm = yield* KvmSystem.KvmSystem
  const vm = yield* kvm.createVm
  const memory = yield* ffi.mapAnonymous(MEMORY_SIZE)
  new Uint8Array(memory.buffer).set(code, ENTRY)
  const region = KvmUserspaceMemoryRegion.make()
  KvmUserspaceMemoryRegion.fields.memory_size.setNumber(region, MEMORY_SIZE)
  KvmUserspaceMemoryRegion.fields.userspace_addr.set(region, memory.address)
  yield* kvm.ioctl(vm, KvmIoctl.KVM_SET_USER_MEMORY_REGION, region)
  const vcpu = yield* ffi.own(ffi.ioctl(vm, KvmIoctl.KVM_CREATE_VCPU, 0))
  const shared = yield* ffi.mapShared(vcpu, kvm.vcpuMappingSize)
  const sregs = KvmSregs.make()
  yield* kvm.ioctl(vcpu, KvmIoctl.KVM_GET_SREGS, sregs)
  KvmSregs.fields.cs.base.set(sregs, 0n)
  KvmSregs.fields.cs.selector.set(sregs, 0)
  yield* kvm.ioctl(vcpu, KvmIoctl.KVM_SET_SREGS, sregs)
  const regs = KvmRegs.make()
  KvmRegs.fields.rip.setNumber(regs, ENTRY)
  KvmRegs.fields.rflags.setNumber(regs, 2)
  yield* kvm.ioctl(vcpu, KvmIoctl.KVM_SET_REGS, regs)
  return { vcpu, run: new DataView(shared.buffer), shared }
})

/** Why KVM on `path` cannot be used. */
const openFailure = (path: string, layer: typeof Ffi.layer) =>
  Effect.flip(Effect.scoped(Effect.provide(KvmSystem.make({ path }), layer)))

/** The descriptors of machines and vCPUs that this process has open. */
const openMachines = () =>
  readdirSync("/proc/self/fd").filter((fd) => {
    try {
      return /kvm-(vm|vcpu)/.test(readlinkSync(`/proc/self/fd/${fd}`))
    } catch {
      return false
    }
  })

const layers = [["node:ffi", Ffi.layerWith({ backEnds: ["node:ffi"], quiet: true })], [
  "koffi",
  Ffi.layerKoffi
]] as const

for (const [name, layer] of layers) {
  describe.skipIf(kvmObstacle !== undefined)(onKvm(`KVM through ${name}`), () => {
    it.layer(KvmSystem.layer.pipe(Layer.provideMerge(layer)))((it) => {
      it.effect("runs a 16-bit guest that prints a byte and halts", () =>
        Effect.gen(function*() {
          const kvm = yield* KvmSystem.KvmSystem
          // mov dx, 0x3f8; mov al, 'T'; out dx, al; hlt
          const { run, vcpu } = yield* makeGuest([0xba, PORT & 0xff, PORT >> 8, 0xb0, 0x54, 0xee, 0xf4])
          const { exit, exit_reason } = KvmRun.fields
          yield* kvm.ioctl(vcpu, KvmIoctl.KVM_RUN)
          assert.strictEqual(exit_reason.get(run), KvmExit.KVM_EXIT_IO)
          assert.strictEqual(exit.io.direction.get(run), KvmRunValue.KVM_EXIT_IO_OUT)
          assert.strictEqual(exit.io.port.get(run), PORT)
          assert.strictEqual(exit.io.size.get(run), 1)
          assert.strictEqual(exit.io.count.get(run), 1)
          assert.strictEqual(String.fromCharCode(run.getUint8(exit.io.data_offset.getNumber(run))), "T")
          yield* kvm.ioctl(vcpu, KvmIoctl.KVM_RUN)
          assert.strictEqual(exit_reason.get(run), KvmExit.KVM_EXIT_HLT)
        }))

      it.effect("leaves a spinning guest at once when immediate_exit is set", () =>
        Effect.gen(function*() {
          const kvm = yield* KvmSystem.KvmSystem
          const { run, vcpu } = yield* makeGuest([0xeb, 0xfe])
          KvmRun.fields.immediate_exit.set(run, 1)
          const error = yield* Effect.flip(kvm.ioctl(vcpu, KvmIoctl.KVM_RUN))
          assert.strictEqual(error.operation, "KVM_RUN")
          assert.deepStrictEqual(error.errno, { number: 4, name: "EINTR" })
        }))

      it.effect("knows what this host can do", () =>
        Effect.gen(function*() {
          const kvm = yield* KvmSystem.KvmSystem
          assert.isAtLeast(kvm.vcpuMappingSize, KvmRun.size)
          assert.isAtLeast(kvm.maxVcpus, 1)
          assert.strictEqual(kvm.capability("KVM_CAP_READONLY_MEM"), 1)
          const cpuid = kvm.supportedCpuid()
          const count = KvmCpuid2.fields.nent.get(cpuid)
          assert.isAbove(count, 0)
          assert.strictEqual(cpuid.byteLength, KvmCpuid2.fields.entries.at(count))
        }))

      it.effect("says which call failed, with its arguments, errno and a hint", () =>
        Effect.gen(function*() {
          const kvm = yield* KvmSystem.KvmSystem
          const vm = yield* kvm.createVm
          const region = KvmUserspaceMemoryRegion.make()
          KvmUserspaceMemoryRegion.fields.memory_size.setNumber(region, 1)
          const error = yield* Effect.flip(kvm.ioctl(vm, KvmIoctl.KVM_SET_USER_MEMORY_REGION, region))
          assert.strictEqual(error.operation, "KVM_SET_USER_MEMORY_REGION")
          assert.deepStrictEqual(error.errno, { number: 22, name: "EINVAL" })
          assert.strictEqual(error.arguments, `${vm}, 32 bytes`)
          assert.match(error.message, /KVM_SET_USER_MEMORY_REGION\(.*\): invalid argument \(EINVAL\)\. .+/)
        }))

      it.effect("closes everything with the scope", () =>
        Effect.gen(function*() {
          yield* Effect.scoped(Effect.gen(function*() {
            yield* makeGuest([0xf4])
            assert.strictEqual(openMachines().length, 2)
          }))
          const { shared } = yield* Effect.scoped(makeGuest([0xf4]))
          assert.throws(() => shared.buffer, Ffi.UseAfterUnmap)
          assert.strictEqual(openMachines().length, 0)
        }))
    })
  })

  describe(`A host without KVM, through ${name}`, () => {
    it.effect("names a device that is not there", () =>
      Effect.gen(function*() {
        const error = yield* openFailure("/dev/no-kvm", layer)
        assert.strictEqual(error._tag, "HypervisorError")
        assert.strictEqual(
          error.message.split(". ")[0],
          "open(\"/dev/no-kvm\", 0x2): no such file or directory (ENOENT)"
        )
        assert.match(error.message, /kvm_intel or kvm_amd/)
      }))

    it.effect("names a file that is not KVM", () =>
      Effect.gen(function*() {
        const error = yield* openFailure("/dev/null", layer)
        assert.match(error.message, /^KVM_GET_API_VERSION\(.*\(ENOTTY\)/)
      }))
  })
}
