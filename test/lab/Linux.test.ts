// An unmodified distribution kernel under `troupe run`, on an ordinary KVM: the host's own, or the nested lab's.
import { afterAll, assert, beforeAll, describe, it, type TestContext } from "vitest"
import { watched } from "../../scripts/lab/ExitWatch.ts"
import type { LabResult } from "../../scripts/lab/Lab.ts"
import type { LinuxGuest, LinuxOutcome, LinuxRunner } from "../../scripts/lab/LinuxRunner.ts"
import { missingForLinux, openLinuxRunner } from "../../scripts/lab/LinuxRunner.ts"
import { TROUPE_SOURCE } from "../../scripts/lab/TroupeCommand.ts"

/** Exit codes of `troupe run`. */
const POWER_OFF = 0
const RESET = 32
const PANIC = 34
const TRIPLE_FAULT = 35

const whyNot = await missingForLinux()
const title = "unmodified Linux"
if (whyNot !== undefined) console.warn(`SKIPPED: ${title}: ${whyNot}`)

describe.skipIf(whyNot !== undefined)(whyNot === undefined ? title : `${title} (skipped: ${whyNot})`, () => {
  let runner: LinuxRunner

  beforeAll(async () => {
    runner = await openLinuxRunner({ name: "test" })
    process.stderr.write(`- guests run ${runner.where}\n`)
  })

  afterAll(async () => {
    await runner?.[Symbol.asyncDispose]()
  })

  /** Runs a guest; all that it printed is part of what a failed assertion says. */
  const boot = async (guest: LinuxGuest): Promise<LinuxOutcome> => {
    const outcome = await runner.run(guest)
    // A sign of life: the test runner itself prints nothing until all of this file is done.
    process.stderr.write(
      `- ${guest.action}, ${guest.image}, ${guest.cpus ?? 1} vCPU: ${outcome.seconds.toFixed(1)} s\n`
    )
    assert.isTrue(
      outcome.report.has("uname"),
      `the guest did not reach its userspace: exit code ${outcome.code}, ${outcome.seconds} s, output:\n${outcome.output}`
    )
    return outcome
  }

  const expectReport = (guest: LinuxGuest, { cmdline, output, report }: LinuxOutcome): void => {
    assert.include(report.get("uname"), `Linux (none) ${runner.kernel.release} `)
    assert.strictEqual(report.get("cpus"), String(guest.cpus ?? 1), output)
    assert.strictEqual(report.get("cmdline"), cmdline)
    const kibibytes = Number(/^(\d+) kB$/.exec(report.get("memory") ?? "")?.[1])
    const given = (guest.memory ?? 512) * 1024
    // The kernel keeps some for itself before it counts.
    assert.isAtMost(kibibytes, given)
    assert.isAtLeast(kibibytes, given - 96 * 1024)
  }

  const images = [
    { name: "bzImage, 64-bit Linux entry", image: "bzImage", bootProtocol: "auto" },
    { name: "ELF, PVH entry", image: "vmlinux", bootProtocol: "pvh" }
  ] as const
  for (const { bootProtocol, image, name } of images) {
    for (const cpus of [1, 2]) {
      it(`${name}, ${cpus} vCPU${cpus === 1 ? "" : "s"}: reaches userspace and powers off through ACPI`, async () => {
        const guest: LinuxGuest = { action: "poweroff", image, bootProtocol, cpus, memory: cpus === 1 ? 512 : 768 }
        const outcome = await boot(guest)
        expectReport(guest, outcome)
        assert.strictEqual(outcome.code, POWER_OFF, outcome.output)
      })
    }
  }

  it("ELF, 64-bit Linux entry: reaches userspace and powers off through ACPI", async () => {
    const guest: LinuxGuest = { action: "poweroff", image: "vmlinux", bootProtocol: "linux64" }
    const outcome = await boot(guest)
    expectReport(guest, outcome)
    assert.strictEqual(outcome.code, POWER_OFF, outcome.output)
  })

  it("a reboot ends with its own outcome", async () => {
    const outcome = await boot({ action: "reboot", image: "bzImage" })
    assert.strictEqual(outcome.code, RESET, outcome.output)
  })

  it("a kernel panic ends with its own outcome", async () => {
    const outcome = await boot({ action: "panic", image: "bzImage" })
    assert.include(outcome.output, "Kernel panic - not syncing")
    assert.strictEqual(outcome.code, PANIC, outcome.output)
  })

  it("the kernel's own drivers find the entropy device through ACPI and read from it", async () => {
    const { code, output, report } = await boot({ action: "rng", image: "vmlinux" })
    // Virtio 1.2, section 5.4: device type 4; section 2.1: ACKNOWLEDGE, DRIVER, FEATURES_OK and DRIVER_OK.
    assert.match(report.get("virtio") ?? "", /^virtio0 0x0004 0x0000000f$/, output)
    assert.strictEqual(report.get("rng-current"), "virtio_rng.0")
    const bytes = report.get("hwrng") ?? ""
    assert.match(bytes, /^[0-9a-f]{32}$/, output)
    assert.notMatch(bytes, /^(..)\1{15}$/, "16 equal bytes are no entropy")
    const interrupts = /^\d+:\s+(\d+) /.exec(report.get("interrupts") ?? "")?.[1]
    assert.isAtLeast(Number(interrupts), 1, output)
    assert.strictEqual(code, POWER_OFF, output)
  })

  describe("the KVM of the lab", () => {
    /** Runs the command in the lab; on a host that needs none, the kvm tier does the same on the host's own KVM. */
    const inLab = async (context: TestContext, args: string): Promise<LabResult> => {
      if (runner.lab === undefined) return context.skip("the host's own KVM boots Linux: the kvm tier runs this there")
      return runner.lab.run({ script: watched(`node ${TROUPE_SOURCE} ${args}`) })
    }

    it("runs the small guest, with its second processor, timer and entropy device", async (context) => {
      const guest = "--kernel test/guest/troupe-guest.elf --cpus 2 --memory 64M"
      const { code, output } = await inLab(context, `run ${guest} --cmdline "smp timer rng poweroff"`)
      for (const line of ["smp 2 of 2 up", "rng ok", "poweroff"]) assert.include(output, `troupe-guest: ${line}`)
      assert.strictEqual(code, POWER_OFF, output)
    })

    it("says what a guest did last whose processor shut down", async (context) => {
      const guest = "--kernel test/guest/troupe-guest.elf --memory 64M"
      const { code, output } = await inLab(context, `run ${guest} --cmdline "triplefault"`)
      assert.strictEqual(code, TRIPLE_FAULT, output)
      assert.match(output, /kvm_exit: .* reason shutdown rip 0x/)
    })
  })
})
