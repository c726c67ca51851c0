/** An unmodified Linux with its devices on PCI: its own `virtio_pci` finds them, sets MSI-X up and drives them. */
import { KvmGuestLifecycle } from "@troupe/node"
import * as Effect from "effect/Effect"
import * as assert from "node:assert"
import { runHost, startLinux } from "./LinuxHost.ts"

const program = Effect.gen(function*() {
  const { attempt, end, run, step } = yield* startLinux({ virtioRng: true, virtioTransport: "pci", cpus: 2 })
  const device = "/sys/bus/pci/devices/0000:00:00.1"

  const enumeration = Effect.gen(function*() {
    const messages = yield* run("dmesg | grep -i pci")
    // The kernel believes the MCFG table because ACPI reserves the pages, and takes windows and addresses as they are.
    assert.match(messages, /MMCONFIG at \[mem 0xe0000000-0xe00fffff\] reserved in ACPI motherboard resources/)
    assert.match(messages, /root bus resource \[mem 0xe1000000-0xe2ffffff window\]/)
    for (
      const wrong of [/can't claim/, /error updating/, /no compatible bridge window/, /virtio_pci.*(leaving|failed)/]
    ) {
      assert.doesNotMatch(messages, wrong)
    }
    const functions = (yield* run("cat /proc/bus/pci/devices")).trim().split("\n").map((line) => line.split(/\s+/))
    assert.deepStrictEqual(functions.map(([place, identity]) => `${place} ${identity}`), [
      "0000 1b360008",
      "0001 1af41044"
    ])
    assert.strictEqual(yield* run(`cat ${device}/vendor ${device}/device ${device}/enable`), "0x1af4\n0x1044\n1")
    assert.match(yield* run(`readlink ${device}/driver`), /\/virtio-pci$/)
  })

  const interrupts = Effect.gen(function*() {
    const lines = (yield* run("grep virtio0 /proc/interrupts")).split("\n")
    assert.deepStrictEqual(lines.map((line) => line.trim().split(/\s+/).at(-1)), ["virtio0-config", "virtio0-input"])
    for (const line of lines) assert.match(line, /PCI-MSI/)
    const counts = lines.map((line) =>
      line.trim().split(/\s+/).slice(1, 3).reduce((sum, count) => sum + Number(count), 0)
    )
    return counts[1] ?? 0
  })

  yield* step("enumeration", enumeration)
  yield* step(
    "entropy",
    Effect.gen(function*() {
      assert.strictEqual(yield* run("cat /sys/class/misc/hw_random/rng_current"), "virtio_rng.0")
      assert.strictEqual(yield* run("cat /sys/bus/virtio/devices/virtio0/status"), "0x0000000f")
      const before = yield* interrupts
      const sums = yield* run("for i in 1 2 3 4; do dd if=/dev/hwrng bs=512 count=1 2>/dev/null | md5sum; done")
      assert.strictEqual(new Set(sums.split("\n")).size, 4)
      assert.ok((yield* interrupts) > before)
    })
  )
  // The kernel moves a vector to another processor: it masks it, writes its message, unmasks it.
  yield* step(
    "move",
    Effect.gen(function*() {
      for (const cpu of [1, 0]) {
        const [number = ""] = (yield* run("grep virtio0-input /proc/interrupts")).trim().split(":")
        yield* run(`echo ${1 << cpu} > /proc/irq/${number}/smp_affinity`)
        const count = Effect.map(
          run("grep virtio0-input /proc/interrupts"),
          (line) => Number(line.trim().split(/\s+/)[1 + cpu])
        )
        const before = yield* count
        yield* run("dd if=/dev/hwrng bs=512 count=1 2>/dev/null | md5sum")
        assert.ok((yield* count) > before, `no interrupt reached processor ${cpu}`)
      }
    })
  )
  // The driver resets the device when it lets go of it, and sets it up anew when it takes it again.
  yield* step(
    "again",
    Effect.gen(function*() {
      yield* run("echo 0000:00:00.1 > /sys/bus/pci/drivers/virtio-pci/unbind")
      assert.strictEqual(yield* run("ls /sys/bus/virtio/devices"), "")
      yield* run("echo 0000:00:00.1 > /sys/bus/pci/drivers/virtio-pci/bind")
      assert.match(yield* run("dd if=/dev/hwrng bs=16 count=1 2>/dev/null | md5sum"), /^[0-9a-f]{32} /)
      assert.ok((yield* interrupts) > 0)
    })
  )
  yield* step(
    "poweroff",
    Effect.gen(function*() {
      yield* Effect.forkScoped(Effect.ignore(attempt("poweroff -f")))
      assert.deepStrictEqual(yield* end, { _tag: "PowerOff" })
    })
  )
})

runHost(program, KvmGuestLifecycle.layer)
