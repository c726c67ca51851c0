/** Disks on a real KVM, driven by the small guest: what it writes is on the host's file, and what a disk refuses is an error and no more. */
import { assert, describe, it } from "@effect/vitest"
import { type GuestConfigInput, GuestLifecycle } from "@troupe/core"
import { blockClientFromBytes } from "@troupe/core/BlockClient"
import { fromPath, KvmGuestLifecycle } from "@troupe/node"
import * as BlockFile from "@troupe/node/BlockFile"
import { Effect } from "effect"
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { kvmObstacle, onKvm } from "./support.ts"

const ELF = fileURLToPath(new URL("../guest/troupe-guest.elf", import.meta.url))
const SECTOR = 512
const SECTORS = 4096
const SEED = 7

type Disk = NonNullable<GuestConfigInput["blockDevices"]>[number]

/** The bytes of sectors that have the guest's pattern (see test/guest/README.md). */
const pattern = (sector: number, sectors: number, seed = SEED): Uint8Array => {
  const first = (sector * SECTOR) / 4
  return new Uint8Array(
    Uint32Array.from({ length: (sectors * SECTOR) / 4 }, (_, i) => Math.imul(first + i + seed, 2654435761)).buffer
  )
}

/** The sum of bytes as the guest makes it. */
const sum = (bytes: Uint8Array): string => {
  const words = new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4)
  let total = 0
  for (const word of words) total = ((total << 1 | total >>> 31) + word) >>> 0
  return `0x${total.toString(16)}`
}

const temporaryFile = Effect.acquireRelease(
  Effect.sync(() => {
    const directory = mkdtempSync(join(tmpdir(), "troupe-disk-"))
    const path = join(directory, "disk.img")
    writeFileSync(path, new Uint8Array(SECTORS * SECTOR))
    return { directory, path }
  }),
  ({ directory }) => Effect.sync(() => rmSync(directory, { recursive: true }))
)

interface Machine {
  readonly cpus: number
  readonly virtioTransport: "mmio" | "pci"
  readonly virtioPackedRing: boolean
}

const MACHINES: ReadonlyArray<Machine> = [
  { cpus: 1, virtioTransport: "mmio", virtioPackedRing: false },
  { cpus: 2, virtioTransport: "mmio", virtioPackedRing: true },
  { cpus: 2, virtioTransport: "pci", virtioPackedRing: false },
  { cpus: 1, virtioTransport: "pci", virtioPackedRing: true }
]
const SMALL: Machine = { cpus: 1, virtioTransport: "mmio", virtioPackedRing: false }

const runGuest = Effect.fnUntraced(function*(cmdline: string, disks: ReadonlyArray<Disk>, machine = SMALL) {
  const lifecycle = yield* GuestLifecycle
  yield* lifecycle.create({
    kernelType: "LINUX",
    kernel: fromPath(ELF),
    cmdline: `quiet ${machine.virtioPackedRing ? "packed" : "split"} ${cmdline}`,
    ...machine,
    guestMemory: "32M",
    blockDevices: disks
  })
  const serial = yield* (yield* lifecycle.bind).getSerial
  assert.deepStrictEqual(yield* lifecycle.run, { _tag: "PowerOff" })
  return serial.log().map((line) => line.replace("troupe-guest: ", ""))
})

describe.skipIf(kvmObstacle !== undefined)(onKvm("disks of the small guest"), () => {
  it.layer(KvmGuestLifecycle.layer, { excludeTestServices: true, timeout: 60_000 })((it) => {
    it.effect.each(MACHINES)(
      "are what it writes, byte for byte, at any depth and request size: $cpus vCPU, $virtioTransport, packed $virtioPackedRing",
      (machine) =>
        Effect.gen(function*() {
          const { path } = yield* temporaryFile
          const disk: Disk = { id: "a-disk", mode: "READ_WRITE", format: "FILE", client: BlockFile.fromPath(path) }
          const words = [1, 4, 64].flatMap((depth, i) => {
            const sector = 256 * i
            return [
              `depth=${depth}`,
              `blk=write,${sector},128,${SEED}`,
              `blk=write,${sector + 128},128,${SEED},65536`,
              `blk=verify,${sector},256,${SEED},512`,
              `blk=rand-read,1000`,
              `blk=read,${sector},256`
            ]
          })
          const lines = yield* runGuest(`smp blk ${words.join(" ")} blk=flush`, [disk], machine)
          assert.include(lines, `blk capacity ${SECTORS} sectors`)
          assert.include(lines, "blk id a-disk")
          assert.include(lines, "blk flush ok")
          assert.strictEqual(
            lines.filter((line) => line.startsWith("blk bench") && line.endsWith(" errors=0")).length,
            3
          )
          assert.strictEqual(lines.filter((line) => line === "blk verify 256 sectors ok").length, 3)
          for (const sector of [0, 256, 512]) {
            assert.include(lines, `blk read 256 sectors sum ${sum(pattern(sector, 256))}`)
          }
          const written = readFileSync(path)
          assert.deepStrictEqual(new Uint8Array(written.subarray(0, 768 * SECTOR)), pattern(0, 768))
          assert.isTrue(written.subarray(768 * SECTOR).every((byte) => byte === 0))
        })
    )

    it.effect("read as zero where it discarded, or wrote zeros, and take no room there", () =>
      Effect.gen(function*() {
        const { path } = yield* temporaryFile
        const disk: Disk = { id: "a-disk", mode: "READ_WRITE", format: "FILE", client: BlockFile.fromPath(path) }
        const lines = yield* runGuest(
          `blk=write,0,2048,${SEED} blk=discard,0,1024 blk=zero,1024,256 blk=zero,1280,256,1 blk=read,0,1536 blk=verify,1536,512,${SEED} blk=flush`,
          [disk]
        )
        assert.include(lines, "blk discard ok")
        assert.strictEqual(lines.filter((line) => line === "blk zero ok").length, 2)
        assert.include(lines, "blk read 1536 sectors sum 0x0")
        assert.include(lines, "blk verify 512 sectors ok")
        assert.isTrue(readFileSync(path).subarray(0, 1536 * SECTOR).every((byte) => byte === 0))
        // Zeros that must stay allocated keep their room.
        assert.isAtMost(statSync(path).blocks, SECTORS - 1024 - 256)
        assert.isAtLeast(statSync(path).blocks, SECTORS - 1024 - 512)
      }))

    it.effect("refuse what is beyond their end, and writes where they are read-only", () =>
      Effect.gen(function*() {
        const bytes = pattern(0, 64)
        const lines = yield* runGuest(
          [
            `blk blk=verify,0,64,${SEED} blk=write,0,8,1 blk=verify,0,64,${SEED}`,
            `disk=1 blk=read,60,8 blk=write,64,8,1 blk=discard,60,8 blk=verify,0,64,${SEED}`
          ].join(" "),
          [
            { id: "read-only", mode: "READ_ONLY", format: "FILE", client: blockClientFromBytes("one", bytes.slice()) },
            { id: "short", mode: "READ_WRITE", format: "FILE", client: blockClientFromBytes("two", bytes.slice()) }
          ]
        )
        assert.deepStrictEqual(lines.filter((line) => /capacity|verify|failed/.test(line)), [
          "blk capacity 64 sectors read-only",
          "blk verify 64 sectors ok",
          "blk write failed status 1",
          "blk verify 64 sectors ok",
          "blk read failed status 1",
          "blk write failed status 1",
          "blk discard failed status 1",
          "blk verify 64 sectors ok"
        ])
      }))

    it.effect("keep volatile writes from the file", () =>
      Effect.gen(function*() {
        const { path } = yield* temporaryFile
        const lines = yield* runGuest(
          `blk=write,0,512,${SEED} blk=verify,0,512,${SEED}`,
          [{ id: "volatile", mode: "VOLATILE_WRITE", format: "FILE", client: BlockFile.fromPath(path) }]
        )
        assert.include(lines, "blk verify 512 sectors ok")
        assert.isTrue(readFileSync(path).every((byte) => byte === 0))
      }))
  })
})
