/** Devices that fail on a real KVM: the small guest's drivers hear that a reset is needed, start anew, and their work goes on. */
import { assert, describe, it } from "@effect/vitest"
import { type GuestConfigInput, GuestLifecycle } from "@troupe/core"
import { makeMemoryBackend } from "@troupe/core/BlockBackend"
import { makeBlockClient } from "@troupe/core/BlockClient"
import type { DevicePolicy } from "@troupe/core/Device"
import { restartPolicy } from "@troupe/core/RestartSchedule"
import { DeviceDefects } from "@troupe/core/testing"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import { Effect, Exit, Layer, Logger, Schedule } from "effect"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))
const REQUESTS = 300

interface Subject {
  readonly device: string
  readonly word: string
  readonly done: RegExp
  readonly config: (defects: DeviceDefects.DeviceDefects) => Partial<GuestConfigInput>
}

/** A disk whose back end breaks as planned, which none should. */
const breakingDisk = (defects: DeviceDefects.DeviceDefects) =>
  makeBlockClient("breaking", () =>
    Effect.sync(() => {
      const backend = makeMemoryBackend("memory", new Uint8Array(2 ** 20))
      return {
        ...backend,
        read: (...request) => {
          defects.reach("host")
          backend.read(...request)
        },
        write: (...request) => {
          defects.reach("host")
          backend.write(...request)
        }
      }
    }))

const subjects: ReadonlyArray<Subject> = [
  {
    device: "rng0",
    word: `rng=endure,${REQUESTS}`,
    done: new RegExp(`^rng endure ${REQUESTS} requests (\\d+) resets ok$`),
    config: () => ({ virtioRng: true })
  },
  {
    device: "block0",
    word: `blk=endure,${REQUESTS}`,
    done: new RegExp(`^blk endure ${2 * REQUESTS} requests (\\d+) resets ok$`),
    config: (defects) => ({
      blockDevices: [{
        id: "disk",
        mode: "READ_WRITE",
        format: "FILE",
        client: breakingDisk(defects)
      }]
    })
  }
]

/** Runs the guest with a device that breaks as planned. */
const runGuest = (
  subject: Subject,
  defects: DeviceDefects.DeviceDefects,
  policy: DevicePolicy,
  machine: Partial<GuestConfigInput> = {}
) =>
  Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({
      kernelType: "LINUX",
      kernel: fromPath(ELF),
      cmdline: `quiet ${machine.virtioPackedRing === true ? "packed" : "split"} smp ${subject.word} say=after`,
      cpus: 1,
      guestMemory: "32M",
      ...machine,
      ...subject.config(defects)
    })
    const serial = yield* (yield* lifecycle.bind).getSerial
    const exit = yield* Effect.exit(lifecycle.run)
    return { exit, lines: serial.log().map((line) => line.replace("troupe-guest: ", "")) }
  }).pipe(Effect.provide(
    GuestLifecycle.layer.pipe(
      Layer.provide(
        DeviceDefects.layer((device) =>
          device.name === subject.device ? { ...DeviceDefects.breaking(device, defects), policy } : device
        )
      ),
      Layer.provide(layerDevices.pipe(Layer.provide(Layer.succeed(EntropySource, {
        fill: (bytes) => {
          defects.reach("host")
          bytes.fill(0x11)
        }
      })))),
      Layer.provide(KvmGuestLifecycle.layerHypervisor()),
      Layer.merge(Logger.layer([]))
    )
  ))

const MACHINES = [
  { cpus: 1, virtioTransport: "mmio", virtioPackedRing: false },
  { cpus: 2, virtioTransport: "mmio", virtioPackedRing: true },
  { cpus: 2, virtioTransport: "pci", virtioPackedRing: false }
] as const

/** Never gives up within a test, and loses no time. */
const persistent: DevicePolicy = { _tag: "restart", schedule: Schedule.spaced("1 millis") }

const PLACES: ReadonlyArray<DeviceDefects.DefectPlace> = ["doorbell", "done", "interrupt", "write", "host"]

describe.skipIf(kvmObstacle !== undefined).each(subjects)(onKvm("a device that fails: $device"), (subject) => {
  it.live.each(MACHINES)(
    "is started again, and its driver's work goes on: $cpus vCPU, $virtioTransport, packed $virtioPackedRing",
    (machine) =>
      Effect.gen(function*() {
        for (const place of PLACES) {
          // Every so often, at one kind of point, and not always at the same one of the driver's start.
          let reached = 0
          let next = 11
          const defects = new DeviceDefects.DeviceDefects((_, at) => {
            if (at !== place || ++reached !== next) return false
            next += 97 + next % 17
            return true
          })
          const { exit, lines } = yield* runGuest(subject, defects, persistent, machine)
          assert.deepStrictEqual(exit, Exit.succeed({ _tag: "PowerOff" }), lines.join("\n"))
          const resets = lines.flatMap((line) => subject.done.exec(line)?.[1] ?? [])
          assert.strictEqual(resets.length, 1, `${place}: ${lines.join("\n")}`)
          assert.isAbove(defects.defects, 0, place)
          assert.isAtMost(Number(resets[0]), defects.defects)
          assert.include(lines, "say after")
        }
      }),
    60_000
  )

  it.live(
    "ends the machine with a typed error where it is not to be started again, or fails again and again",
    () =>
      Effect.gen(function*() {
        const policies = [[{ _tag: "escalate" }, 1], [restartPolicy({ delay: "1 millis", times: 3 }), 4]] as const
        for (const [policy, starts] of policies) {
          const defects = new DeviceDefects.DeviceDefects((_, place) => place === "doorbell")
          const { exit } = yield* runGuest(subject, defects, policy)
          const error = Exit.findErrorOption(exit)
          if (error._tag === "None") return assert.fail("the machine should have ended")
          assert.strictEqual(error.value.reason._tag, "VCPU_RUNTIME_FAILURE")
          assert.strictEqual(error.value.reason.device, subject.device)
          assert.include(error.value.message, "broken on purpose")
          assert.strictEqual(defects.defects, starts)
        }
      }),
    60_000
  )
})
