/**
 * Devices that fail on a real KVM: the small guest's drivers hear that a reset is needed, start anew, and their work goes on, as does
 * that of the device beside. Bytes carry numbers and sums: none is lost, and none comes twice.
 */
import { assert, describe, it } from "@effect/vitest"
import { type Guest, type GuestConfigInput, type GuestError, GuestLifecycle, type GuestStop } from "@troupe/core"
import { makeMemoryBackend } from "@troupe/core/BlockBackend"
import { makeBlockClient } from "@troupe/core/BlockClient"
import type { DevicePolicy } from "@troupe/core/Device"
import * as NetStreams from "@troupe/core/NetStreams"
import { restartPolicy } from "@troupe/core/RestartSchedule"
import { DeviceDefects } from "@troupe/core/testing"
import { EntropySource, layer as layerDevices } from "@troupe/devices"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import { layerVsock, VsockManager } from "@troupe/vsock"
import { Effect, Exit, Layer, Logger, Schedule, Stream } from "effect"
import type { Scope } from "effect"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))

// --- what the guest sends, and is sent back ------------------------------------------------------------------------------

const NOTE_SIZE = 64
const NOTE_MAGIC = 0x6574_6f6e

/** The notes that came to the host, in their order: how many requests were completed before each, and its own number. */
type Notes = Array<{ readonly done: number; readonly attempt: number }>

const readNote = (notes: Notes, bytes: Uint8Array): void => {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const [magic, done, attempt, sum] = [0, 4, 8, 12].map((offset) => view.getUint32(offset, true))
  if (done === undefined || attempt === undefined) return
  let expected = (done * 31 + attempt) >>> 0
  for (const byte of bytes.subarray(16)) expected = (((expected << 1) | (expected >>> 31)) + byte) >>> 0
  assert.deepStrictEqual([magic, sum], [NOTE_MAGIC, expected])
  notes.push({ done, attempt })
}

/** Each attempt came once at most and in its turn, and each request once at least. */
const checkNotes = (notes: Notes, requests: number): void => {
  for (let i = 1; i < notes.length; i++) {
    const [before, note] = [notes[i - 1], notes[i]]
    if (before === undefined || note === undefined) continue
    assert.isAbove(note.attempt, before.attempt)
    assert.isAtLeast(note.done, before.done)
    assert.isAtMost(note.done, before.done + 1)
  }
  assert.deepStrictEqual([notes[0]?.done, notes.at(-1)?.done], [0, requests - 1])
}

// --- devices -------------------------------------------------------------------------------------------------------------

/** What a device is given to do, afresh for each run. */
interface Work {
  readonly config: Partial<GuestConfigInput>
  /** The host's part: done before the guest runs, its fibers interrupted when it has ended. */
  readonly host?: (guest: Guest) => Effect.Effect<unknown, GuestError, Scope.Scope>
  readonly devices?: typeof layerDevices
  /** Looks at what the host has got in the end. Throws if that is wrong. */
  readonly ended?: (guest: Guest) => Effect.Effect<unknown, GuestError>
}

interface Subject {
  readonly device: string
  /** The name of the driver in the guest, what follows it in the word, and how many requests it does. */
  readonly driver: string
  readonly port?: number
  readonly requests: number
  readonly places: ReadonlyArray<DeviceDefects.DefectPlace>
  readonly work: (defects: DeviceDefects.DeviceDefects, requests: number) => Work
}

const DRIVEN: ReadonlyArray<DeviceDefects.DefectPlace> = ["doorbell", "done", "interrupt", "write"]
const SIGNALLED: ReadonlyArray<DeviceDefects.DefectPlace> = [...DRIVEN, "signal"]

const memoryDisk = makeBlockClient(
  "disk",
  () => Effect.sync(() => makeMemoryBackend("memory", new Uint8Array(2 ** 20)))
)

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

const disk = (client: typeof memoryDisk): Partial<GuestConfigInput> => ({
  blockDevices: [{ id: "disk", mode: "READ_WRITE", format: "FILE", client }]
})

const PORT = 9
const MEM_BLOCK = 2 ** 21

const subjects: ReadonlyArray<Subject> = [
  {
    device: "rng0",
    driver: "rng",
    requests: 150,
    places: [...DRIVEN, "host"],
    work: () => ({ config: disk(memoryDisk) })
  },
  {
    device: "block0",
    driver: "blk",
    requests: 150,
    places: [...DRIVEN, "host"],
    work: (defects) => ({ config: disk(breakingDisk(defects)) })
  },
  {
    device: "console0",
    driver: "console",
    requests: 100,
    places: SIGNALLED,
    work: (_, requests) => {
      const notes: Notes = []
      return {
        config: { virtioConsole: true },
        host: (guest) =>
          Effect.flatMap(guest.getConsole, (port) => {
            const note = new Uint8Array(NOTE_SIZE)
            let place = 0
            const echo = (bytes: Uint8Array) =>
              Effect.sync(() => {
                for (const byte of bytes) {
                  note[place++] = byte
                  if (place < NOTE_SIZE) continue
                  place = 0
                  readNote(notes, note)
                }
              }).pipe(Effect.andThen(port.write(bytes)))
            return Effect.forkScoped(Stream.runForEach(port.output, echo))
          }),
        ended: () => Effect.sync(() => checkNotes(notes, requests))
      }
    }
  },
  {
    device: "balloon0",
    driver: "balloon",
    requests: 100,
    places: DRIVEN,
    work: (_, requests) => ({
      config: { virtioBalloon: true },
      ended: (guest) =>
        Effect.map(guest.getBalloonController, (balloon) => {
          const { badRequests, inflatedPages } = balloon.counters()
          assert.strictEqual(badRequests, 0)
          assert.isAtLeast(inflatedPages, requests)
        })
    })
  },
  {
    device: "mem0",
    driver: "mem",
    requests: 60,
    places: SIGNALLED,
    work: () => ({
      config: { virtioMem: true, virtioMemBlockSize: MEM_BLOCK, virtioMemRegionSize: 64 * MEM_BLOCK },
      host: (guest) => Effect.flatMap(guest.getMemController, (memory) => memory.requestSize(64 * MEM_BLOCK))
    })
  },
  {
    device: "net0",
    driver: "net",
    requests: 100,
    places: SIGNALLED,
    work: (_, requests) => {
      const notes: Notes = []
      const network = NetStreams.layer(({ fromGuest, send }) =>
        Stream.runForEach(fromGuest, (frame) =>
          Effect.suspend(() => {
            readNote(notes, frame.subarray(14))
            return send(frame)
          }))
      )
      return {
        config: { defaultNet: true },
        devices: layerDevices.pipe(Layer.provide(network)),
        ended: () => Effect.sync(() => checkNotes(notes, requests))
      }
    }
  },
  {
    device: "vsock0",
    driver: "vsock",
    port: PORT,
    requests: 40,
    places: SIGNALLED,
    work: (_, requests) => {
      const notes: Notes = []
      return {
        config: {
          virtioVsock: true,
          vsockListeners: [{
            port: PORT,
            acceptor: () =>
              Effect.succeed((socket) => {
                const note = new Uint8Array(NOTE_SIZE)
                let place = 0
                return Stream.runForEach(socket.input, (bytes) =>
                  Effect.suspend(() => {
                    note.set(bytes, place)
                    place += bytes.length
                    if (place === NOTE_SIZE) readNote(notes, note)
                    return socket.write(bytes)
                  })).pipe(Effect.ignore)
              })
          }]
        },
        ended: () => Effect.sync(() => checkNotes(notes, requests))
      }
    }
  }
]

// --- runs ----------------------------------------------------------------------------------------------------------------

interface Outcome {
  readonly exit: Exit.Exit<GuestStop, GuestError>
  readonly lines: ReadonlyArray<string>
  /** Throws if the host has got something wrong. */
  readonly ended: Effect.Effect<unknown, GuestError>
}

/** Runs the guest with a device that breaks as planned. */
const runGuest = (
  { device: subject, driver, port, requests, work: makeWork }: Subject,
  defects: DeviceDefects.DeviceDefects,
  policy: DevicePolicy,
  machine: Partial<GuestConfigInput> = {}
) => {
  const work = makeWork(defects, requests)
  const word = `${driver}=endure${port === undefined ? "" : `,${port}`},${requests}`
  return Effect.gen(function*() {
    const lifecycle = yield* GuestLifecycle
    yield* lifecycle.create({
      kernelType: "LINUX",
      kernel: fromPath(ELF),
      cmdline: `quiet ${machine.virtioPackedRing === true ? "packed" : "split"} smp ${word} say=after`,
      cpus: 1,
      guestMemory: "32M",
      virtioRng: true,
      ...machine,
      ...work.config
    })
    const guest = yield* lifecycle.bind
    const serial = yield* guest.getSerial
    yield* work.host?.(guest) ?? Effect.void
    const exit = yield* Effect.exit(lifecycle.run)
    const lines = serial.log().map((line) => line.replace("troupe-guest: ", ""))
    return { exit, lines, ended: work.ended?.(guest) ?? Effect.void }
  }).pipe(Effect.provide(
    GuestLifecycle.layer.pipe(
      Layer.provide(
        DeviceDefects.layer((device) =>
          device.name === subject ? { ...DeviceDefects.breaking(device, defects), policy } : device
        )
      ),
      Layer.provide(layerVsock.pipe(Layer.provide(VsockManager.layer), Layer.provide(work.devices ?? layerDevices))),
      Layer.provide(Layer.succeed(EntropySource, {
        fill: (bytes) => {
          if (subject === "rng0") defects.reach("host")
          bytes.fill(0x11)
        }
      })),
      Layer.provide(KvmGuestLifecycle.layerHypervisor()),
      Layer.merge(Logger.layer([]))
    )
  ))
}

const MACHINES = [
  { cpus: 1, virtioTransport: "mmio", virtioPackedRing: false },
  { cpus: 2, virtioTransport: "mmio", virtioPackedRing: true },
  { cpus: 2, virtioTransport: "pci", virtioPackedRing: false }
] as const

/** Never gives up within a test, and loses no time. */
const persistent: DevicePolicy = { _tag: "restart", schedule: Schedule.spaced("1 millis") }

/** Long enough for a host that does ten other things: nothing here waits for a clock. */
const PATIENCE = 300_000

describe.skipIf(kvmObstacle !== undefined).each(subjects)(onKvm("a device that fails: $device"), (subject) => {
  it.live.each(MACHINES)(
    "is started again, and its driver's work goes on: $cpus vCPU, $virtioTransport, packed $virtioPackedRing",
    (machine) =>
      Effect.gen(function*() {
        for (const place of subject.places) {
          // At one kind of point, less and less often: sooner or later the driver's start, which has tens of them, succeeds.
          let reached = 0
          let next = 11
          const defects: DeviceDefects.DeviceDefects = new DeviceDefects.DeviceDefects((_, at) => {
            if (at !== place || ++reached !== next) return false
            next += 97 + next % 17 + 32 * defects.defects
            return true
          })
          const { ended, exit, lines }: Outcome = yield* runGuest(subject, defects, persistent, machine)
          const told: string = `${place}: ${lines.join("\n")}`
          assert.deepStrictEqual(exit, Exit.succeed({ _tag: "PowerOff" }), told)
          const line = new RegExp(
            `^${subject.driver} endure ${subject.requests} requests (\\d+) resets (\\d+) beside ok$`
          )
          const match = lines.flatMap((text) => line.exec(text) ?? [])
          assert.lengthOf(match, 3, told)
          const [, resets, beside] = match.map(Number)
          assert.isAbove(defects.defects, 0, place)
          assert.isAtMost(resets ?? 0, defects.defects)
          assert.strictEqual(beside, resets)
          yield* ended
          assert.include(lines, "say after")
        }
      }),
    PATIENCE
  )

  it.live.each(["mmio", "pci"] as const)(
    "ends the machine with a typed error where it is not to be started again, or fails again and again, behind virtio-%s",
    (virtioTransport) =>
      Effect.gen(function*() {
        const policies = [[{ _tag: "escalate" }, 1], [restartPolicy({ delay: "1 millis", times: 3 }), 4]] as const
        for (const [policy, starts] of policies) {
          const defects = new DeviceDefects.DeviceDefects((_, place) => place === "doorbell")
          const { exit } = yield* runGuest(subject, defects, policy, { virtioTransport })
          const error = Exit.findErrorOption(exit)
          if (error._tag === "None") return assert.fail("the machine should have ended")
          assert.strictEqual(error.value.reason._tag, "VCPU_RUNTIME_FAILURE")
          assert.strictEqual(error.value.reason.device, subject.device)
          assert.include(error.value.message, "broken on purpose")
          assert.strictEqual(defects.defects, starts)
        }
      }),
    PATIENCE
  )
})
